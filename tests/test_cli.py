import logging
import subprocess
import sys

import anndata as ad
import pytest
import torch
from typer.testing import CliRunner

import histovar as hv
from histovar.cli import app, main


@pytest.fixture
def histovar(tmp_path):
    """Run the program as users do: exit code, standard output, standard error."""

    def run(*arguments):
        command = [sys.executable, "-c", "from histovar.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """The same in this process, quicker, for commands that are refused."""
    package = logging.getLogger("histovar")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "level", package.level)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["histovar", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


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
    code, out, _ = histovar("info", "two")
    assert code == 0 and "log1p(counts per 10,000)" in out and "'X_uni': 16" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "absent.h5ad"], "no model directory"),
        (["info", "absent"], "no model directory"),
        (["evaluate", "absent.h5ad"], "no file 'absent.h5ad'"),
        (["train"], "give .h5ad files or --dataset"),
        (["train", "--dataset", "PRAD", "--data-dir", "absent"], "no directory"),
        (["train", "--dataset", "PRAD", "--training_stage", "3"], "training_stage"),
        (["train", "--dataset", "PRAD", "--model", "OTHER"], "--model"),
        (["train", "--colour", "red"], "No such option"),
    ],
)
def test_errors_are_one_line_and_exit_2(refusal, arguments, message):
    code, out, error = refusal(*arguments)
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


@pytest.mark.parametrize("command", ["train", "predict", "evaluate", "demo", "info"])
def test_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output
