"""The methods that histovar is compared with."""

import numpy as np
import pytest

import histovar as hv

METHODS = ["ridge_hest", "ridge", "pls", "kernel_ridge", "knn", "mlp", "mfbp", "var_st"]


@pytest.fixture(scope="module")
def sections():
    adata = hv.datasets.simulate(4, 100, 60, embedding_dim=32, random_state=2)
    train = adata[adata.obs["section"] != "S4"].copy()
    hv.pp.gene_panel(train, n_genes=30)
    return train, adata[adata.obs["section"] == "S4"].copy()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_scores_in_the_slots_of_predict(sections, method):
    train, query = sections[0], sections[1].copy()
    if method == "var_st":  # the slowest
        train = train[::3].copy()
    fitted = hv.tl.baseline(train, method, use_rep="X_histology", library_key="section")
    fitted.predict(query)
    scores = hv.tl.evaluate(query, key=method)
    if method != "var_st":  # which needs more than these few spots
        assert scores["pearson"].mean() > 0.1
    summary = query.uns[method]["evaluation"].loc["S4"]
    assert 0.8 < summary["coverage 90"] < 0.98
    measured = np.asarray(query[:, scores.index].layers["lognorm"].toarray())
    spread = hv.get.prediction(query, key=method).layers["std"]
    assert 0.5 < spread.mean() / measured.std(0).mean() < 1.5
    again = hv.tl.baseline(train, method, use_rep="X_histology", library_key="section").predict(query, copy=True)
    np.testing.assert_array_equal(again.obsm[method], query.obsm[method])


def test_section_standardisation_undoes_a_shift(sections):
    train, query = sections[0], sections[1].copy()
    plain, robust = (
        hv.tl.baseline(train, "ridge", use_rep="X_histology", library_key="section", standardize=how)
        for how in ("training", "section")
    )
    first = [fitted.predict(query, copy=True).obsm["ridge"] for fitted in (plain, robust)]
    query.obsm["X_histology"] = query.obsm["X_histology"] + 3
    second = [fitted.predict(query, copy=True).obsm["ridge"] for fitted in (plain, robust)]
    assert np.abs(second[0] - first[0]).mean() > 10 * np.abs(second[1] - first[1]).mean()


def test_unknown_methods_are_refused(sections):
    with pytest.raises(ValueError, match="method: expected one of .*ridge.*got 'forest'"):
        hv.tl.baseline(sections[0], "forest", use_rep="X_histology")
    with pytest.raises(ValueError, match="standardize: expected 'section' or 'training', got"):
        hv.tl.baseline(sections[0], "ridge", use_rep="X_histology", standardize="both")
