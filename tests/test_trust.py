"""Which genes can be trusted: expected correlations on an unseen section, and genes that are not predicted."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

import histovar as hv
from histovar.cli import main as command_line
from histovar.metrics.trust import effective_spots, expected_accuracy, p_values, section_accuracy

COLUMNS = ["expected_pearson", "lower", "upper", "ceiling", "share_of_ceiling", "p_value", "q_value"]


@pytest.fixture(scope="module")
def shuffled(prepared):
    """Training sections in which every other gene of the panel has no pattern, and those genes."""
    adata = prepared.copy()
    del adata.layers["lognorm"]
    genes = adata.var_names[adata.var["histovar_panel"]][::2]
    rng, counts = np.random.default_rng(0), adata.X.toarray()
    for section in adata.obs["section"].unique():
        rows = np.flatnonzero(adata.obs["section"] == section)
        for column in adata.var_names.get_indexer(genes):
            counts[rows, column] = counts[rng.permutation(rows), column]
    adata.X = counts
    return adata, genes


def random_fields(place, n, width, rng):
    """Independent smooth random fields."""
    at = (place - place.min(0)) / np.ptp(place, axis=0).max() * 60
    fields = [gaussian_filter(rng.normal(size=(90, 90)), width, mode="wrap") for _ in range(n)]
    return np.stack([map_coordinates(field / field.std(), at.T, order=1) for field in fields], 1)


def test_the_table_says_what_to_expect_of_every_gene(model, tmp_path):
    table = hv.get.genes(model)
    assert list(table.columns) == COLUMNS and table.index.tolist() == model.registry["genes"]
    assert ((table["lower"] < table["expected_pearson"]) & (table["expected_pearson"] < table["upper"])).all()
    assert (table["q_value"] >= table["p_value"]).all() and (table["q_value"] < 0.1).sum() > 10
    np.testing.assert_allclose(table["share_of_ceiling"], table["expected_pearson"] / table["ceiling"])
    assert table.attrs["expected on"] == "an unseen section"
    assert table.attrs["groups"] == ["S1", "S2", "S3"] and table.attrs["n_spots"] == [60, 60, 60]
    model.save(tmp_path / "m")
    pd.testing.assert_frame_equal(hv.get.genes(hv.TwoStageVARST.load(tmp_path / "m")), table)


def test_what_is_expected_is_what_is_found_on_a_section_held_out(model, query):
    hv.tl.predict(query, model)
    found, table = hv.tl.evaluate(query)["pearson"], hv.get.genes(model)
    assert np.corrcoef(found, table["expected_pearson"])[0, 1] > 0.4
    assert found.between(table["lower"], table["upper"]).mean() > 0.7


def test_calibration_on_held_out_sections_replaces_it(loaded, query):
    hv.tl.calibrate(query, loaded)
    table = hv.get.genes(loaded)
    assert table.attrs["groups"] == ["S4"] and table.attrs["n_spots"] == [60]
    hv.tl.predict(query, loaded)
    found = hv.tl.evaluate(query)["pearson"]
    assert np.corrcoef(found, table["expected_pearson"])[0, 1] > 0.98  # but for shrinkage, those of this very section


def test_named_individuals_are_compared_instead_of_sections(loaded, simulated):
    adata = simulated[simulated.obs["section"] != "S1"].copy()
    adata.obs["section"] = adata.obs["section"].astype(str) + "'"  # new to the model
    adata.obs["patient"] = np.where(adata.obs["section"] == "S4'", "b", "a")
    hv.tl.calibrate(adata, loaded, group_key="patient")
    table = hv.get.genes(loaded)
    assert table.attrs == {"expected on": "an unseen individual", "groups": ["a", "b"], "n_spots": [120, 60]}


def test_individuals_that_were_trained_on_are_not_called_unseen(loaded, query, caplog):
    loaded.registry["groups_stage2"] = ["a"]
    query.obs["patient"] = "a"
    caplog.set_level("INFO", "histovar")
    hv.tl.calibrate(query, loaded, group_key="patient")
    assert hv.get.genes(loaded).attrs["expected on"] == "an unseen section"
    assert "individuals ['a'] were trained on: not tested on another individual" in caplog.text


@pytest.mark.usefixtures("brief")
def test_a_model_of_one_section_says_that_no_other_was_tested(prepared, caplog):
    from .conftest import QUICK, small_config

    one = prepared[prepared.obs["section"] == "S1"].copy()
    caplog.set_level("INFO", "histovar")
    model = hv.tl.train(one, use_rep="X_histology", config=small_config(), **QUICK)
    assert "not tested on another section" in hv.get.genes(model).attrs["expected on"]
    assert "genes predicted at q < 0.1" in caplog.text and "not tested on another section" in caplog.text
    assert "not tested on another section" in hv.pl.trust(model).get_title()
    plt.close("all")


def test_genes_without_pattern_are_not_called_predicted(shuffled):
    from .conftest import QUICK, small_config

    adata, genes = shuffled
    model = hv.tl.train(adata.copy(), use_rep="X_histology", library_key="section", config=small_config(), **QUICK)
    table = hv.get.genes(model)
    called = table.index[table["q_value"] < 0.1]
    assert len(called) > 5 and called.isin(genes).mean() <= 0.1
    others = table.index.difference(genes)
    assert table.loc[genes, "expected_pearson"].mean() < table.loc[others, "expected_pearson"].mean() - 0.2


@pytest.mark.parametrize("width", [0, 5, 8])
def test_chance_is_judged_by_how_smooth_maps_are(simulated, width):
    rng = np.random.default_rng(width)
    place = simulated.obsm["spatial"][simulated.obs["section"] == "S1"]
    sections, naive = [], []
    for _ in range(3):
        x, y = (
            random_fields(place, 400, width, rng) + 0.2 * rng.normal(size=(len(place), 400))
            if width
            else rng.normal(size=(len(place), 400))
            for _ in range(2)
        )
        sections.append(section_accuracy(x, y, place, None))
        naive.append(np.abs(sections[-1].z) * np.sqrt(len(place) - 3) > 1.96)
    p = p_values(sections, cross_fitted=False)
    assert 0.01 < (p < 0.05).mean() < 0.09 and (p < 0.001).mean() < 0.01
    assert (np.mean(naive) > 0.15) == (width > 0)  # as independent spots, smooth maps seem to go together
    n_effective = effective_spots(x, y, place)
    assert np.median(n_effective) > 50 if width == 0 else np.median(n_effective) < 35


def test_depth_alone_is_no_pattern():
    rng = np.random.default_rng(0)
    totals = rng.lognormal(8, 0.7, 150)
    place = rng.uniform(size=(150, 2))
    by_depth = np.log(totals)[:, None] + rng.normal(0, 0.3, (150, 100))
    predicted = np.log(totals)[:, None] + rng.normal(0, 0.3, (150, 100))
    assert (p_values([section_accuracy(predicted, by_depth, place, None)], cross_fitted=False) < 1e-6).all()
    assert (p_values([section_accuracy(predicted, by_depth, place, totals)], cross_fitted=False) < 0.05).mean() < 0.12


@pytest.mark.parametrize("n_groups", [2, 3, 8])
def test_intervals_hold_for_new_groups(n_groups):
    rng = np.random.default_rng(n_groups)
    held, expected, found = [], [], []
    for _ in range(60):
        genes, groups = rng.normal(0.4, 0.2, 100), rng.normal(0, 0.08, n_groups + 1)
        z = genes + groups[:, None] + rng.normal(0, 0.1, (n_groups + 1, 100))
        made = expected_accuracy(np.tanh(z[:-1]), np.full(100, 0.1**2))
        new = np.tanh(z[-1])
        held.append(((new > made.lower) & (new < made.upper)).mean())
        best = made.mean.argsort()[-10:]
        expected.append(made.mean[best].mean())
        found.append(new[best].mean())
    assert 0.86 < np.mean(held) < 0.96
    assert np.mean(expected) == pytest.approx(np.mean(found), abs=0.03)  # the best are not overrated


def test_few_groups_are_no_error_and_undefined_genes_stay_so():
    one = expected_accuracy(np.array([[0.5, np.nan, 0.1]]), np.full(3, 0.01))
    assert np.isnan(one.mean).tolist() == [False, True, False] and one.lower[0] < 0.3 < 0.7 < one.upper[0] + 0.1
    assert np.isnan(expected_accuracy(np.full((2, 3), np.nan), np.full(3, 0.01))).all()
    assert np.isfinite(expected_accuracy(np.array([[0.5], [0.4]]), np.array([0.01]))).all()
    groups = np.array([[0.5, 0.4], [np.nan, np.nan], [0.5, 0.3]])  # of the second nothing is known
    np.testing.assert_array_equal(
        expected_accuracy(groups, np.full(2, 0.01)), expected_accuracy(groups[[0, 2]], np.full(2, 0.01))
    )


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_trusted_genes_of_a_prediction(query, model, tmp_path, suffix):
    import anndata

    bare = query[:, :0].copy()
    hv.tl.predict(bare, model)
    getattr(bare, f"write_{suffix}")(tmp_path / f"p.{suffix}")
    read = getattr(anndata, f"read_{suffix}")(tmp_path / f"p.{suffix}")
    table = hv.get.genes(model)
    limit = float(table["expected_pearson"].median())
    trusted = hv.get.prediction(read, min_trust=limit)
    assert trusted.var_names.tolist() == table.index[table["expected_pearson"] >= limit].tolist()
    whole = hv.get.prediction(read)
    np.testing.assert_array_equal(whole.var["expected_pearson"], table["expected_pearson"])
    np.testing.assert_array_equal(trusted.X, whole[:, trusted.var_names].X)
    assert trusted.layers["rates"].shape == trusted.shape


def test_no_gene_to_trust_is_warned_of(query, model, caplog):
    hv.tl.predict(query, model)
    assert hv.get.prediction(query, min_trust=1).shape == (60, 0)
    assert "min_trust: no gene has an expected correlation of 1 or more" in caplog.text


def test_models_and_predictions_that_do_not_say(query, loaded, tmp_path):
    figures = plt.get_fignums()
    del loaded.registry["trust"]
    loaded.save(tmp_path / "older")
    older = hv.TwoStageVARST.load(tmp_path / "older")
    hv.tl.predict(query, older)
    for call in (lambda: hv.get.genes(older), lambda: hv.pl.trust(older)):
        with pytest.raises(ValueError, match=r"model: it holds no expected accuracy .* call histovar.tl.calibrate"):
            call()
    assert "expected_pearson" not in hv.get.prediction(query).var
    with pytest.raises(ValueError, match="min_trust: the prediction 'histovar' holds no expected accuracy"):
        hv.get.prediction(query, min_trust=0.3)
    assert plt.get_fignums() == figures


def test_a_prediction_without_trust_drops_that_of_an_earlier_one(query, model, loaded):
    hv.tl.predict(query, model)
    del loaded.registry["trust"]
    hv.tl.predict(query, loaded)
    assert "expected_pearson" not in query.uns["histovar"]


def test_without_counts_there_is_no_ceiling(model_of_values):
    table = hv.get.genes(model_of_values)
    assert table[["ceiling", "share_of_ceiling"]].isna().all(axis=None)
    assert table.drop(columns=["ceiling", "share_of_ceiling"]).notna().all(axis=None)


def test_trust_is_forgotten_with_its_stage_2(loaded, model, tmp_path):
    del loaded.registry["trust"]
    loaded.save(tmp_path / "without")
    whole = hv.TwoStageVARST.load(tmp_path / "without")
    whole.registry["trust"] = model.registry["trust"]
    whole.load_stage(tmp_path / "without", 2)
    assert "trust" not in whole.registry


def test_plot_shows_every_gene(model, tmp_path):
    ax = hv.pl.trust(model, n_labels=3, save=tmp_path / "trust.png")
    table = hv.get.genes(model)
    assert ax.get_title() == "30 genes, on an unseen section" and (tmp_path / "trust.png").stat().st_size > 10_000
    drawn = np.concatenate([line.get_ydata() for line in ax.lines if "genes" in str(line.get_label())])
    assert sorted(drawn) == sorted(table["expected_pearson"])
    best = table["expected_pearson"].nlargest(3).index
    assert [line.split()[1] for line in ax.texts[0].get_text().splitlines()] == best.tolist()
    plt.close("all")


def test_info_says_how_many_genes_are_predicted_and_lists_them(model, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "m")
    monkeypatch.setattr("sys.argv", ["histovar", "info", str(tmp_path / "m"), "--out", str(tmp_path / "genes.csv")])
    command_line()
    table = hv.get.genes(model)
    n = int((table["q_value"] < 0.1).sum())
    line = f"Trust  {n} of 30 genes predicted at q < 0.1, median expected Pearson "
    assert line in capsys.readouterr().out
    listed = pd.read_csv(tmp_path / "genes.csv", index_col="gene")
    pd.testing.assert_frame_equal(listed, table, check_flags=False)


def test_sections_predicted_from_one_another_are_not_independent():
    rng = np.random.default_rng(0)
    features, noise, place = rng.normal(size=(3, 80, 4)), rng.normal(size=(3, 80, 1000)), rng.uniform(size=(80, 2))
    sections = []
    for left_out in range(3):
        others = [k for k in range(3) if k != left_out]
        learnt = sum(features[k].T @ noise[k] for k in others)
        sections.append(section_accuracy(features[left_out] @ learnt, noise[left_out], place, None))
    assert (p_values(sections, cross_fitted=False) < 0.05).mean() > 0.08
    assert 0.01 < (p_values(sections, cross_fitted=True) < 0.05).mean() < 0.07
