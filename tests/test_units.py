"""Counts, units and depth: negative binomial counts, one model in all units, blind and at a given depth."""

import anndata as ad
import dask.array as da
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import stats

import histovar as hv
from histovar.anndata_io.expression import counts_of_values
from histovar.model.negative_binomial import count_quantiles, fit_dispersion, log_moments
from histovar.model.observation import Composition, Observation, randomised_levels

from .conftest import QUICK, small_config
from .test_errors import refuse

KEY = "X_histology"
OPTIONS = {"use_rep": KEY, "library_key": "section", "config": small_config(), **QUICK}


def negative_binomial(mean, dispersion):
    return stats.nbinom(1 / dispersion, 1 / (1 + mean * dispersion))


def predicted(adata, model, **options):
    return hv.get.prediction(hv.tl.predict(adata, model, copy=True, **options))


def evaluated(adata, model, **options):
    """Mean scores over sections."""
    made = hv.tl.predict(adata, model, copy=True, **options)
    hv.tl.evaluate(made)
    return made.uns["histovar"]["evaluation"].loc["mean"]


@pytest.fixture
def measured(query):
    """A held-out section with each spot's total count in obs."""
    query.obs["total"] = np.asarray(query.X.sum(1)).ravel()
    return query


# Distributions of counts


@pytest.mark.parametrize("mean", [0.003, 0.2, 3.0, 60.0])
@pytest.mark.parametrize("dispersion", [1e-4, 0.3, 5.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 15.0])
def test_moments_of_log_counts_are_the_sums_they_stand_for(mean, dispersion, scale):
    counts = negative_binomial(mean, dispersion)
    k = np.arange(counts.isf(1e-12) + 1)
    values, probabilities = np.log1p(scale * k), counts.pmf(k)
    found = log_moments(torch.tensor([[mean]]), torch.tensor([[dispersion]]), torch.tensor([[scale]]))
    by_hand = [(values**power * probabilities).sum() for power in (1, 2)]
    np.testing.assert_allclose([float(moment) for moment in found], by_hand, rtol=2e-3)


def test_moments_of_counts_hold_the_dispersion_and_the_excess():
    observation = Observation(2)
    observation.dispersion.copy_(torch.tensor([0.2, 1.0]))
    composition = Composition(torch.tensor([[0.01, 0.1]]), torch.zeros(1), torch.tensor([0.3]), torch.ones(1))
    mean, std = observation.moments(composition, "counts", torch.tensor([500.0]))
    for gene, (expected, dispersion) in enumerate([(5, 0.5), (50, 1.3)]):
        counts = negative_binomial(expected, dispersion)
        assert float(mean[0, gene]) == pytest.approx(counts.mean(), rel=1e-4)
        assert float(std[0, gene]) == pytest.approx(counts.std(), rel=1e-4)


def test_an_unknown_depth_widens_the_prediction():
    observation = Observation(1)
    observation.dispersion.fill_(0.1)
    observation.depth_errors.copy_(torch.linspace(-1, 1, len(observation.depth_errors)))
    composition = Composition(torch.tensor([[0.05]]), torch.tensor([1000.0]).log(), torch.zeros(1), torch.ones(1))
    known = torch.tensor([1000.0])
    for units, least in (("log_counts", 1.1), ("counts", 1.1), ("lognorm", 1.0)):
        blind = observation.moments(composition, units)[1]
        assert blind > least * observation.moments(composition, units, known)[1]
    assert observation.moments(composition, "rates") == observation.moments(composition, "rates", known)


def test_quantiles_of_counts_are_exact():
    levels = (torch.arange(50) + 0.5) / 50
    grid = torch.cartesian_prod(torch.tensor([0.01, 0.5, 4.0, 20.0]), torch.tensor([0.01, 0.5, 1.5]))
    mean, dispersion = grid.T[:, None]
    found = count_quantiles(mean, dispersion, levels)[0].numpy()
    for row, (m, d) in zip(found, grid.numpy().astype(float), strict=True):
        counts = negative_binomial(m, d)
        # Of the widest, counts are summed by twos.
        off = 0 if counts.mean() + 6 * counts.std() < 128 else 1
        np.testing.assert_allclose(row, counts.ppf(levels.numpy()), rtol=0, atol=off)


def test_quantiles_of_large_counts_are_near():
    levels = (torch.arange(20) + 0.5) / 20
    for mean, dispersion in ((300.0, 1e-3), (300.0, 0.05), (200.0, 2.0), (5000.0, 0.5), (20.0, 5.0), (10.0, 10.0)):
        found = count_quantiles(torch.tensor([[mean]]), torch.tensor([[dispersion]]), levels)[0, 0]
        counts = negative_binomial(mean, dispersion)
        np.testing.assert_allclose(found, counts.ppf(levels.numpy()), rtol=0.03, atol=1 + 0.02 * counts.std())


def test_dispersion_is_recovered():
    rng = np.random.default_rng(0)
    true = np.array([0.02, 0.3, 2.0])
    mean = rng.gamma(2, 10, (4000, 3))
    counts = rng.poisson(mean * rng.gamma(1 / true, true, (4000, 3)))
    found = fit_dispersion(torch.from_numpy(counts).float(), torch.from_numpy(mean).float())
    np.testing.assert_allclose(found, true, rtol=0.15)


def test_levels_of_counts_are_uniform_where_the_distribution_is_right():
    rng = np.random.default_rng(0)
    dispersion = np.array([0.5, 1.0])
    mean = rng.gamma(1, 2, (4000, 2)).astype(np.float32)  # a third of the counts are zeros
    counts = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape))
    observation = Observation(2)
    observation.dispersion.copy_(torch.from_numpy(dispersion))
    composition = Composition(torch.from_numpy(mean), torch.zeros(4000), torch.zeros(4000), torch.ones(4000))
    points = observation.points(composition, "counts", torch.ones(4000))
    generator = torch.Generator().manual_seed(0)
    levels = randomised_levels(points, torch.from_numpy(counts).float(), generator).numpy()
    assert (counts == 0).mean() > 0.3
    for gene in range(2):
        assert stats.kstest(levels[:, gene], "uniform").statistic < 0.03
    deeper = observation.points(composition, "counts", torch.full((4000,), 2.0))
    levels = randomised_levels(deeper, torch.from_numpy(counts).float(), generator).numpy()
    assert stats.kstest(levels[:, 0], "uniform").statistic > 0.1


# One model, any units


def test_units_agree_with_each_other(query, model):
    rates = predicted(query, model, units="rates")
    np.testing.assert_allclose(rates.X, rates.layers["rates"], rtol=1e-5)
    maps = {}
    for depth in (500, 5000):
        counts, log_counts, lognorm = (
            predicted(query, model, units=units, depth=depth) for units in ("counts", "log_counts", "lognorm")
        )
        np.testing.assert_allclose(counts.X, rates.X * depth / 1e4, rtol=1e-4)
        # By Jensen's inequality.
        assert (log_counts.X <= np.log1p(counts.X) + 1e-4).all()
        assert (lognorm.X <= np.log1p(rates.X) + 1e-4).all()
        np.testing.assert_allclose(counts.layers["rates"], rates.X, rtol=1e-5)
        maps[depth] = log_counts.X, lognorm.X
    assert (maps[5000][0] > maps[500][0]).all()
    # Of deeper spots log-normalised values are nearer to those of the rates themselves.
    gaps = [np.log1p(rates.X) - maps[depth][1] for depth in (500, 5000)]
    assert gaps[1].mean() < gaps[0].mean()
    assert predicted(query, model).X == pytest.approx(predicted(query, model, units="lognorm").X)


def test_quantiles_and_draws_are_in_the_units(query, model):
    wanted = {"depth": 100, "quantiles": (0.05, 0.5, 0.95), "n_samples": 4}
    counts, logs = (predicted(query, model, units=units, **wanted) for units in ("counts", "log_counts"))
    for name in ("q0.05", "q0.95", "sample_0", "sample_3"):
        values = counts.layers[name]
        assert (values == np.round(values)).all()  # none is large enough here to be taken for smooth
        np.testing.assert_allclose(np.log1p(values), logs.layers[name], atol=1e-5)
    assert (counts.layers["q0.05"] <= counts.layers["q0.5"]).all()


def test_spots_of_one_depth_have_one_total(query, model):
    at_depth = predicted(query, model, units="counts", depth=700)
    ratio = at_depth.X.sum(1) / at_depth.layers["rates"].sum(1)
    np.testing.assert_allclose(ratio, 0.07, rtol=1e-4)
    blind = predicted(query, model, units="counts")
    assert (blind.X.sum(1) / blind.layers["rates"].sum(1)).std() > 0.001
    np.testing.assert_array_equal(blind.obs["total_count"], at_depth.obs["total_count"])


def test_a_column_of_depths_is_each_spots_own(query, model):
    query.obs["depth"] = np.where(np.arange(query.n_obs) % 2, 400, 9000)
    column = predicted(query, model, units="log_counts", depth="depth")
    for row, depth in ((1, 400), (0, 9000)):
        number = predicted(query, model, units="log_counts", depth=depth)
        np.testing.assert_allclose(column.X[row::2], number.X[row::2], rtol=1e-5)


def test_units_are_written_beside_the_values(query, model):
    for options, words in (
        ({}, "log1p(counts per 10,000)"),
        ({"units": "counts", "depth": 3000}, "counts at the depth of 3,000 counts"),
        ({"units": "log_counts"}, "log1p(counts)"),
    ):
        made = hv.tl.predict(query, model, copy=True, **options)
        assert made.uns["histovar"]["units"] == hv.get.prediction(made).uns["units"] == words


def test_rates_and_spots_are_given_to_scanpy(query, model):
    hv.tl.predict(query, model)
    made = hv.get.prediction(query)
    np.testing.assert_array_equal(made.layers["rates"], query.obsm["histovar_rates"])
    columns = ["total_count", "excess", "depth_spread", "novelty"]
    np.testing.assert_array_equal(made.obs[columns], query.obsm["histovar_spots"])
    assert (made.obs["total_count"] > 0).all() and made.obs["novelty"].between(0, 1).all()
    assert not set(columns) & set(query.obs)
    share = query[:, made.var_names].X.sum() / query.X.sum()
    assert made.layers["rates"].sum(1).mean() == pytest.approx(1e4 * share, rel=0.1)


def test_other_predictions_leave_nothing_of_rates(query, model):
    hv.tl.predict(query, model, n_samples=2, quantiles=(0.5,))
    hv.tl.predict(query, model, decoding="greedy")
    left = {name for name in query.obsm if name.startswith("histovar")}
    assert left == {"histovar", "histovar_std", "histovar_tokens", "histovar_source"}
    assert "observation" not in query.uns["histovar"]
    assert set(query.uns["histovar"]["slots"]) == {f"obsm/{name}" for name in left}


# Blind, and at a given depth


def test_predictions_at_the_measured_depth_are_better(measured, model):
    scores = evaluated(measured, model, units="log_counts")
    assert scores["MSE given depth"] < 0.9 * scores["MSE"]
    assert scores["CRPS given depth"] < 0.95 * scores["CRPS"]
    assert scores["PCC-all given depth"] > scores["PCC-all"] + 0.02


@pytest.mark.parametrize("units", ["lognorm", "log_counts", "counts"])
def test_the_predictive_check_is_the_prediction_at_the_measured_depth(measured, model, units):
    blind = evaluated(measured, model, units=units)
    known = evaluated(measured, model, units=units, depth="total")
    for name in ("MSE", "CRPS", "coverage 90", "PCC-all"):
        assert known[name] == pytest.approx(blind[f"{name} given depth"], rel=1e-4)
    assert not any(name.endswith("given depth") for name in known.index)


@pytest.mark.parametrize("units", ["lognorm", "counts"])
def test_intervals_at_the_measured_depth_hold(measured, model, units):
    scores = evaluated(measured, model, units=units)
    assert 0.8 < scores["coverage 90 given depth"] < 0.98  # of counts, intervals hold more than they promise
    assert 0.7 < scores["coverage 80 given depth"] < 0.94


def test_shallow_sections_are_covered_at_their_depth(simulated, model):
    """The section is thinned to a twentieth, so its log-normalised values are far from those of training."""
    query = simulated[simulated.obs["section"] == "S4"].copy()
    query.X.data = np.random.default_rng(0).binomial(query.X.data.astype(int), 0.05).astype(np.float32)
    query.X.eliminate_zeros()
    scores = evaluated(query, model)
    assert scores["MSE given depth"] < 0.8 * scores["MSE"]
    assert 0.8 < scores["coverage 90 given depth"] < 0.99


# What is refused


@pytest.mark.parametrize("options", [{"units": "counts"}, {"units": "lognorm"}, {"depth": 1000}])
def test_models_of_values_have_neither_units_nor_depth(query, model_of_values, options):
    message = r"^units, depth: the model learnt from values of 'values', whose dependence .*; train with counts"
    refuse(query, lambda a: hv.tl.predict(a, model_of_values, **options), ValueError, message)
    hv.tl.predict(query, model_of_values)
    assert not {"histovar_rates", "histovar_spots"} & set(query.obsm)
    assert "rates" not in hv.get.prediction(query).layers


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_single_draws_have_neither_units_nor_depth(query, model, decoding):
    for options in ({"units": "counts"}, {"depth": 1000}):
        message = f"^units, depth: only with decoding='expected', got '{decoding}'; n_samples= adds draws$"
        refuse(query, lambda a, o=options: hv.tl.predict(a, model, decoding=decoding, **o), ValueError, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.nan], r"^depth: obs\['depth'\] is missing, negative or more than 1e\+09 in 1 of 60 spots"),
        ([-1.0, np.inf, 2e9], r"^depth: obs\['depth'\] is missing, .* in 3 of 60 spots"),
        (["1000"], r"^depth: obs\['depth'\] must hold total counts, got (object|str)"),
        ([True], r"^depth: obs\['depth'\] must hold total counts, got"),
    ],
)
def test_depths_that_are_no_total_counts_are_refused(query, model, values, message):
    rest = [True if values == [True] else 1000.0] * (query.n_obs - len(values))
    query.obs["depth"] = [*values, *rest] if not isinstance(values[0], str) else values * query.n_obs
    refuse(query, lambda a: hv.tl.predict(a, model, depth="depth"), ValueError, message)


@pytest.mark.parametrize(
    ("depth", "error", "message"),
    [
        ("missing", KeyError, "depth: no 'missing' in obs, which has .*'section'"),
        (0.5, ValueError, r"^depth: expected a column of obs or a number from 1 to 1e9, got 0\.5"),
        (np.nan, ValueError, "^depth: expected a column of obs or a number from 1 to 1e9, got nan"),
        (True, TypeError, "^depth: expected a column of obs or a number or None, got True"),
    ],
)
def test_depths_that_cannot_be_are_refused(query, model, depth, error, message):
    refuse(query, lambda a: hv.tl.predict(a, model, depth=depth), error, message)


def test_empty_spots_have_a_depth(query, model):
    query.obs["depth"] = [0, *[1000] * (query.n_obs - 1)]
    hv.tl.predict(query, model, units="counts", depth="depth", quantiles=(0.5,))
    assert (query.obsm["histovar"][0] < 1).all() and np.isfinite(query.obsm["histovar_quantiles"]).all()


def test_measurements_in_other_units_are_refused(query, model):
    hv.tl.predict(query, model)
    refuse(query, lambda a: hv.tl.evaluate(a, layer="counts"), KeyError, "layer: no 'counts' in layers")
    query.layers["lognorm"] = query.X.log1p()
    hv.tl.predict(query, model, units="counts")
    refuse(
        query,
        lambda a: hv.tl.evaluate(a, layer="lognorm"),
        ValueError,
        "^layer: .* than the prediction, which is in counts",
    )
    query.X.data += 0.5
    refuse(query, hv.tl.evaluate, ValueError, "X must hold counts, so that predicted counts can be compared")


def test_predictions_named_like_their_units_are_not_taken_for_measured(query, model):
    query = query[:, model.registry["genes"]].copy()
    for units in ("counts", "rates"):
        hv.tl.predict(query, model, units=units, key_added=units)
        assert units in query.layers
        assert hv.tl.evaluate(query, key=units)["pearson"].max() < 0.99


@pytest.mark.usefixtures("brief")
def test_a_layer_named_like_units_is_a_layer(training, query):
    for adata in (training, query):
        adata.layers["counts"] = adata.X.copy()
    model = hv.tl.train(training, layer="counts", **OPTIONS)
    hv.tl.predict(query, model)
    assert not model.stage2.of_counts and query.uns["histovar"]["units"] == "counts"
    before = hv.tl.evaluate(query)["mse"]
    query.layers["counts"] *= 3
    assert (hv.tl.evaluate(query)["mse"] > before).all()


def test_records_that_were_changed_are_refused(query, model):
    hv.tl.predict(query, model)
    cut = query.copy()
    cut.obsm["histovar_rates"] = cut.obsm["histovar_rates"][:, :4]
    for call in (hv.tl.evaluate, hv.get.prediction):
        refuse(cut, call, ValueError, r"obsm\['histovar_rates'\] holds float32 of shape \(60, 4\), expected .* 60 x 30")
    query.uns["histovar"]["observation"]["dispersion"] = np.ones(3)
    refuse(
        query, hv.tl.evaluate, ValueError, r"uns\['histovar'\]\['observation'\]\['dispersion'\] holds .* predict again"
    )


# Learning from counts, or from values


def normalized(adata):
    """With log-normalised values over all genes, of which some are then dropped."""
    adata.layers["lognorm"] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=1e4, layer="lognorm")
    sc.pp.log1p(adata, layer="lognorm")
    return adata


def test_genes_dropped_after_normalising_are_in_the_totals(training):
    totals = np.asarray(training.X.sum(1)).ravel()
    few = normalized(training)[:, 5:35].copy()
    values = few.layers["lognorm"].toarray()
    counts = counts_of_values(few, np.arange(30), values, 1e4)
    np.testing.assert_allclose(counts.totals, totals, rtol=1e-4)
    np.testing.assert_array_equal(counts.panel, few.X.toarray())
    some = counts_of_values(few, np.arange(10, 20), values[3:9, 10:20], 1e4, np.arange(3, 9))
    np.testing.assert_allclose(some.totals, totals[3:9], rtol=1e-4)


@pytest.mark.usefixtures("brief")
def test_a_model_of_few_genes_learns_the_depth_of_all(training):
    log_totals = np.log(np.asarray(training.X.sum(1)).ravel())
    model = hv.tl.train(normalized(training)[:, 5:35].copy(), **OPTIONS)
    assert model.stage2.of_counts and model.stage2.is_calibrated
    assert float(model.stage2.prior.depth_mean) == pytest.approx(log_totals.mean(), abs=1e-3)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("change", ["smoothed", "of other counts", "without counts"])
def test_values_that_do_not_follow_the_counts_are_learnt_as_values(training, query, change):
    training = normalized(training)
    if change == "smoothed":
        training.layers["lognorm"] = 0.5 * (training.layers["lognorm"] + training.layers["lognorm"][::-1])
    elif change == "of other counts":
        training.X = training.X[::-1].copy()
    else:
        training.X = None
    model = hv.tl.train(training, **OPTIONS)
    assert not model.stage2.of_counts and model.stage2.is_calibrated
    with pytest.raises(ValueError, match="^units, depth: the model learnt from values"):
        hv.tl.predict(query, model, units="counts")


# Wherever the object is


@pytest.mark.parametrize("options", [{"units": "log_counts"}, {"units": "counts", "depth": "total"}, {"depth": 900}])
def test_chunks_are_predicted_in_the_same_units(simulated, model, options):
    whole = simulated[np.random.default_rng(0).permutation(simulated.n_obs)].copy()
    whole.obs["total"] = np.asarray(whole.X.sum(1)).ravel()
    lazy = whole.copy()
    lazy.obsm[KEY] = da.from_array(whole.obsm[KEY], chunks=(37, 16))
    for adata in (whole, lazy):
        hv.tl.predict(adata, model, quantiles=(0.1, 0.9), **options)
    for name in ("histovar", "histovar_std", "histovar_rates", "histovar_spots", "histovar_quantiles"):
        assert isinstance(lazy.obsm[name], da.Array)
        np.testing.assert_allclose(
            lazy.obsm[name].compute(), whole.obsm[name], rtol=1e-3, atol=1 if "quantiles" in name else 1e-4
        )
    scores = [hv.tl.evaluate(adata) for adata in (whole, lazy)]
    np.testing.assert_allclose(scores[0]["crps"], scores[1]["crps"], rtol=1e-3)


def test_loaded_models_predict_the_same(measured, model, loaded):
    for options in ({"units": "counts", "depth": "total"}, {"units": "lognorm", "quantiles": (0.05, 0.95)}):
        ours, theirs = (hv.tl.predict(measured, m, copy=True, **options) for m in (loaded, model))
        for name in ("histovar", "histovar_std", "histovar_rates", "histovar_spots"):
            np.testing.assert_array_equal(ours.obsm[name], theirs.obsm[name])


def test_predictions_in_files_are_scored_the_same(measured, model, tmp_path):
    hv.tl.predict(measured, model, units="counts", depth="total")
    measured.write_h5ad(tmp_path / "made.h5ad")
    measured.write_zarr(tmp_path / "made.zarr")
    scores = hv.tl.evaluate(measured)
    for read, name in ((ad.read_h5ad, "made.h5ad"), (ad.read_zarr, "made.zarr")):
        stored = read(tmp_path / name)
        np.testing.assert_allclose(hv.tl.evaluate(stored)["crps"], scores["crps"], rtol=1e-5)
        assert stored.uns["histovar"]["evaluated_distribution"] == "negative binomial"
    del measured.obs["total"]
    with pytest.raises(KeyError, match="depth: no 'total' in obs"):
        hv.tl.evaluate(measured)


def test_joined_predictions_are_scored(simulated, model):
    parts = [simulated[simulated.obs["section"] == name].copy() for name in ("S3", "S4")]
    for part in parts:
        hv.tl.predict(part, model)
    joined = ad.concat(parts, uns_merge="same")
    hv.tl.evaluate(joined)
    summary = joined.uns["histovar"]["evaluation"]
    assert joined.uns["histovar"]["evaluated_distribution"] == "negative binomial"
    hv.tl.evaluate(parts[1])
    alone = parts[1].uns["histovar"]["evaluation"].loc["S4"]
    for name in ("CRPS", "MSE", "coverage 90", "CRPS given depth"):
        assert summary.loc["S4", name] == pytest.approx(alone[name], rel=1e-4)


def test_predictions_of_several_models_are_joined_without_their_distributions(simulated, model, loaded):
    loaded.stage2.observation.dispersion.mul_(2)
    parts = [simulated[simulated.obs["section"] == name].copy() for name in ("S3", "S4")]
    for part, each in zip(parts, (model, loaded), strict=True):
        hv.tl.predict(part, each, quantiles=(0.01, 0.25, 0.5, 0.75, 0.99))
    joined = ad.concat(parts, uns_merge="same")
    hv.tl.evaluate(joined)
    assert joined.uns["histovar"]["evaluated_distribution"] == "quantiles"
    for part in parts:
        hv.tl.predict(part, model, units="counts", depth=100 if part is parts[0] else 200)
    with pytest.raises(KeyError, match=r"uns\['histovar'\] has no .*'depth'.*, as after anndata\.concat"):
        hv.tl.evaluate(ad.concat(parts, uns_merge="same"))
