"""Negative binomial counts: quantiles, moments of their logarithm, likelihood and dispersion."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Nodes of the trapezoidal rule on the logarithm of Frullani's variable; below the first, integrands are linear in it.
STEP = 0.7
NODES = torch.arange(-18.0, 4.0, STEP, dtype=torch.float64).exp()
FIRST = float(NODES[0]) * math.exp(-STEP / 2)
EULER = 0.5772156649015329
# Counts up to which distributions are summed; where they reach further, by steps of several counts. Where zero is less
# likely than that, they are smooth enough for a gamma distribution.
SUMMED, LEAST_ZERO = 128, math.exp(-60)
# Standard deviations above the mean up to which they are summed.
REACH = 6.0
# Bounds of a gene's dispersion.
SMALLEST_DISPERSION, LARGEST_DISPERSION = 1e-4, 100.0
# Values that are tried of its logarithm, in rounds.
SEARCH = (15, 5, 5, 5)


def gamma_quantiles(shape: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of gamma distributions of mean 1, (...) to (..., n_levels), by cube roots (Wilson & Hilferty 1931)."""
    variance = 1 / (9 * shape[..., None])
    # Not torch.special.ndtri, which MPS does not have.
    standard_normal = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    cube_root = 1 - variance + variance.sqrt() * standard_normal
    return cube_root.clamp(min=0).pow(3)


def count_quantiles(mean: Tensor, dispersion: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of negative binomial counts, (n_spots, n_genes) to (n_spots, n_genes, n_levels).

    Exact as far as :data:`SUMMED` counts reach; of wider distributions, by steps of several counts, but for zero; those
    of large counts whose shape is above 1 are a gamma distribution's.

    Parameters
    ----------
    mean, dispersion
        (n_spots, n_genes).
    levels
        (n_levels,), increasing.
    """
    zero = (-(1 / dispersion) * (mean * dispersion).log1p()).exp()
    # X / step has its variance as a negative binomial of another dispersion.
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
    wanted = levels.expand(*mean.shape, -1).contiguous()
    steps = torch.searchsorted(cumulative, wanted).clamp(max=SUMMED - 1)
    # Of steps of several counts, where between the middles of two the level lies; zero by its own probability.
    above = cumulative.gather(-1, steps)
    below = F.pad(cumulative, (1, 0)).gather(-1, steps)
    share = ((wanted - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
    between = (step[..., None] * (steps - 0.5 + share)).clamp(min=0).round()
    exact = torch.where(step[..., None] == 1, steps.to(mean.dtype), between)
    exact = torch.where(wanted <= zero[..., None], 0.0, exact)
    is_smooth = (log_zero.exp() <= LEAST_ZERO) | ((step > 1) & (smooth_shape > 1))
    summed = (cumulative[..., -1:] > levels[-1]) & ~is_smooth[..., None]
    return torch.where(summed, exact, smooth.round())


def log_moments(mean: Tensor, dispersion: Tensor, scale: Tensor, *, second: bool = True) -> tuple[Tensor, Tensor]:
    """First and second moment of log1p(scale x count) of negative binomial counts; see :class:`Observation`.

    Parameters
    ----------
    mean, dispersion
        (n_spots, n_genes).
    scale
        (n_spots, 1).
    second
        Whether the second is needed, too; zeros otherwise.
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
    """Of negative binomial counts, up to what does not depend on mean and dispersion; shapes are broadcast."""
    shape = 1 / dispersion
    constant = torch.lgamma(counts + shape) - torch.lgamma(shape)
    return torch.xlogy(counts + shape, 1 + mean * dispersion) - torch.xlogy(counts, mean * dispersion) - constant


def fitted_dispersion(counts: Tensor, mean: Tensor, excess: Tensor | None = None) -> Tensor:
    """Dispersion of each gene, by maximum likelihood given the means: (n_spots, n_genes) to (n_genes,).

    A search on the logarithm, over all of its range and then ever closer about the best.

    Parameters
    ----------
    counts, mean
        (n_spots, n_genes).
    excess
        (n_spots,) relative variance that each spot has beyond that of the negative binomial.
    """
    more = 0.0 if excess is None or not bool(excess.any()) else excess[:, None]

    def loss(log_dispersion: Tensor) -> Tensor:
        return negative_log_likelihood(counts, mean, log_dispersion.exp() + more).mean(0)

    low, high = math.log(SMALLEST_DISPERSION), math.log(LARGEST_DISPERSION)
    best, width = counts.new_full((counts.shape[1],), (low + high) / 2), (high - low) / 2
    for n_steps in SEARCH:
        tried = torch.stack([(best + width * place).clamp(low, high) for place in torch.linspace(-1, 1, n_steps)])
        losses = torch.stack([loss(candidate) for candidate in tried])
        best = tried.gather(0, losses.nan_to_num(torch.inf).argmin(0, keepdim=True))[0]
        width = 2 * width / (n_steps - 1)
    return best.exp()
