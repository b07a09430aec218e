"""Softmax over thousands of codes, for some tokens at a time: logits of all of them are never held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .at_once import at_once

# Logits that are held at once on a CPU.
LOGITS_AT_ONCE = 2**20


def tokens_at_once(codes: Tensor) -> int:
    """Number of tokens whose logits for the codes, (n_codes, n), are held at once."""
    return max(1, at_once(LOGITS_AT_ONCE, codes.device) // len(codes))


def two_parts(x: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each number, split into a rounded one and a remainder in a lower precision."""
    high = x.to(half)
    return high, (x - high).to(half)


def logits_in_pieces(query: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Yield the logits of queries (..., n) for codes (n_codes, n), for some queries at a time."""
    for chunk in query.flatten(0, -2).split(tokens_at_once(codes)):
        yield chunk @ codes.T


def softmax_in_pieces(query: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits as :func:`logits_in_pieces` does, and their softmax."""
    for logits in logits_in_pieces(query, codes):
        # Many times faster than exp, which is slow for very small results.
        yield logits, logits.softmax(1, dtype=torch.float32)


class Normaliser(torch.autograd.Function):
    """Log-sum-exp of queries over the codes.

    Its gradient with respect to the query is the expected code, so the forward pass yields all that the backward pass
    needs. Codes are constants.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, codes: Tensor) -> Tensor:
        """(..., n) and (n_codes, n) to (...)."""
        normalisers, means = [], []
        columns = codes.T.contiguous()
        for logits, shares in softmax_in_pieces(query, codes):
            normalisers.append(logits.amax(1) - shares.amax(1).log())
            means.append(F.linear(shares, columns))
        ctx.save_for_backward(torch.cat(means).view(query.shape))
        return torch.cat(normalisers).view(query.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Of the query alone."""
        (mean,) = ctx.saved_tensors
        return gradients[0][..., None] * mean, None
