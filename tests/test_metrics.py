import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from histovar import metrics


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(40, 5))
    return measured + rng.normal(size=(40, 5)), measured


def test_correlations_are_those_of_scipy(pair):
    predicted, measured = pair
    for ours, theirs in ((metrics.pearson, stats.pearsonr), (metrics.spearman, stats.spearmanr)):
        expected = [theirs(p, m).statistic for p, m in zip(predicted.T, measured.T, strict=True)]
        np.testing.assert_allclose(ours(predicted, measured), expected)


def test_constant_predictions_count_as_zero(pair):
    predicted, measured = pair
    predicted[:, 2] = 0.1 + 0.2
    scores = metrics.per_gene(predicted, measured, list("abcde"))
    assert scores.loc["c", ["pearson", "spearman"]].tolist() == [0, 0]
    assert scores["constant"].tolist() == [False, False, True, False, False]
    summary = metrics.summary(scores)
    assert summary["n_constant"] == 1
    assert summary["PCC-all"] == pytest.approx(scores["pearson"].sum() / 5)
    assert "PCC-10" not in summary
    assert summary["n_undefined"] == 0


@pytest.fixture(autouse=True)
def no_warnings_of_numpy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_partial_correlation_is_that_of_the_residuals(pair):
    predicted, measured = pair
    total = np.random.default_rng(1).poisson(500, 40)
    depth = np.log1p(total)[:, None] ** [1, 2]
    left = [y - LinearRegression().fit(depth, y).predict(depth) for y in pair]
    expected = [stats.pearsonr(p, m).statistic for p, m in zip(left[0].T, left[1].T, strict=True)]
    np.testing.assert_allclose(metrics.partial_pearson(predicted, measured, total), expected, atol=1e-6)
    same = metrics.partial_pearson(predicted, measured, np.full(40, 500))
    np.testing.assert_allclose(same, metrics.pearson(predicted, measured), atol=1e-9)


def correlations(predicted, measured):
    total = np.arange(100, 100 + len(measured))
    return np.stack(
        [
            metrics.pearson(predicted, measured),
            metrics.spearman(predicted, measured),
            metrics.partial_pearson(predicted, measured, total),
        ]
    )


@pytest.mark.parametrize("constant", [0.0, 0.1 + 0.2, 1e6])
def test_a_constant_measurement_has_no_correlation_and_a_constant_prediction_counts_as_zero(pair, constant):
    predicted, measured = pair
    before = correlations(predicted, measured)
    measured[:, [1, 3]] = constant
    predicted[:, [2, 3]] = constant
    after = correlations(predicted, measured)
    assert np.isnan(after[:, [1, 3]]).all()
    assert (after[:, 2] == 0).all()
    np.testing.assert_allclose(after[:, [0, 4]], before[:, [0, 4]])
    assert metrics.mean_pearson(predicted, measured) == pytest.approx(after[0, [0, 2, 4]].mean())
    scores = metrics.per_gene(predicted, measured, list("abcde"))
    assert scores["constant"].tolist() == [False, False, True, False, False]
    summary = metrics.summary(scores)
    assert (summary["n_genes"], summary["n_constant"], summary["n_undefined"]) == (5, 1, 2)
    assert summary["PCC-all"] == pytest.approx(after[0, [0, 2, 4]].mean())
    assert summary["MSE"] == pytest.approx(((predicted - measured) ** 2).mean())


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_gene_with_nan_has_no_correlation_and_leaves_others_alone(pair, broken, side):
    before = correlations(*pair)
    pair[side][7, 2] = broken
    pair[1 - side][:, 2] = 1.0  # NaN, not the 0 of a constant prediction
    after = correlations(*pair)
    assert np.isnan(after[:, 2]).all()
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(after[:, others], before[:, others])
    assert np.isfinite(metrics.mean_pearson(*pair))


@pytest.mark.parametrize("n_spots", [0, 1, 2, 4, 5])
def test_correlations_of_few_spots(pair, n_spots):
    predicted, measured = (values[:n_spots] for values in pair)
    pearson, spearman, partial = correlations(predicted, measured)
    assert np.isnan(partial).all() == (n_spots < 5)
    assert np.isnan(pearson).all() == np.isnan(spearman).all() == (n_spots < 2)
    assert np.isnan(metrics.mean_pearson(predicted, measured)) == (n_spots < 2)
    assert np.isnan(metrics.relative_variance_distance(predicted, measured)) == (n_spots < 2)
    assert np.isnan(metrics.gene_correlation_error(predicted, measured)) == (n_spots < 2)


def test_what_depth_alone_explains_has_no_partial_correlation(pair):
    predicted, measured = pair
    total = np.random.default_rng(1).poisson(500, 40)
    predicted[:, 0] = measured[:, 1] = 3 * np.log1p(total) + 1
    scores = metrics.partial_pearson(predicted, measured, total)
    assert scores[0] == 0 and np.isnan(scores[1])
    assert np.isfinite(scores[2:]).all()
    assert np.isnan(metrics.partial_pearson(predicted, measured, np.full(40, np.nan))).all()


def test_best_genes_are_the_best_of_those_that_vary():
    rng = np.random.default_rng(0)
    measured = rng.normal(size=(30, 12))
    predicted = measured + rng.normal(size=(30, 12))
    genes = [str(i) for i in range(12)]
    measured[:, 0] = 0
    best = np.sort(metrics.pearson(predicted, measured)[1:])[-10:]
    assert metrics.summary(metrics.per_gene(predicted, measured, genes))["PCC-10"] == pytest.approx(best.mean())
    measured[:, :3] = 0
    summary = metrics.summary(metrics.per_gene(predicted, measured, genes))
    assert summary["PCC-10"] == summary["PCC-all"] > 0 and "PCC-50" not in summary
    nothing = metrics.summary(metrics.per_gene(predicted, 0 * measured, genes))
    assert np.isnan(nothing["PCC-all"]) and np.isnan(nothing["Spearman"]) and nothing["n_undefined"] == 12


def test_genes_that_do_not_vary_are_left_out_of_variance_and_correlation_errors(pair):
    predicted, measured = pair
    kept = [0, 2, 4]
    measured[:, [1, 3]] = 2.0
    for score in (metrics.relative_variance_distance, metrics.gene_correlation_error):
        assert score(predicted, measured) == pytest.approx(score(predicted[:, kept], measured[:, kept]))
        assert np.isnan(score(predicted, np.zeros_like(measured)))
    draws = np.stack([predicted, measured], 2)
    expected = metrics.gene_correlation_error(draws[:, kept], measured[:, kept])
    assert metrics.gene_correlation_error(draws, measured) == pytest.approx(expected)
    assert np.isnan(metrics.gene_correlation_error(predicted[:, :2], measured[:, :2]))
    flat = predicted.copy()
    flat[:, 0] = 1.0  # a constant prediction stays in, as uncorrelated
    theirs, ours = (np.corrcoef(x[:, kept], rowvar=False)[np.triu_indices(3, 1)] for x in (measured, predicted))
    by_hand = np.sqrt(np.mean((ours * [0, 0, 1] - theirs) ** 2))
    assert metrics.gene_correlation_error(flat, measured) == pytest.approx(by_hand)


def test_noise_ceiling_of_genes_that_do_not_vary_or_are_all_noise():
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.exp(rng.normal(2, 1, (60, 4))))
    counts[:, 1] = 0
    counts[:, 2] = 0
    counts[5, 2] = 1  # all in one half
    ceiling = metrics.noise_ceiling(counts)
    assert np.isnan(ceiling[1]) and ceiling[2] == 0 and (ceiling[[0, 3]] > 0.5).all()
    assert np.isnan(metrics.noise_ceiling(counts[:1])).all()


def test_statistics_of_genes_are_compared_over_other_spots():
    values = np.random.default_rng(0).random((30, 4))
    twice = np.concatenate([values, values])
    assert metrics.gene_correlation_error(twice, values) == pytest.approx(0, abs=1e-12)
    assert metrics.relative_variance_distance(twice, values) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="measured: expected 4 genes, as in predicted, got 3"):
        metrics.gene_correlation_error(twice, values[:, :3])
