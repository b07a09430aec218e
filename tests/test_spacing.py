"""Neighbourhoods have the same size in microns on any grid."""

import numpy as np
import pytest

import histovar as hv
from histovar.anndata_io.spacing import density, microns_per_pixel, of_training, spacing

from .conftest import QUICK, small_config

OPTIONS = {"use_rep": "X_histology", "library_key": "section", **QUICK}


def with_scale(adata, mpp):
    for entry in adata.uns["spatial"].values():
        entry["scalefactors"]["microns_per_pixel"] = mpp
    return adata


@pytest.fixture(scope="module")
def dense():
    """Sections on a grid of 50 um (100 pixels)."""
    return with_scale(hv.datasets.simulate(4, 400, 40, embedding_dim=16, random_state=1), 0.5)


@pytest.fixture(scope="module")
def sparse(dense):
    """Every second spot of every second row: a grid twice as wide."""
    column, row = (dense.obsm["spatial"] / (100, 100 * np.sqrt(3) / 2)).T
    keep = np.zeros(dense.n_obs, bool)
    for section in dense.obs["section"].unique():
        rows = np.flatnonzero(dense.obs["section"] == section)
        line = np.round(row[rows] - row[rows].min()).astype(int)
        place = np.round(2 * (column[rows] - column[rows].min())).astype(int)
        keep[rows] = (line % 2 == 0) & (place % 4 == place[line % 2 == 0][0] % 4)
    return dense[keep].copy()


def trained(adata, seed=0):
    adata = adata[adata.obs["section"] != "S4"].copy()
    hv.pp.gene_panel(adata, n_genes=30)
    hv.pp.gene_scales(adata, scales=(1, 4, 10))
    return hv.tl.train(adata, config=small_config(), random_state=seed, **OPTIONS)


@pytest.fixture(scope="module")
def of_sparse(sparse):
    return trained(sparse)


def predicted(adata, model):
    adata = adata[adata.obs["section"] == "S4"].copy()
    hv.tl.predict(adata, model)
    return hv.get.prediction(adata).to_df()


def test_spacing_is_that_of_the_grid(dense, sparse):
    steps = np.arange(20) * 7.0
    square = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    assert spacing(square) == pytest.approx(7, rel=0.05)
    hexagonal = np.concatenate([square, square + 3.5]) * (1, np.sqrt(3))
    for grid, true in ((square, 7), (hexagonal, 7 * np.sqrt(np.sqrt(3) / 2))):
        from_corner = np.argsort(np.linalg.norm(grid - grid.mean(0), axis=1))
        for n_spots in (9, 12, 16, 20, 30, 40):
            assert spacing(grid[from_corner[:n_spots]]) == pytest.approx(true, rel=0.08)
    assert np.isnan(spacing(np.zeros((50, 2)))) and np.isnan(spacing(np.zeros((1, 2))))
    of = {name: spacing(a[a.obs["section"] == "S1"].obsm["spatial"]) for name, a in (("d", dense), ("s", sparse))}
    assert of["s"] / of["d"] == pytest.approx(2, rel=0.1)


def test_another_grid_of_the_same_tissue_is_predicted_alike(dense, sparse, of_sparse):
    here = predicted(sparse, of_sparse)
    on_dense = predicted(dense, of_sparse).loc[here.index]
    by_seed = predicted(sparse, trained(sparse, seed=1))
    unknown = dense.copy()
    for entry in unknown.uns["spatial"].values():
        del entry["scalefactors"]["microns_per_pixel"]
    by_count = predicted(unknown, of_sparse).loc[here.index]
    off, off_of_seed, off_by_count = (np.abs(p - here).to_numpy().mean() for p in (on_dense, by_seed, by_count))
    assert off < off_of_seed
    assert off < 0.8 * off_by_count


def test_the_model_knows_its_spacing_and_says_so(of_sparse, dense, tmp_path, caplog):
    caplog.set_level("INFO", logger="histovar")
    of_sparse.save(tmp_path / "m")
    loaded = hv.TwoStageVARST.load(tmp_path / "m")
    assert loaded.registry["spacing_um"] == pytest.approx(100, rel=0.1)
    predicted(dense, loaded)
    assert "section 'S4': spots are" in caplog.text
    caplog.clear()
    unknown = dense[dense.obs["section"] == "S4"].copy()
    del unknown.uns["spatial"]
    hv.tl.predict(unknown, loaded)
    assert "microns per pixel of sections ['S4'] are unknown" in caplog.text


def test_a_section_whose_spots_coincide(dense, caplog):
    """Its scale is known, and the other sections tell the spacing; an unknown scale is another case."""

    def spacing_of(adata):
        caplog.clear()
        names = adata.obs["section"].to_numpy(str)
        return of_training(adata, adata.obsm["spatial"], names, "section", ["X_uni_112um"])

    expected = spacing_of(dense)
    assert not caplog.messages
    together = dense.copy()
    together.obsm["spatial"][(together.obs["section"] == "S1").to_numpy()] = 7.0
    assert spacing_of(together) == pytest.approx(expected, rel=0.05)
    assert "sections ['S1'] have a single spot or all spots in one place" in caplog.text
    assert "microns per pixel" not in caplog.text
    names = together.obs["section"].to_numpy(str)
    caplog.clear()
    ratio = density(together, together.obsm["spatial"], names, "section", 2 * expected)
    assert (ratio[names == "S1"] == 1).all() and (ratio[names == "S2"] > 2).all()
    assert "sections ['S1'] have a single spot" in caplog.text and "unknown" not in caplog.text
    del together.uns["spatial"]["S2"]
    assert spacing_of(together) is None
    assert "microns per pixel of 1 of 4 sections (['S2']) are unknown" in caplog.text


def test_the_scale_of_a_section_counts_before_one_without_a_name(dense):
    """The scale recorded for the section comes first, then uns["spatial"], then that of an object of one section."""
    adata = dense.copy()
    made = {"X_a_112um": {"encoder": "a", "pooling": "cls"}}
    adata.uns["X_a"] = {"embeddings": made, "scale": {"*": 0.9}}
    adata.uns["X_b"] = {"embeddings": made, "scale": {"S1": 0.7}}
    adata.uns["other"] = {"scale": {"S1": 3.0, "S2": 3.0}}  # not histovar's
    del adata.uns["spatial"]["S3"]["scalefactors"]["microns_per_pixel"]
    assert [microns_per_pixel(adata, name, "section") for name in ("S1", "S2", "S3")] == [0.7, 0.5, 0.9]


def test_stored_niche_of_another_grid_is_not_used(dense, of_sparse):
    query = dense[dense.obs["section"] == "S4"].copy()
    hv.pp.niche(query, use_rep="X_histology", n_neighbors=(4, 8), library_key="section")
    np.testing.assert_allclose(predicted(query, of_sparse), predicted(dense, of_sparse), atol=1e-5)


def test_chunks_have_the_same_neighbourhoods(dense, of_sparse):
    import dask.array as da

    query = dense[dense.obs["section"] == "S4"].copy()
    query.obsm["X_histology"] = da.from_array(query.obsm["X_histology"], chunks=(150, -1))
    np.testing.assert_allclose(predicted(query, of_sparse), predicted(dense, of_sparse), atol=1e-4)
