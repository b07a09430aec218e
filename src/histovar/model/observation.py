"""Observation model: negative binomial counts given predicted rates and sequencing depth, with calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor, nn

from .calibration import LEVELS, hierarchical_levels, interpolate_levels
from .negative_binomial import SUMMED, count_quantiles, fit_dispersion, log_moments

Units = Literal["lognorm", "log_counts", "counts", "rates"]

# Rates are given as counts per spot of this total count.
RATE_TOTAL = 1e4
# Number of quantiles of depth errors that are stored, and of their means over which moments integrate.
DEPTH_LEVELS, DEPTH_NODES = 100, 5
# Largest change of a log rate by the tokens.
LARGEST_SHIFT = 1.0
# Expected count of a gene at which counting noise is negligible.
UNLIMITED = 1e6
# Number of points that represent a distribution, evenly spaced in probability.
POINTS = 200
# Probabilities of counts that are in memory at once.
AT_ONCE = 2**24
# Most measured values whose levels calibration sorts; of more, an even subset is used.
MOST_LEVELS = 2**22
# Spots whose distributions are in memory at once.
SPOTS_AT_ONCE = 256
# Standard deviations of log rates and of log depth between sections of one individual, and between individuals, over
# 34 sections of eight patients of her2st (benchmarks/units.py). They count as much as PRIOR_GROUPS groups of the
# training data.
SECTIONS_APART, INDIVIDUALS_APART = (0.17, 0.18), (0.74, 0.66)
PRIOR_GROUPS, PATIENTS = 1, 8
# Fewest groups for hierarchical conformal intervals: intervals of 90 % need 1 / 10 % - 1.
ENOUGH_GROUPS = 9
# Least expected count of a gene in a group for the gene to count in the variance between groups.
LEAST_GROUP_COUNTS = 20.0


class Composition(NamedTuple):
    """Predicted rates and depth of spots with their uncertainty, before any depth is chosen.

    Parameters
    ----------
    rates
        (n_spots, n_genes): expected share of each gene in a spot's total count.
    log_depth
        (n_spots,): expected logarithm of the total count.
    excess
        (n_spots,): relative variance of the rates in addition to the genes' dispersion, where the members of the
        model disagree more than they did on training spots, or the section is unlike those of training.
    depth_spread
        (n_spots,): factor of the depth's errors, relative to those on training spots.
    """

    rates: Tensor
    log_depth: Tensor
    excess: Tensor
    depth_spread: Tensor

    def take(self, rows: Tensor) -> Composition:
        """Select rows, that is spots."""
        return Composition(*(values[rows] for values in self))


class Observation(nn.Module):
    r"""Observation model of counts: negative binomial around total count times rate, with a dispersion for each gene.

    The variance of a count of mean :math:`\mu` is :math:`\mu + (\alpha + e) \mu^2`, with the gene's dispersion
    :math:`\alpha`, the variation of the rate that histology does not explain, and the spot's excess :math:`e`. Where
    the total count is not known, its logarithm is predicted from histology, with the errors seen on spots that were not
    trained on.

    Moments of log-normalised counts are exact. By Frullani's integral
    :math:`\log(1 + x) = \int_0^\infty (1 - e^{-s x}) e^{-s} / s \, ds` and, as the inverse Laplace transform of
    :math:`\log(p) / p` is :math:`-(\gamma + \log s)`, :math:`\log^2(1 + x) = -2 \int_0^\infty (1 - e^{-s x})
    (\gamma + \log s) e^{-s} / s \, ds`, so that their expectations only need the negative binomial's Laplace transform
    :math:`(1 + \alpha \mu (1 - e^{-s}))^{-1/\alpha}`.

    Parameters
    ----------
    n_genes
        Number of genes.
    """

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("base", torch.zeros(n_genes))
        self.register_buffer("dispersion", torch.ones(n_genes))
        self.register_buffer("target_sum", torch.tensor(RATE_TOTAL))
        self.register_buffer("depth_errors", torch.zeros(DEPTH_LEVELS))
        self.register_buffer("usual_disagreement", torch.zeros(()))
        self.register_buffer("apart", torch.tensor(SECTIONS_APART))
        self.register_buffer("levels", torch.arange(1, LEVELS + 1) / (LEVELS + 1))
        self.register_buffer("calibrated", torch.tensor(False))

    base: Tensor
    dispersion: Tensor
    target_sum: Tensor
    depth_errors: Tensor
    usual_disagreement: Tensor
    apart: Tensor
    levels: Tensor
    calibrated: Tensor

    def plain(self) -> dict[str, Any]:
        """Export what predicted distributions need besides the compositions, as NumPy arrays."""
        names = ("dispersion", "target_sum", "depth_errors", "levels")
        return {name: self.get_buffer(name).cpu().numpy().copy() for name in names}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild an observation model from the arrays of :meth:`plain`."""
        observation = cls(len(values["dispersion"]))
        for name in observation.plain():
            observation.get_buffer(name).copy_(torch.as_tensor(np.asarray(values[name])))
        return observation

    def _depths(self, composition: Composition, depth: Tensor | None) -> list[tuple[float, Tensor]]:
        """Total counts (n_spots, 1) to integrate over, with their weights; only one if the depth is known."""
        if depth is not None:
            return [(1.0, depth.to(composition.rates).clamp(min=1)[:, None])]
        errors = self.depth_errors.view(DEPTH_NODES, -1).mean(1)
        log_depth, spread = composition.log_depth, composition.depth_spread
        return [(1 / DEPTH_NODES, (log_depth + spread * error).exp().clamp(min=1)[:, None]) for error in errors]

    def composed(self, rates: Tensor, log_depth: Tensor, disagreement: Tensor, novelty: Tensor) -> Composition:
        """Combine predicted rates and depth with the uncertainty that training spots do not have.

        A section unlike those of training may be of a different kind of individual. In proportion to its novelty, the
        variance between individuals takes the place of that between sections, which every prediction includes.

        Parameters
        ----------
        rates
            (n_spots, n_genes).
        log_depth
            (n_spots,).
        disagreement
            (n_spots,): see ``histovar.model.prior.disagreement``.
        novelty
            (n_spots,) between 0 and 1.
        """
        rates_variance, depth_variance = (
            (i**2 - s.square()).clamp(min=0) for i, s in zip(INDIVIDUALS_APART, self.apart, strict=True)
        )
        excess = (disagreement - self.usual_disagreement).clamp(min=0) + novelty * rates_variance
        variance = self.depth_errors.square().mean().clamp(min=1e-6)
        return Composition(rates, log_depth, excess, (1 + novelty * depth_variance / variance).sqrt())

    def moments(self, composition: Composition, units: Units, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predictive mean and standard deviation in the chosen units.

        Parameters
        ----------
        composition
            Predicted rates and depth.
        units
            ``"lognorm"``: log1p of counts per target sum; ``"log_counts"``: log1p of counts; ``"counts"``;
            ``"rates"``: counts per 10,000 of a spot with unlimited sequencing depth.
        depth
            (n_spots,) total count of every spot; None integrates over its predicted distribution.

        Returns
        -------
        mean, std
            (n_spots, n_genes).
        """
        rates = composition.rates
        relative = self.dispersion + composition.excess[:, None]
        if units == "rates":
            return RATE_TOTAL * rates, RATE_TOTAL * rates * relative.sqrt()
        first, second = torch.zeros_like(rates), torch.zeros_like(rates)
        for weight, total in self._depths(composition, depth):
            mean = rates * total
            if units == "counts":
                one, two = mean, mean + (1 + relative) * mean.square()
            else:
                scale = self.target_sum / total if units == "lognorm" else torch.ones_like(total)
                one, two = log_moments(mean, relative, scale)
            first += weight * one
            second += weight * two
        return first, (second - first.square()).clamp(min=0).sqrt()

    def mean(self, rates: Tensor, log_depth: Tensor) -> Tensor:
        """Expected log-normalised value at the predicted depth, (n_spots, n_genes)."""
        total = log_depth.exp()[:, None]
        return log_moments(rates * total, self.dispersion.expand_as(rates), self.target_sum / total, second=False)[0]

    def shifted(self, composition: Composition, expected: Tensor) -> Composition:
        """Shift the rates towards given log-normalised values, (n_spots, n_genes), by one Newton step."""
        rates, step = composition.rates, 0.1
        current = self.mean(rates, composition.log_depth)
        slope = (self.mean(rates * math.exp(step), composition.log_depth) - current) / step
        change = ((expected - current) / slope.clamp(min=1e-3)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
        return composition._replace(rates=rates * change.exp())

    def points(self, composition: Composition, units: Units, depth: Tensor | None = None) -> Tensor:
        """Predictive distribution as sorted values of equal probability, (n_spots, n_genes, 200).

        Arguments are as in :meth:`moments`; quantiles of counts are those of ``count_quantiles``.
        """
        rates, relative = composition.rates, self.dispersion + composition.excess[:, None]
        if units == "rates":
            # As counts of a spot with unlimited sequencing depth.
            counts = count_quantiles(torch.full_like(rates, UNLIMITED), relative, _levels(POINTS, rates))
            return RATE_TOTAL * rates[..., None] * (counts / UNLIMITED)
        totals = [total for _, total in self._depths(composition, depth)]
        levels = _levels(POINTS // len(totals), rates)
        points = rates.new_empty(*rates.shape, POINTS)
        n_genes = max(1, AT_ONCE // (SUMMED * max(1, len(rates))))
        for start in range(0, rates.shape[1], n_genes):
            genes = slice(start, start + n_genes)
            values = [count_quantiles(rates[:, genes] * total, relative[:, genes], levels) for total in totals]
            if units == "lognorm":
                values = [
                    (value * (self.target_sum / total)[..., None]).log1p()
                    for value, total in zip(values, totals, strict=True)
                ]
            elif units == "log_counts":
                values = [value.log1p() for value in values]
            points[:, genes] = torch.cat(values, 2).sort(2).values
        return points

    def _fit_groups(
        self, counts: Tensor, expected: Tensor, excess: Tensor, groups: Tensor, known: float
    ) -> tuple[float, Tensor, int]:
        """Standard deviation of log rates between groups, genes' dispersions within groups, and number of groups."""
        n_groups = int(groups.max()) + 1
        sums, expectations, noise = (counts.new_zeros(n_groups, counts.shape[1]) for _ in range(3))
        sums.index_add_(0, groups, counts)
        expectations.index_add_(0, groups, expected)
        noise.index_add_(0, groups, expected + self.dispersion * expected.square())
        is_informative = expectations > LEAST_GROUP_COUNTS
        shifts = torch.where(is_informative, (sums.clamp(min=1) / expectations.clamp(min=1)).log(), 0.0)
        noise = torch.where(is_informative, noise / expectations.square().clamp(min=1), 0.0)
        informed_groups = is_informative.any(1)
        squares = ((shifts.square() - noise).sum(1) / is_informative.sum(1).clamp(min=1)).clamp(min=0)
        variance = _pool_variance(squares[informed_groups], known)
        shrinkage = variance / (variance + noise)
        adjusted = expected * (shrinkage * shifts).exp()[groups]
        return math.sqrt(variance), fit_dispersion(counts, adjusted, excess), int(informed_groups.sum())

    def at_levels(self, points: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated quantiles of :meth:`points`: (n_spots, n_genes, n) to (n_spots, n_genes, n_levels)."""
        n = points.shape[2]
        return points[..., self._positions(levels, n).floor().clamp(0, n - 1).long()]

    def ends(self, points: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated ends of central intervals of counts: quantiles, moved towards the median by less than one value.

        Counts have few values, and an interval that includes both ends covers more than its nominal level, as part of
        the ends' probability lies beyond the levels. So a value belongs to the interval only if at least half of its
        probability lies within the levels; then intervals cover too much and too little equally often (the
        mid-distribution of Parzen 2004).

        Parameters
        ----------
        points, levels
            As in :meth:`at_levels`.
        """
        n = points.shape[2]
        positions = self._positions(levels, n)
        ends = self.at_levels(points, levels)
        first, end = torch.searchsorted(points, ends), torch.searchsorted(points, ends, right=True)
        middle = (first + end) / 2
        lower, upper = (points.gather(2, index.clamp(0, n - 1)) for index in (first - 1, end))
        is_repeated = end - first > 1
        ends = torch.where(is_repeated & (positions > n / 2) & (positions < middle), lower, ends)
        ends = torch.where(is_repeated & (positions < n / 2) & (positions > middle), upper, ends)
        median = points[..., n // 2, None]
        return torch.where(positions < n / 2, ends.minimum(median), ends.maximum(median))

    def _positions(self, levels: Sequence[float] | Tensor, n: int) -> Tensor:
        """Positions of calibrated levels among n sorted points, 0 to n."""
        return interpolate_levels(self.levels[:, None], levels)[:, 0] * n

    @torch.no_grad()
    def fit(
        self,
        counts: Tensor,
        totals: Tensor,
        composition: Composition,
        groups: Tensor | None,
        *,
        of_individuals: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Fit dispersion, depth errors and calibrated levels to spots that the prediction has not seen.

        Errors of spots and of whole groups are told apart. The variance between groups is the mean over the groups and
        the variance known from other data, which counts as one more group. For predictions of a new group, it is
        inflated by the square of the ratio of the 95 % quantiles of Student's t and the normal distribution, with a
        degree of freedom for each group and for each but one of the patients behind the known variance. From
        ``ENOUGH_GROUPS`` groups on, enough for intervals of 90 %, levels are those of hierarchical conformal prediction
        (``hierarchical_levels``).

        Parameters
        ----------
        counts
            (n_spots, n_genes).
        totals
            (n_spots,) total count of each spot.
        composition
            Predicted rates and depth of the spots.
        groups
            (n_spots,) number of each spot's section or individual. None where the prediction has seen other spots of
            these, so that they do not show the variance between groups.
        of_individuals
            Whether groups are individuals.
        generator
            Source of randomness.
        """
        expected = composition.rates * totals[:, None]
        known = INDIVIDUALS_APART if of_individuals else SECTIONS_APART
        self.dispersion.copy_(fit_dispersion(counts, expected, composition.excess))
        even = torch.arange(1, LEVELS + 1, dtype=torch.double) / (LEVELS + 1)
        subset = slice(None, None, max(1, counts.numel() // MOST_LEVELS))
        measured = self._measured_levels(counts, totals, composition, generator).flatten()[subset]
        self.levels.copy_(torch.quantile(measured.double().cpu(), even))
        # So far intervals cover spots of these groups; now widen them to cover those of a new group.
        errors = (totals.clamp(min=1).log() - composition.log_depth) / composition.depth_spread
        (rates_apart, depth_apart), within, n_groups = known, self.dispersion, 0
        if groups is not None:
            rates_apart, within, n_groups = self._fit_groups(counts, expected, composition.excess, groups, known[0])
            depth_apart, errors = _fit_group_depths(errors, groups, known[1])
        inflation = float((t.ppf(0.95, n_groups + PATIENTS - 1) / norm.ppf(0.95)) ** 2)
        self.apart.copy_(torch.tensor([rates_apart, depth_apart]))
        self.dispersion.copy_(within + inflation * rates_apart**2)
        spread = (1 + inflation * depth_apart**2 / errors.square().mean().clamp(min=1e-6)).sqrt()
        levels = (torch.arange(DEPTH_LEVELS, device=errors.device) + 0.5) / DEPTH_LEVELS
        self.depth_errors.copy_(spread * torch.quantile(errors, levels.to(errors)))
        if groups is not None and n_groups >= ENOUGH_GROUPS:
            measured = self._measured_levels(counts, totals, composition, generator).flatten()[subset]
            their_groups = groups.repeat_interleave(counts.shape[1])[subset]
            self.levels.copy_(hierarchical_levels(measured.cpu(), their_groups.cpu(), self.levels.cpu()))
        self.calibrated.fill_(True)

    def _measured_levels(self, counts: Tensor, totals: Tensor, composition: Composition, generator: Any) -> Tensor:
        """Level of each count in its predicted distribution, given the spot's total count: (n_spots, n_genes)."""
        batches = torch.arange(len(totals)).split(SPOTS_AT_ONCE)
        predicted = ((rows, self.points(composition.take(rows), "counts", totals[rows])) for rows in batches)
        return torch.cat([randomised_levels(points, counts[rows], generator) for rows, points in predicted])


def _fit_group_depths(errors: Tensor, groups: Tensor, known: float) -> tuple[float, Tensor]:
    """Standard deviation of log depth errors between groups, and the errors within groups."""
    means = torch.stack([errors[groups == k].mean() for k in range(int(groups.max()) + 1)])
    sizes = torch.stack([(groups == k).sum() for k in range(len(means))])
    noise = (errors - means[groups]).square().mean() / sizes
    variance = _pool_variance((means.square() - noise).clamp(min=0), known)
    shrinkage = variance / (variance + noise)
    return math.sqrt(variance), errors - (shrinkage * means)[groups]


def _pool_variance(variances: Tensor, known: float) -> float:
    """Shrink the variance between groups to the known one, which counts as :data:`PRIOR_GROUPS` groups."""
    return float((variances.sum() + PRIOR_GROUPS * known**2) / (len(variances) + PRIOR_GROUPS))


def _levels(n: int, like: Tensor) -> Tensor:
    """Midpoints of n equal intervals of probability, (n,)."""
    return (torch.arange(n, device=like.device) + 0.5) / n


def randomised_levels(points: Tensor, measured: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Randomised probability integral transform: level of each measured value in its predicted distribution.

    Uniform if the distribution is right, also for counts (Czado, Gneiting & Held 2009).

    Parameters
    ----------
    points
        (n_spots, n_genes, n): sorted values of equal probability.
    measured
        (n_spots, n_genes).
    generator
        Source of randomness.
    """
    n = points.shape[2]
    value = measured[..., None].contiguous()
    below = torch.searchsorted(points.contiguous(), value)[..., 0]
    not_above = torch.searchsorted(points.contiguous(), value, right=True)[..., 0]
    height = torch.rand(below.shape, generator=generator, device=below.device)
    return (below + height * (not_above - below + 1)) / (n + 1)
