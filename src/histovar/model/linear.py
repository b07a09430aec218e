"""Linear regression beside the perceptrons: what few spots can be better told by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearPart(nn.Module):
    """A linear prediction for each cross-fitted member, one for the others, and how much of it to take.

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
        """(n_spots, n_in) to (n_members, n_spots, n_out), or to (1, n_spots, n_out) of what saw all training spots."""
        which = slice(-1) if cross_fitted else slice(-1, None)
        return self.bias[which] + features @ self.weight[which]

    def forward(self, outputs: Tensor, features: Tensor, *, cross_fitted: bool) -> Tensor:
        """Outputs of members, (n_members, n_spots, n_out), with the linear prediction's share."""
        return torch.lerp(outputs, self.predict(features, cross_fitted=cross_fitted), self.share)

    @torch.no_grad()
    def set_share(self, truth: Tensor, members: Tensor, linear: Tensor, weights: Tensor) -> None:
        r"""Take as much as the linear prediction is better, on spots that neither has seen.

        With :math:`m` the members' prediction, :math:`l` the linear one and :math:`y` the truth, the share is
        :math:`\sum [(y - m)^2 - (y - l)^2] / \sum (m - l)^2` in [0, 1]: nothing unless the linear prediction is
        the better one, all of it where the members only add noise to it.

        Parameters
        ----------
        truth, members, linear
            (n_spots, n_out).
        weights
            (n_spots,) weight of each spot.
        """
        gain = ((truth - members).square() - (truth - linear).square()).sum(1) @ weights
        apart = (members - linear).square().sum(1) @ weights
        self.share.copy_((gain / apart.clamp(min=1e-12)).clamp(0, 1))
