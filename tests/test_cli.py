import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from lightning.pytorch import Callback
from typer.testing import CliRunner

import histovar as hv
from histovar.cli import app
from histovar.cli.option_names import Option, with_options
from histovar.cli.predict import Decoding as DecodingChoice
from histovar.cli.predict import Precision as PrecisionChoice
from histovar.cli.predict import Units as UnitsChoice
from histovar.model.card import content_digest
from histovar.model.decoding import Mode
from histovar.model.network import Precision
from histovar.model.observation import Units

from .conftest import QUICK

pytestmark = pytest.mark.usefixtures("brief")


PROGRAM = [sys.executable, "-c", "from histovar.cli import main; main()"]


def own_line(text):
    return [line for line in text.splitlines() if line.startswith("histovar: ")]


@pytest.fixture
def hest_layout(simulated, tmp_path):
    for name in ("S1", "S2", "S3"):
        part = simulated[simulated.obs["section"] == name].copy()
        (tmp_path / "PRAD" / "st").mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(part.obsm["X_histology"]), tmp_path / "PRAD" / f"{name}_uni.pt")
        del part.obsm["X_histology"]
        part.write_h5ad(tmp_path / "PRAD" / "st" / f"{name}.h5ad")
    return tmp_path


def test_the_reference_command_lines(histovar, hest_layout, query, tmp_path):
    common = ["--model", "TWO_STAGE_VAR_ST", "--n-genes", 30, "--data-dir", hest_layout]
    embeddings = {f: f.read_bytes() for f in (hest_layout / "PRAD").glob("*.pt")}
    for file in embeddings:
        file.unlink()
    first = ["train", "--dataset", "PRAD", "--training_stage", 1, "--epochs", 1, "--batch_size", 64, "--gpus", 0]
    code, out, error = histovar(*first, *common, "--out", "one")
    assert code == 0 and out.endswith("model written to one\n"), error
    for file, content in embeddings.items():
        file.write_bytes(content)
    second = [
        "train",
        "--dataset",
        "PRAD",
        "--training-stage",
        2,
        "--stage1_ckpt",
        "one",
        "--epochs",
        1,
        "--batch-size",
        64,
    ]
    code, out, error = histovar(*second, *common, "--out", "two")
    assert code == 0 and out.endswith("model written to two\n"), error

    query.obsm["X_uni"] = query.obsm["X_histology"]
    query.write_h5ad(tmp_path / "query.h5ad")
    assert histovar("predict", "query.h5ad", "--model", "two", "--out", "out.h5ad")[0] == 0
    made = ad.read_h5ad(tmp_path / "out.h5ad")
    model = hv.TwoStageVARST.load(tmp_path / "two")
    hv.tl.predict(query, model)
    assert (hv.get.prediction(made).X == hv.get.prediction(query).X).all()
    code, out, _ = histovar("evaluate", "out.h5ad", "--out", "scores.csv")
    assert code == 0 and "PCC-10" in out and (tmp_path / "scores.csv").is_file()
    # Once as users do, in a process of its own.
    info = subprocess.run([*PROGRAM, "info", "two"], capture_output=True, text=True, cwd=tmp_path, check=False)
    code, out = info.returncode, info.stdout
    assert (
        code == 0
        and "log1p(counts per 10,000)" in out
        and "X_uni (16 numbers)" in out
        and "Learnt from  counts\n" in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.h5ad"], "no model directory"),
        (["info", "absent"], "no model directory"),
        (["describe", "absent", "--tissue", "breast"], "no model directory"),
        (["describe", "absent"], "give --tissue, --species or --licence"),
        (["describe", "hf://lab/breast", "--tissue", "breast"], "'hf://lab/breast' is on the hub"),
        (["evaluate", "absent.h5ad"], "no file 'absent.h5ad'"),
        (["train"], "give either input files (.h5ad, .zarr) or --dataset"),
        (["train", "--dataset", "PRAD", "--data-dir", "absent"], "no directory"),
        (["train", "--dataset", "PRAD", "--training_stage", "3"], "training_stage"),
        (["train", "--dataset", "PRAD", "--model", "OTHER"], "--model"),
        (["train", "--colour", "red"], "No such option"),
    ],
)
def test_errors_are_one_line_and_exit_2(histovar, arguments, message):
    code, out, error = histovar(*arguments)
    assert code == 2 and out == ""
    lines = own_line(error)
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there_are_refused_with_the_flag_that_helps(histovar):
    code, _, error = histovar(
        "train", "--dataset", "PRAD", "--model", "TWO_STAGE_VAR_ST", "--training_stage", 1, "--epochs", 150,
        "--batch_size", 256, "--gpus", 1,
    )  # fmt: skip
    assert code == 2 and "use --gpus 0 (the CPU)" in own_line(error)[0]


def test_version_is_printed(histovar):
    code, output, _ = histovar("--version")
    assert code == 0 and output.strip() == hv.__version__


@pytest.mark.parametrize("command", ["train", "predict", "calibrate", "adapt", "evaluate", "describe", "demo", "info"])
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def run_app(*arguments):
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_training_is_that_of_python(training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.layers["mine"] = training.X.log1p()
    training.obsm["xy"] = training.obsm.pop("spatial")
    training.write_h5ad("in.h5ad")
    options = ["--n-genes", 30, "--epochs", 1, "--gpus", 0, "--seed", 3, "--layer", "mine", "--spatial-key", "xy"]
    run_app("train", "in.h5ad", *options, "--covariate", "region", "--key-added", "two", "--out", "new/model")
    ours = hv.TwoStageVARST.load("new/model")
    assert ours.stage2.is_calibrated and ours.registry["calibration"]["sections"] == ["S1", "S2", "S3"]
    assert ours.registry["layer"] == "mine" and list(ours.registry["covariates"]) == ["region"]
    hv.pp.gene_panel(training, n_genes=30, library_key="section", key_added="two")
    theirs = hv.tl.train(
        training, use_rep="X_histology", library_key="section", layer="mine", spatial_key="xy", covariates=["region"],
        key_added="two", random_state=3, max_epochs=1, accelerator="cpu", enable_progress_bar=False,
    )  # fmt: skip
    assert ours.registry == theirs.registry
    for name, values in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], values, equal_nan=True)


def test_training_is_continued(training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training.write_h5ad("in.h5ad")
    command = ["train", "in.h5ad", "--n-genes", 30, "--epochs", 1, "--gpus", 0, "--checkpoint-dir", "kept"]
    run_app(*command, "--out", "one")
    with pytest.raises(ValueError, match="kept"):
        run_app(*command, "--out", "two")
    run_app(*command, "--resume", "--out", "two")
    one, two = (hv.TwoStageVARST.load(path).state_dict() for path in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="--resume needs --checkpoint-dir"):
        run_app("train", "in.h5ad", "--resume")


def test_stage_2_alone_is_calibrated(training, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hv.tl.train_stage1(prepared.copy(), library_key="section", **QUICK).save("one")
    training.write_h5ad("in.h5ad")
    stage2 = ["train", "in.h5ad", "--training-stage", 2, "--stage1-ckpt", "one", "--epochs", 1, "--gpus", 0]
    with pytest.raises(ValueError, match="--n-genes 31: stage 1 was trained on 30 genes"):
        run_app(*stage2, "--out", "two", "--n-genes", 31)
    with pytest.raises(ValueError, match="--layer X: stage 1 was trained on 'lognorm'"):
        run_app(*stage2, "--out", "two", "--layer", "X")
    with pytest.raises(ValueError, match="--out: 'one' is the input 'one' itself"):
        run_app(*stage2, "--out", "one")
    run_app(*stage2, "--out", "two")
    assert hv.TwoStageVARST.load("two").stage2.is_calibrated


@pytest.fixture
def trained(loaded, query, tmp_path, monkeypatch):
    """A directory with a model and a section."""
    monkeypatch.chdir(tmp_path)
    loaded.save("model")
    query.write_h5ad("query.h5ad")
    query.write_zarr("query.zarr")
    return loaded


def test_prediction_and_its_scores_are_those_of_python(trained, query, capsys):
    query.obsm["xy"] = query.obsm["spatial"]
    query.write_h5ad("query.h5ad")
    sampling = ["--n-samples", 3, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--seed", 5]
    wanted = ["--quantile", 0.05, "--quantile", 0.95, "--key-added", "a", "--spatial-key", "xy", "--precision", "bf16"]
    run_app("predict", "query.h5ad", "-m", "model", "-o", "out.h5ad", *sampling, *wanted)
    made = ad.read_h5ad("out.h5ad")
    hv.tl.predict(
        query, trained, n_samples=3, temperature=0.9, top_k=50, top_p=0.95, random_state=5, quantiles=[0.05, 0.95],
        key_added="a", spatial_key="xy", precision="bf16",
    )  # fmt: skip
    for key in ("a_samples", "a_quantiles", "a_tokens"):
        assert (made.obsm[key] == query.obsm[key]).all()
    assert made.uns["a"]["calibrated"]
    capsys.readouterr()
    run_app("evaluate", "out.h5ad", "--key", "a", "--layer", "lognorm", "-o", "scores.csv")
    assert "PCC-10" in capsys.readouterr().out
    scores = hv.tl.evaluate(query, key="a", layer="lognorm")
    assert pd.read_csv("scores.csv", index_col=0)["pearson"].to_numpy() == pytest.approx(scores["pearson"].to_numpy())
    run_app("evaluate", "out.h5ad", "--key", "a", "-o", "scores.csv")  # which is replaced
    run_app("predict", "query.h5ad", "-m", "model", "-o", "out.h5ad", "--decoding", "greedy")
    assert ad.read_h5ad("out.h5ad").uns["histovar"]["params"]["decoding"] == "greedy"


def test_scores_by_individual_are_those_of_python(trained, simulated, histovar, capsys):
    both = simulated[simulated.obs["section"].isin(["S3", "S4"])].copy()
    both.obs["animal"] = both.obs["section"].astype(str).map({"S3": "x", "S4": "y"})
    hv.tl.predict(both, trained)
    both.write_h5ad("both.h5ad")
    run_app("evaluate", "both.h5ad", "--group-key", "animal", "--seed", 3)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["S3", "S4", "mean", "low", "high"]
    hv.tl.evaluate(both, group_key="animal", random_state=3)
    ends = both.uns["histovar"]["evaluation_interval"]["MSE"].tolist()
    (line,) = [line for line in printed if line.startswith("MSE ") and "given" not in line]
    assert [float(x) for x in line.split()[-2:]] == pytest.approx(ends, abs=1e-4)
    assert "--group-key: no 'patient' in obs" in histovar("evaluate", "both.h5ad", "--group-key", "patient")[2]


@pytest.mark.parametrize("depth", ["2500", "total", None])
def test_units_and_depth_are_those_of_python(trained, query, depth, capsys):
    query.obs["total"] = np.asarray(query.X.sum(1)).ravel()
    query.write_h5ad("query.h5ad")
    query.write_zarr("query.zarr")
    options = [] if depth is None else ["--depth", depth]
    hv.tl.predict(query, trained, units="log_counts", depth=2500 if depth == "2500" else depth)
    for name in ("query.h5ad", "query.zarr"):
        out = f"out_{name}"
        run_app("predict", name, "-m", "model", "-o", out, "--units", "log_counts", *options)
        made = ad.read_zarr(out) if out.endswith("zarr") else ad.read_h5ad(out)
        np.testing.assert_allclose(hv.get.prediction(made).X, query.obsm["histovar"], atol=1e-4)
        assert made.uns["histovar"]["units"] == query.uns["histovar"]["units"]
        capsys.readouterr()
    run_app("evaluate", "out_query.h5ad")
    hv.tl.evaluate(query)
    mse = query.uns["histovar"]["evaluation"].loc["S4", "MSE"]
    assert f" {mse:.4f} " in capsys.readouterr().out


def test_info_says_what_a_model_learnt_from(trained, model_of_values, capsys):
    model_of_values.save("of_values")
    model_of_values.save_stage("stage1", 1)
    for path, learnt in (("model", "Learnt from  counts"), ("of_values", "Learnt from  values"), ("stage1", None)):
        run_app("info", path)
        out = capsys.readouterr().out
        assert learnt in out if learnt else "Learnt from" not in out


def test_a_saved_model_is_described_as_from_python(trained, histovar):
    said = ("--tissue", "breast cancer", "--species", "human", "--licence", "cc-by-4.0")
    assert histovar("describe", "model", *said)[0] == 0
    assert histovar("describe", "model", "--species", "", "--licence", "mit")[1] == "description written to model\n"
    trained.describe(tissue="breast cancer", species="human", licence="cc-by-4.0")
    trained.describe(species="", licence="mit")
    described = hv.TwoStageVARST.load("model")
    assert described.registry["description"] == trained.registry["description"]
    assert "| Tissue | breast cancer |" in Path("model/README.md").read_text()
    out = histovar("info", "model")[1]
    assert "Tissue  breast cancer\n" in out and "Licence  mit\n" in out and "Species" not in out


def test_slides_are_predicted_and_scored_as_sections_of_their_own(trained, simulated, histovar):
    for name in ("S1", "S4"):
        part = simulated[simulated.obs["section"] == name].copy()
        del part.obs["section"]
        part.obs_names = [f"AAAC-{i}" for i in range(part.n_obs)]
        part.write_h5ad(f"{name}.h5ad")
    run_app("predict", "S1.h5ad", "S4.h5ad", "-m", "model", "-o", "both.h5ad")
    both = ad.read_h5ad("both.h5ad")
    query = simulated[simulated.obs["section"] == "S4"].copy()
    hv.tl.predict(query, trained)
    ours = both[both.obs["section"] == "S4"].obsm["histovar"]
    assert ours == pytest.approx(query.obsm["histovar"], abs=1e-4)
    for name in ("S1", "S4"):
        run_app("predict", f"{name}.h5ad", "-m", "model", "-o", f"{name}_predicted.zarr")
    run_app("evaluate", "S1_predicted.zarr", "S4_predicted.zarr", "both.h5ad", "-o", "scores.csv")
    run_app("evaluate", "both.h5ad", "-o", "scored.h5ad")
    run_app("report", "both.h5ad", "-o", "both.html")
    run_app("report", "scored.h5ad", "-o", "scored.html")
    reports = [Path(name).read_text() for name in ("both.html", "scored.html")]
    assert ["PCC-all" in report for report in reports] == [False, True]
    run_app("predict", "S4.h5ad", "-m", "model", "-o", "other.h5ad", "--quantile", "0.5")
    assert "'quantiles' differs" in histovar("evaluate", "both.h5ad", "other.h5ad")[2]
    assert "has no prediction 'b'" in histovar("evaluate", "both.h5ad", "--key", "b")[2]


def test_calibration_with_held_out_sections(trained, query):
    before = trained.stage2.observation.dispersion.clone()
    run_app("calibrate", "query.h5ad", "-m", "model", "-o", "calibrated", "--gpus", 0)
    ours = hv.TwoStageVARST.load("calibrated")
    hv.tl.calibrate(query, trained)
    torch.testing.assert_close(ours.stage2.observation.dispersion, trained.stage2.observation.dispersion)
    assert not torch.equal(before, ours.stage2.observation.dispersion)
    run_app("calibrate", "query.h5ad", "-m", "model", "-o", "model")
    assert hv.TwoStageVARST.load("model").registry["calibration"]["sections"] == ["S4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "query.h5ad", "--devices", "0"], "--devices"),
        (["train", "query.h5ad", "--batch-size", "0"], "--batch-size"),
        (["train", "query.h5ad", "--epochs", "0"], "--epochs"),
        (["train", "query.h5ad", "--seed", "-1"], "--seed"),
        (["train", "query.h5ad", "--n-genes", "1"], "--n-genes"),
        (["train", "query.h5ad", "--gpus", "-1"], "--gpus"),
        (["train", "query.h5ad", "--library-key", ""], "--library-key"),
        (["train", "query.h5ad", "--use-rep", ""], "--use-rep"),
        (["train", "query.h5ad", "--stage1-ckpt", "model"], "--stage1-ckpt is for --training-stage 2"),
        (["train", "query.h5ad", "--library-key", "slide"], "no 'slide' in obs of query.h5ad"),
        (["train", "query.h5ad", "--hold-out", "S9"], "no sections ['S9']"),
        (["predict", "query.h5ad", "--n-samples", "1000000"], "--n-samples"),
        (["predict", "query.h5ad", "--quantile", "1.5"], "--quantile"),
        (["predict", "query.h5ad", "--temperature", "0"], "0 is not more than 0"),
        (["predict", "query.h5ad", "--top-p", "0"], "0 is not more than 0"),
        (["predict", "query.h5ad", "--scheduler", "tcp://x"], "--scheduler needs a single .zarr store"),
        (["predict", "query.h5ad", "-m", "model", "--units", "cpm"], "--units"),
        (["predict", "query.h5ad", "-m", "model", "--depth", ""], "--depth"),
        (["predict", "query.h5ad", "-m", "model", "--depth", "0"], "depth: expected a column of obs or a number from"),
        (["predict", "query.zarr", "-m", "model", "-o", "o.zarr", "--depth", "totals"], "depth: no 'totals' in obs"),
        (
            ["predict", "query.h5ad", "-m", "model", "--decoding", "greedy", "--units", "counts"],
            "--units, --depth: only with --decoding 'expected'",
        ),
        (["predict", "notes.txt", "-m", "model"], "'notes.txt' is not AnnData"),
        (["predict", "query.h5ad", "-m", "model", "--quantile", "0.5", "--decoding", "greedy"], "--quantile: "),
        (["demo", "--n-spots", "3"], "--n-spots"),
        (["calibrate", "query.h5ad", "-m", "model"], "--out"),
    ],
)
def test_impossible_options_are_refused_in_one_line(trained, histovar, tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    code, out, error = histovar(*arguments)
    assert code == 2 and out == "" and "Traceback" not in error
    assert len(own_line(error)) == 1 and message in own_line(error)[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.h5ad", "-o", "out.csv"], "--out must end in .h5ad or .zarr"),
        (["predict", "absent.h5ad", "-o", ""], "the path is empty"),
        (["predict", "absent.h5ad", "-o", "folder.h5ad"], "'folder.h5ad' is a directory, but the output is a file"),
        (["predict", "absent.h5ad", "-o", "file.zarr"], "'file.zarr' is a file, but the output is a directory"),
        (["predict", "absent.h5ad", "-o", "notes.txt/out.h5ad"], "notes.txt', which is a file"),
        (["predict", "absent.h5ad", "-o", "link.h5ad"], "'link.h5ad' exists and is not replaced"),
        (["predict", "link.h5ad", "-o", "query.h5ad"], "'query.h5ad' is the input 'link.h5ad' itself"),
        (["predict", "query.zarr", "-o", "query.zarr"], "'query.zarr' is the input 'query.zarr' itself"),
        (["predict", "query.zarr", "-o", "query.zarr/obs/out.zarr"], "lies in the input 'query.zarr'"),
        (["predict", "query.h5ad", "-m", "model", "-o", "model/out.h5ad"], "lies in the input 'model'"),
        (["predict", "folder.h5ad/q.zarr", "-o", "../."], "--out must end in"),
        (["predict", "query.h5ad", "-m", "model", "-o", "query.zarr"], "it holds no prediction of histovar"),
        (["predict", "query.h5ad", "-m", "model", "-o", "/proc/out.h5ad"], "'/proc/out.h5ad' cannot be written"),
        (["train", "absent.h5ad", "-o", "notes.txt"], "'notes.txt' is a file, but the output is a directory"),
        (["train", "absent.h5ad", "-o", "mine"], "'mine' exists and is not replaced"),
        (["train", "absent.h5ad", "-o", "out.h5ad"], "must not end in .h5ad"),
        (["train", "mine/in.h5ad", "-o", "mine"], "'mine' contains the input 'mine/in.h5ad'"),
        (["train", "--dataset", "mine", "-o", "mine/model"], "lies in the input 'mine'"),
        (["evaluate", "absent.h5ad", "-o", "out.tsv"], "--out must end in .csv"),
        (["evaluate", "absent.h5ad", "-o", "mine/table.csv"], "it is not a table of scores"),
        (["demo", "-o", "mine"], "'mine' exists and is not replaced"),
        (["calibrate", "absent.h5ad", "-m", "model", "-o", "model/new"], "lies in the input 'model'"),
    ],
)
def test_outputs_are_checked_before_any_work(trained, histovar, tmp_path, arguments, message):
    (tmp_path / "folder.h5ad").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "link.h5ad").symlink_to("query.h5ad")
    for name, text in (("file.zarr", ""), ("notes.txt", "mine"), ("mine/table.csv", "gene,pearson\n")):
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    code, out, error = histovar(*arguments)
    assert code == 2 and out == ""
    assert len(own_line(error)) == 1 and message in own_line(error)[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_embedding_is_guessed_only_where_there_is_one(histovar, training, tmp_path):
    training.obsm["X_uni"] = training.obsm["X_histology"]
    training.write_h5ad(tmp_path / "in.h5ad")
    assert "['X_histology', 'X_uni']; say which to use with --use-rep KEY" in " ".join(
        own_line(histovar("train", "in.h5ad")[2])
    )
    del training.obsm["X_uni"], training.obsm["X_histology"]
    training.write_h5ad(tmp_path / "in.h5ad")
    assert "--use-rep: no embeddings found" in histovar("train", "in.h5ad")[2]


def test_a_panel_of_another_number_is_refused(histovar, prepared, tmp_path):
    prepared.write_h5ad(tmp_path / "in.h5ad")
    (line,) = own_line(histovar("train", "in.h5ad", "--n-genes", "20")[2])
    assert "--n-genes 20: the file already has a panel of 30 genes in var['histovar_panel']" in line


def test_a_model_card_cannot_send_control_characters_to_the_terminal(trained, capsys):
    card = json.loads(Path("model/model.json").read_text())
    card["registry"]["units"] = "\x1b]0;owned\x07\n\u202e"
    Path("model/model.json").write_text(json.dumps(card | {"sha256": content_digest(card)}))
    run_app("info", "model")
    out = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\n\\u202e" in out and all(c.isprintable() for c in out.replace("\n", ""))
    Path("model/model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="model.json"):
        run_app("info", "model")


def test_choices_are_those_of_python():
    for ours, theirs in ((DecodingChoice, Mode), (PrecisionChoice, Precision), (UnitsChoice, Units)):
        assert set(ours) == set(get_args(theirs))


def test_interrupted_training_says_so(tmp_path):
    command = [*PROGRAM, "demo", "--n-spots", "2000"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = ""
    while "gene scales" not in log:  # what comes next is training
        line = running.stderr.readline()
        assert line, log
        log += line
    running.send_signal(signal.SIGINT)
    out, error = running.communicate(timeout=120)
    assert running.returncode == 130 and out == "" and own_line(error) == ["histovar: interrupted"]


def test_torch_is_imported_after_its_threads_are_told_to_sleep():
    code = "import sys, histovar.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lightning_does_not_swallow_ctrl_c(prepared):
    class Interrupt(Callback):
        def on_train_batch_end(self, *arguments):
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        hv.tl.train_stage1(prepared.copy(), callbacks=[Interrupt()], **QUICK)
    assert signal.getsignal(signal.SIGINT) is handler


def test_messages_name_options_not_arguments(histovar, tmp_path):
    pixels = np.full((300, 300, 3), 160, dtype=np.uint8)
    tifffile.imwrite(tmp_path / "unknown.tif", pixels, tile=(256, 256), photometric="rgb")
    code, _, error = histovar("tile", "unknown.tif")
    assert code == 2 and error.startswith("histovar: --mpp: ") and "pass --mpp, such as" in error
    code, _, error = histovar("info", "absent")
    assert code == 2 and error.startswith("histovar: MODEL: ")
    code, _, error = histovar("train", "absent.h5ad", "--training-stage", "2", "--stage1-ckpt", "absent")
    assert code == 2 and "--model" not in error
    code, _, error = histovar("predict", "absent.h5ad", "--model", "absent")
    assert code == 2 and error.startswith("histovar: --model: ")


@pytest.mark.parametrize(
    "message, expected",
    [
        ("mpp: unknown; pass mpp=", "--mpp: unknown; pass --mpp"),
        ("give layer='counts' or tokens=False", "give --layer 'counts' or --no-tokens"),
        ("call histovar.tl.train(adata, layer='x') first", "call histovar.tl.train(adata, layer='x') first"),
        ("individuals are not named (layer=)", "individuals are not named (--layer)"),
        ("var: no layer: nothing", "var: no layer: nothing"),
        ("layer, mpp: only with layer='a'; layer= too", "--layer, --mpp: only with --layer 'a'; --layer too"),
        ("no file '/data/layer=A1/mpp=2.tif'", "no file '/data/layer=A1/mpp=2.tif'"),
        ("the patient's config.layer=2", "the patient's config.layer=2"),
        ("give layer={'A1': 1}", "give layer={'A1': 1}"),
    ],
)
def test_options_of_messages(message, expected):
    options = {"mpp": Option("--mpp", "--mpp"), "layer": Option("--layer", "--layer")}
    options["tokens"] = Option("--tokens", "--no-tokens")
    assert with_options(message, options) == expected
