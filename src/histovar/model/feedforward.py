"""The transformer's feed-forward layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dropout import Dropout

# Hidden values that are held at once on a CPU where no gradient is wanted: few enough to stay in its caches.
HIDDEN_AT_ONCE = 2**20


class FeedForward(nn.Sequential):
    """Two linear layers, an activation and dropout between them.

    On CPUs fresh memory for all hidden values costs more than to compute them, so that where no gradient is wanted some
    rows at a time go through one buffer.

    Parameters
    ----------
    width, hidden
        Of the rows, and of what lies between the two layers.
    activation
        ``"gelu"`` or ``"relu"``.
    dropout
        Its rate.
    """

    def __init__(self, width: int, hidden: int, activation: str, dropout: float) -> None:
        between = nn.GELU() if activation == "gelu" else nn.ReLU(inplace=True)
        super().__init__(nn.Linear(width, hidden), between, Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of (..., width), each by itself."""
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            whole: Tensor = super().forward(x)
            return whole
        up, up_bias, down, down_bias = self.parameters()
        activate_ = torch.ops.aten.gelu_ if isinstance(self[1], nn.GELU) else torch.relu_
        rows, at_once = x.flatten(0, -2).to(up.dtype), max(1, HIDDEN_AT_ONCE // len(up))
        made, buffer = torch.empty_like(rows), rows.new_empty(min(at_once, len(rows)), len(up))
        for some, out in zip(rows.split(at_once), made.split(at_once), strict=True):
            hidden = torch.addmm(up_bias, some, up.T, out=buffer[: len(some)])
            torch.addmm(down_bias, activate_(hidden), down.T, out=out)
        return made.view(x.shape)
