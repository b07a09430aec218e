"""Softmax and log-sum-exp over thousands of codes, in chunks of tokens, without holding all logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunk_size import chunk_size

# Logits that are in memory at once on a CPU.
LOGITS_AT_ONCE = 2**20


def tokens_at_once(codes: Tensor) -> int:
    """Number of tokens whose logits over the codes, (n_codes, n), are in memory at once."""
    return max(1, chunk_size(LOGITS_AT_ONCE, codes.device) // len(codes))


def split_high_low(x: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split floats into high and low half-precision parts, whose sum is nearly exact (compensated summation)."""
    high = x.to(half)
    return high, (x - high).to(half)


def logits_in_pieces(query: Tensor, codes: Tensor) -> Iterator[Tensor]:
    """Yield logits of queries (..., n) over codes (n_codes, n), one chunk of queries at a time."""
    for chunk in query.flatten(0, -2).split(tokens_at_once(codes)):
        yield chunk @ codes.T


def softmax_in_pieces(query: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits as :func:`logits_in_pieces` does, and their softmax."""
    for logits in logits_in_pieces(query, codes):
        # softmax is many times as fast as exp, which is slow where its results are very small.
        yield logits, logits.softmax(1, dtype=torch.float32)


class Normaliser(torch.autograd.Function):
    """Log-sum-exp of logits over the codes, differentiable with respect to the query.

    The gradient is the expected code, which the forward pass computes anyway and saves. Codes are constants.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, codes: Tensor) -> Tensor:
        """Log-sum-exp of queries (..., n) over codes (n_codes, n): (...)."""
        normalisers, means = [], []
        columns = codes.T.contiguous()
        for logits, shares in softmax_in_pieces(query, codes):
            normalisers.append(logits.amax(1) - shares.amax(1).log())
            means.append(F.linear(shares, columns))
        ctx.save_for_backward(torch.cat(means).view(query.shape))
        return torch.cat(normalisers).view(query.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Gradient with respect to the query; the codes have none."""
        (mean,) = ctx.saved_tensors
        return gradients[0][..., None] * mean, None
