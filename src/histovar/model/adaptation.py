"""What a few measured spots of a section change in its prediction: level, depth, what neighbours tell, calibration.

Of each gene a section's log rate lies off what the model expects by a *level*. Levels are shrunk by how far apart
sections are known to be and by how far the genes' levels turn out to be (empirical Bayes); so is the shift of log
depth. What is left of measured spots is a Gaussian process of their *place*: near a spot where more of a gene was
measured than was expected, more is expected (kriging), over a distance and by a share that are chosen for all genes
together. Each step is checked by predicting measured spots from the others, and left out unless that is better: for
neighbours, by more than a standard error. Dispersion and the depth's error become those of spots left out, shrunk to
the model's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.stats import norm, t
from torch import Tensor, nn

from .negative_binomial import negative_log_likelihood
from .observation import INDIVIDUALS_APART, PATIENTS, Composition, Observation

# Fewest measured spots that tell a level and its uncertainty.
LEAST_MEASURED = 9
# Most of which neighbours are told: the cost grows with their cube.
MOST_NEIGHBORS = 1000
# Distances over which neighbours may tell of each other, in distances between spots next to each other, and shares of
# what histology does not tell that may be theirs to tell.
LENGTHS, SHARES = (2.0, 6.0, 18.0), (0.1, 0.2, 0.4, 0.6, 0.8)
# Largest change of a log rate, or of log depth, by neighbours.
LARGEST_CHANGE = 2.0
# As many measured spots as what is known of training weighs in dispersion and the depth's error, and as many genes as
# what is known of other sections weighs in how far apart levels are.
PRIOR_SPOTS, PRIOR_GENES = 10, 10
# Rounds of Newton's method and of empirical Bayes.
ROUNDS = 40
# Factors of dispersion that are tried.
FACTORS = tuple(math.exp(step / 10) for step in range(-20, 11))
# By how much more than the variance between groups dispersion and depth's errors hold (:meth:`Observation.fit`).
INFLATION = float((t.ppf(0.95, PATIENTS) / norm.ppf(0.95)) ** 2)


class Adaptation(nn.Module):
    """Changes of what is predicted, learnt from measured spots of a section.

    Parameters
    ----------
    n_spots
        Number of measured spots that their neighbours are told of.
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
        """Of what measured spots tell their neighbours."""
        of = {"rates": self.weights, "depth": self.depth_weights}
        return [name for name, weights in of.items() if bool(weights.any())]

    def forward(self, composition: Composition, place: Tensor | None = None) -> Composition:
        """What is predicted of spots, corrected.

        Parameters
        ----------
        composition
            As the model was trained to predict it.
        place
            (n_spots, 2) coordinates in the section that was measured, NaN of spots of others. None where all are: they
            have no measured neighbours.
        """
        rates, depth = self.log_rates, self.log_depth
        if place is not None:
            near_rates, near_depth = ((-torch.cdist(place, self.place) / length).exp() for length in self.lengths)
            rates = rates + _limited(near_rates.nan_to_num(0) @ self.weights)
            depth = depth + _limited(near_depth.nan_to_num(0) @ self.depth_weights)[:, 0]
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
        """Learn from measured spots; the observation model's dispersion and error of the depth are set, too.

        Parameters
        ----------
        observation
            Of the model, set in place.
        counts
            (n, n_genes).
        totals
            (n,) total count of each spot.
        composition
            What the model expects of them, without what novelty adds to its uncertainty.
        place
            (n, 2) coordinates.
        near
            (n_spots,) which of the measured spots their neighbours are told of.
        novelty
            How unlike those of training the section is, 0 to 1: as far, individuals may be apart, not sections.
        spacing
            Distance between spots of the section next to each other.
        """
        apart = observation.apart.square()
        beyond = (apart.new_tensor(INDIVIDUALS_APART).square() - apart).clamp(min=0)
        rates_apart, depth_apart = (apart + novelty * beyond).unbind()
        usual = observation.dispersion.clone()
        within = torch.maximum(usual - INFLATION * apart[0], 0.1 * usual)
        self.place.copy_(place[near])

        usual_error = observation.depth_errors.mean()
        usual_errors = observation.depth_errors - usual_error
        errors = totals.clamp(min=1).log() - composition.log_depth - usual_error
        usual_variance = (usual_errors.square().mean() - INFLATION * apart[1]).clamp(min=0.01)
        variance = _pooled(errors - errors.mean(), usual_variance)
        kept = depth_apart / (depth_apart + variance / len(errors))
        left, left_without = errors - kept * errors.mean(), errors - kept * _mean_of_others(errors)
        if left_without.square().mean() > errors.square().mean():
            left, left_without = errors, errors.clone()
        self.log_depth.copy_(usual_error + (errors - left).mean())

        expected = composition.rates * totals.clamp(min=1)[:, None]
        levels, levels_without = levels_of_genes(counts, expected, within, rates_apart)
        if _loss(counts, expected * levels_without.exp(), usual) > _loss(counts, expected, usual):
            levels, levels_without = torch.zeros_like(levels), torch.zeros_like(levels_without)
        self.log_rates.copy_(levels)
        mean = (expected * levels.exp()).clamp(min=1e-6)
        weight = mean / (1 + within * mean)
        residuals = (counts / mean - 1) * weight / weight.mean(0)

        distances = torch.cdist(self.place, self.place) / spacing
        of_rates = told_by_neighbors(residuals[near], within, 1 / mean.mean(0), distances)
        of_depth = told_by_neighbors(left[near, None], variance[None], variance.new_zeros(1), distances)
        self.weights.copy_(of_rates.weights)
        self.depth_weights.copy_(of_depth.weights)
        self.lengths.copy_(spacing * torch.tensor([of_rates.length, of_depth.length]))

        # Calibration by spots that are predicted from the others.
        levels_without[near] += _limited(of_rates.left_out)
        left_without[near] -= _limited(of_depth.left_out)[:, 0]
        unseen = expected * levels_without.exp()
        observation.dispersion.copy_(usual * _dispersion_factor(usual, counts, unseen, composition.excess))
        spread = _pooled(left_without, usual_variance).sqrt()
        observation.depth_errors.copy_(usual_errors * spread / usual_errors.square().mean().sqrt().clamp(min=1e-6))


def levels_of_genes(counts: Tensor, expected: Tensor, within: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """By how much genes' log rates lie off those expected: (n_genes,), and without each spot, (n_spots, n_genes).

    The mode given negative binomial counts and a normal prior, whose mean and variance are those of the genes' levels,
    what is known weighing as :data:`PRIOR_GENES` more.

    Parameters
    ----------
    counts, expected
        (n_spots, n_genes): what was measured and what was expected.
    within
        (n_genes,) dispersion within a section.
    known
        Variance of log rates that is known of other sections.
    """
    levels, middle, variance = torch.zeros_like(within), known.new_zeros(()), known
    for _ in range(ROUNDS):
        mean = (expected * levels.exp()).clamp(min=1e-6)
        weight = mean / (1 + within * mean)
        score = weight * (counts / mean - 1)
        curvature = weight.sum(0) + 1 / variance
        levels = levels + ((score.sum(0) - (levels - middle) / variance) / curvature).clamp(-1, 1)
        middle = levels.mean()
        squares = (levels - middle).square() + 1 / curvature
        variance = (squares.sum() + PRIOR_GENES * known) / (len(levels) + PRIOR_GENES)
    return levels, levels - score / (curvature - weight)


class Neighbors(NamedTuple):
    """Weights of spots in what they tell, what each is told without itself, (n, n_outputs) each, and the length."""

    weights: Tensor
    left_out: Tensor
    length: float


def told_by_neighbors(residuals: Tensor, variance: Tensor, noise: Tensor, distances: Tensor) -> Neighbors:
    """A Gaussian process of place, chosen by leaving spots out one by one; nothing if that is not clearly better.

    Parameters
    ----------
    residuals
        (n, n_outputs).
    variance
        (n_outputs,) variance, of which a share is the process' and the rest each spot's own.
    noise
        (n_outputs,) variance of counting.
    distances
        (n, n) between spots, in distances between spots next to each other.
    """
    nothing = torch.zeros_like(residuals)
    best, best_gain = Neighbors(nothing, nothing, 1.0), 0.0
    alone = _log_score(residuals, variance + noise)
    for length in LENGTHS:
        values, vectors = torch.linalg.eigh((-distances / length).exp().double())
        turned = vectors.T @ residuals.double()
        for share in SHARES:
            spectrum = variance * (share * values[:, None].clamp(min=0) + 1 - share) + noise
            weights = vectors @ (turned / spectrum)
            precision = vectors.square() @ (1 / spectrum)
            errors = weights / precision
            gains = (_log_score(errors, 1 / precision) - alone).mean(1)
            gain, standard_error = float(gains.mean()), float(gains.std() / math.sqrt(len(gains)))
            if gain > max(best_gain, standard_error):
                told = (variance * share * weights).float()
                best, best_gain = Neighbors(told, residuals - errors.float(), length), gain
    return best


def _log_score(errors: Tensor, variance: Tensor) -> Tensor:
    """Log density of normal distributions, up to a constant."""
    return -(variance.log() + errors.square() / variance) / 2


def _loss(counts: Tensor, mean: Tensor, dispersion: Tensor) -> float:
    return float(negative_log_likelihood(counts, mean, dispersion).mean())


def _mean_of_others(values: Tensor) -> Tensor:
    return (values.sum() - values) / (len(values) - 1)


def _limited(change: Tensor) -> Tensor:
    return change.clamp(-LARGEST_CHANGE, LARGEST_CHANGE)


def _pooled(errors: Tensor, usual: Tensor) -> Tensor:
    """Mean square of errors, the usual one weighing as some more of them."""
    return (errors.square().sum() + PRIOR_SPOTS * usual) / (len(errors) + PRIOR_SPOTS)


def _dispersion_factor(usual: Tensor, counts: Tensor, mean: Tensor, excess: Tensor) -> float:
    """Factor of all genes' dispersions, by maximum likelihood, shrunk to 1."""
    best = min(FACTORS, key=lambda factor: _loss(counts, mean, usual * factor + excess[:, None]))
    return float(best ** (len(counts) / (len(counts) + PRIOR_SPOTS)))
