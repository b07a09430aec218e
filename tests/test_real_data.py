"""Training and prediction on her2st; skipped where the data are absent."""

import anndata as ad
import numpy as np
import pytest
from scipy.sparse import csr_matrix

import histovar as hv


def test_reader_agrees_with_the_paired_object(data_dir):
    paired = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    read = hv.datasets.her2st(data_dir / "her2st" / "raw", image_width=200)
    assert set(read.obs_names) == set(paired.obs_names)
    read = read[paired.obs_names]
    np.testing.assert_allclose(read.obsm["spatial"], paired.obsm["spatial"], atol=0.5)
    np.testing.assert_array_equal(read.obs["array_row"], paired.obs["array_row"])
    shared = paired.var_names.intersection(read.var_names)
    assert len(shared) == paired.n_vars
    assert (read[:, shared].X != paired[:, shared].X).nnz == 0
    for section, image in paired.uns["spatial"].items():
        ours, theirs = (u["scalefactors"]["spot_diameter_fullres"] for u in (read.uns["spatial"][section], image))
        assert abs(ours - theirs) < 10


REPS = ["X_squeezenet", "X_squeezenet_wide"]
SHORT = {"enable_progress_bar": False, "stage1": {"max_epochs": 1}, "stage2": {"max_epochs": 2}}


@pytest.fixture(scope="module")
def sections(data_dir):
    """Two training sections with their panel, and a held-out third."""
    adata = ad.read_h5ad(data_dir / "her2st" / "paired.h5ad")
    training, query = (adata[adata.obs["section"].isin(s)].copy() for s in (["C2", "C4"], ["C5"]))
    hv.pp.gene_panel(training, n_genes=200)
    return training, query


@pytest.fixture(scope="module")
def trained(sections):
    return hv.tl.train(sections[0].copy(), use_rep=REPS, library_key="section", **SHORT)


def pcc(predictor, query):
    """Mean correlation of a model's or a baseline's prediction with log-normalised counts."""
    query = query.copy()
    if isinstance(predictor, hv.TwoStageVARST):
        hv.tl.predict(query, predictor, key_added="made")
    else:
        predictor.predict(query, key_added="made")
    made = hv.get.prediction(query, key="made")
    total = np.asarray(query.X.sum(1)).clip(1)
    measured = np.log1p(query[:, made.var_names].X.toarray() / total * 1e4)
    return hv.metrics.mean_pearson(np.asarray(made.X), measured)


def test_default_settings_reach_their_score_on_an_unseen_section(sections, trained):
    query = sections[1].copy()
    assert (trained.stage1.code_counts.sum(0) > 0).float().mean() >= 0.5
    hv.tl.predict(query, trained)
    hv.tl.evaluate(query)
    summary = query.uns["histovar"]["evaluation"].loc["C5"]
    assert summary["PCC-200"] >= 0.36 and summary["MSE"] < 0.48
    measured = query[:, trained.registry["genes"]].layers["lognorm"].toarray()
    made = hv.get.prediction(query)
    inside = np.abs(measured - made.X) < 1.645 * made.layers["std"]
    assert 0.82 < inside.mean() < 0.96


def test_a_shallow_shifted_section_is_predicted_no_worse_than_by_ridge_in_either_unit(sections, trained):
    training, query = (adata.copy() for adata in sections)
    rng = np.random.default_rng(0)
    counts = query.X.toarray().astype(int)
    query.X = csr_matrix(rng.binomial(counts, 650 / np.median(counts.sum(1))).astype(np.float32))
    for key in REPS:
        values = query.obsm[key]
        query.obsm[key] = (values + rng.normal(size=values.shape[1]) * values.std(0)).astype(np.float32)
    for adata in (training, query):
        adata.layers["log_counts"] = adata.X.log1p()
    for units, layer in (("lognorm", None), ("log_counts", "log_counts")):
        ridge = hv.tl.baseline(training, "ridge", layer=layer, use_rep=REPS, library_key="section")
        hv.tl.predict(query, trained, units=units, key_added="ours")
        ridge.predict(query, key_added="ridge")
        ours, theirs = (hv.tl.evaluate(query, key=key) for key in ("ours", "ridge"))
        for score in ("pearson", "partial_pearson"):
            assert ours[score].mean() >= theirs[score].mean()


def test_a_hundred_spots_are_used_no_worse_than_by_ridge(sections, monkeypatch):
    monkeypatch.setattr("histovar.training.stage1.WARMUP_STEPS", 40)  # worse codes, which can only lower the score
    training, query = sections
    chosen = np.random.default_rng(0).permutation(training.n_obs)[:100]
    few = training[np.sort(chosen)].copy()
    model = hv.tl.train(few, use_rep=REPS, library_key="section", **SHORT)
    assert pcc(model, query) >= pcc(hv.tl.baseline(few, "ridge", use_rep=REPS, library_key="section"), query)
