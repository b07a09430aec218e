"""Embeddings that are never in memory whole: the same predictions, chunk by chunk, resumed where they stopped."""

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pytest
import zarr

import histovar as hv
from histovar.anndata_io import zarr_store
from histovar.cli import app

KEY = "X_histology"


@pytest.fixture
def whole(simulated):
    """Sections in no order, so that chunks hold spots of several and neighbours are in other chunks."""
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
        np.testing.assert_allclose(lazy.obsm[key].compute(), np.asarray(whole.obsm[key]), atol=1e-4)
    ours, theirs = hv.get.prediction(lazy), hv.get.prediction(whole)
    np.testing.assert_allclose(ours.X, theirs.X, atol=1e-4)
    assert ours.var_names.equals(theirs.var_names)


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
    with pytest.raises(ValueError, match="has width 5, the model was trained on width 16"):
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
