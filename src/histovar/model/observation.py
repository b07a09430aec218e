"""What would be measured of a spot: negative binomial counts, given what it is made of and how deep it is sequenced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from scipy.stats import norm, t
from torch import Tensor, nn

from .calibration import LEVELS, between_levels, hierarchical_levels
from .negative_binomial import SUMMED, count_quantiles, fitted_dispersion, log_moments

Units = Literal["lognorm", "log_counts", "counts", "rates"]

# Counts per spot that rates are given for.
RATE_TOTAL = 1e4
# Quantiles of the depth's error that are kept, and groups of them over which moments are taken.
DEPTH_LEVELS, DEPTH_NODES = 100, 5
# Largest change of a log rate that tokens may make.
LARGEST_SHIFT = 1.0
# Expected counts of a gene, of which counting is no noise.
NO_END = 1e6
# Points that stand for a distribution, evenly spaced in probability.
POINTS = 200
# Probabilities of counts that are held at once.
AT_ONCE = 2**24
# Levels of measured values that calibration looks at, evenly taken; they are sorted.
MOST_PLACES = 2**22
# Spots whose distributions are held at once.
SPOTS_AT_ONCE = 256
# How much sections of one individual, and individuals, differ: standard deviations of log rates and of log depth, over
# 34 sections of eight patients of her2st (benchmarks/units.py). They weigh as much as one group of the training data.
SECTIONS_APART, INDIVIDUALS_APART = (0.17, 0.18), (0.74, 0.66)
PRIOR_GROUPS, PATIENTS = 1, 8
# Groups from which on levels are taken from them: hierarchical conformal intervals of 90 % need 1 / 10 % - 1.
ENOUGH_GROUPS = 9
# Expected counts of a gene in a group, from which it tells how far the group is away.
TELLING_COUNTS = 20.0


class Composition(NamedTuple):
    """What is predicted of spots, whatever depth they are sequenced to.

    Parameters
    ----------
    rates
        (n_spots, n_genes): share of a spot's total count that each gene is expected to have.
    log_depth
        (n_spots,): expected logarithm of the total count.
    excess
        (n_spots,): relative variance of the rates beyond the genes' dispersion, where the members of the model
        disagree more than they did on training spots, or the section is unlike those of training.
    depth_spread
        (n_spots,): how many times as far as of training spots the depth may be off.
    """

    rates: Tensor
    log_depth: Tensor
    excess: Tensor
    depth_spread: Tensor

    def take(self, rows: Tensor) -> Composition:
        """That of some of the spots."""
        return Composition(*(part[rows] for part in self))


class Observation(nn.Module):
    r"""Counts of a spot: negative binomial about total count times rate, with a dispersion for each gene.

    The variance of a count of mean :math:`\mu` is :math:`\mu + (\alpha + e) \mu^2`, with the gene's dispersion
    :math:`\alpha`, which holds what histology does not tell of the rate, and the spot's excess :math:`e`. Where the
    total count is not known, its logarithm lies about what histology tells of it as it did on spots not trained on.

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
        """What predicted distributions are made with, beside the compositions, as numbers and arrays."""
        names = ("dispersion", "target_sum", "depth_errors", "levels")
        return {name: self.get_buffer(name).cpu().numpy().copy() for name in names}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """An observation model of what :meth:`plain` gave."""
        observation = cls(len(values["dispersion"]))
        for name in observation.plain():
            observation.get_buffer(name).copy_(torch.as_tensor(np.asarray(values[name])))
        return observation

    def _depths(self, composition: Composition, depth: Tensor | None) -> list[tuple[float, Tensor]]:
        """Total counts (n_spots, 1) and their weights: the one that is known, or nodes of what may be."""
        if depth is not None:
            return [(1.0, depth.to(composition.rates).clamp(min=1)[:, None])]
        errors = self.depth_errors.view(DEPTH_NODES, -1).mean(1)
        log_depth, spread = composition.log_depth, composition.depth_spread
        return [(1 / DEPTH_NODES, (log_depth + spread * error).exp().clamp(min=1)[:, None]) for error in errors]

    def composed(self, rates: Tensor, log_depth: Tensor, disagreement: Tensor, novelty: Tensor) -> Composition:
        """Rates and depth with what makes them less certain than those of training spots.

        A section that is like none of training may be of another kind of individual: as far as it is novel, it may be
        as far away as individuals are from each other, beyond what is expected of new sections anyway.

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
        of_rates, of_depth = (
            (i**2 - s.square()).clamp(min=0) for i, s in zip(INDIVIDUALS_APART, self.apart, strict=True)
        )
        excess = (disagreement - self.usual_disagreement).clamp(min=0) + novelty * of_rates
        variance = self.depth_errors.square().mean().clamp(min=1e-6)
        return Composition(rates, log_depth, excess, (1 + novelty * of_depth / variance).sqrt())

    def moments(self, composition: Composition, units: Units, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of what would be measured.

        Parameters
        ----------
        composition
            Of some spots.
        units
            ``"lognorm"``: log1p of counts per target sum; ``"log_counts"``: log1p of counts; ``"counts"``;
            ``"rates"``: what counts per 10,000 would be of a spot that is sequenced to no end.
        depth
            (n_spots,) total count of every spot; None integrates over what histology tells of it.

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
        """Expected log-normalised value at the expected depth, (n_spots, n_genes)."""
        total = log_depth.exp()[:, None]
        return log_moments(rates * total, self.dispersion.expand_as(rates), self.target_sum / total, second=False)[0]

    def shifted(self, composition: Composition, expected: Tensor) -> Composition:
        """Rates by which the expected log-normalised value is another one, (n_spots, n_genes): one Newton step."""
        rates, step = composition.rates, 0.1
        now = self.mean(rates, composition.log_depth)
        slope = (self.mean(rates * math.exp(step), composition.log_depth) - now) / step
        change = ((expected - now) / slope.clamp(min=1e-3)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
        return composition._replace(rates=rates * change.exp())

    def points(self, composition: Composition, units: Units, depth: Tensor | None = None) -> Tensor:
        """What may be measured: sorted values of equal probability, (n_spots, n_genes, 200).

        Arguments are as in :meth:`moments`; quantiles of counts are those of ``count_quantiles``.
        """
        rates, relative = composition.rates, self.dispersion + composition.excess[:, None]
        if units == "rates":
            # As counts of a spot that is sequenced to no end.
            counts = count_quantiles(torch.full_like(rates, NO_END), relative, _levels(POINTS, rates))
            return RATE_TOTAL * rates[..., None] * (counts / NO_END)
        totals = [total for _, total in self._depths(composition, depth)]
        levels = _levels(POINTS // len(totals), rates)
        found = rates.new_empty(*rates.shape, POINTS)
        at_once = max(1, AT_ONCE // (SUMMED * max(1, len(rates))))
        for start in range(0, rates.shape[1], at_once):
            genes = slice(start, start + at_once)
            values = [count_quantiles(rates[:, genes] * total, relative[:, genes], levels) for total in totals]
            if units == "lognorm":
                values = [
                    (value * (self.target_sum / total)[..., None]).log1p()
                    for value, total in zip(values, totals, strict=True)
                ]
            elif units == "log_counts":
                values = [value.log1p() for value in values]
            found[:, genes] = torch.cat(values, 2).sort(2).values
        return found

    def _groups_apart(
        self, counts: Tensor, expected: Tensor, excess: Tensor, groups: Tensor, known: float
    ) -> tuple[float, Tensor, int]:
        """Standard deviation of groups' log rates about those expected, genes' dispersions within, number of groups."""
        n_groups = int(groups.max()) + 1
        sums, expectations, noise = (counts.new_zeros(n_groups, counts.shape[1]) for _ in range(3))
        sums.index_add_(0, groups, counts)
        expectations.index_add_(0, groups, expected)
        noise.index_add_(0, groups, expected + self.dispersion * expected.square())
        telling = expectations > TELLING_COUNTS
        shifts = torch.where(telling, (sums.clamp(min=1) / expectations.clamp(min=1)).log(), 0.0)
        noise = torch.where(telling, noise / expectations.square().clamp(min=1), 0.0)
        of_groups = telling.any(1)
        squares = ((shifts.square() - noise).sum(1) / telling.sum(1).clamp(min=1)).clamp(min=0)
        variance = _pooled(squares[of_groups], known)
        kept = variance / (variance + noise)
        adjusted = expected * (kept * shifts).exp()[groups]
        return math.sqrt(variance), fitted_dispersion(counts, adjusted, excess), int(of_groups.sum())

    def at_levels(self, points: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated quantiles, from :meth:`points`: (n_spots, n_genes, n) to (n_spots, n_genes, n_levels)."""
        n = points.shape[2]
        return points[..., self._places_of(levels, n).floor().clamp(0, n - 1).long()]

    def ends(self, points: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated ends of intervals: quantiles that are moved towards the median by less than one value.

        Counts have few values, and an interval with both ends in it holds more than it promises by what of the ends'
        probability lies beyond the levels. So a value belongs to the interval if half of its probability or more lies
        within: then intervals hold too much and too little equally often (the mid-distribution of Parzen 2004).

        Parameters
        ----------
        points, levels
            As in :meth:`at_levels`.
        """
        n = points.shape[2]
        places = self._places_of(levels, n)
        found = self.at_levels(points, levels)
        first, end = torch.searchsorted(points, found), torch.searchsorted(points, found, right=True)
        middle = (first + end) / 2
        lower, upper = (points.gather(2, where.clamp(0, n - 1)) for where in (first - 1, end))
        several = end - first > 1
        found = torch.where(several & (places > n / 2) & (places < middle), lower, found)
        found = torch.where(several & (places < n / 2) & (places > middle), upper, found)
        median = points[..., n // 2, None]
        return torch.where(places < n / 2, found.minimum(median), found.maximum(median))

    def _places_of(self, levels: Sequence[float] | Tensor, n: int) -> Tensor:
        """Where calibrated levels lie among so many points, 0 to n."""
        return between_levels(self.levels[:, None], levels)[:, 0] * n

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
        """Learn dispersion, error of the depth and calibration from spots that the prediction has not seen.

        Errors are of spots and of whole groups. The variance between groups is the mean of what is found of each and,
        weighing as one more, of what is known of others; it enters predictions of a new group by the 95 % quantile of
        Student's t in place of the normal one, with a degree of freedom for each group and for each but one of the
        patients of whom it is known. From ``ENOUGH_GROUPS`` groups on, which are enough for intervals of 90 %,
        levels are those of hierarchical conformal prediction (``hierarchical_levels``).

        Parameters
        ----------
        counts
            (n_spots, n_genes).
        totals
            (n_spots,) total count of each spot.
        composition
            What is predicted of them.
        groups
            (n_spots,) number of each spot's section, or individual; None where the prediction has seen other spots of
            them, which tells nothing of how far groups are apart.
        of_individuals
            Which.
        generator
            Source of randomness.
        """
        expected = composition.rates * totals[:, None]
        known = INDIVIDUALS_APART if of_individuals else SECTIONS_APART
        self.dispersion.copy_(fitted_dispersion(counts, expected, composition.excess))
        even = torch.arange(1, LEVELS + 1, dtype=torch.double) / (LEVELS + 1)
        looked_at = slice(None, None, max(1, counts.numel() // MOST_PLACES))
        places = self._places(counts, totals, composition, generator).flatten()[looked_at]
        self.levels.copy_(torch.quantile(places.double().cpu(), even))
        # Intervals that hold for spots of groups as these are now made to hold for a new group.
        errors = (totals.clamp(min=1).log() - composition.log_depth) / composition.depth_spread
        (rates_apart, depth_apart), within, n_groups = known, self.dispersion, 0
        if groups is not None:
            rates_apart, within, n_groups = self._groups_apart(counts, expected, composition.excess, groups, known[0])
            depth_apart, errors = _depths_apart(errors, groups, known[1])
        inflation = float((t.ppf(0.95, n_groups + PATIENTS - 1) / norm.ppf(0.95)) ** 2)
        self.apart.copy_(torch.tensor([rates_apart, depth_apart]))
        self.dispersion.copy_(within + inflation * rates_apart**2)
        spread = (1 + inflation * depth_apart**2 / errors.square().mean().clamp(min=1e-6)).sqrt()
        levels = (torch.arange(DEPTH_LEVELS, device=errors.device) + 0.5) / DEPTH_LEVELS
        self.depth_errors.copy_(spread * torch.quantile(errors, levels.to(errors)))
        if groups is not None and n_groups >= ENOUGH_GROUPS:
            places = self._places(counts, totals, composition, generator).flatten()[looked_at]
            of_places = groups.repeat_interleave(counts.shape[1])[looked_at]
            self.levels.copy_(hierarchical_levels(places.cpu(), of_places.cpu(), self.levels.cpu()))
        self.calibrated.fill_(True)

    def _places(self, counts: Tensor, totals: Tensor, composition: Composition, generator: Any) -> Tensor:
        """Level of each count in what is predicted of it at the spot's own total count, (n_spots, n_genes)."""
        rows_at_once = torch.arange(len(totals)).split(SPOTS_AT_ONCE)
        predicted = ((rows, self.points(composition.take(rows), "counts", totals[rows])) for rows in rows_at_once)
        return torch.cat([randomised_levels(points, counts[rows], generator) for rows, points in predicted])


def _depths_apart(errors: Tensor, groups: Tensor, known: float) -> tuple[float, Tensor]:
    """Standard deviation of groups' mean errors of log depth, and the errors with those taken out."""
    means = torch.stack([errors[groups == k].mean() for k in range(int(groups.max()) + 1)])
    sizes = torch.stack([(groups == k).sum() for k in range(len(means))])
    noise = (errors - means[groups]).square().mean() / sizes
    variance = _pooled((means.square() - noise).clamp(min=0), known)
    kept = variance / (variance + noise)
    return math.sqrt(variance), errors - (kept * means)[groups]


def _pooled(variances: Tensor, known: float) -> float:
    """Variance between groups: mean of each one's squared distance, and of what is known of others."""
    return float((variances.sum() + PRIOR_GROUPS * known**2) / (len(variances) + PRIOR_GROUPS))


def _levels(n: int, like: Tensor) -> Tensor:
    """Probabilities in the middle of n equal parts."""
    return (torch.arange(n, device=like.device) + 0.5) / n


def randomised_levels(points: Tensor, measured: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Level of each measured value in a distribution, at random between those of its neighbours and equals.

    Uniform where the distribution is right, also of counts (Czado, Gneiting & Held 2009).

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
