"""The conditional mean: a small, heavily regularised ensemble of rates, or of values where there are no counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .distributed import mean_of_processes
from .dropout import dropout
from .linear import LinearPart

# Logarithm of a gene's relative rate for an output of 1: rates vary about so much from spot to spot.
LOG_RATE = 0.5
# Least rate, relative to that of all training spots, which linear regression could take below zero.
LEAST_RATE = 0.01
# Spots for which what every cross-fitted member predicts is held at once.
UNSEEN_AT_ONCE = 512


class EnsembleLinear(nn.Module):
    """A linear layer for each member: (n_members, n, n_in) to (n_members, n, n_out)."""

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(n_members, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_members, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: slice) -> Tensor:
        """Of some members."""
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class _EnsembleNorm(nn.Module):
    """A layer normalisation for each member."""

    def __init__(self, n_members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_members, 1, width))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, width))

    def forward(self, x: Tensor, members: slice) -> Tensor:
        return torch.addcmul(self.bias[members], F.layer_norm(x, x.shape[-1:]), self.weight[members])


class ConditionalMeanPrior(nn.Module):
    """Expected expression given the condition's features, by an ensemble.

    Where the model learns from counts, that is every gene's rate, its share of a spot's total count, relative to that
    of all training spots; else standardised expression. Depth, the log total count, is predicted apart, by ridge
    regression: perceptrons fit it no better, and of tissue unlike that of training a line goes on where they level off.

    Each member is a multilayer perceptron (two hidden layers, layer norm, GELU, strong dropout), and sees one of the
    condition's views. The first ``config.n_members`` are cross-fitted: each never sees one fold of the training spots.
    So a training spot can be given the prediction of members that did not see it, which is as wrong as the prediction
    of a new spot, and the token model and the calibration that build on it learn from honest errors. As many again see
    every training spot; a new spot gets their mean. Where ridge regression predicts training spots better than
    perceptrons do, as of few spots it may, each has some of it (:class:`LinearPart`).

    Parameters
    ----------
    config
        The model's configuration.
    views
        Columns of the features that members see in turn, equally many each.
    n_features
        Width of the condition's features.
    """

    def __init__(self, config: ModelConfig, views: Sequence[Tensor], n_features: int) -> None:
        super().__init__()
        self.config, self.views = config, list(views)
        n, hidden = 2 * config.n_members, config.prior_hidden
        self.layers = nn.ModuleList([EnsembleLinear(n, len(views[0]), hidden), EnsembleLinear(n, hidden, hidden)])
        self.norms = nn.ModuleList([_EnsembleNorm(n, hidden), _EnsembleNorm(n, hidden)])
        self.output = EnsembleLinear(n, hidden, config.n_genes)
        self.linear = LinearPart(config.n_members, n_features, config.n_genes)
        self.depth = LinearPart(config.n_members, n_features, 1)
        self.register_buffer("of_rates", torch.tensor(False))
        self.register_buffer("n_folds", torch.tensor(1))

    of_rates: Tensor
    n_folds: Tensor

    def _views(self, members: slice) -> list[int]:
        """Which view each member takes: cross-fitted ones so that each fold is left out by members of several."""
        n, n_views = self.config.n_members, len(self.views)
        cross_fitted = [m // int(self.n_folds) % n_views for m in range(n)]
        return (cross_fitted + [m % n_views for m in range(n)])[members]

    def _outputs(self, features: Tensor, members: slice) -> Tensor:
        """Of the last layer of some members: (number of them, n_spots, n_genes)."""
        seen = [features[:, columns] for columns in self.views]
        x = torch.stack([seen[view] for view in self._views(members)])
        x = dropout(x, self.config.prior_input_dropout, self.training)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = dropout(F.gelu(norm(layer(x, members), members)), self.config.prior_dropout, self.training)
        outputs: Tensor = self.output(x, members)
        return outputs

    def _relative(self, outputs: Tensor) -> Tensor:
        return (LOG_RATE * outputs).exp() if self.of_rates else outputs

    def forward(self, features: Tensor, *, cross_fitted: bool = False) -> Tensor:
        """Prediction of every member that saw all training spots, or of every cross-fitted one.

        Parameters
        ----------
        features
            (n_spots, n_features).
        cross_fitted
            Which of them.

        Returns
        -------
        Tensor
            (n_members, n_spots, n_genes): relative rates, or standardised expression.
        """
        n = self.config.n_members
        members = slice(0, n) if cross_fitted else slice(n, 2 * n)
        outputs = self.linear(self._relative(self._outputs(features, members)), features, cross_fitted=cross_fitted)
        return outputs.clamp(min=LEAST_RATE) if self.of_rates else outputs

    def log_depth(self, features: Tensor, members: Tensor | None = None) -> Tensor:
        """Expected log total count, (n_spots,), of what saw all training spots or of some cross-fitted members."""
        found = self.depth.predict(features, cross_fitted=members is not None)[..., 0]
        return (found if members is None else found[members]).mean(0)

    def loss(self, features: Tensor, score: Callable[[Tensor], Tensor], folds: Tensor) -> Tensor:
        """Sum over all members of the mean loss on the spots that the member may see.

        Parameters
        ----------
        features
            (n_spots, n_features).
        score
            Loss of predictions, (n_members, n_spots, n_genes) to (n_members, n_spots).
        folds
            (n_spots,) fold of each spot.
        """
        errors = score(self._relative(self._outputs(features, slice(None))))
        seen = (~self._unseen(folds)).to(errors.dtype)
        seen = torch.cat([seen, torch.ones_like(seen)])
        return ((errors * seen).sum(1) / mean_of_processes(seen.sum(1)).clamp(min=1)).sum()

    @torch.no_grad()
    def out_of_fold(self, features: Tensor, folds: Tensor) -> OutOfFold:
        """What members that did not see each training spot predict of it."""
        found = []
        for some, fold in zip(features.split(UNSEEN_AT_ONCE), folds.split(UNSEEN_AT_ONCE), strict=True):
            unseen = self._unseen(fold).to(features.dtype)
            members, n = self(some, cross_fitted=True), unseen.sum(0)[:, None]
            mean = torch.einsum("mng,mn->ng", members, unseen) / n
            log_depth = (self.depth.predict(some, cross_fitted=True)[..., 0] * unseen).sum(0) / n[:, 0]
            apart = disagreement(members, unseen) if self.of_rates else torch.zeros_like(log_depth)
            found.append(OutOfFold(mean, log_depth, apart))
        return OutOfFold(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _unseen(self, folds: Tensor) -> Tensor:
        left_out = torch.arange(self.config.n_members, device=folds.device) % self.n_folds
        return left_out[:, None] == folds


class OutOfFold(NamedTuple):
    """Mean prediction of members, (n_spots, n_genes), log depth and disagreement, (n_spots,)."""

    mean: Tensor
    log_depth: Tensor
    disagreement: Tensor


def disagreement(members: Tensor, weights: Tensor | None = None) -> Tensor:
    """Relative variance between members' rates, mean over genes: (n_members, n_spots, n_genes) to (n_spots,).

    Parameters
    ----------
    members
        Rates of members.
    weights
        (n_members, n_spots): 1 for those that count, 0 for others; all by default.
    """
    weights = members.new_ones(members.shape[:2]) if weights is None else weights
    n = weights.sum(0)[:, None]
    mean = torch.einsum("mng,mn->ng", members, weights) / n
    square = torch.einsum("mng,mn->ng", (members / mean - 1).square(), weights)
    return (square / (n - 1).clamp(min=1)).mean(1)
