"""Predicted distributions: both kinds of uncertainty, calibration, and the scores that judge them."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

import histovar as hv
from histovar.model import Calibration

from .conftest import QUICK, small_config


def test_crps_is_the_integral_it_stands_for():
    def integral(cdf, y):
        return quad(lambda x: (cdf(x) - (x >= y)) ** 2, -12, 12, points=[y], limit=400)[0]

    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=(1, 1, 7)), np.array([[0.4]])
    by_hand = integral(lambda x: (draws <= x).mean(), 0.4)
    assert hv.metrics.crps_samples(draws, y)[0, 0] == pytest.approx(by_hand, abs=1e-3)
    mean, std = np.array([[0.3]]), np.array([[1.7]])
    by_hand = integral(lambda x: norm.cdf(x, 0.3, 1.7), 0.4)
    assert hv.metrics.crps_normal(mean, std, y)[0, 0] == pytest.approx(by_hand, abs=1e-6)
    levels = (np.arange(400) + 0.5) / 400
    quantiles = norm.ppf(levels, 0.3, 1.7)[None, None]
    assert hv.metrics.crps_quantiles(quantiles, levels, y)[0, 0] == pytest.approx(by_hand, rel=1e-2)


def test_coverage_and_pit_of_a_known_distribution():
    rng = np.random.default_rng(0)
    mean, std = rng.normal(size=(3000, 4)), rng.uniform(0.5, 2, (3000, 4))
    measured = rng.normal(mean, std) + 50
    levels = np.linspace(0.01, 0.99, 99)
    quantiles = hv.metrics.normal_quantiles(mean + 50, std, levels)
    low, high = hv.metrics.interval(quantiles, levels, 0.8)
    np.testing.assert_allclose(hv.metrics.coverage(low, high, measured), 0.8, atol=0.03)
    place = hv.metrics.pit(quantiles, levels, measured)
    np.testing.assert_allclose(np.quantile(place, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    with pytest.raises(ValueError, match=r"no central interval of 0\.99"):
        hv.metrics.interval(quantiles, levels, 0.99)


def test_pit_of_zeros_spreads_over_the_levels_that_are_zero():
    levels = np.linspace(0.05, 0.95, 19)
    quantiles = np.broadcast_to(np.clip(levels - 0.5, 0, None), (500, 1, 19))
    place = hv.metrics.pit(quantiles, levels, np.zeros((500, 1)))
    assert place.min() < 0.05 and 0.45 < place.max() < 0.6


def test_calibration_mends_wrong_deviations():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4000, 3, generator=generator)
    stated = torch.ones(4000, 3)
    skewed = torch.distributions.Exponential(1.0).sample((4000, 3)) - 1
    measured = mean + skewed * torch.tensor([0.3, 1.0, 3.0])
    calibration = Calibration(3)
    assert not calibration.fitted
    calibration.fit(measured[:2000], mean[:2000], stated[:2000])
    low, high = calibration.quantiles(mean[2000:], stated[2000:], (0.05, 0.95)).unbind(2)
    inside = (measured[2000:] >= low) & (measured[2000:] <= high)
    np.testing.assert_allclose(inside.float().mean(0), 0.9, atol=0.03)
    np.testing.assert_allclose(calibration.spread, [0.3, 1.0, 3.0], rtol=0.15)


def test_calibration_of_many_genes_is_that_of_each():
    generator = torch.Generator().manual_seed(0)
    measured = torch.randn(60, 2100, generator=generator)
    zeros, ones = torch.zeros_like(measured), torch.ones_like(measured)
    many, last = Calibration(2100), Calibration(30)
    many.fit(measured, zeros, ones)
    last.fit(measured[:, -30:], zeros[:, -30:], ones[:, -30:])
    torch.testing.assert_close(many.scores[:, -30:], last.scores)


def test_calibrated_draws_keep_ranks_and_take_calibrated_values():
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration(2)
    calibration.fit(2 * torch.randn(3000, 2, generator=generator), torch.zeros(3000, 2), torch.ones(3000, 2))
    shared = torch.randn(5, 1, 200, generator=generator)
    samples = torch.cat([shared, -shared], 1)
    made = calibration.draws(samples, torch.zeros(5, 2), torch.ones(5, 2))
    torch.testing.assert_close(made.argsort(2), samples.argsort(2))
    assert made.std() == pytest.approx(2, rel=0.1)


def test_noise_ceiling_bounds_what_a_perfect_predictor_scores():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0, 0.8, (1500, 30)))
    rate = rate / rate.sum(1, keepdims=True) * 200
    counts = rng.poisson(rate)
    ceiling = hv.metrics.noise_ceiling(counts)
    truth = np.log1p(counts / counts.sum(1, keepdims=True).clip(1) * 1e4)
    best = hv.metrics.pearson(np.log1p(rate), truth)
    assert abs(ceiling.mean() - best.mean()) < 0.1
    assert (hv.metrics.noise_ceiling(20 * counts) > ceiling).all()


def test_partial_pearson_sees_through_depth():
    rng = np.random.default_rng(0)
    total = np.exp(rng.normal(8, 1, 400))
    signal = rng.normal(size=(400, 2))
    measured = np.log(total)[:, None] + signal
    depth_only = np.repeat(np.log(total)[:, None], 2, 1) + rng.normal(0, 0.01, (400, 2))
    assert (hv.metrics.pearson(depth_only, measured) > 0.6).all()
    assert np.abs(hv.metrics.partial_pearson(depth_only, measured, total)).max() < 0.15
    assert (hv.metrics.partial_pearson(signal, measured, total) > 0.95).all()


def test_variance_and_correlation_errors():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5))
    assert hv.metrics.relative_variance_distance(measured, measured) == 0
    assert hv.metrics.relative_variance_distance(np.zeros_like(measured), measured) == pytest.approx(1)
    assert hv.metrics.gene_correlation_error(3 * measured + 1, measured) == pytest.approx(0, abs=1e-9)
    shuffled = np.stack([rng.permutation(column) for column in measured.T], 1)
    assert hv.metrics.gene_correlation_error(shuffled, measured) > 0.2
    draws = np.stack([measured, measured], 2)
    assert hv.metrics.gene_correlation_error(draws, measured) == pytest.approx(0, abs=1e-9)


def test_calibration_that_fails_leaves_the_object_as_it_was(prepared, loaded):
    fresh, before = prepared.copy(), deepcopy(loaded.registry)
    del fresh.layers["lognorm"], fresh.uns["histovar"]["lognorm"]
    with pytest.raises(ValueError, match="device"):
        hv.tl.calibrate(fresh, loaded, device="cuda:99")
    assert "lognorm" not in fresh.layers and loaded.registry == before
    hv.tl.calibrate(fresh, loaded, device="cpu")
    assert "lognorm" in fresh.layers


def test_intervals_say_that_they_are_calibrated(query, model):
    hv.tl.predict(query, model, quantiles=(0.025, 0.1, 0.5, 0.9, 0.975))
    stored = query.uns["histovar"]
    assert stored["calibrated"]
    cube = query.obsm["histovar_quantiles"]
    assert cube.shape == (query.n_obs, 30, 5)
    assert (np.diff(cube, axis=2) >= 0).all() and (cube >= 0).all()
    scores = hv.tl.evaluate(query)
    assert query.uns["histovar"]["evaluated_distribution"] == "negative binomial"
    summary = query.uns["histovar"]["evaluation"].loc["mean"]
    assert 0.7 < summary["coverage 80"] < 0.92
    assert summary["width 50"] < summary["width 80"] < summary["width 95"]
    assert {"crps", "coverage", "partial_pearson"} <= set(scores)
    assert {"RVD", "correlation error", "PIT deviation", "uncertainty PCC", "PCC-partial"} <= set(summary.index)


def test_without_calibration_quantiles_need_draws(query, loaded_of_values):
    loaded, query.layers["values"] = loaded_of_values, query.X.log1p()
    loaded.stage2.calibration = Calibration(30)
    with pytest.raises(ValueError, match="quantiles.*pass n_samples.*calibrate"):
        hv.tl.predict(query, loaded, quantiles=(0.5,))
    hv.tl.predict(query, loaded, quantiles=(0.5,), n_samples=30)
    assert not query.uns["histovar"]["calibrated"]
    middle = np.median(query.obsm["histovar_samples"], axis=2)
    np.testing.assert_allclose(query.obsm["histovar_quantiles"][:, :, 0], middle, atol=1e-5)
    hv.tl.calibrate(query, loaded)
    assert loaded.registry["calibration"] == {"sections": ["S4"], "n_spots": 60, "groups": []}
    hv.tl.predict(query, loaded, quantiles=(0.05, 0.95))
    assert query.uns["histovar"]["calibrated"]


def test_calibration_on_part_of_the_training_sections_is_refused(prepared, loaded):
    with pytest.raises(ValueError, match="give all of these"):
        hv.tl.calibrate(prepared[:100].copy(), loaded)
    with pytest.raises(ValueError, match="too few to calibrate"):
        hv.tl.calibrate(prepared[:10].copy(), loaded)


def test_members_that_disagree_widen_the_prediction(query, loaded_of_values):
    loaded = loaded_of_values
    loaded.stage2.prior.linear.share.fill_(0)  # which all members have in common
    narrow = hv.tl.predict(query, loaded, n_samples=20, copy=True)
    with torch.no_grad():
        loaded.stage2.prior.genes.output.bias[-1] += 3
        loaded.stage2.prior.genes.output.bias[-2] -= 3
    wide = hv.tl.predict(query, loaded, n_samples=20, copy=True)
    gap = np.abs(wide.obsm["histovar"] - narrow.obsm["histovar"]).mean().mean()
    assert gap < 0.1
    assert (wide.obsm["histovar_std"].mean() > 1.5 * narrow.obsm["histovar_std"].mean()).all()
    loaded.stage2.calibration = Calibration(30)
    wide = hv.tl.predict(query, loaded, n_samples=20, copy=True)
    assert wide.obsm["histovar_samples"].std(2).mean() > 1.5 * narrow.obsm["histovar_samples"].std(2).mean()


def test_shifted_and_scaled_embeddings_of_a_section_change_little(query, model):
    before = hv.tl.predict(query, model, copy=True).obsm["histovar"]
    query.obsm["X_histology"] = 1.5 * query.obsm["X_histology"] + 4
    after = hv.tl.predict(query, model, copy=True).obsm["histovar"]
    within = hv.metrics.pearson(after, before)
    assert np.median(within) > 0.85


@pytest.mark.usefixtures("brief")
def test_without_a_prior_only_held_out_sections_calibrate(prepared, query):
    config = small_config(n_members=0)
    model = hv.tl.train(prepared.copy(), use_rep="X_histology", library_key="section", config=config, **QUICK)
    assert not model.stage2.is_calibrated
    with pytest.raises(ValueError, match="no prior.*held-out sections"):
        hv.tl.calibrate(prepared.copy(), model)
    hv.tl.calibrate(query, model)
    assert model.stage2.is_calibrated


def stained(adata, seed):
    """Embeddings of every section shifted and scaled by random amounts of its own."""
    rng = np.random.default_rng(seed)
    values = adata.obsm["X_histology"].copy()
    for section in adata.obs["section"].unique():
        rows = (adata.obs["section"] == section).to_numpy()
        shift = 4 * rng.normal(size=values.shape[1]) * values.std(0)
        values[rows] = values[rows] * rng.uniform(0.6, 1.6, values.shape[1]) + shift
    adata = adata.copy()
    adata.obsm["X_histology"] = values.astype(np.float32)
    return adata


def test_stain_is_taken_out_of_a_section_whether_training_had_it_or_not():
    # Sections large enough for their own statistics to be known: of 60 spots the score hangs on the seed.
    sections = hv.datasets.simulate(4, 150, 40, embedding_dim=16, random_state=1)
    query, training = (sections[(sections.obs["section"] == "S4") == held_out].copy() for held_out in (True, False))
    hv.pp.gene_panel(training, n_genes=30)
    hv.pp.gene_scales(training, scales=(1, 4, 10))
    options = {"use_rep": "X_histology", "library_key": "section", "config": small_config(), **QUICK}

    def score(trained, adata):
        made = hv.tl.predict(adata, trained, copy=True)
        return hv.tl.evaluate(made)["pearson"].mean()

    model, other = hv.tl.train(training, **options), hv.tl.train(stained(training, 0), **options)
    clean = score(model, query)
    assert score(other, stained(query, 1)) > 0.8 * clean  # a third of the members see the stain
    assert score(model, stained(query, 1)) > 0.75 * clean
