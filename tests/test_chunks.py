"""Prediction of dask and zarr arrays chunk by chunk: the same as in memory, and continued after an interruption."""

import os
import shutil
import subprocess
import sys
import time

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pytest
import zarr

import histovar as hv
from histovar._atomic import directory_lock
from histovar.anndata_io import zarr_store
from histovar.cli import app

KEY = "X_histology"


@pytest.fixture
def whole(simulated):
    """Spots in random order, so that chunks hold spots of several sections and neighbours are in other chunks."""
    return simulated[np.random.default_rng(0).permutation(simulated.n_obs)].copy()


def in_chunks(adata, rows=37, columns=7):
    lazy = adata.copy()
    lazy.obsm[KEY] = da.from_array(np.asarray(adata.obsm[KEY]), chunks=(rows, columns))
    return lazy


def test_chunks_are_predicted_as_the_whole(whole, loaded):
    lazy = in_chunks(whole)
    hv.tl.predict(whole, loaded, quantiles=(0.1, 0.9))
    hv.tl.predict(lazy, loaded, quantiles=(0.1, 0.9))
    for key in ("histovar", "histovar_std", "histovar_tokens", "histovar_quantiles"):
        assert isinstance(lazy.obsm[key], da.Array)
        assert lazy.obsm[key].chunks[0] == lazy.obsm[KEY].chunks[0]
        ours, theirs = lazy.obsm[key].compute(), np.asarray(whole.obsm[key])
        if key == "histovar_quantiles":
            # A rounding error may shift a quantile of counts by one.
            assert np.isclose(ours, theirs, atol=1e-4).mean() > 0.999 and np.isclose(ours, theirs, atol=0.1).all()
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    ours, theirs = hv.get.prediction(lazy), hv.get.prediction(whole)
    np.testing.assert_allclose(ours.X, theirs.X, atol=1e-4)
    assert ours.var_names.equals(theirs.var_names)


def test_chunks_are_predicted_without_tokens(whole, loaded):
    lazy = in_chunks(whole)
    hv.tl.predict(whole, loaded)
    hv.tl.predict(lazy, loaded, tokens=False)
    assert "histovar_tokens" not in lazy.obsm
    np.testing.assert_allclose(lazy.obsm["histovar"].compute(), whole.obsm["histovar"], atol=1e-4)


def test_sections_unlike_training_are_warned_of_when_chunks_are_computed(whole, loaded, caplog):
    def said(compute, data):
        caplog.clear()
        compute(data)
        return sorted(line for line in caplog.messages if "unlike that of the training" in line)

    whole.obsm[KEY][(whole.obs["section"] == "S2").to_numpy()] += 20
    at_once = said(lambda data: hv.tl.predict(data, loaded), whole)
    assert len(at_once) == 1 and "'S2'" in at_once[0] and "'S1'" not in at_once[0]
    lazy = in_chunks(whole)
    assert not said(lambda data: hv.tl.predict(data, loaded), lazy)
    assert said(lambda data: data.obsm["histovar"].compute(), lazy) == at_once


def test_predicted_chunks_do_not_make_the_counts_lazy(simulated, loaded):
    lazy = in_chunks(simulated)
    hv.tl.predict(lazy, loaded)
    assert "lognorm" not in lazy.layers
    hv.tl.evaluate(lazy)
    assert "lognorm" in lazy.layers


def test_zarr_arrays_are_taken_as_they_are(whole, loaded, tmp_path):
    lazy = whole.copy()
    lazy.obsm[KEY] = zarr.array(np.asarray(whole.obsm[KEY]), chunks=(50, 16), store=tmp_path / "x.zarr")
    hv.tl.predict(whole, loaded)
    hv.tl.predict(lazy, loaded)
    np.testing.assert_allclose(lazy.obsm["histovar"].compute(), whole.obsm["histovar"], atol=1e-4)


def test_other_processes_predict_the_same(whole, loaded):
    lazy = in_chunks(whole, rows=200)
    hv.tl.predict(whole, loaded)
    hv.tl.predict(lazy, loaded)
    made = lazy.obsm["histovar"].compute(scheduler="processes", num_workers=1)
    np.testing.assert_allclose(made, whole.obsm["histovar"], atol=1e-4)


def test_draws_of_chunks_repeat_with_their_seed(whole, loaded):
    def drawn(seed):
        lazy = in_chunks(whole)
        hv.tl.predict(lazy, loaded, n_samples=2, random_state=seed)
        return lazy.obsm["histovar_samples"].compute()

    assert np.array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    assert not np.allclose(drawn(0)[:37].mean(0), drawn(0)[37:74].mean(0))


def test_niches_of_chunks(whole):
    lazy = in_chunks(whole)
    for adata in (whole, lazy):
        hv.pp.niche(adata, use_rep=KEY, n_neighbors=(4, 8), library_key="section")
    assert isinstance(lazy.obsm["histovar_niche"], da.Array)
    np.testing.assert_allclose(lazy.obsm["histovar_niche"].compute(), whole.obsm["histovar_niche"], atol=1e-5)
    source = lazy.obsm["histovar_niche_source"]
    assert isinstance(source, da.Array)
    np.testing.assert_array_equal(source.compute(), whole.obsm["histovar_niche_source"])


def test_bad_values_of_a_chunk_are_named(whole, loaded):
    values = np.array(whole.obsm[KEY])
    values[50] = np.nan
    lazy = whole.copy()
    lazy.obsm[KEY] = da.from_array(values, chunks=(37, 16))
    hv.tl.predict(lazy, loaded)
    with pytest.raises(ValueError, match=r"obsm\['X_histology'\] near row .* has NaN"):
        lazy.obsm["histovar"].compute()
    lazy.obsm[KEY] = lazy.obsm[KEY][:, :5]
    with pytest.raises(ValueError, match="has width 5, but the model was trained on width 16"):
        hv.tl.predict(lazy, loaded)


def test_command_line_streams_a_store(whole, loaded, tmp_path):
    whole.write_zarr(tmp_path / "in.zarr")
    loaded.save(tmp_path / "model")
    command = ["predict", str(tmp_path / "in.zarr"), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out.zarr")]
    app(command, standalone_mode=False)
    made = ad.read_zarr(tmp_path / "out.zarr")
    assert made.var_names.tolist() == loaded.registry["genes"]
    assert KEY not in made.obsm
    hv.tl.predict(whole, loaded)
    np.testing.assert_allclose(made.layers["histovar"], whole.obsm["histovar"], atol=1e-4)
    np.testing.assert_allclose(hv.get.prediction(made).layers["std"], whole.obsm["histovar_std"], atol=1e-4)
    assert not (tmp_path / "out.zarr.part").exists()


def test_interrupted_store_is_continued(whole, loaded, tmp_path):
    calls = []

    def lazy(fail):
        def work(block, block_info=None):
            if fail and len(calls) == 3:
                raise OSError("worker lost")
            calls.append(block_info[0]["chunk-location"][0])
            return block

        adata = hv.datasets.simulate(1, len(whole), 40, random_state=0)
        values = da.from_array(np.asarray(whole.obsm[KEY]), chunks=(37, 16))
        adata.obsm["made"] = da.map_blocks(work, values, dtype=values.dtype, meta=values._meta)
        return adata

    with dask.config.set(scheduler="synchronous"), pytest.raises(OSError, match="worker lost"):
        zarr_store.write_zarr(lazy(True), tmp_path / "out.zarr", {"model": 1})
    assert not (tmp_path / "out.zarr").exists()
    with pytest.raises(
        ValueError, match=r"out.zarr.part' has \d chunks of an unfinished prediction that differs in model; finish"
    ):
        zarr_store.write_zarr(lazy(False), tmp_path / "out.zarr", {"model": 2})
    before = set(calls)
    calls.clear()
    zarr_store.write_zarr(lazy(False), tmp_path / "out.zarr", {"model": 1})
    assert len(calls) < 7  # at least one had been written
    assert before | set(calls) == set(range(7))
    made = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_array_equal(made.obsm["made"], whole.obsm[KEY])


def test_all_slots_of_a_store_are_predicted_in_one_pass(whole, loaded, tmp_path):
    lazy = in_chunks(whole)
    batches = []
    loaded.var_stage.condition.register_forward_hook(lambda module, inputs, output: batches.append(output))
    with dask.config.set(scheduler="synchronous"):
        hv.tl.predict(lazy, loaded, n_samples=2)
        batches.clear()
        lazy.obsm["histovar"].compute()
        of_one_slot = len(batches)
        batches.clear()
        zarr_store.write_zarr(lazy, tmp_path / "out.zarr", {"model": 1})
    assert len(batches) == of_one_slot > 0


@pytest.fixture
def command(loaded, tmp_path):
    """A command that streams a store of three chunks, with its model and input."""
    hv.datasets.simulate(1, 4200, 40, embedding_dim=16, random_state=1).write_zarr(tmp_path / "in.zarr")
    loaded.save(tmp_path / "model")
    return ["predict", str(tmp_path / "in.zarr"), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out.zarr")]


def killed(command, moment):
    """Run a command in a process of its own, and kill it when `moment` becomes true."""
    process = subprocess.Popen([sys.executable, "-c", "from histovar.cli import main; main()", *command])
    while not moment():
        assert process.poll() is None, "the command ended before that moment"
        time.sleep(0.001)
    process.kill()
    process.wait()


def test_killed_commands_are_continued(command, tmp_path):
    out, part = tmp_path / "out.zarr", tmp_path / "out.zarr.part"
    app([*command[:-1], str(tmp_path / "whole.zarr")], standalone_mode=False)
    killed(command, lambda: any(name.startswith(".out.zarr.part") for name in os.listdir(tmp_path)))
    assert not part.exists() and not out.exists()
    killed(command, lambda: any((part / "done").glob("*")))
    assert not out.exists()
    chunks = [file for file in (part / "store.zarr" / "layers" / "histovar").rglob("*0") if file.is_file()]
    chunks[0].unlink()  # as a crash of the machine may do
    app(command, standalone_mode=False)
    made, whole = ad.read_zarr(out), ad.read_zarr(tmp_path / "whole.zarr")
    for key in ("histovar", "histovar_std"):
        np.testing.assert_array_equal(made.layers[key], whole.layers[key])
    assert sorted(os.listdir(tmp_path)) == ["copy", "in.zarr", "model", "out.zarr", "whole.zarr"]


def test_unfinished_predictions_of_another_input_are_not_continued(command, loaded, tmp_path):
    part = tmp_path / "out.zarr.part"
    killed(command, lambda: any((part / "done").glob("*")))
    n_done = len(list((part / "done").iterdir()))
    with pytest.raises(
        ValueError, match=rf"out.zarr.part' has {n_done} chunks of .* that differs in n_samples; finish"
    ):
        app([*command, "--n-samples", "2"], standalone_mode=False)
    with pytest.raises(ValueError, match=rf"out.zarr.part' has {n_done} chunks of .* that differs in depth, units"):
        app([*command, "--units", "counts", "--depth", "1000"], standalone_mode=False)
    store = zarr.open_group(tmp_path / "in.zarr", mode="r+")
    before = store[f"obsm/{KEY}"][:]
    store[f"obsm/{KEY}"][:3] = before[3:6]
    with pytest.raises(
        ValueError, match="differs in content of the input; finish it with the same arguments, or delete it"
    ):
        app(command, standalone_mode=False)
    # Nothing is lost where nothing is done.
    for mark in (part / "done").iterdir():
        mark.unlink()
    app(command, standalone_mode=False)
    changed = ad.read_zarr(tmp_path / "in.zarr")
    hv.tl.predict(changed, loaded)
    made = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_allclose(made.layers["histovar"], changed.obsm["histovar"], atol=1e-4)
    assert not part.exists()


def test_what_histovar_did_not_write_is_not_taken_for_unfinished(whole, loaded, tmp_path):
    whole.write_zarr(tmp_path / "in.zarr")
    loaded.save(tmp_path / "model")
    command = ["predict", str(tmp_path / "in.zarr"), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out.zarr")]
    part = tmp_path / "out.zarr.part"
    part.mkdir()
    (part / "notes.txt").write_text("of the user")
    with pytest.raises(ValueError, match="was not written by histovar; move it, or give another --out"):
        app(command, standalone_mode=False)
    (part / "notes.txt").unlink()
    with directory_lock(part, seconds=0), pytest.raises(ValueError, match="is being written by another process; wait"):
        app(command, standalone_mode=False)
    whole.write_zarr(part / "in.zarr")
    with pytest.raises(ValueError, match="out.zarr.part' contains the input"):
        app(["predict", str(part / "in.zarr"), *command[2:]], standalone_mode=False)
    assert (part / "in.zarr").exists()
    shutil.rmtree(part / "in.zarr")
    app(command, standalone_mode=False)
    assert ad.read_zarr(tmp_path / "out.zarr").shape == (240, 30)


def test_damaged_embeddings_are_named_when_they_are_streamed(whole, loaded, tmp_path):
    whole.write_zarr(tmp_path / "in.zarr")
    loaded.save(tmp_path / "model")
    command = ["predict", str(tmp_path / "in.zarr"), "-m", str(tmp_path / "model"), "-o", str(tmp_path / "out.zarr")]
    chunk = next(file for file in (tmp_path / "in.zarr" / "obsm" / KEY).rglob("*0") if file.is_file())
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"obsm/{KEY} of .*in.zarr' is damaged; copy or write the store again"):
        app(command, standalone_mode=False)
    chunk.unlink()
    with pytest.raises(ValueError, match=rf"obsm/{KEY} of .*in.zarr' lacks 1 of 1 chunk files"):
        app(command, standalone_mode=False)
    chunk.write_bytes(content)
    app(command, standalone_mode=False)
    assert ad.read_zarr(tmp_path / "out.zarr").shape == (240, 30)
