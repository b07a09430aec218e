import dataclasses
import hashlib
import json
import os
import shutil
import stat
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import histovar as hv
from histovar import _atomic
from histovar.model.card import ConfigCard, content_digest, read_card
from histovar.model.checkpoint import verify

from .conftest import QUICK, small_config


def test_a_model_prints_as_facts(model):
    text = repr(model)
    assert "Genes: 30: " in text and "X_histology (16 numbers)" in text and "S1, S2, S3" in text
    assert "Linear(" not in text and "Linear(" in repr(model.stage1)
    untrained = hv.TwoStageVARST(model.config)
    untrained.describe(tissue="breast \x1b[31m")
    assert r"Tissue: breast \x1b[31m" in repr(untrained) and "\x1b" not in repr(untrained)


def test_saved_model_predicts_the_same(model, query, tmp_path):
    model.save(tmp_path / "m")
    again = hv.TwoStageVARST.load(tmp_path / "m")
    assert again.registry == model.registry and again.config == model.config
    one, other = (hv.tl.predict(query, m, copy=True) for m in (model, again))
    np.testing.assert_array_equal(one.obsm["histovar"], other.obsm["histovar"])
    for stage, frame in model.history.items():
        np.testing.assert_allclose(again.history[stage], frame)
    assert {f.suffix for f in (tmp_path / "m").iterdir()} == {".json", ".md", ".safetensors"}


def test_stages_are_saved_and_loaded_separately(model, query, tmp_path):
    model.save_stage(tmp_path / "one", 1)
    model.save_stage(tmp_path / "two", 2)
    alone = hv.TwoStageVARST.load(tmp_path / "one")
    assert alone.stage2 is None
    with pytest.raises(ValueError, match="no stage 2"):
        hv.tl.predict(query, alone)
    alone.load_stage(tmp_path / "two", 2)
    expected, made = (hv.tl.predict(query, m, copy=True).obsm["histovar"] for m in (model, alone))
    np.testing.assert_array_equal(expected, made)
    with pytest.raises(ValueError, match="holds stages"):
        alone.load_stage(tmp_path / "two", 1)
    with pytest.raises(ValueError, match="stage 2 alone"):
        hv.TwoStageVARST.load(tmp_path / "two")


def test_other_genes_are_refused(model, tmp_path):
    model.save(tmp_path / "m")
    other = hv.TwoStageVARST(small_config())
    other.registry["genes"] = ["A", "B"]
    with pytest.raises(ValueError, match="genes of"):
        other.load_stage(tmp_path / "m", 1)


def test_what_is_not_a_model_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model directory"):
        hv.TwoStageVARST.load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a saved model"):
        hv.TwoStageVARST.load(tmp_path / "empty")

    path = tmp_path / "m"
    model.save(path)
    card = json.loads((path / "model.json").read_text())

    def written(text):
        (path / "model.json").write_text(text)
        return path

    with pytest.raises(ValueError, match="truncated or not JSON"):
        hv.TwoStageVARST.load(written(json.dumps(card)[:100]))
    with pytest.raises(ValueError, match="does not describe a histovar model"):
        hv.TwoStageVARST.load(written("{}"))
    with pytest.raises(ValueError, match="upgrade histovar"):
        hv.TwoStageVARST.load(written(json.dumps(card | {"format_version": 99})))
    other = card | {"config": card["config"] | {"prior_hidden": 7}}
    with pytest.raises(ValueError, match="changed after it was saved"):
        hv.TwoStageVARST.load(written(json.dumps(other)))
    with pytest.raises(ValueError, match="does not fit the configuration"):
        hv.TwoStageVARST.load(written(json.dumps(other | {"sha256": content_digest(other)})))
    written(json.dumps(card))
    weights = path / "stage1.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or damaged"):
        hv.TwoStageVARST.load(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="lacks stage1.safetensors"):
        hv.TwoStageVARST.load(path)


def test_stage2_cannot_be_put_on_another_stage1(model):
    config = model.config.replace(codebook_size=64)
    with pytest.raises(ValueError, match="codebook_size.*differ from the trained stage 1"):
        model.add_stage2(config)
    assert isinstance(model.stage2.transformer.parents, torch.Tensor)


@pytest.mark.parametrize("path", sorted((Path(__file__).parent / "data").glob("model-*")), ids=lambda p: p.name)
def test_models_of_every_format_still_predict(path, query):
    model = hv.TwoStageVARST.load(path)
    hv.tl.predict(query, model)
    hv.tl.evaluate(query)
    assert query.uns["histovar"]["evaluation"].loc["S4", "PCC-all"] > 0.2
    if not (path / "prediction.npy").exists():
        return
    then, now = np.load(path / "prediction.npy"), query.obsm["histovar"]
    if json.loads((path / "model.json").read_text())["format_version"] in (5, 6):
        # Then, some of the predicted depth was added to a section that was unlike those of training.
        np.testing.assert_allclose(now, then, atol=0.2)
    # Before, spots as far away as the last of the neighbours were not among them.
    assert np.corrcoef(now.ravel(), then.ravel())[0, 1] > 0.999


def edit(path, change, sign=True):
    """Change a model's card; `sign` computes its SHA-256 again, as somebody who knows the format would."""
    file = path / "model.json"
    card = json.loads(file.read_text())
    change(card)
    if sign and "sha256" in card:
        card["sha256"] = content_digest(card)
    file.write_text(json.dumps(card))


def test_files_have_the_modes_of_the_umask(model, tmp_path):
    before = os.umask(0o027)
    try:
        model.save(tmp_path / "m")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "m").iterdir()} == {0o640}


def test_files_of_the_user_stay(model, tmp_path):
    path = tmp_path / "m"
    (path / "figures").mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    (path / "figures" / "a.txt").write_text("mine, too")
    for _ in range(2):
        model.save(path)
        model.save_stage(path, 1)
    assert hv.TwoStageVARST.load(path).registry == model.registry
    assert (path / "notes.txt").read_text() == "mine" and (path / "figures" / "a.txt").read_text() == "mine, too"
    assert len(list(path.iterdir())) == 6

    other = tmp_path / "other"
    other.mkdir()
    (other / "model.json").write_text('{"architecture": "ResNet"}')
    with pytest.raises(ValueError, match="was not written by histovar"):
        model.save(other)
    assert (other / "model.json").read_text() == '{"architecture": "ResNet"}'
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save(other / "model.json")


@pytest.mark.parametrize("has_locks", [True, False])
def test_interrupted_saves_leave_the_old_or_the_new(has_locks, model, loaded, tmp_path, monkeypatch):
    """The process is stopped at every rename and every flush in turn."""
    path = tmp_path / "m"
    if not has_locks:
        monkeypatch.setattr(_atomic, "_try_lock", lambda *_: False)
    with torch.no_grad():
        loaded.stage2.observation.dispersion.mul_(2)
    spreads = [m.stage2.observation.dispersion.clone() for m in (model, loaded)]
    for name in ("replace", "fsync"):
        real = getattr(os, name)
        for stop in range(8):
            model.save(path)
            calls = iter(range(100))

            def interrupt(*args, real=real, calls=calls, stop=stop):
                if next(calls) == stop:
                    raise KeyboardInterrupt
                return real(*args)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, interrupt)
                try:
                    loaded.save(path)
                except KeyboardInterrupt:
                    pass
            again = hv.TwoStageVARST.load(path)
            assert any(torch.equal(again.stage2.observation.dispersion, spread) for spread in spreads)
            assert verify(path) == json.loads((path / "model.json").read_text())["sha256"]
    loaded.save(path)
    names = sorted(f.name for f in path.iterdir() if has_locks or not f.name.startswith("."))
    assert names == ["README.md", "model.json", "stage1.safetensors", "stage2.safetensors"]


def test_leftovers_are_removed_and_never_loaded(model, tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    for name in (".stage1-0123456789abcdef.safetensors", f".model.json.{_atomic._machine()}-999999999-0.tmp.json"):
        (path / name).write_text("half")
    with pytest.raises(FileNotFoundError, match="not a saved model"):
        hv.TwoStageVARST.load(path)
    model.save(path)
    assert len(list(path.iterdir())) == 4


@pytest.mark.usefixtures("brief")
def test_save_stage_joins_what_belongs_together(model, loaded, prepared, query, tmp_path):
    path = tmp_path / "m"
    model.save_stage(path, 2)
    model.save_stage(path, 1)
    again = hv.TwoStageVARST.load(path)
    assert again.registry == model.registry and list(again.history) == ["stage1", "stage2"]
    expected, made = (hv.tl.predict(query, m, copy=True).obsm["histovar"] for m in (model, again))
    np.testing.assert_array_equal(expected, made)

    other = hv.tl.train_stage1(prepared.copy(), library_key="section", config=small_config(), random_state=5, **QUICK)
    whole = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(ValueError, match="holds stage 2 of another model"):
        other.save_stage(path, 1)
    assert {f.name: f.read_bytes() for f in path.iterdir()} == whole
    with pytest.raises(ValueError, match="has no stage 2"):
        other.save_stage(tmp_path / "two", 2)
    old = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "data" / "model-0.1.0", old)
    with pytest.raises(ValueError, match="holds stage 2 in format 1"):
        other.save_stage(old, 1)
    other.save(path)
    assert hv.TwoStageVARST.load(path).stage2 is None and not (path / "stage2.safetensors").exists()


def test_damaged_files_are_refused(model, loaded, tmp_path):
    path, other = tmp_path / "m", tmp_path / "other"
    model.save(path)
    with torch.no_grad():
        loaded.stage2.observation.dispersion.mul_(2)
    loaded.save(other)
    digest = verify(path)
    rng = np.random.default_rng(0)
    for file in sorted(f for f in path.iterdir() if f.suffix != ".md"):
        whole = file.read_bytes()
        for at in rng.integers(len(whole), size=12):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(rng.integers(8))
            file.write_bytes(flipped)
            for read in (hv.TwoStageVARST.load, verify):
                try:
                    read(path)
                except ValueError:
                    continue
                assert json.loads(flipped) == json.loads(whole), f"{file.name}, byte {at}"  # white space of the card
        file.write_bytes(whole)
    assert verify(path) == digest
    shutil.copy(other / "stage2.safetensors", path)
    for read in (hv.TwoStageVARST.load, verify):
        with pytest.raises(ValueError, match="stage2.safetensors.*belongs to another model"):
            read(path)
    shutil.copy(other / "model.json", path)
    assert verify(path) == verify(other) != digest
    edit(path, lambda card: card["registry"].update(units="counts"), sign=False)
    for read in (hv.TwoStageVARST.load, verify, read_card):
        with pytest.raises(ValueError, match="changed after it was saved"):
            read(path)


def test_weights_that_are_not_finite_are_refused(loaded, tmp_path):
    path = tmp_path / "m"
    loaded.save(path)
    state = load_file(path / "stage2.safetensors")
    state["head.output.bias"][3] = float("nan")
    save_file(state, path / "stage2.safetensors")
    digest = hashlib.sha256((path / "stage2.safetensors").read_bytes()).hexdigest()
    edit(path, lambda card: card["weights"].update({"stage2.safetensors": digest}))
    with pytest.raises(ValueError, match="head.output.bias holds values that are not finite"):
        hv.TwoStageVARST.load(path)
    with torch.no_grad():
        loaded.stage1.scales.mean[0] = float("inf")
    with pytest.raises(ValueError, match="stage 1: scales.mean holds values that are not finite"):
        loaded.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 10**12),
        ("n_layers", 10**9),
        ("codebook_dim", 10**6),
        ("codebook_size", 2**16),
        ("n_pcs", 10**9),
        ("width", 4 * 10**6),
        ("embedding_dims", [16] * 10**5),
        ("prior_hidden", 10**8),
        ("n_members", 10**6),
    ],
)
def test_huge_models_are_refused_before_they_are_built(field, value, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(Path(__file__).parent / "data" / "model-0.1.0", path)
    edit(path, lambda card: card["config"].update({field: value}))
    if field == "embedding_dims":
        edit(path, lambda card: card["registry"].update(use_rep=["X"] * 10**5, embedding_dims=value))
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"does not fit the configuration|n_layers|n_pcs"):
        hv.TwoStageVARST.load(path)
    assert time.monotonic() - start < 5


KEYS = {"use_rep": "X_histology", "spatial_key": "spatial", "library_key": "section"}
DELETED = object()
CORRUPTIONS = [DELETED, None, -1, 0, 10**18, float("nan"), "text", [], {}, [[]], True, 0.5]


def fields_of(value, path=()):
    """Every field of a card, and the first value of every list."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from fields_of(item, (*path, name))


def corrupted(card, path, value):
    changed = deepcopy(card)
    *parents, last = path
    place = changed
    for name in parents:
        place = place[name]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize("version", [1, 6])
def test_corrupted_cards_are_refused_in_one_line_or_load_a_whole_model(version, model, query, tmp_path):
    path = tmp_path / "m"
    if version == 1:
        shutil.copytree(Path(__file__).parent / "data" / "model-0.1.0", path)
    else:
        model.save(path)
    card = json.loads((path / "model.json").read_text())
    few = query[:20].copy()
    n_refused = n_whole = 0
    for field in fields_of(card):
        for value in CORRUPTIONS:
            changed = corrupted(card, field, value)
            if changed == card:
                continue
            if version == 6 and field != ("sha256",):
                changed["sha256"] = content_digest(changed)
            (path / "model.json").write_text(json.dumps(changed))
            try:
                again = hv.TwoStageVARST.load(path)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, error
                n_refused += 1
                continue
            made = hv.tl.predict(few, again, **KEYS, copy=True)
            assert np.isfinite(made.obsm["histovar"]).all(), (field, value)
            n_whole += 1
    assert n_refused > 5 * n_whole


def test_errors_of_a_card_name_the_field(model, tmp_path):
    path = tmp_path / "m"
    model.save(path)
    card = json.loads((path / "model.json").read_text())
    for field, value, message in (
        (("config", "n_layers"), "two", r"model.json': config.n_layers: input should be a valid integer, got 'two'"),
        (("config", "dropout"), 1.5, r"config.dropout: .*less than 1, got 1.5"),
        (("config", "n_heads"), 5, r"config: width=32 must be divisible by n_heads=5"),
        (("config", "colour"), 1, r"config.colour: .*not permitted"),
        (("registry", "genes"), ["A"], r"registry.genes: must have config.n_genes=30 genes, got 1"),
        (("registry", "use_rep"), DELETED, r"registry.use_rep: missing"),
        (("registry",), {}, r"registry.genes: missing"),
        (("weights", "stage1.safetensors"), "0", r"weights.stage1.safetensors: "),
        (("format_version",), True, r"format_version must be a number from 1 to 9, got True"),
        (("format_version",), 5, r"not in format 5"),
    ):
        changed = corrupted(card, field, value) if value is DELETED else deepcopy(card)
        if value is not DELETED:
            place = changed
            for name in field[:-1]:
                place = place[name]
            place[field[-1]] = value
        changed["sha256"] = content_digest(changed)
        (path / "model.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            read_card(path)
    for text in ('{"format": "histovar", "format": "histovar"}', "[" * 100_000, "", "\xff"):
        (path / "model.json").write_text(text)
        with pytest.raises(ValueError, match="truncated or not JSON"):
            read_card(path)


def test_the_schema_has_the_fields_of_the_configuration():
    assert set(ConfigCard.model_fields) == {f.name for f in dataclasses.fields(hv.ModelConfig)}


def test_directories_are_written_whole(tmp_path):
    path = tmp_path / "store.zarr"
    for content in ("one", "two"):
        with _atomic.atomic_directory(path) as folder:
            (folder / "0").mkdir()
            (folder / "0" / "chunk").write_text(content)
        assert (path / "0" / "chunk").read_text() == content
    with pytest.raises(RuntimeError), _atomic.atomic_directory(path) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["store.zarr"] and (path / "0" / "chunk").read_text() == "two"
    # As on systems that cannot exchange names, killed between the two renames.
    aside = tmp_path / f".store.zarr.{_atomic._machine()}-999999999-0.old.zarr"
    path.rename(aside)
    _atomic.remove_leftovers(path)
    assert (path / "0" / "chunk").read_text() == "two" and not aside.exists()


def test_files_are_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "scores.csv"
    for content in ("one", "two"):
        with _atomic.atomic_file(path) as file:
            assert file.suffix == ".csv"
            file.write_text(content)
    with pytest.raises(RuntimeError), _atomic.atomic_file(path) as file:
        file.write_text("half")
        raise RuntimeError
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no directory"), _atomic.atomic_file(tmp_path / "a" / "b"):
        pass
    with pytest.raises(IsADirectoryError), _atomic.atomic_file(tmp_path):
        pass
    (tmp_path / "link").symlink_to(path)
    with _atomic.atomic_file(tmp_path / "link") as file:
        file.write_text("three")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "three"
    monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)
    folder = tmp_path / "folder"
    for content in ("one", "two"):
        with _atomic.atomic_directory(folder) as beside:
            (beside / "a").write_text(content)
    assert (folder / "a").read_text() == "two" and len(list(tmp_path.iterdir())) == 3
