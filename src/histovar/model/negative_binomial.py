"""Negative binomial counts: quantiles, moments of log1p, likelihood, and dispersion by maximum likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Nodes of the trapezoidal rule for Frullani's integral, even on a log scale; below the first, integrands are linear.
STEP = 0.7
NODES = torch.arange(-18.0, 4.0, STEP, dtype=torch.float64).exp()
FIRST = float(NODES[0]) * math.exp(-STEP / 2)
EULER = 0.5772156649015329
# Number of terms in sums of probabilities; wider distributions are summed in steps of several counts. Where the
# probability of zero is smaller than LEAST_ZERO, a gamma distribution is close enough.
SUMMED, LEAST_ZERO = 128, math.exp(-60)
# Standard deviations above the mean that sums reach.
REACH = 6.0
# Bounds of a gene's dispersion.
SMALLEST_DISPERSION, LARGEST_DISPERSION = 1e-4, 100.0
# Number of candidates for its logarithm in each round of the search.
SEARCH = (15, 5, 5, 5)


def gamma_quantiles(shape: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of gamma distributions of mean 1, (...) to (..., n_levels), approximated (Wilson & Hilferty 1931)."""
    variance = 1 / (9 * shape[..., None])
    # Not torch.special.ndtri, which MPS does not have.
    standard_normal = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    cube_root = 1 - variance + variance.sqrt() * standard_normal
    return cube_root.clamp(min=0).pow(3)


def count_quantiles(mean: Tensor, dispersion: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of negative binomial counts, (n_spots, n_genes) to (n_spots, n_genes, n_levels).

    Exact for distributions within :data:`SUMMED` counts. Wider ones are summed in steps of several counts, with the
    exact probability of zero; for large counts with a shape above 1, quantiles are those of a gamma distribution.

    Parameters
    ----------
    mean, dispersion
        (n_spots, n_genes).
    levels
        (n_levels,), increasing.
    """
    zero = (-(1 / dispersion) * (mean * dispersion).log1p()).exp()
    # X / step has the mean and variance of a negative binomial with another dispersion.
    reach = mean + REACH * (mean + dispersion * mean.square()).sqrt()
    step = (reach / SUMMED).ceil().clamp(min=1)
    smooth_shape = mean / (1 + mean * dispersion)
    smooth = mean[..., None] * gamma_quantiles(smooth_shape, levels)
    mean = mean / step
    dispersion = (dispersion - (1 - 1 / step) / mean.clamp(min=1e-12)).clamp(min=SMALLEST_DISPERSION)
    shape = 1 / dispersion
    odds = mean * dispersion
    k = torch.arange(SUMMED - 1, device=mean.device)
    log_zero = -shape * odds.log1p()
    ratios = (shape[..., None] + k) / (k + 1) * (odds / (1 + odds))[..., None]
    probabilities = torch.cat([log_zero.exp()[..., None], ratios], -1).cumprod(-1)
    cumulative = probabilities.cumsum(-1)
    targets = levels.expand(*mean.shape, -1).contiguous()
    steps = torch.searchsorted(cumulative, targets).clamp(max=SUMMED - 1)
    # Within a step of several counts, interpolate; zero has its exact probability.
    above = cumulative.gather(-1, steps)
    below = F.pad(cumulative, (1, 0)).gather(-1, steps)
    share = ((targets - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    between = (step[..., None] * (steps - 0.5 + share)).clamp(min=0).round()
    exact = torch.where(step[..., None] == 1, steps.to(mean.dtype), between)
    exact = torch.where(targets <= zero[..., None], 0.0, exact)
    is_smooth = (log_zero.exp() <= LEAST_ZERO) | ((step > 1) & (smooth_shape > 1))
    summed = (cumulative[..., -1:] > levels[-1]) & ~is_smooth[..., None]
    return torch.where(summed, exact, smooth.round())


def log_moments(mean: Tensor, dispersion: Tensor, scale: Tensor, *, second: bool = True) -> tuple[Tensor, Tensor]:
    """First and second moments of log1p(scale x count) for negative binomial counts; see :class:`Observation`.

    Parameters
    ----------
    mean, dispersion
        (n_spots, n_genes).
    scale
        (n_spots, 1).
    second
        Whether to compute the second moment; if not, what is returned for it has no meaning.
    """
    first = FIRST * scale * mean
    square = -2 * (EULER + math.log(FIRST) - 1) * first
    relative = mean * dispersion
    for node in NODES.tolist():
        absent = torch.log1p(relative * -torch.expm1(-node * scale)).div_(-dispersion)
        present = -torch.expm1(absent)
        weight = STEP * math.exp(-node)
        first.add_(present, alpha=weight)
        if second:
            square.add_(present, alpha=-2 * weight * (EULER + math.log(node)))
    return first, square


def negative_log_likelihood(counts: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Negative log likelihood of negative binomial counts, up to a constant; shapes are broadcast."""
    shape = 1 / dispersion
    constant = torch.lgamma(counts + shape) - torch.lgamma(shape)
    return torch.xlogy(counts + shape, 1 + mean * dispersion) - torch.xlogy(counts, mean * dispersion) - constant


def fit_dispersion(counts: Tensor, mean: Tensor, excess: Tensor | None = None) -> Tensor:
    """Fit the dispersion of each gene by maximum likelihood given the means: (n_spots, n_genes) to (n_genes,).

    A grid search on its logarithm, refined around the best candidate in each round.

    Parameters
    ----------
    counts, mean
        (n_spots, n_genes).
    excess
        (n_spots,) relative variance of each spot in addition to the genes' dispersion.
    """
    extra = 0.0 if excess is None or not bool(excess.any()) else excess[:, None]

    def loss(log_dispersion: Tensor) -> Tensor:
        return negative_log_likelihood(counts, mean, log_dispersion.exp() + extra).mean(0)

    low, high = math.log(SMALLEST_DISPERSION), math.log(LARGEST_DISPERSION)
    best, width = counts.new_full((counts.shape[1],), (low + high) / 2), (high - low) / 2
    for n_steps in SEARCH:
        candidates = torch.stack([(best + width * x).clamp(low, high) for x in torch.linspace(-1, 1, n_steps)])
        losses = torch.stack([loss(candidate) for candidate in candidates])
        best = candidates.gather(0, losses.nan_to_num(torch.inf).argmin(0, keepdim=True))[0]
        width = 2 * width / (n_steps - 1)
    return best.exp()
