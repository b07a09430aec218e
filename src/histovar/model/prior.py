"""The conditional mean: a small, heavily regularised ensemble whose prediction shifts the token logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .distributed import mean_of_processes
from .dropout import dropout
from .linear import LinearPart

# How much of the predicted depth (in standard deviations) is added to genes (in standard deviations) of a section that
# is like none of training. Log-normalised values follow depth through their zeros: the genes' mean correlation with it
# is 0.13 to 0.24 in seven of her2st's eight patients and 0.29 to 0.38 in the shallow one, and histology tells the depth
# of another patient's spots better than their composition. More would cost deep sections more than it gives others.
DEPTH_SHARE = 0.6
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
    """Expected standardised expression and depth given the condition's features, by an ensemble.

    Each member is a multilayer perceptron (two hidden layers, layer norm, GELU, strong dropout). The first
    ``config.n_members`` are cross-fitted: each never sees one fold of the training spots. So a training spot can be
    given the prediction of members that did not see it, which is as wrong as the prediction of a new spot, and the
    token model and the calibration that build on it learn from honest errors. As many again see every training spot;
    a new spot gets their mean. Where ridge regression predicts training spots better than perceptrons do, as of few
    spots it may, each has some of it (:class:`LinearPart`).

    Depth, the log total count, is one more output. Within a tissue it is left out of expression; where a section is
    unlike those of training (:attr:`Histology.novelty`), some of it is added.

    Parameters
    ----------
    config
        The model's configuration.
    n_features
        Width of the condition's features.
    """

    def __init__(self, config: ModelConfig, n_features: int) -> None:
        super().__init__()
        self.config = config
        n, hidden = 2 * config.n_members, config.prior_hidden
        self.layers = nn.ModuleList([EnsembleLinear(n, n_features, hidden), EnsembleLinear(n, hidden, hidden)])
        self.norms = nn.ModuleList([_EnsembleNorm(n, hidden), _EnsembleNorm(n, hidden)])
        self.output = EnsembleLinear(n, hidden, config.n_genes + 1)
        self.linear = LinearPart(config.n_members, n_features, config.n_genes + 1)

    def _hidden(self, features: Tensor, members: slice) -> Tensor:
        """What some members make of the features: (number of them, n_spots, prior_hidden)."""
        x = features.expand(len(self.output.bias[members]), -1, -1)
        x = dropout(x, self.config.prior_input_dropout, self.training)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = dropout(F.gelu(norm(layer(x, members), members)), self.config.prior_dropout, self.training)
        return x

    def forward(self, features: Tensor, novelty: Tensor, *, cross_fitted: bool = False) -> Tensor:
        """Prediction of every member that saw all training spots, or of every cross-fitted one.

        Parameters
        ----------
        features
            (n_spots, n_features).
        novelty
            (n_spots,) between 0 and 1.
        cross_fitted
            Which of them.

        Returns
        -------
        Tensor
            (n_members, n_spots, n_genes), standardised expression.
        """
        n = self.config.n_members
        members = slice(0, n) if cross_fitted else slice(n, 2 * n)
        outputs = self.output(self._hidden(features, members), members)
        outputs = self.linear(outputs, features, cross_fitted=cross_fitted)
        genes, depth = outputs.split([self.config.n_genes, 1], 2)
        return genes + DEPTH_SHARE * novelty[:, None] * depth

    def loss(
        self,
        features: Tensor,
        targets: Tensor,
        weights: Tensor,
        folds: Tensor,
        n_folds: int,
        also: EnsembleLinear | None = None,
    ) -> Tensor:
        """Sum over all members of the weighted mean squared error on the spots that the member may see.

        Parameters
        ----------
        features
            (n_spots, n_features).
        targets
            (n_spots, n_genes + 1 + outputs of `also`): standardised genes, depth, then what `also` is to predict.
        weights
            (n_spots,) weight of each spot.
        folds
            (n_spots,) fold of each spot.
        n_folds
            Number of folds; cross-fitted member ``m`` leaves out fold ``m % n_folds``.
        also
            Further outputs of the hidden layers, for training alone.
        """
        every = slice(None)
        hidden = self._hidden(features, every)
        outputs = torch.cat([layer(hidden, every) for layer in (self.output, also) if layer is not None], 2)
        errors = (outputs - targets).square().mean(2) * weights
        seen = (~self._unseen(folds, n_folds)).to(errors.dtype)
        seen = torch.cat([seen, torch.ones_like(seen)])
        return ((errors * seen).sum(1) / mean_of_processes(seen.sum(1)).clamp(min=1)).sum()

    @torch.no_grad()
    def out_of_fold(self, features: Tensor, folds: Tensor, n_folds: int) -> Tensor:
        """Mean prediction of the members that did not see each training spot: (n_spots, n_genes)."""
        found = []
        for some, fold in zip(features.split(UNSEEN_AT_ONCE), folds.split(UNSEEN_AT_ONCE), strict=True):
            unseen = self._unseen(fold, n_folds).to(features.dtype)
            members = self(some, some.new_zeros(len(some)), cross_fitted=True)
            found.append(torch.einsum("mng,mn->ng", members, unseen) / unseen.sum(0)[:, None])
        return torch.cat(found)

    def _unseen(self, folds: Tensor, n_folds: int) -> Tensor:
        left_out = torch.arange(self.config.n_members, device=folds.device) % n_folds
        return left_out[:, None] == folds
