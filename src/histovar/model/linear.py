"""Ridge regression as a part of the prior, for training data of few spots."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearPart(nn.Module):
    """Linear regressions, one for each cross-fitted member and one for all others, and their weight in the prediction.

    Parameters
    ----------
    n_members
        Number of cross-fitted members.
    n_in, n_out
        Number of features and of outputs.
    """

    def __init__(self, n_members: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_members + 1, n_in, n_out))
        self.register_buffer("bias", torch.zeros(n_members + 1, 1, n_out))
        self.register_buffer("share", torch.zeros(()))

    weight: Tensor
    bias: Tensor
    share: Tensor

    def predict(self, features: Tensor, *, cross_fitted: bool) -> Tensor:
        """Predict from (n_spots, n_in) by all cross-fitted regressions, or by the one fitted to all training spots.

        Returns
        -------
        Tensor
            (n_members, n_spots, n_out), or (1, n_spots, n_out).
        """
        regressions = slice(-1) if cross_fitted else slice(-1, None)
        return self.bias[regressions] + features @ self.weight[regressions]

    def forward(self, outputs: Tensor, features: Tensor, *, cross_fitted: bool) -> Tensor:
        """Mix the members' outputs, (n_members, n_spots, n_out), with the linear prediction."""
        return torch.lerp(outputs, self.predict(features, cross_fitted=cross_fitted), self.share)

    @torch.no_grad()
    def set_share(self, truth: Tensor, members: Tensor, linear: Tensor, weights: Tensor) -> None:
        r"""Set the weight of the linear prediction by its out-of-fold gain over the perceptrons.

        With :math:`m` the members' prediction, :math:`l` the linear one and :math:`y` the truth, the weight is
        :math:`\sum [(y - m)^2 - (y - l)^2] / \sum (m - l)^2`, clipped to [0, 1]: 0 unless the linear prediction is
        the better one, 1 where the members only add noise to it.

        Parameters
        ----------
        truth, members, linear
            (n_spots, n_out): predictions are out of fold.
        weights
            (n_spots,) weight of each spot.
        """
        gain = ((truth - members).square() - (truth - linear).square()).sum(1) @ weights
        distance = (members - linear).square().sum(1) @ weights
        self.share.copy_((gain / distance.clamp(min=1e-12)).clamp(0, 1))
