"""Scores: registry, averages over individuals, confidence intervals, gene and spatial structure."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse, stats
from sklearn.metrics import r2_score

import histovar as hv
from histovar import metrics
from histovar.anndata_io.neighbors import Neighborhoods

PATIENTS = {"S1": "a", "S2": "a", "S3": "b", "S4": "b", "S5": "c", "S6": "d"}


@pytest.fixture(scope="module")
def cohort():
    """Sections of four patients, of which the first was trained on, and predictions of all of them."""
    adata = hv.datasets.simulate(6, 60, 40, embedding_dim=16, random_state=1)
    adata.obs["patient"] = adata.obs["section"].astype(str).map(PATIENTS)
    train = adata[adata.obs["patient"] == "a"].copy()
    hv.pp.gene_panel(train, n_genes=30)
    ridge = hv.tl.baseline(train, "ridge", use_rep="X_histology", library_key="section", group_key="patient")
    ridge.predict(adata)
    return adata


@pytest.fixture
def unseen(cohort):
    return cohort[cohort.obs["patient"] != "a"].copy()


@pytest.fixture
def spots():
    rng = np.random.default_rng(0)
    place = rng.random((60, 2))
    measured = rng.normal(size=(60, 6)) + np.sin(4 * place[:, :1]) * np.arange(6)
    graph = Neighborhoods.of(place, None, (6,)).graphs[0]
    return measured + rng.normal(size=(60, 6)), measured, graph


def test_what_evaluation_writes_is_what_is_registered(query, model):
    hv.tl.predict(query, model, n_samples=3)
    scores = hv.tl.evaluate(query)
    registered = metrics.describe()
    beyond_the_panel = [f"PCC-{n}{suffix}" for n in (50, 200) for suffix in ("", " given depth")]
    expected = [name for name in registered.index if name not in beyond_the_panel]
    for table in ("evaluation", "evaluation_interval"):
        assert list(query.uns["histovar"][table].columns) == expected
    assert set(scores) == set(registered["gene_score"]) - {""}
    assert registered.drop(columns="gene_score").loc[~registered.index.str.startswith("n_")].notna().all(axis=None)
    assert registered.index.is_unique


@pytest.mark.parametrize("n_genes", [50, 200])
def test_best_genes_are_registered(n_genes):
    values = np.random.default_rng(0).normal(size=(9, n_genes))
    summary = metrics.summary(metrics.per_gene(values, values, list(map(str, range(n_genes)))))
    assert f"PCC-{n_genes}" in summary and set(summary) <= set(metrics.describe().index)


def test_a_perfect_prediction_has_the_best_scores(unseen):
    genes = list(unseen.uns["ridge"]["genes"])
    hv.tl.evaluate(unseen, key="ridge")
    measured = unseen[:, genes].layers["lognorm"].toarray()
    unseen.obsm["ridge"], unseen.obsm["ridge_std"] = measured, np.full_like(measured, 1e-6)
    hv.tl.evaluate(unseen, key="ridge")
    registered, summary = metrics.describe(), unseen.uns["ridge"]["evaluation"].loc["mean"]
    exact = [name for name in summary.index if registered["best"][name] in (0, 1) and "PIT" not in name]
    exact.remove("uncertainty PCC")  # no error is left to correlate with
    np.testing.assert_allclose(summary[exact].astype(float), registered.loc[exact, "best"], atol=1e-4)


def test_scores_are_averaged_over_the_sections_of_each_individual(unseen):
    hv.tl.evaluate(unseen, key="ridge")
    stored = unseen.uns["ridge"]
    summary, groups = stored["evaluation"], stored["evaluation_groups"]
    assert list(summary.index) == ["S3", "S4", "S5", "S6", "mean"] and list(groups.index) == ["b", "c", "d"]
    pd.testing.assert_series_equal(groups.loc["b"], summary.loc[["S3", "S4"]].mean(), check_names=False)
    pd.testing.assert_series_equal(groups.loc["c"], summary.loc["S5"], check_names=False)
    np.testing.assert_allclose(summary.loc["mean"].to_numpy(), summary.iloc[:4].mean().to_numpy())
    hv.tl.evaluate(unseen, key="ridge", group_key="section")
    assert list(unseen.uns["ridge"]["evaluation_groups"].index) == ["S3", "S4", "S5", "S6"]
    del unseen.obs["patient"]
    hv.tl.evaluate(unseen, key="ridge")
    assert "evaluation_groups" not in unseen.uns["ridge"]


def test_mean_scores_lie_in_intervals_that_the_seed_repeats(unseen, tmp_path):
    hv.tl.evaluate(unseen, key="ridge")
    first, mean = unseen.uns["ridge"]["evaluation_interval"], unseen.uns["ridge"]["evaluation"].loc["mean"]
    assert (first.loc["low"] <= mean + 1e-9).all() and (mean <= first.loc["high"] + 1e-9).all()
    assert (first.loc["low"] < first.loc["high"])[["PCC-all", "MSE", "coverage 90 top tenth", "Moran error"]].all()
    unseen.write_h5ad(tmp_path / "scored.h5ad")
    again = ad.read_h5ad(tmp_path / "scored.h5ad").uns["ridge"]["evaluation_interval"]
    pd.testing.assert_frame_equal(again, first, check_index_type=False, check_column_type=False)
    hv.tl.evaluate(unseen, key="ridge", random_state=1)
    other = unseen.uns["ridge"]["evaluation_interval"]
    hv.tl.evaluate(unseen, key="ridge", random_state=0)
    pd.testing.assert_frame_equal(unseen.uns["ridge"]["evaluation_interval"], first)
    assert not other.equals(first)


def test_one_individual_has_no_intervals(unseen, caplog):
    caplog.set_level("INFO")
    one = unseen[unseen.obs["patient"] == "b"].copy()
    hv.tl.evaluate(one, key="ridge")
    assert one.uns["ridge"]["evaluation_interval"].isna().all(axis=None)
    assert "scores have no intervals: all spots belong to one individual, 'b'" in caplog.text
    del one.obs["patient"]
    hv.tl.evaluate(one, key="ridge")
    assert one.uns["ridge"]["evaluation_interval"].loc[:, "MSE"].notna().all()  # of two sections


def test_individuals_that_were_trained_on_are_named(cohort, unseen, caplog):
    hv.tl.evaluate(unseen, key="ridge")
    assert "trained on:" not in caplog.text
    mixed = cohort[cohort.obs["section"].isin(["S2", "S5"])].copy()
    mixed.obs["section"] = mixed.obs["section"].astype(str).replace("S2", "another of the same")
    hv.tl.evaluate(mixed, key="ridge")
    (warned,) = [r.getMessage() for r in caplog.records if "among those trained on" in r.message]
    assert warned.startswith("individuals ['a'] were among those trained on")


def test_sections_of_several_individuals_are_refused(unseen):
    unseen.obs.loc[unseen.obs_names[0], "patient"] = "d"
    with pytest.raises(ValueError, match="group_key: section 'S3' has several"):
        hv.tl.evaluate(unseen, key="ridge")
    with pytest.raises(KeyError, match="group_key: no 'animal' in obs"):
        hv.tl.evaluate(unseen, key="ridge", group_key="animal")


def test_bootstrap_draws_whole_clusters():
    rng = np.random.default_rng(0)
    scores = pd.DataFrame({"a": rng.normal(size=12), "b": rng.normal(size=12)})
    alone = metrics.bootstrap_interval(scores, list(map(str, range(12))))
    theirs = stats.bootstrap((scores["a"],), np.mean, method="percentile", n_resamples=5000, rng=0)
    np.testing.assert_allclose(alone["a"], theirs.confidence_interval, atol=0.1)
    # Sections that say the same again make nothing surer, unless they are taken for independent.
    thrice, names = pd.concat([scores] * 3), list(map(str, range(12))) * 3
    pd.testing.assert_frame_equal(metrics.bootstrap_interval(thrice, names), alone)
    independent = metrics.bootstrap_interval(thrice, list(map(str, range(36))))
    assert (independent.loc["high"] - independent.loc["low"] < 0.8 * (alone.loc["high"] - alone.loc["low"])).all()


def test_bootstrap_leaves_out_what_is_undefined():
    scores = pd.DataFrame({"all": [1.0, 2, 3], "two": [1.0, np.nan, 3], "one": [np.nan, np.nan, 3]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ends = metrics.bootstrap_interval(scores, ["x", "y", "z"])
        assert metrics.bootstrap_interval(scores, ["x"] * 3).isna().all(axis=None)
    assert ends["two"].tolist() == [1, 3] and ends["one"].isna().all()
    with pytest.raises(ValueError, match="clusters: expected 3"):
        metrics.bootstrap_interval(scores, ["x"])


def test_r2_is_that_of_sklearn(spots):
    predicted, measured, _ = spots
    np.testing.assert_allclose(metrics.r2(predicted, measured), r2_score(measured, predicted, multioutput="raw_values"))
    measured[:, 0], predicted[3, 1] = 2.0, np.nan
    score = metrics.r2(predicted, measured)
    assert np.isnan(score[:2]).all() and np.isfinite(score[2:]).all()
    assert np.isnan(metrics.r2(predicted[:1], measured[:1])).all()


def test_morans_i_is_that_of_scanpy(spots):
    predicted, measured, graph = spots
    np.testing.assert_allclose(metrics.morans_i(measured, graph), sc.metrics.morans_i(graph, measured.T), atol=1e-5)
    draws = np.stack([predicted, measured], 2)
    both = [metrics.morans_i(values, graph) for values in (predicted, measured)]
    np.testing.assert_allclose(metrics.morans_i(draws, graph), np.mean(both, 0))
    correlation, error = metrics.moran_agreement(predicted, measured, graph)
    assert correlation == pytest.approx(np.corrcoef(*both)[0, 1]) and error == pytest.approx(
        np.abs(both[0] - both[1]).mean()
    )
    with pytest.raises(ValueError, match="neighbors: expected a graph of 60 spots"):
        metrics.morans_i(measured, graph[:9, :9])


def test_spatial_agreement_leaves_out_what_is_undefined(spots):
    predicted, measured, graph = spots
    kept = [0, 2, 4, 5]
    measured[:, 1], predicted[7, 3] = 1.0, np.nan
    expected = metrics.moran_agreement(predicted[:, kept], measured[:, kept], graph)
    assert metrics.moran_agreement(predicted, measured, graph) == pytest.approx(expected)
    flat = predicted.copy()
    flat[:, 0] = 3.0  # a constant prediction stays in, as without pattern
    by_hand = metrics.morans_i(predicted, graph)[kept] * [0, 1, 1, 1] - metrics.morans_i(measured, graph)[kept]
    assert metrics.moran_agreement(flat, measured, graph)[1] == pytest.approx(np.abs(by_hand).mean())
    assert np.isnan(metrics.moran_agreement(predicted[:, :1], measured[:, :1], graph)[0])
    nobody = sparse.csr_matrix((60, 60))
    assert np.isnan(metrics.moran_agreement(predicted, measured, nobody)).all()


def test_gene_structure_is_the_correlation_of_correlations(spots):
    predicted, measured, _ = spots
    pairs = np.triu_indices(6, 1)
    p, m = (np.corrcoef(values, rowvar=False)[pairs] for values in (predicted, measured))
    assert metrics.gene_structure_correlation(predicted, measured) == pytest.approx(np.corrcoef(p, m)[0, 1])
    assert metrics.gene_structure_correlation(measured * np.arange(1, 7), measured) == pytest.approx(1)
    of_draws = metrics.gene_structure_correlation(np.stack([predicted, measured], 2), measured)
    assert of_draws == pytest.approx(np.corrcoef(p + m, m)[0, 1])
    kept = [0, 2, 4, 5]
    measured[:, 1], predicted[7, 3] = 1.0, np.nan
    expected = metrics.gene_structure_correlation(predicted[:, kept], measured[:, kept])
    assert metrics.gene_structure_correlation(predicted, measured) == pytest.approx(expected)
    assert np.isnan(metrics.gene_structure_correlation(predicted[:, :2], measured[:, :2]))


def test_coverage_in_the_top_tenth_sees_what_coverage_hides():
    rng = np.random.default_rng(0)
    predicted = rng.random((200, 3))
    measured = predicted + np.where(predicted > np.sort(predicted, 0)[-20], 1.0, 0.0)  # all but the 20th of the highest
    low, high = predicted - 0.1, predicted + 0.1
    assert metrics.coverage(low, high, measured) == pytest.approx(181 / 200)
    assert metrics.top_coverage(low, high, measured, predicted) == pytest.approx(1 / 20)
    assert metrics.top_coverage(low, high, measured, 0 * predicted) == pytest.approx(181 / 200)  # all are highest
    measured[3, 0] = np.nan
    assert np.isnan(metrics.top_coverage(low, high, measured, predicted)).tolist() == [True, False, False]


def test_spatial_scores_are_those_of_the_sections_own_neighbours(unseen):
    hv.tl.evaluate(unseen, key="ridge")
    part = unseen[unseen.obs["section"] == "S4"]
    graph = Neighborhoods.of(part.obsm["spatial"], None, (6,)).graphs[0]
    genes = list(unseen.uns["ridge"]["genes"])
    expected = metrics.moran_agreement(part.obsm["ridge"], part[:, genes].layers["lognorm"].toarray(), graph)
    summary = unseen.uns["ridge"]["evaluation"]
    assert summary.loc["S4", ["Moran correlation", "Moran error"]].tolist() == pytest.approx(expected)


def test_without_coordinates_all_but_spatial_scores_are_taken(unseen, caplog):
    hv.tl.evaluate(unseen, key="ridge")
    before = unseen.uns["ridge"]["evaluation"]
    del unseen.obsm["spatial"]
    hv.tl.evaluate(unseen, key="ridge")
    after = unseen.uns["ridge"]["evaluation"]
    assert "no scores of spatial structure" in caplog.text
    pd.testing.assert_frame_equal(after, before.drop(columns=["Moran correlation", "Moran error"]))


def test_structure_of_few_spots_is_undefined_and_warned_of(unseen, caplog):
    few = unseen[[0, 1, *range(60, 120)]].copy()
    hv.tl.evaluate(few, key="ridge")
    summary = few.uns["ridge"]["evaluation"]
    assert np.isnan(summary.loc["S3", "Moran correlation"])
    assert summary.loc["mean", "Moran correlation"] == summary.loc["S4", "Moran correlation"]
    assert "Moran correlation in ['S3'], with too few spots or too few genes that vary" in caplog.text


def test_baselines_leave_out_individuals():
    """Sections of an individual are alike here and individuals differ, so only whole ones tell about new ones."""
    adata = hv.datasets.simulate(6, 60, 40, embedding_dim=16, random_state=3)
    adata.obs["animal"] = adata.obs["section"].astype(str).map({f"S{i}": "xyz"[(i - 1) // 2] for i in range(1, 7)})
    rng = np.random.default_rng(0)
    animal = adata.obs["animal"].astype("category").cat.codes.to_numpy()
    adata.obsm["X_histology"] += 5 * rng.normal(size=(3, 16))[animal].astype(np.float32)
    values = 5 + rng.normal(size=(3, 40))[animal] + 0.1 * rng.normal(size=adata.shape)
    adata.layers["values"] = values.clip(0).astype(np.float32)
    hv.pp.gene_panel(adata, n_genes=30)
    options = {"use_rep": "X_histology", "layer": "values", "library_key": "section"}
    by_section = hv.tl.baseline(adata, "ridge", **options)
    by_animal = hv.tl.baseline(adata, "ridge", group_key="animal", **options)
    assert by_animal.std.mean() > 3 * by_section.std.mean()
    penalties = [fitted.estimator.model_.best_params_["ridge__alpha"] for fitted in (by_section, by_animal)]
    assert penalties[0] < penalties[1]
    by_animal.predict(adata)
    stored = adata.uns["ridge"]
    assert list(stored["trained_on_groups"]) == ["x", "y", "z"] and stored["params"]["group_key"] == "animal"
    one = adata[adata.obs["animal"] == "x"].copy()
    alone = hv.tl.baseline(one, "ridge", group_key="animal", **options)
    np.testing.assert_allclose(alone.std, hv.tl.baseline(one, "ridge", **options).std)  # by section, as there is one
