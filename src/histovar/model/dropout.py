"""Fast dropout on CPUs, where torch draws a random number for every element, one after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set elements to 0 with probability `p`, and scale the others to keep the expectation.

    On CPUs one random integer serves eight elements, and `p` is rounded to a 256th.

    Parameters
    ----------
    x
        Any shape.
    p
        Probability, between 0 and 1.
    training
        Whether to drop anything.
    """
    dropped = round(256 * p)
    if not training or dropped == 0:
        return x
    if x.device.type != "cpu" or dropped == 256:
        return F.dropout(x, p)
    n = x.numel()
    bits = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None)
    keep = torch.ge(bits.view(torch.uint8)[:n].view(x.shape), dropped, out=torch.empty(x.shape, dtype=x.dtype))
    return x * keep.mul_(256 / (256 - dropped))


class Dropout(nn.Module):
    """:func:`dropout` as a module.

    Parameters
    ----------
    p
        Probability.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout in training mode; return the input unchanged otherwise."""
        return dropout(x, self.p, self.training)
