"""The transformer's feed-forward layers, with little memory for hidden values on CPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .dropout import Dropout

# Hidden values that are in memory at once on a CPU: few enough to stay in its caches.
HIDDEN_AT_ONCE = 2**20


class FeedForward(nn.Sequential):
    """Two linear layers with an activation and dropout between them.

    On CPUs, allocating memory for all hidden values costs more than computing them. So rows go through one buffer in
    chunks, and the backward pass computes the hidden values again.

    Parameters
    ----------
    width, hidden
        Width of the input and output, and of the hidden layer.
    activation
        ``"gelu"`` or ``"relu"``.
    dropout
        Dropout rate.
    """

    def __init__(self, width: int, hidden: int, activation: str, dropout: float) -> None:
        nonlinearity = nn.GELU() if activation == "gelu" else nn.ReLU(inplace=True)
        super().__init__(nn.Linear(width, hidden), nonlinearity, Dropout(dropout), nn.Linear(hidden, width))
        self.drops = dropout > 0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to each row of (..., width)."""
        mixed = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or mixed or (self.drops and self.training):
            unchunked: Tensor = super().forward(x)
            return unchunked
        weights = tuple(self.parameters())
        rows = x.flatten(0, -2).to(weights[0].dtype)
        outputs: Tensor = _ChunkedFeedForward.apply(rows, *weights, isinstance(self[1], nn.GELU))
        return outputs.view(x.shape)


class _ChunkedFeedForward(torch.autograd.Function):
    """Apply both layers to rows (n, width), one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, gelu: bool
    ) -> Tensor:
        """Compute the outputs, (n, width); hidden values are not kept."""
        ctx.save_for_backward(x, up, up_bias, down)
        ctx.gelu = gelu
        activate_: Callable[[Tensor], Tensor] = torch.ops.aten.gelu_ if gelu else torch.relu_
        outputs = torch.empty_like(x)
        for rows, hidden in _chunks(x, up):
            torch.addmm(up_bias, x[rows], up.T, out=hidden)
            torch.addmm(down_bias, activate_(hidden), down.T, out=outputs[rows])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of all inputs, with hidden values computed again."""
        (gradient,) = gradients
        x, up, up_bias, down = ctx.saved_tensors
        grad_x, grad_up, grad_up_bias, grad_down = (
            torch.empty_like(x),
            *(torch.zeros_like(w) for w in (up, up_bias, down)),
        )
        for rows, hidden in _chunks(x, up):
            torch.addmm(up_bias, x[rows], up.T, out=hidden)
            grad_hidden = gradient[rows] @ down
            if ctx.gelu:
                active, grad_hidden = nn.functional.gelu(hidden), torch.ops.aten.gelu_backward(grad_hidden, hidden)
            else:
                active, grad_hidden = hidden.relu(), torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
            grad_down.addmm_(gradient[rows].T, active)
            grad_up.addmm_(grad_hidden.T, x[rows])
            grad_up_bias += grad_hidden.sum(0)
            torch.mm(grad_hidden, up, out=grad_x[rows])
        return grad_x, grad_up, grad_up_bias, grad_down, gradient.sum(0), None


def _chunks(x: Tensor, up: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each chunk, and the part of one buffer for their hidden values."""
    n_rows = max(1, HIDDEN_AT_ONCE // len(up))
    buffer = x.new_empty(min(n_rows, len(x)), len(up))
    for start in range(0, len(x), n_rows):
        rows = slice(start, min(start + n_rows, len(x)))
        yield rows, buffer[: rows.stop - rows.start]
