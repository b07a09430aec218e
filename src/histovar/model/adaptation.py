"""Adapt predictions to a section of which a few spots were measured: levels of genes, depth, kriging, calibration.

A gene's *level* is by how much its log rate in this section differs from what the model predicts. Levels are shrunk by
the known variance between sections and by the variance that the genes' levels turn out to have (empirical Bayes), and
so is the shift of log depth. The residuals of the measured spots are then modelled as a Gaussian process of their
coordinates (kriging): near a spot where more of a gene was measured than predicted, more of it is predicted. Its length
scale and its share of the variance are chosen for all genes together. Each step is checked by predicting measured spots
from the others, and left out unless it improves on that; the Gaussian process must improve by more than a standard
error. Dispersion and depth errors become those of the left-out spots, shrunk towards the model's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.stats import norm, t
from torch import Tensor, nn

from .negative_binomial import negative_log_likelihood
from .observation import INDIVIDUALS_APART, PATIENTS, Composition, Observation

# Fewest measured spots for an estimate of levels and their uncertainty.
LEAST_MEASURED = 9
# Most measured spots in the Gaussian process, whose cost grows with their cube.
MOST_NEIGHBORS = 1000
# Candidates for the Gaussian process: its length scale, in distances between adjacent spots, and the share of the
# residual variance that it explains.
LENGTHS, SHARES = (2.0, 6.0, 18.0), (0.1, 0.2, 0.4, 0.6, 0.8)
# Largest change of a log rate, or of log depth, by the Gaussian process.
LARGEST_CHANGE = 2.0
# Weight of the training data in dispersion and depth errors, in measured spots, and weight of other sections in the
# variance of levels, in genes.
PRIOR_SPOTS, PRIOR_GENES = 10, 10
# Iterations of Newton's method and of empirical Bayes.
ROUNDS = 40
# Candidates for the factor of the dispersions.
FACTORS = tuple(math.exp(step / 10) for step in range(-20, 11))
# Factor by which :meth:`Observation.fit` inflates the variance between groups in dispersion and depth errors.
INFLATION = float((t.ppf(0.95, PATIENTS) / norm.ppf(0.95)) ** 2)


class Adaptation(nn.Module):
    """Corrections of predicted rates and depth, learnt from measured spots of a section.

    Parameters
    ----------
    n_spots
        Number of measured spots in the Gaussian process.
    n_genes
        Number of genes.
    """

    def __init__(self, n_spots: int, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("log_rates", torch.zeros(n_genes))
        self.register_buffer("log_depth", torch.zeros(()))
        self.register_buffer("place", torch.zeros(n_spots, 2))
        self.register_buffer("lengths", torch.ones(2))
        self.register_buffer("weights", torch.zeros(n_spots, n_genes))
        self.register_buffer("depth_weights", torch.zeros(n_spots, 1))

    log_rates: Tensor
    log_depth: Tensor
    place: Tensor
    lengths: Tensor
    weights: Tensor
    depth_weights: Tensor

    @property
    def neighbors_tell(self) -> list[str]:
        """Which predictions are corrected near measured spots, of ``"rates"`` and ``"depth"``."""
        corrections = {"rates": self.weights, "depth": self.depth_weights}
        return [name for name, weights in corrections.items() if bool(weights.any())]

    def forward(self, composition: Composition, place: Tensor | None = None) -> Composition:
        """Correct predicted rates and depth.

        Parameters
        ----------
        composition
            Prediction of the model before adaptation.
        place
            (n_spots, 2) coordinates in the measured section, NaN for spots of other sections, which have no measured
            neighbours. None: all spots are of other sections.
        """
        rates, depth = self.log_rates, self.log_depth
        if place is not None:
            rate_kernel, depth_kernel = ((-torch.cdist(place, self.place) / length).exp() for length in self.lengths)
            rates = rates + _limit(rate_kernel.nan_to_num(0) @ self.weights)
            depth = depth + _limit(depth_kernel.nan_to_num(0) @ self.depth_weights)[:, 0]
        return composition._replace(rates=composition.rates * rates.exp(), log_depth=composition.log_depth + depth)

    @torch.no_grad()
    def fit(
        self,
        observation: Observation,
        counts: Tensor,
        totals: Tensor,
        composition: Composition,
        place: Tensor,
        *,
        near: Tensor,
        novelty: float,
        spacing: float,
    ) -> None:
        """Learn from measured spots; dispersion and depth errors of the observation model are updated, too.

        Parameters
        ----------
        observation
            Observation model, updated in place.
        counts
            (n, n_genes) counts of the measured spots.
        totals
            (n,) total count of each spot.
        composition
            What the model predicts for these spots, without the uncertainty that novelty adds.
        place
            (n, 2) coordinates.
        near
            (n_spots,) rows of the measured spots that enter the Gaussian process.
        novelty
            How unlike the training sections the section is, 0 to 1: the more, the closer the prior variance of levels
            and depth is to that between individuals, in place of that between sections.
        spacing
            Distance between adjacent spots of the section.
        """
        apart = observation.apart.square()
        beyond = (apart.new_tensor(INDIVIDUALS_APART).square() - apart).clamp(min=0)
        rates_variance, depth_variance = (apart + novelty * beyond).unbind()
        usual = observation.dispersion.clone()
        within = torch.maximum(usual - INFLATION * apart[0], 0.1 * usual)
        self.place.copy_(place[near])

        usual_error = observation.depth_errors.mean()
        usual_errors = observation.depth_errors - usual_error
        errors = totals.clamp(min=1).log() - composition.log_depth - usual_error
        usual_variance = (usual_errors.square().mean() - INFLATION * apart[1]).clamp(min=0.01)
        variance = _pool_variance(errors - errors.mean(), usual_variance)
        shrinkage = depth_variance / (depth_variance + variance / len(errors))
        # Residuals of log depth after its shift, and those where the shift was estimated without the spot.
        residual, residual_without = errors - shrinkage * errors.mean(), errors - shrinkage * _mean_of_others(errors)
        if residual_without.square().mean() > errors.square().mean():
            residual, residual_without = errors, errors.clone()
        self.log_depth.copy_(usual_error + (errors - residual).mean())

        expected = composition.rates * totals.clamp(min=1)[:, None]
        levels, levels_without = estimate_levels(counts, expected, within, rates_variance)
        if _loss(counts, expected * levels_without.exp(), usual) > _loss(counts, expected, usual):
            levels, levels_without = torch.zeros_like(levels), torch.zeros_like(levels_without)
        self.log_rates.copy_(levels)
        mean = (expected * levels.exp()).clamp(min=1e-6)
        weight = mean / (1 + within * mean)
        residuals = (counts / mean - 1) * weight / weight.mean(0)

        distances = torch.cdist(self.place, self.place) / spacing
        rate_kriging = fit_kriging(residuals[near], within, 1 / mean.mean(0), distances)
        depth_kriging = fit_kriging(residual[near, None], variance[None], variance.new_zeros(1), distances)
        self.weights.copy_(rate_kriging.weights)
        self.depth_weights.copy_(depth_kriging.weights)
        self.lengths.copy_(spacing * torch.tensor([rate_kriging.length, depth_kriging.length]))

        # Calibrate on each spot as predicted from the others.
        levels_without[near] += _limit(rate_kriging.left_out)
        residual_without[near] -= _limit(depth_kriging.left_out)[:, 0]
        unseen = expected * levels_without.exp()
        observation.dispersion.copy_(usual * _fit_dispersion_factor(usual, counts, unseen, composition.excess))
        spread = _pool_variance(residual_without, usual_variance).sqrt()
        observation.depth_errors.copy_(usual_errors * spread / usual_errors.square().mean().sqrt().clamp(min=1e-6))


def estimate_levels(counts: Tensor, expected: Tensor, within: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate by how much genes' log rates in a section differ from those predicted (empirical Bayes).

    The posterior mode given negative binomial counts and a normal prior, whose mean and variance are those of the
    genes' levels; the variance known from other sections counts as :data:`PRIOR_GENES` more genes.

    Parameters
    ----------
    counts, expected
        (n_spots, n_genes) measured and predicted counts.
    within
        (n_genes,) dispersion within a section.
    known
        Variance of log rates between sections, known from other data.

    Returns
    -------
    levels
        (n_genes,).
    without
        (n_spots, n_genes): levels estimated without each spot.
    """
    levels, centre, variance = torch.zeros_like(within), known.new_zeros(()), known
    for _ in range(ROUNDS):
        mean = (expected * levels.exp()).clamp(min=1e-6)
        weight = mean / (1 + within * mean)
        score = weight * (counts / mean - 1)
        curvature = weight.sum(0) + 1 / variance
        levels = levels + ((score.sum(0) - (levels - centre) / variance) / curvature).clamp(-1, 1)
        centre = levels.mean()
        squares = (levels - centre).square() + 1 / curvature
        variance = (squares.sum() + PRIOR_GENES * known) / (len(levels) + PRIOR_GENES)
    return levels, levels - score / (curvature - weight)


class Kriging(NamedTuple):
    """Gaussian process of residuals over space.

    Parameters
    ----------
    weights
        (n, n_outputs): a prediction is the kernel between its spot and the measured ones, times these.
    left_out
        (n, n_outputs): prediction for each measured spot from the others.
    length
        Length scale of the exponential kernel.
    """

    weights: Tensor
    left_out: Tensor
    length: float


def fit_kriging(residuals: Tensor, variance: Tensor, noise: Tensor, distances: Tensor) -> Kriging:
    """Fit a Gaussian process with an exponential kernel; all weights are zero unless it clearly predicts better.

    Length scale and share of the variance are those with the best leave-one-out log score.

    Parameters
    ----------
    residuals
        (n, n_outputs).
    variance
        (n_outputs,) variance of the residuals, of which the process explains a share.
    noise
        (n_outputs,) variance of counting.
    distances
        (n, n) distances between spots, in those between adjacent ones.
    """
    zeros = torch.zeros_like(residuals)
    best, best_gain = Kriging(zeros, zeros, 1.0), 0.0
    baseline = _log_score(residuals, variance + noise)
    for length in LENGTHS:
        values, vectors = torch.linalg.eigh((-distances / length).exp().double())
        rotated = vectors.T @ residuals.double()
        for share in SHARES:
            spectrum = variance * (share * values[:, None].clamp(min=0) + 1 - share) + noise
            weights = vectors @ (rotated / spectrum)
            precision = vectors.square() @ (1 / spectrum)
            errors = weights / precision
            gains = (_log_score(errors, 1 / precision) - baseline).mean(1)
            gain, standard_error = float(gains.mean()), float(gains.std() / math.sqrt(len(gains)))
            if gain > max(best_gain, standard_error):
                scaled = (variance * share * weights).float()
                best, best_gain = Kriging(scaled, residuals - errors.float(), length), gain
    return best


def _log_score(errors: Tensor, variance: Tensor) -> Tensor:
    """Log density of normal distributions, up to a constant."""
    return -(variance.log() + errors.square() / variance) / 2


def _loss(counts: Tensor, mean: Tensor, dispersion: Tensor) -> float:
    """Mean negative log likelihood of counts."""
    return float(negative_log_likelihood(counts, mean, dispersion).mean())


def _mean_of_others(values: Tensor) -> Tensor:
    """Mean of all values but the one at each position, (n,) to (n,)."""
    return (values.sum() - values) / (len(values) - 1)


def _limit(change: Tensor) -> Tensor:
    """Clip a change of a logarithm to :data:`LARGEST_CHANGE`."""
    return change.clamp(-LARGEST_CHANGE, LARGEST_CHANGE)


def _pool_variance(errors: Tensor, usual: Tensor) -> Tensor:
    """Mean square of errors, shrunk to the usual one, which counts as :data:`PRIOR_SPOTS` more spots."""
    return (errors.square().sum() + PRIOR_SPOTS * usual) / (len(errors) + PRIOR_SPOTS)


def _fit_dispersion_factor(usual: Tensor, counts: Tensor, mean: Tensor, excess: Tensor) -> float:
    """Fit one factor of all genes' dispersions by maximum likelihood, shrunk towards 1."""
    best = min(FACTORS, key=lambda factor: _loss(counts, mean, usual * factor + excess[:, None]))
    return float(best ** (len(counts) / (len(counts) + PRIOR_SPOTS)))
