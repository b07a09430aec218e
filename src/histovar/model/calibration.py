"""Conformal calibration: intervals that cover as often as they say, of genes and of new groups of spots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# Levels at which the quantiles of the scores are kept.
LEVELS = 199
# torch.quantile takes 16 million values at most.
GENES_AT_ONCE = 2048


def between_levels(kept: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
    """What is kept at :data:`LEVELS` even levels, linear between them and constant beyond.

    Parameters
    ----------
    kept
        (LEVELS, n).
    levels
        (n_levels,) between 0 and 1.

    Returns
    -------
    Tensor
        (n_levels, n).
    """
    place = torch.as_tensor(levels, dtype=torch.float32, device=kept.device) * (LEVELS + 1) - 1
    low = place.floor().clamp(0, LEVELS - 1).long()
    high = (low + 1).clamp(max=LEVELS - 1)
    return torch.lerp(kept[low], kept[high], (place - low).clamp(0, 1)[:, None])


class Calibration(nn.Module):
    """Quantiles of each gene's normalised errors on spots that were not trained on.

    The score of a spot is its error in units of the predicted standard deviation, ``(measured - mean) / std``. The
    quantile of a new spot at some level is its mean plus its standard deviation times the quantile of the scores
    (split conformal prediction with normalised residuals: Lei et al. 2018, section 5.2, both tails apart, as
    expression is skewed). Draws keep their ranks, and with them co-expression, and take their values from the
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
        """Whether it was calibrated."""
        return bool(self.scores.any())

    @torch.no_grad()
    def fit(self, measured: Tensor, mean: Tensor, std: Tensor) -> None:
        """Learn from held-out spots.

        Parameters
        ----------
        measured, mean, std
            (n_spots, n_genes).
        """
        scores = ((measured - mean) / std.clamp(min=1e-6)).double()
        n = len(scores)
        levels = torch.arange(1, LEVELS + 1, dtype=torch.double) / (LEVELS + 1)
        # The finite-sample correction of conformal prediction: levels of n + 1 spots, the new one among them.
        outer = torch.where(levels > 0.5, levels * (n + 1) / n, 1 - (1 - levels) * (n + 1) / n)
        columns = scores.split(GENES_AT_ONCE, 1)
        self.scores.copy_(torch.cat([torch.quantile(part, outer.clamp(0, 1), dim=0) for part in columns], 1))
        self.spread.copy_(scores.square().mean(0).sqrt().float())

    def score_quantiles(self, levels: Sequence[float] | Tensor) -> Tensor:
        """Quantiles of the scores, linear between the levels kept and constant beyond: (n_levels, n_genes)."""
        return between_levels(self.scores, levels)

    def quantiles(self, mean: Tensor, std: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
        """Calibrated quantiles, (n_spots, n_genes) to (n_spots, n_genes, n_levels)."""
        return mean[..., None] + std[..., None] * self.score_quantiles(levels).T

    def draws(self, samples: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Draws of (n_spots, n_genes, n_samples) given calibrated values, their ranks kept."""
        n = samples.shape[2]
        levels = (torch.arange(n, device=samples.device) + 0.5) / n
        ranks = samples.argsort(2).argsort(2)
        return self.quantiles(mean, std, levels).gather(2, ranks)


def hierarchical_levels(places: Tensor, groups: Tensor, levels: Tensor) -> Tensor:
    """Levels by which central intervals hold for spots of a new group (Lee, Barber & Willett 2023, arXiv 2306.06342).

    Every group weighs the same, however many its spots, and the new one as much, of which the worst is assumed: K
    groups tell intervals that may fail in a share of 1 / (K + 1) or more.

    Parameters
    ----------
    places
        (n,): level of each measured value, of any spot and gene, in the distribution predicted.
    groups
        (n,) number of its group.
    levels
        (LEVELS,) what to keep of intervals for which there are too few groups, but no narrower than those within.

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
    wanted = (2 * half - 1) * (len(sizes) + 1) / len(sizes)
    held = np.interp(wanted, reached.cumsum(0), central)
    known = torch.from_numpy(np.where(wanted <= 1, held, np.nan))
    upper, lower = levels[LEVELS // 2 :].double(), 1 - levels[: LEVELS // 2 + 1].double().flip(0)
    ends = [torch.where(known.isnan(), end, 0.5 + known / 2).cummax(0).values for end in (lower, upper)]
    return torch.cat([1 - ends[0].flip(0), ends[1][1:]]).to(levels)
