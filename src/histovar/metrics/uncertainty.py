"""Scores of predicted distributions: CRPS, coverage, PIT.

A predictive distribution is given as quantiles at known levels, (n_spots, n_genes, n_levels). Sorted draws are
quantiles (:func:`sample_quantiles`), and a mean with a standard deviation gives those of a normal distribution
(:func:`normal_quantiles`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from histovar._arguments import Seed, Share, check_arguments

from ._arrays import Draws, Levels, Matrix, Quantiles

INTERVALS = (0.5, 0.8, 0.9, 0.95)


@check_arguments
def crps_samples(samples: Draws, measured: Matrix) -> NDArray[np.float64]:
    r"""Continuous ranked probability score of draws, in the units of expression; smaller is better.

    ``E|X - y| - E|X - X'| / 2`` over the draws (Gneiting & Raftery 2007, equation 21), which is the score of their
    empirical distribution: :func:`crps_quantiles` of the sorted draws, exactly.

    Parameters
    ----------
    samples
        (n_spots, n_genes, n_samples).
    measured
        (n_spots, n_genes).

    Returns
    -------
    ndarray
        (n_spots, n_genes).
    """
    return crps_quantiles(*sample_quantiles(samples), measured)


@check_arguments
def crps_quantiles(quantiles: Quantiles, levels: Levels, measured: Matrix) -> NDArray[np.float64]:
    """CRPS of a distribution given by quantiles: twice the pinball loss, integrated over the levels.

    The integral is taken by the trapezoidal rule between the levels; the outermost levels stand for the tails beyond
    them. With few levels it is a rough approximation.

    Parameters
    ----------
    quantiles
        (n_spots, n_genes, n_levels), increasing.
    levels
        (n_levels,).
    measured
        (n_spots, n_genes).

    Returns
    -------
    ndarray
        (n_spots, n_genes).
    """
    tau = np.asarray(levels, dtype=np.float64)
    edges = np.concatenate([[0.0], (tau[1:] + tau[:-1]) / 2, [1.0]])
    error = np.asarray(measured, dtype=np.float64)[..., None] - quantiles
    pinball = np.maximum(tau * error, (tau - 1) * error)
    score: NDArray[np.float64] = 2 * pinball @ np.diff(edges)
    return score


@check_arguments
def crps_normal(mean: Matrix, std: Matrix, measured: Matrix) -> NDArray[np.float64]:
    """CRPS of normal distributions in closed form (Gneiting et al. 2005, equation 5), all (n_spots, n_genes)."""
    spread = np.maximum(np.asarray(std, dtype=np.float64), 1e-12)
    z = (np.asarray(measured) - mean) / spread
    score: NDArray[np.float64] = spread * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return score


@check_arguments
def normal_quantiles(mean: Matrix, std: Matrix, levels: Levels) -> NDArray[np.float64]:
    """Quantiles of normal distributions cut off at 0: (n_spots, n_genes) to (n_spots, n_genes, n_levels)."""
    values = np.asarray(mean)[..., None] + np.asarray(std)[..., None] * norm.ppf(np.asarray(levels))
    return np.clip(values, 0, None)


@check_arguments
def interval(quantiles: Quantiles, levels: Levels, share: Share) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ends of the central interval that should contain `share` of the values, each (n_spots, n_genes).

    Raises
    ------
    ValueError
        If `levels` do not reach that far out.
    """
    tau = np.asarray(levels, dtype=np.float64)
    ends = ((1 - share) / 2, (1 + share) / 2)
    if ends[0] < tau[0] - 1e-9 or ends[1] > tau[-1] + 1e-9:
        raise ValueError(f"share: levels from {tau[0]:g} to {tau[-1]:g} have no central interval of {share:g}")
    low, high = (_at(quantiles, tau, level) for level in ends)
    return low, high


def _at(quantiles: NDArray[Any], tau: NDArray[np.float64], level: float) -> NDArray[Any]:
    """Quantile at a level, interpolated linearly between those given."""
    right = min(max(int(np.searchsorted(tau, level)), 1), len(tau) - 1)
    share = np.clip((level - tau[right - 1]) / (tau[right] - tau[right - 1]), 0, 1)
    value: NDArray[Any] = quantiles[..., right - 1] * (1 - share) + quantiles[..., right] * share
    return value


@check_arguments
def coverage(low: Matrix, high: Matrix, measured: Matrix) -> NDArray[np.float64]:
    """Coverage of an interval, ends included: share of the spots, (n_genes,); NaN where a value is NaN."""
    y = np.asarray(measured)
    share: NDArray[np.float64] = ((y >= low) & (y <= high)).mean(0)
    return np.where(np.isnan(low + high + y).any(0), np.nan, share)


@check_arguments
def top_coverage(
    low: Matrix, high: Matrix, measured: Matrix, predicted: Matrix, top: Share = 0.1
) -> NDArray[np.float64]:
    """Coverage of an interval among the spots with a gene's highest predictions.

    Marginal coverage may be right although this one is not.

    Parameters
    ----------
    low, high, measured
        As in :func:`coverage`, (n_spots, n_genes).
    predicted
        (n_spots, n_genes) predictions; spots at or above their (1 - `top`) quantile are chosen.
    top
        Share of the spots.

    Returns
    -------
    ndarray
        (n_genes,); NaN where a value is NaN.
    """
    p, y = np.asarray(predicted), np.asarray(measured)
    if not len(p):
        return np.full(p.shape[1], np.nan)
    chosen = p >= np.quantile(p, 1 - top, axis=0)
    covered = (y >= low) & (y <= high) & chosen
    return np.where(np.isnan(low + high + y + p).any(0), np.nan, covered.sum(0) / chosen.sum(0).clip(min=1))


@check_arguments
def pit(quantiles: Quantiles, levels: Levels, measured: Matrix, random_state: Seed = 0) -> NDArray[np.float64]:
    """Probability integral transform: the level at which the measured value lies; uniform if calibrated.

    If several quantiles equal the measured value, as they do at zero, a level is drawn at random between theirs (Czado
    et al. 2009); if the value lies beyond all quantiles, between the outermost level and 0 or 1.

    Parameters
    ----------
    quantiles
        (n_spots, n_genes, n_levels), increasing.
    levels
        (n_levels,).
    measured
        (n_spots, n_genes).
    random_state
        Seed of the draws between levels.

    Returns
    -------
    ndarray
        (n_spots, n_genes), between 0 and 1.
    """
    y = np.asarray(measured)[..., None]
    tau = np.concatenate([[0.0], np.asarray(levels, dtype=np.float64), [1.0]])
    below = (quantiles < y).sum(2)
    not_above = (quantiles <= y).sum(2)
    height = np.random.default_rng(random_state).random(below.shape)
    low, high = tau[below], tau[np.minimum(not_above + 1, len(tau) - 1)]
    return low + height * (high - low)


@check_arguments
def sample_quantiles(samples: Draws) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Turn draws into quantiles: sorted draws, and their levels (i + 1/2) / n."""
    n = np.shape(samples)[2]
    return np.sort(samples, axis=2), (np.arange(n) + 0.5) / n
