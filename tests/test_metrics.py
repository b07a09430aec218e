import numpy as np
import pytest
from scipy import stats

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
