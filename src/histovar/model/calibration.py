"""Conformal calibration: prediction intervals with the coverage they state, for each gene and for new groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Number of levels at which quantiles of the conformity scores are stored.
LEVELS = 199
# torch.quantile takes at most 16 million values.
GENES_AT_ONCE = 2048


def interpolate_levels(values: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
    """Interpolate values stored at :data:`LEVELS` even levels linearly; beyond the first and last they are constant.

    Parameters
    ----------
    values
        (LEVELS, n).
    levels
        (n_levels,) between 0 and 1.

    Returns
    -------
    Tensor
        (n_levels, n).
    """
    position = torch.as_tensor(levels, dtype=torch.float32, device=values.device) * (LEVELS + 1) - 1
    low = position.floor().clamp(0, LEVELS - 1).long()
    high = (low + 1).clamp(max=LEVELS - 1)
    return torch.lerp(values[low], values[high], (position - low).clamp(0, 1)[:, None])


class Calibration(nn.Module):
    """Conformal calibration of each gene, from normalised errors on spots that were not trained on.

    The conformity score of a spot is its error in units of the predicted standard deviation, ``(measured - mean) /
    std``. A calibrated quantile of a new spot is its mean plus its standard deviation times the same quantile of the
    scores (split conformal prediction with normalised residuals: Lei et al. 2018, section 5.2; each tail by itself, as
    expression is skewed). Draws keep their ranks, and with them co-expression, but take their values from the
    calibrated quantiles (ensemble copula coupling: Schefzik et al. 2013).

    Parameters
    ----------
    n_genes
        Number of genes.
    """

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(LEVELS, n_genes))
        self.register_buffer("spread", torch.ones(n_genes))

    scores: Tensor
    spread: Tensor

    @property
    def fitted(self) -> bool:
        """Whether it has been calibrated."""
        return bool(self.scores.any())

    @torch.no_grad()
    def fit(self, measured: Tensor, mean: Tensor, std: Tensor) -> None:
        """Calibrate on held-out spots.

        Parameters
        ----------
        measured, mean, std
            (n_spots, n_genes): measured values, and the predicted mean and standard deviation.
        """
        scores = ((measured - mean) / std.clamp(min=1e-6)).double()
        n = len(scores)
        levels = torch.arange(1, LEVELS + 1, dtype=torch.double) / (LEVELS + 1)
        # Finite-sample correction of conformal prediction: the new spot counts as one of n + 1.
        corrected = torch.where(levels > 0.5, levels * (n + 1) / n, 1 - (1 - levels) * (n + 1) / n)
        columns = scores.split(GENES_AT_ONCE, 1)
        self.scores.copy_(torch.cat([torch.quantile(genes, corrected.clamp(0, 1), dim=0) for genes in columns], 1))
        self.spread.copy_(scores.square().mean(0).sqrt().float())

    def score_quantiles(self, levels: Sequence[float] | Tensor) -> Tensor:
        """Interpolated quantiles of the conformity scores: (n_levels, n_genes)."""
        return interpolate_levels(self.scores, levels)

    def quantiles(self, mean: Tensor, std: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated quantiles, (n_spots, n_genes) to (n_spots, n_genes, n_levels)."""
        return mean[..., None] + std[..., None] * self.score_quantiles(levels).T

    def draws(self, samples: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Replace the values of draws, (n_spots, n_genes, n_samples), by calibrated quantiles, keeping their ranks."""
        n = samples.shape[2]
        levels = (torch.arange(n, device=samples.device) + 0.5) / n
        ranks = samples.argsort(2).argsort(2)
        return self.quantiles(mean, std, levels).gather(2, ranks)


def hierarchical_levels(places: Tensor, groups: Tensor, levels: Tensor) -> Tensor:
    """Calibrate levels so that central intervals cover spots of a new group (hierarchical conformal prediction).

    Every group has the same weight, however many spots it has, and so has the new one, for which the worst is assumed:
    K groups give intervals with an error rate of 1 / (K + 1) or more. Wider intervals keep their levels, but are made
    no narrower than those within them. Source: Lee, Barber & Willett 2023, arXiv 2306.06342.

    Parameters
    ----------
    places
        (n,): level of each measured value, of any spot and gene, in its predicted distribution.
    groups
        (n,) number of its group.
    levels
        (LEVELS,) levels to keep for intervals for which there are too few groups.

    Returns
    -------
    Tensor
        (LEVELS,).
    """
    sizes = groups.bincount()
    central, order = (2 * places.double() - 1).abs().sort()
    reached = (1 / sizes.double() / len(sizes))[groups[order]]
    even = torch.arange(1, LEVELS + 1, dtype=torch.double) / (LEVELS + 1)
    half = even[LEVELS // 2 :]
    coverage = (2 * half - 1) * (len(sizes) + 1) / len(sizes)
    widths = np.interp(coverage, reached.cumsum(0), central)
    calibrated = torch.from_numpy(np.where(coverage <= 1, widths, np.nan))
    upper, lower = levels[LEVELS // 2 :].double(), 1 - levels[: LEVELS // 2 + 1].double().flip(0)
    ends = [torch.where(calibrated.isnan(), end, 0.5 + calibrated / 2).cummax(0).values for end in (lower, upper)]
    return torch.cat([1 - ends[0].flip(0), ends[1][1:]]).to(levels)
