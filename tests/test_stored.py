"""Training from expression and embeddings on disk, section by section."""

import anndata as ad
import dask.array as da
import numpy as np
import pytest
import torch
from scipy import sparse

import histovar as hv
from histovar.anndata_io import zarr_store
from histovar.cli import app
from histovar.training import data
from histovar.training.data import Spots, StoredSpots

from .conftest import QUICK, small_config

KEY = "X_histology"
pytestmark = pytest.mark.usefixtures("brief")


def on_disk(adata, path):
    adata.write_zarr(path)
    return zarr_store.read_zarr(path, rows_at_once=50)


@pytest.fixture
def few_at_once(monkeypatch):
    """Make chunks so small that the test's sections have many."""
    monkeypatch.setattr(data, "CHUNK_SPOTS", 16)
    monkeypatch.setattr(data, "SHUFFLED_CHUNKS", 3)


def trained(adata):
    options = {"use_rep": KEY, "library_key": "section", "config": small_config(), "enable_progress_bar": False}
    return hv.tl.train(adata, **options, max_epochs=3)


def test_training_on_disk_learns_the_same(training, query, tmp_path, few_at_once):
    stored = on_disk(training, tmp_path / "in.zarr")
    models = [trained(adata) for adata in (training, stored)]
    assert isinstance(stored.X, da.Array) and isinstance(stored.obsm[KEY], da.Array) and not stored.layers
    assert (training.var["histovar_panel"] == stored.var["histovar_panel"]).all()
    np.testing.assert_array_equal(training.varm["histovar_scales"], stored.varm["histovar_scales"])
    for name, values in models[0].stage2.condition.named_buffers():
        torch.testing.assert_close(values, models[1].stage2.condition.get_buffer(name), atol=1e-5, rtol=1e-4)
    # What was learnt differs a little, as batches come in another order, and with it how far genes can be trusted.
    known = [{**model.registry, "trust": model.registry["trust"]["n_spots"]} for model in models]
    assert known[0] == known[1]
    maps = []
    for model in models:
        hv.tl.predict(query, model)
        maps.append(hv.get.prediction(query).X)
    assert hv.metrics.mean_pearson(*maps) > 0.8
    for side in (0, 1):
        assert abs(maps[0].mean() - maps[1].mean()) < 0.05 * maps[side].mean()


def test_training_on_disk_repeats_with_its_seed(training, tmp_path, few_at_once):
    stored = on_disk(training, tmp_path / "in.zarr")
    states = [trained(stored).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_tables_that_are_not_in_memory_are_asked_for(training, tmp_path):
    training.write_zarr(tmp_path / "in.zarr")
    stored = ad.experimental.read_lazy(tmp_path / "in.zarr")
    with pytest.raises(ValueError, match=r"obs is not in memory; read it with adata.obs = adata.obs.to_memory\(\)"):
        hv.pp.gene_panel(stored, n_genes=30)
    stored.obs, stored.var = stored.obs.to_memory(), stored.var.to_memory()
    hv.pp.gene_panel(stored, n_genes=30)
    hv.pp.gene_panel(training, n_genes=30)
    assert (stored.var["histovar_panel"] == training.var["histovar_panel"]).all()


def test_backed_sections_in_any_order(training, tmp_path):
    shuffled = training[np.random.default_rng(0).permutation(training.n_obs)].copy()
    shuffled.X = sparse.csr_matrix(shuffled.X)
    shuffled.write_h5ad(tmp_path / "in.h5ad")
    backed = ad.read_h5ad(tmp_path / "in.h5ad", backed="r")
    model = hv.tl.train(backed, use_rep=KEY, library_key="section", config=small_config(), **QUICK)
    assert backed.isbacked and "lognorm" not in backed.layers
    assert model.registry["sections_stage2"] == ["S1", "S2", "S3"]
    assert model.stage2.is_calibrated


def test_values_that_cannot_be_are_refused_before_training(training, tmp_path):
    training.obsm[KEY][70] = np.nan
    stored = on_disk(training, tmp_path / "in.zarr")
    stage1 = hv.tl.train_stage1(stored, library_key="section", config=small_config(), **QUICK)
    with pytest.raises(ValueError, match=r"obsm\['X_histology'\] has NaN .*row 10.*\(rows of section 'S2'\)"):
        hv.tl.train_stage2(stored, stage1, use_rep=KEY, library_key="section", **QUICK)
    with pytest.raises(KeyError, match="no 'X_uni' in obsm"):
        hv.tl.train(stored, use_rep="X_uni", library_key="section", **QUICK)


def test_every_spot_is_drawn_once_an_epoch(tmp_path, few_at_once):
    values = torch.arange(100.0)[:, None]
    spots = StoredSpots([(values[:40], values[:40].long()), (values[40:], values[40:].long())], 100, tmp_path)
    assert spots[[3, 77, 3]][1].flatten().tolist() == [3, 77, 3]
    some = spots.take(np.arange(0, 100, 3))
    sampler = some.shuffled(0, 1, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(34))
    assert first != list(sampler)
    drawn = some[first][0].flatten()
    torch.testing.assert_close(drawn.sort().values, values[::3, 0])
    # Spots that are read together are of three chunks, and in no order.
    together = drawn[:12] // 16
    assert len(together.unique()) == 3 and not torch.equal(together, together.sort().values)
    halves = [list(some.shuffled(0, 2, rank)) for rank in (0, 1)]
    assert set(halves[0]) | set(halves[1]) == set(range(34)) and len(halves[0]) == len(halves[1]) == 17


def test_spots_in_memory_and_on_disk_are_the_same(tmp_path, few_at_once):
    inputs = hv.model.Histology(
        (torch.randn(40, 3), torch.randn(40, 2)), torch.rand(40, 2), torch.rand(40, 0), torch.zeros(40)
    )
    items = (inputs, torch.randint(0, 4096, (40, 5)), torch.rand(40))
    rows = np.array([39, 0, 17])
    here, there = Spots(*items).take(rows)[[2, 1]], StoredSpots([items], 40, tmp_path).take(rows)[[2, 1]]
    for ours, theirs in zip(data._tensors(here), data._tensors(there), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_command_line_trains_from_a_store(training, tmp_path):
    training.write_zarr(tmp_path / "in.zarr")
    command = ["train", str(tmp_path / "in.zarr"), "--n-genes", "30", "--epochs", "1", "--gpus", "0"]
    app([*command, "--out", str(tmp_path / "model")], standalone_mode=False)
    model = hv.TwoStageVARST.load(tmp_path / "model")
    assert model.registry["use_rep"] == [KEY] and model.config.n_genes == 30
