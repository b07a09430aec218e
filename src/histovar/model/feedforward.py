"""The transformer's feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import Dropout

# Hidden values that are held at once on a CPU: few enough to stay in its caches.
HIDDEN_AT_ONCE = 2**20


class FeedForward(nn.Sequential):
    """Two linear layers, an activation and dropout between them.

    On CPUs fresh memory for all hidden values costs more than to compute them, so that some rows at a time go through
    one buffer; their gradients compute hidden values again.

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
        self.drops = dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        """Rows of (..., width), each by itself."""
        mixed = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or mixed or (self.drops and self.training):
            whole: Tensor = super().forward(x)
            return whole
        weights = tuple(self.parameters())
        rows = x.flatten(0, -2).to(weights[0].dtype)
        made: Tensor = _Rows.apply(rows, *weights, isinstance(self[1], nn.GELU))
        return made.view(x.shape)


class _Rows(torch.autograd.Function):
    """Rows (n, width) through both layers, some at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, gelu: bool
    ) -> Tensor:
        ctx.save_for_backward(x, up, up_bias, down)
        ctx.gelu = gelu
        activate_: Callable[[Tensor], Tensor] = torch.ops.aten.gelu_ if gelu else torch.relu_
        made = torch.empty_like(x)
        for rows, hidden in _pieces(x, up):
            torch.addmm(up_bias, x[rows], up.T, out=hidden)
            torch.addmm(down_bias, activate_(hidden), down.T, out=made[rows])
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, up, up_bias, down = ctx.saved_tensors
        of_x, of_up, of_up_bias, of_down = torch.empty_like(x), *(torch.zeros_like(w) for w in (up, up_bias, down))
        for rows, hidden in _pieces(x, up):
            torch.addmm(up_bias, x[rows], up.T, out=hidden)
            of_hidden = gradient[rows] @ down
            if ctx.gelu:
                active, of_hidden = nn.functional.gelu(hidden), torch.ops.aten.gelu_backward(of_hidden, hidden)
            else:
                active, of_hidden = hidden.relu(), torch.ops.aten.threshold_backward(of_hidden, hidden, 0)
            of_down.addmm_(gradient[rows].T, active)
            of_up.addmm_(of_hidden.T, x[rows])
            of_up_bias += of_hidden.sum(0)
            torch.mm(of_hidden, up, out=of_x[rows])
        return of_x, of_up, of_up_bias, of_down, gradient.sum(0), None


def _pieces(x: Tensor, up: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and room for their hidden values."""
    at_once = max(1, HIDDEN_AT_ONCE // len(up))
    buffer = x.new_empty(min(at_once, len(x)), len(up))
    for start in range(0, len(x), at_once):
        rows = slice(start, min(start + at_once, len(x)))
        yield rows, buffer[: rows.stop - rows.start]
