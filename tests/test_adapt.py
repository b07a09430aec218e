"""Adaptation to a few measured spots of a new section: what it corrects, and what is refused."""

import logging

import numpy as np
import pytest

import histovar as hv
from histovar.cli import main

from .conftest import QUICK, small_config


def shallower(query, share=0.2, seed=0):
    """Thin the section's counts, and multiply every gene's rate by a random factor."""
    rng = np.random.default_rng(seed)
    counts = np.asarray(query.X.toarray() if hasattr(query.X, "toarray") else query.X)
    factors = np.exp(0.8 * rng.normal(size=query.n_vars))
    query.X = rng.poisson(share * counts * factors).astype(np.float32)
    return query


def choose(query, n, seed=0):
    query.obs["measured"] = np.isin(np.arange(query.n_obs), np.random.default_rng(seed).permutation(query.n_obs)[:n])
    return query


@pytest.fixture
def section(query):
    return choose(shallower(query), 20)


@pytest.fixture
def adapted(section, model):
    return hv.tl.adapt(section, model, "measured")


def scores(section, model):
    hv.tl.predict(section, model)
    others = section[~section.obs["measured"].to_numpy()].copy()
    hv.tl.evaluate(others)
    return others.uns["histovar"]["evaluation"].loc["mean"]


def test_level_depth_and_intervals_are_corrected_on_other_spots(section, model, adapted):
    before, after = scores(section.copy(), model), scores(section.copy(), adapted)
    assert after["CRPS"] < 0.9 * before["CRPS"]
    assert after["MSE"] < before["MSE"]
    assert after["CRPS given depth"] < before["CRPS given depth"]
    assert 0.8 < after["coverage 90 given depth"]
    hv.tl.predict(section, adapted)
    predicted, totals = hv.get.prediction(section).obs["total_count"], np.asarray(section.X.sum(1)).ravel()
    assert abs(np.log(predicted / totals).mean()) < 0.2


def test_more_spots_are_better(query, model):
    section = shallower(query)
    few, many = (hv.tl.adapt(choose(section, n), model, "measured") for n in (9, 45))
    assert scores(section, many)["CRPS"] < scores(section, few)["CRPS"]


def test_a_section_as_expected_is_hardly_corrected(query, model):
    section = choose(query, 9)
    before, after = scores(section, model), scores(section, hv.tl.adapt(section, model, "measured"))
    assert after["CRPS"] < 1.05 * before["CRPS"]


def test_spots_near_measured_ones_are_corrected(query, model):
    section = choose(query, 40)
    place = section.obsm["spatial"]
    left = place[:, 0] < np.median(place[:, 0])
    counts = np.asarray(section.X.toarray() if hasattr(section.X, "toarray") else section.X)
    counts[left] *= 6  # every gene's share stays, the depth does not
    section.X = counts
    adapted = hv.tl.adapt(section, model, "measured")
    assert "depth" in adapted.stage2.adaptation.neighbors_tell
    hv.tl.predict(section, adapted)
    depth = hv.get.prediction(section).obs["total_count"].to_numpy()
    unseen = ~section.obs["measured"].to_numpy()
    assert np.median(depth[left & unseen]) > 2.5 * np.median(depth[~left & unseen])


def test_the_given_model_is_unchanged_and_the_copy_can_be_saved(section, model, adapted, tmp_path):
    assert "adapted" not in model.registry and model.stage2.adaptation is None
    adapted.save(tmp_path / "adapted")
    loaded = hv.TwoStageVARST.load(tmp_path / "adapted")
    assert loaded.registry["adapted"] == {"section": "S4", "n_spots": 20}
    tables = []
    for each in (adapted, loaded):
        hv.tl.predict(section, each, n_samples=2)
        tables.append(hv.get.prediction(section))
    np.testing.assert_array_equal(tables[0].X, tables[1].X)
    np.testing.assert_array_equal(tables[0].layers["sample_1"], tables[1].layers["sample_1"])
    assert section.uns["histovar"]["adapted_to"] == "S4" and section.uns["histovar"]["n_adapted_spots"] == 20
    hv.tl.predict(section, model)
    assert section.uns["histovar"]["n_adapted_spots"] == 0
    assert "adaptation.place" not in model.stage2.state_dict()


def test_adapted_models_predict_in_all_units_and_at_any_depth(section, adapted):
    for units in ("lognorm", "log_counts", "counts", "rates"):
        hv.tl.predict(section, adapted, units=units, quantiles=(0.05, 0.95))
        result = hv.get.prediction(section)
        assert (result.layers["q0.05"] <= result.layers["q0.95"]).all()
    hv.tl.predict(section, adapted, units="counts", depth=1e6)
    deep = hv.get.prediction(section)
    np.testing.assert_allclose(deep.X, 100 * deep.layers["rates"], rtol=1e-3)


def test_expression_of_other_spots_is_not_read(section, model, adapted):
    nonsense = section.copy()
    nonsense.X[~section.obs["measured"].to_numpy()] = np.nan
    again = hv.tl.adapt(nonsense, model, "measured")
    np.testing.assert_array_equal(again.stage2.adaptation.log_rates, adapted.stage2.adaptation.log_rates)


def test_other_sections_are_warned_of_and_have_no_measured_neighbours(simulated, section, adapted, caplog):
    other = simulated[simulated.obs["section"] == "S3"].copy()
    other.obs["section"] = "S9"
    other.obsm["spatial"] = section.obsm["spatial"][: other.n_obs].copy()
    adapted.stage2.adaptation.weights += 1.0
    hv.tl.predict(other, adapted)
    assert "60 spots belong to other sections" in caplog.text
    rates = hv.get.prediction(other).layers["rates"]
    adapted.stage2.adaptation.weights *= 0.0
    hv.tl.predict(other, adapted)
    np.testing.assert_array_equal(hv.get.prediction(other).layers["rates"], rates)


def test_a_section_without_a_name_is_known_by_its_measured_spots(section, model, caplog):
    del section.obs["section"]
    adapted = hv.tl.adapt(section, model, "measured")
    hv.tl.predict(section, adapted)
    assert "belong to other sections" not in caplog.text
    assert "the section has no name, so it cannot be checked whether it, or a part of it, was trained on" in caplog.text
    elsewhere = section.copy()
    elsewhere.obsm["spatial"] = elsewhere.obsm["spatial"] + 7.0
    hv.tl.predict(elsewhere, adapted)
    assert "belong to other sections" in caplog.text


def test_a_section_without_a_name_that_was_trained_on(section, prepared, brief, caplog):
    """It is recognised by its number of spots if that of training had no name either; with a name it is another."""
    unnamed = prepared[prepared.obs["section"] == "S1"].copy()
    del unnamed.obs["section"]
    model = hv.tl.train(unnamed, use_rep="X_histology", config=small_config(), **QUICK)
    trained_on = choose(unnamed, 20)
    with pytest.raises(
        ValueError, match="library_key: a section without a name and with 60 spots, like this one, was trained on"
    ):
        hv.tl.adapt(trained_on, model, "measured")
    named = hv.tl.adapt(section, model, "measured", library_key="section")
    assert named.registry["adapted"]["section"] == "S4"
    assert "the section has no name" not in caplog.text
    hv.tl.adapt(trained_on[:50].copy(), model, "measured")
    assert "the section has no name, so it cannot be checked whether it, or a part of it, was trained on" in caplog.text


def test_chunks_are_predicted_as_the_whole(section, adapted):
    da = pytest.importorskip("dask.array")
    hv.tl.predict(section, adapted)
    lazy = section.copy()
    lazy.obsm["X_histology"] = da.from_array(section.obsm["X_histology"], (25, -1))
    hv.tl.predict(lazy, adapted, key_added="lazy")
    np.testing.assert_allclose(np.asarray(lazy.obsm["lazy"]), section.obsm["histovar"], rtol=1e-3, atol=1e-4)


def test_an_object_of_measured_spots_alone_is_adapted_to(section, model, caplog):
    alone = section[section.obs["measured"].to_numpy()].copy()
    adapted = hv.tl.adapt(alone, model)
    assert "measured_key: not given" in caplog.text
    assert adapted.registry["adapted"]["n_spots"] == 20
    hv.tl.predict(section, adapted)
    hv.tl.evaluate(section)
    assert "adapted to 20 measured spots" in caplog.text


def test_what_cannot_be_adapted_to_is_refused(section, training, model, adapted, model_of_values):
    with pytest.raises(KeyError, match="measured_key: no 'absent' in obs"):
        hv.tl.adapt(section, model, "absent")
    with pytest.raises(ValueError, match="measured_key: obs\\['section'\\] must be True or False"):
        hv.tl.adapt(section, model, "section")
    with pytest.raises(ValueError, match="measured_key: 8 measured spots are too few"):
        hv.tl.adapt(choose(section.copy(), 8), model, "measured")
    with pytest.raises(ValueError, match="adata: 5 spots are too few"):
        hv.tl.adapt(section[:5].copy(), model)
    with pytest.raises(ValueError, match="section 'S1' was trained on"):
        hv.tl.adapt(training[training.obs["section"] == "S1"].copy(), model)
    with pytest.raises(ValueError, match="measured spots are in 3 sections"):
        hv.tl.adapt(training, model)
    with pytest.raises(ValueError, match="it learnt from values"):
        hv.tl.adapt(section, model_of_values, "measured")
    with pytest.raises(ValueError, match="already adapted to section 'S4'"):
        hv.tl.adapt(section, adapted, "measured")
    with pytest.raises(ValueError, match="model: it is adapted to section 'S4'"):
        hv.tl.calibrate(section, adapted)
    with pytest.raises(KeyError, match="panel genes are missing"):
        hv.tl.adapt(section[:, 10:].copy(), model, "measured")
    logged = section.copy()
    logged.layers["lognorm"] = logged.X = np.log1p(logged.X / np.asarray(logged.X.sum(1))[:, None] * 1e4)
    with pytest.raises(ValueError, match="X must hold the counts"):
        hv.tl.adapt(logged, model, "measured")
    with pytest.raises(ValueError, match="normalised to 100 counts"):
        other = section.copy()
        other.layers["lognorm"] = np.log1p(other.X / np.asarray(other.X.sum(1))[:, None] * 100)
        hv.tl.adapt(other, model, "measured")


def test_command_line(section, model, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "model")
    section.write_h5ad(tmp_path / "S4.h5ad")
    monkeypatch.chdir(tmp_path)
    arguments = ["histovar", "adapt", "S4.h5ad", "-m", "model", "--out", "adapted", "--measured-key", "measured"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    logging.getLogger("histovar").handlers.clear()
    monkeypatch.setattr("sys.argv", ["histovar", "info", "adapted"])
    main()
    logging.getLogger("histovar").handlers.clear()
    assert "20 spots of S4" in capsys.readouterr().out
    expected = hv.tl.adapt(section, model, "measured").stage2.adaptation.log_rates
    np.testing.assert_array_equal(hv.TwoStageVARST.load("adapted").stage2.adaptation.log_rates, expected)
