"""The conditional-mean prior: a small, heavily regularised ensemble that predicts rates, or values without counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .distributed import average_over_processes
from .dropout import dropout
from .linear import LinearPart
from .precision import full_precision

# Log relative rate for an output of 1: about the standard deviation of log rates over spots.
LOG_RATE = 0.5
# Least rate, relative to that of all training spots: linear regression could predict negative ones.
LEAST_RATE = 0.01
# Hidden width of the perceptrons for depth. Weight of ridge regression in the predicted depth of sections like those of
# training, and how much is added to it for sections unlike any.
DEPTH_HIDDEN, LINEAR_DEPTH, MORE_LINEAR = 64, 0.25, 0.5
# Spots for which the predictions of all cross-fitted members are in memory at once.
UNSEEN_AT_ONCE = 512


class EnsembleLinear(nn.Module):
    """Linear layers side by side, one for each member: (n_members, n, n_in) to (n_members, n, n_out)."""

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(n_members, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_members, 1, n_out).uniform_(-bound, bound))

    def forward(self, x: Tensor, members: slice) -> Tensor:
        """Apply the layers of some members."""
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class _EnsembleNorm(nn.Module):
    """Layer normalisation side by side, one for each member."""

    def __init__(self, n_members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_members, 1, width))
        self.bias = nn.Parameter(torch.zeros(n_members, 1, width))

    def forward(self, x: Tensor, members: slice) -> Tensor:
        """Normalise rows by the layers of some members."""
        return torch.addcmul(self.bias[members], F.layer_norm(x, x.shape[-1:]), self.weight[members])


class Ensemble(nn.Module):
    """Ensemble of multilayer perceptrons: two hidden layers, layer norm, GELU, strong dropout.

    Parameters
    ----------
    n
        Number of members.
    n_in, hidden, n_out
        Widths of input, hidden layers and output.
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
        """Apply n of the members: (n, n_spots, n_in) to (n, n_spots, n_out)."""
        x = dropout(x, self.input_dropout, self.training)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = dropout(F.gelu(norm(layer(x, members), members)), self.dropout, self.training)
        outputs: Tensor = self.output(x, members)
        return outputs


class ConditionalMeanPrior(nn.Module):
    """Predicts expected expression from the condition's features, by an ensemble of perceptrons.

    If the model learns from counts, the members predict each gene's rate, its share of the spot's total count, relative
    to that of all training spots; otherwise they predict standardised expression. Depth, the log total count, has
    perceptrons of its own, as it would dominate a shared network. Part of its prediction is ridge regression, the more
    the less a section is like those of training, since a linear model extrapolates where perceptrons level off.

    Each member sees one of the condition's views. The first ``config.n_members`` members are cross-fitted: each is
    trained without one fold of the training spots. So a training spot can be predicted by members that did not see it,
    with errors like those on new spots, from which the token model and the calibration learn. As many members again are
    trained on all training spots; new spots are predicted by their mean. Where ridge regression predicts training spots
    better than the perceptrons, as it may with few spots, it is mixed into each member (``LinearPart``).

    Parameters
    ----------
    config
        The model's configuration.
    views
        Columns of the features that the members see, in turn; equally many in each view.
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
        # Whether rates are predicted, and the number of folds. Kept as Python values, too: reading a buffer waits for
        # the device.
        self.register_buffer("trained", torch.tensor([0, 1]))
        self.of_rates, self.n_folds = False, 1
        self.register_buffer("depth_mean", torch.zeros(()))
        self.register_buffer("depth_std", torch.ones(()))
        self.register_load_state_dict_post_hook(_read_trained)

    def set_trained(self, *, of_rates: bool, n_folds: int) -> None:
        """Set what the members predict, and the number of folds they are cross-fitted on.

        Parameters
        ----------
        of_rates
            Whether they predict relative rates or, if not, standardised expression.
        n_folds
            Number of folds; cross-fitted member ``m`` leaves out fold ``m % n_folds``.
        """
        self.trained.copy_(torch.tensor([of_rates, n_folds]))
        self.of_rates, self.n_folds = of_rates, n_folds

    trained: Tensor
    depth_mean: Tensor
    depth_std: Tensor

    def _members(self, cross_fitted: bool) -> slice:
        """Slice of the cross-fitted members, or of those trained on all spots."""
        n = self.config.n_members
        return slice(0, n) if cross_fitted else slice(n, 2 * n)

    def _seen(self, features: Tensor, members: slice) -> Tensor:
        """Features that each member sees, (n_members, n_spots, n_in).

        Cross-fitted members take the views in such an order that members of several views leave out each fold.
        """
        n, n_views = self.config.n_members, len(self.views)
        cross_fitted = [(m // self.n_folds + m % self.n_folds) % n_views for m in range(n)]
        views = cross_fitted + [m % n_views for m in range(n)]
        seen = [torch.cat([features[:, block.start : block.stop] for block in view], 1) for view in self.views]
        return torch.stack([seen[view] for view in views[members]])

    def _relative(self, outputs: Tensor) -> Tensor:
        """Turn outputs of the perceptrons into relative rates, or leave them as standardised expression."""
        return (LOG_RATE * outputs).exp() if self.of_rates else outputs

    def forward(self, features: Tensor, *, cross_fitted: bool = False) -> Tensor:
        """Predict with all members that were trained on all spots, or with all cross-fitted ones.

        Parameters
        ----------
        features
            (n_spots, n_features).
        cross_fitted
            Whether to use the cross-fitted members.

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
        """Predict the log total count with each member: (n_members, n_spots).

        Parameters
        ----------
        features, cross_fitted
            As in ``forward``.
        novelty
            (n_spots,) how unlike the training sections each spot's section is, 0 to 1.
        """
        members = self._members(cross_fitted)
        with full_precision(features.device):
            outputs = self.depth_mean + self.depth_std * self.depths(self._seen(features, members), members)
            linear = self.linear_depth.predict(features, cross_fitted=cross_fitted)
        return torch.lerp(outputs[..., 0], linear[..., 0], LINEAR_DEPTH + MORE_LINEAR * novelty)

    def loss(
        self, features: Tensor, score: Callable[[Tensor], Tensor], folds: Tensor, log_totals: Tensor | None = None
    ) -> Tensor:
        """Sum of the members' losses, each averaged over the spots that the member may see.

        Parameters
        ----------
        features
            (n_spots, n_features).
        score
            Function that scores predictions: (n_members, n_spots, n_genes) to (n_members, n_spots).
        folds
            (n_spots,) fold of each spot.
        log_totals
            (n_spots, 1) log total counts, to learn depth, too.
        """
        all_members = slice(None)
        x = self._seen(features, all_members)
        errors = score(self._relative(self.genes(x, all_members)))
        if log_totals is not None:
            depth = (log_totals - self.depth_mean) / self.depth_std
            errors = errors + (self.depths(x, all_members) - depth).square()[..., 0]
        seen = (~self._unseen(folds)).to(errors.dtype)
        seen = torch.cat([seen, torch.ones_like(seen)])
        return ((errors * seen).sum(1) / average_over_processes(seen.sum(1)).clamp(min=1)).sum()

    @torch.no_grad()
    def out_of_fold(self, features: Tensor, folds: Tensor) -> OutOfFold:
        """Predict each training spot by the members that did not see it.

        Parameters
        ----------
        features
            (n_spots, n_features) of training spots.
        folds
            (n_spots,) fold of each spot.
        """
        predictions = []
        for x, fold in zip(features.split(UNSEEN_AT_ONCE), folds.split(UNSEEN_AT_ONCE), strict=True):
            unseen = self._unseen(fold).to(features.dtype)
            members, n = self(x, cross_fitted=True), unseen.sum(0)[:, None]
            mean = torch.einsum("mng,mn->ng", members, unseen) / n
            log_depth = (self.log_depth(x, x.new_zeros(len(x)), cross_fitted=True) * unseen).sum(0) / n[:, 0]
            variance = disagreement(members, unseen) if self.of_rates else torch.zeros_like(log_depth)
            predictions.append(OutOfFold(mean, log_depth, variance, n[:, 0]))
        return OutOfFold(*(torch.cat(values) for values in zip(*predictions, strict=True)))

    def _unseen(self, folds: Tensor) -> Tensor:
        """Which cross-fitted members have not seen each spot: (n_members, n_spots)."""
        left_out = torch.arange(self.config.n_members, device=folds.device) % self.n_folds
        return left_out[:, None] == folds


def _read_trained(prior: ConditionalMeanPrior, _: object) -> None:
    """Update the Python values of ``trained`` after loading a state dict."""
    if not prior.trained.is_meta:
        of_rates, n_folds = prior.trained.tolist()
        prior.of_rates, prior.n_folds = bool(of_rates), n_folds


class OutOfFold(NamedTuple):
    """Prediction of training spots by the members that did not see them.

    Parameters
    ----------
    mean
        (n_spots, n_genes) mean over these members.
    log_depth
        (n_spots,) mean log total count.
    disagreement
        (n_spots,) see :func:`disagreement`.
    n_members
        (n_spots,) number of these members.
    """

    mean: Tensor
    log_depth: Tensor
    disagreement: Tensor
    n_members: Tensor


def disagreement(members: Tensor, weights: Tensor | None = None) -> Tensor:
    """Relative variance between members' rates, mean over genes: (n_members, n_spots, n_genes) to (n_spots,).

    Parameters
    ----------
    members
        Rates predicted by each member.
    weights
        (n_members, n_spots): 1 for members to include, 0 for others; by default all are included.
    """
    weights = members.new_ones(members.shape[:2]) if weights is None else weights
    n = weights.sum(0)[:, None]
    mean = torch.einsum("mng,mn->ng", members, weights) / n
    square = torch.einsum("mng,mn->ng", (members / mean - 1).square(), weights)
    return (square / (n - 1).clamp(min=1)).mean(1)
