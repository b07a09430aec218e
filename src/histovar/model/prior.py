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
from .precision import full_precision

# Logarithm of a gene's relative rate for an output of 1: rates vary about so much from spot to spot.
LOG_RATE = 0.5
# Least rate, relative to that of all training spots, which linear regression could take below zero.
LEAST_RATE = 0.01
# Hidden width of the perceptrons of depth. How much of its prediction is ridge regression's: of sections that are like
# those of training, and how much more of sections that are like none.
DEPTH_HIDDEN, LINEAR_DEPTH, MORE_LINEAR = 64, 0.25, 0.5
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


class Ensemble(nn.Module):
    """Multilayer perceptrons side by side: two hidden layers, layer norm, GELU, strong dropout.

    Parameters
    ----------
    n
        Number of members.
    n_in, hidden, n_out
        Widths.
    input_dropout, dropout
        Dropout rates of the input and of hidden layers.
    """

    def __init__(self, n: int, n_in: int, hidden: int, n_out: int, input_dropout: float, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([EnsembleLinear(n, n_in, hidden), EnsembleLinear(n, hidden, hidden)])
        self.norms = nn.ModuleList([_EnsembleNorm(n, hidden), _EnsembleNorm(n, hidden)])
        self.output = EnsembleLinear(n, hidden, n_out)
        self.input_dropout, self.dropout = input_dropout, dropout

    def forward(self, x: Tensor, members: slice) -> Tensor:
        """Of some members: (number of them, n_spots, n_in) to (number of them, n_spots, n_out)."""
        x = dropout(x, self.input_dropout, self.training)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = dropout(F.gelu(norm(layer(x, members), members)), self.dropout, self.training)
        outputs: Tensor = self.output(x, members)
        return outputs


class ConditionalMeanPrior(nn.Module):
    """Expected expression given the condition's features, by an ensemble of perceptrons.

    Where the model learns from counts, that is every gene's rate, its share of a spot's total count, relative to that
    of all training spots; else standardised expression. Depth, the log total count, has perceptrons of its own, which
    would otherwise learn little else. Some of its prediction is ridge regression's, the more the less a section is like
    those of training: a line goes on where perceptrons level off.

    Each member sees one of the condition's views. The first ``config.n_members`` are cross-fitted: each never sees one
    fold of the training spots. So a training spot can be given the prediction of members that did not see it, which is
    as wrong as the prediction of a new spot, and the token model and the calibration that build on it learn from honest
    errors. As many again see every training spot; a new spot gets their mean. Where ridge regression predicts training
    spots better than perceptrons do, as of few spots it may, each has some of it (``LinearPart``).

    Parameters
    ----------
    config
        The model's configuration.
    views
        Columns of the features that members see in turn, equally many each.
    n_features
        Width of the condition's features.
    """

    def __init__(self, config: ModelConfig, views: Sequence[Sequence[range]], n_features: int) -> None:
        super().__init__()
        self.config, self.views = config, list(views)
        n, n_in = config.n_members, sum(map(len, views[0]))
        rates = config.prior_input_dropout, config.prior_dropout
        self.genes = Ensemble(2 * n, n_in, config.prior_hidden, config.n_genes, *rates)
        self.linear = LinearPart(n, n_features, config.n_genes)
        self.depths = Ensemble(2 * n, n_in, DEPTH_HIDDEN, 1, *rates)
        self.linear_depth = LinearPart(n, n_features, 1)
        # Whether rates are predicted, and the number of folds; as numbers, too, which no device needs to be asked for.
        self.register_buffer("trained", torch.tensor([0, 1]))
        self.of_rates, self.n_folds = False, 1
        self.register_buffer("depth_mean", torch.zeros(()))
        self.register_buffer("depth_std", torch.ones(()))
        self.register_load_state_dict_post_hook(_read_trained)

    def set_trained(self, *, of_rates: bool, n_folds: int) -> None:
        """Say what the members are trained on.

        Parameters
        ----------
        of_rates
            Whether they predict relative rates, not standardised expression.
        n_folds
            Number of folds; cross-fitted member ``m`` leaves out fold ``m % n_folds``.
        """
        self.trained.copy_(torch.tensor([of_rates, n_folds]))
        self.of_rates, self.n_folds = of_rates, n_folds

    trained: Tensor
    depth_mean: Tensor
    depth_std: Tensor

    def _members(self, cross_fitted: bool) -> slice:
        n = self.config.n_members
        return slice(0, n) if cross_fitted else slice(n, 2 * n)

    def _seen(self, features: Tensor, members: slice) -> Tensor:
        """What each member sees of the features; cross-fitted ones so that each fold is left out by several views."""
        n, n_views = self.config.n_members, len(self.views)
        cross_fitted = [(m // self.n_folds + m % self.n_folds) % n_views for m in range(n)]
        views = cross_fitted + [m % n_views for m in range(n)]
        seen = [torch.cat([features[:, part.start : part.stop] for part in view], 1) for view in self.views]
        return torch.stack([seen[view] for view in views[members]])

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
        members = self._members(cross_fitted)
        with full_precision(features.device):
            outputs = self._relative(self.genes(self._seen(features, members), members))
            outputs = self.linear(outputs, features, cross_fitted=cross_fitted)
        return outputs.clamp(min=LEAST_RATE) if self.of_rates else outputs

    def log_depth(self, features: Tensor, novelty: Tensor, *, cross_fitted: bool = False) -> Tensor:
        """Log total count that every member expects: (n_members, n_spots).

        Parameters
        ----------
        features, cross_fitted
            As in ``forward``.
        novelty
            (n_spots,) how unlike those of training each spot's section is, 0 to 1.
        """
        members = self._members(cross_fitted)
        with full_precision(features.device):
            outputs = self.depth_mean + self.depth_std * self.depths(self._seen(features, members), members)
            linear = self.linear_depth.predict(features, cross_fitted=cross_fitted)
        return torch.lerp(outputs[..., 0], linear[..., 0], LINEAR_DEPTH + MORE_LINEAR * novelty)

    def loss(
        self, features: Tensor, score: Callable[[Tensor], Tensor], folds: Tensor, log_totals: Tensor | None = None
    ) -> Tensor:
        """Sum over all members of the mean loss on the spots that the member may see.

        Parameters
        ----------
        features
            (n_spots, n_features).
        score
            Loss of predictions, (n_members, n_spots, n_genes) to (n_members, n_spots).
        folds
            (n_spots,) fold of each spot.
        log_totals
            (n_spots, 1) log total counts, where depth is to be learnt, too.
        """
        every = slice(None)
        x = self._seen(features, every)
        errors = score(self._relative(self.genes(x, every)))
        if log_totals is not None:
            depth = (log_totals - self.depth_mean) / self.depth_std
            errors = errors + (self.depths(x, every) - depth).square()[..., 0]
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
            log_depth = (self.log_depth(some, some.new_zeros(len(some)), cross_fitted=True) * unseen).sum(0) / n[:, 0]
            apart = disagreement(members, unseen) if self.of_rates else torch.zeros_like(log_depth)
            found.append(OutOfFold(mean, log_depth, apart, n[:, 0]))
        return OutOfFold(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _unseen(self, folds: Tensor) -> Tensor:
        left_out = torch.arange(self.config.n_members, device=folds.device) % self.n_folds
        return left_out[:, None] == folds


def _read_trained(prior: ConditionalMeanPrior, _: object) -> None:
    if not prior.trained.is_meta:
        of_rates, n_folds = prior.trained.tolist()
        prior.of_rates, prior.n_folds = bool(of_rates), n_folds


class OutOfFold(NamedTuple):
    """Mean prediction of members, (n_spots, n_genes), log depth, disagreement and number of them, (n_spots,)."""

    mean: Tensor
    log_depth: Tensor
    disagreement: Tensor
    n_members: Tensor


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
