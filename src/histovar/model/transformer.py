"""Stage 2: an autoregressive transformer over gene tokens, conditioned on histology."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .condition import sine_cosine
from .config import ModelConfig


class KeyValueCache:
    """Keys and values of one layer's self-attention, filled as tokens are generated.

    Parameters
    ----------
    shape
        (n_spots, n_heads, n_tokens, head_width).
    like
        Tensor that gives device and data type.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)
        self.length = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (n_spots, n_heads, n, head_width) and return all so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head attention by ``scaled_dot_product_attention``.

    Parameters
    ----------
    width, n_heads, dropout
        As in :class:`ModelConfig`.
    """

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of (n_spots, n, width): two of (n_spots, n_heads, n, head_width)."""
        keys, values = self.key_value(x).chunk(2, -1)
        return self._heads(keys), self._heads(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from (n_spots, n, width) to keys and values; `mask` is True where attention is allowed."""
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(self._heads(self.query(x)), keys, values, mask, dropout)
        attended: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return attended


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the condition, feed-forward.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.style == "modern"
        # Dropout inside the sublayers costs more than they do; behind each of them it is enough.
        inside = 0.0 if self.pre_norm else config.dropout
        self.self_attention = Attention(config.width, config.n_heads, inside)
        self.cross_attention = Attention(config.width, config.n_heads, inside)
        self.feedforward = nn.Sequential(
            nn.Linear(config.width, config.feedforward),
            nn.GELU() if self.pre_norm else nn.ReLU(),
            nn.Dropout(inside),
            nn.Linear(config.feedforward, config.width),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """One layer.

        Parameters
        ----------
        x
            (n_spots, n, width).
        memory
            Keys and values of the condition, from ``cross_attention.project``.
        mask
            (n, n), True where attention is allowed; None when everything cached may be seen.
        cache
            Where generation keeps keys and values.
        """

        def attend_self(x: Tensor) -> Tensor:
            keys, values = self.self_attention.project(x)
            if cache is not None:
                keys, values = cache.extend(keys, values)
            attended: Tensor = self.self_attention(x, keys, values, mask)
            return attended

        def attend_memory(x: Tensor) -> Tensor:
            attended: Tensor = self.cross_attention(x, *memory)
            return attended

        steps: tuple[Callable[[Tensor], Tensor], ...] = (attend_self, attend_memory, self.feedforward)
        for norm, step in zip(self.norms, steps, strict=True):
            x = x + self.dropout(step(norm(x))) if self.pre_norm else norm(x + self.dropout(step(x)))
        return x


class GeneVARTransformer(nn.Module):
    """Hidden states of gene tokens, each from the tokens before it and the condition.

    Tokens are generated in blocks: one token a block with ``order="token"``, one scale a block with
    ``order="scale"``. A position's input is the embedding of a token of an earlier block (the token before;
    the token of the parent group) and its own position; the first block's input is the condition. A position
    attends to its own and to earlier blocks, so it never sees a token of its own block or of a later one.
    The two orders have the same weights.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        modern = config.style == "modern"
        self.norm: nn.Module = nn.LayerNorm(config.width) if modern else nn.Identity()
        if modern:
            self.positions = nn.Parameter(torch.randn(config.n_tokens, config.width) * 0.02)
        else:
            table = sine_cosine(torch.arange(config.n_tokens).float(), config.width)
            self.register_buffer("positions", table, persistent=False)
        self.register_buffer("parents", torch.full((config.n_tokens,), -1, dtype=torch.long))

    parents: Tensor

    @property
    def blocks(self) -> list[tuple[int, int, int]]:
        """(scale, start, stop) of every block of tokens that is generated at once."""
        starts = [sum(self.config.scales[:k]) for k in range(len(self.config.scales) + 1)]
        scales = [(k, start, stop) for k, (start, stop) in enumerate(pairwise(starts))]
        if self.config.order == "scale":
            return scales
        return [(k, t, t + 1) for k, start, stop in scales for t in range(start, stop)]

    def sources(self) -> Tensor:
        """Index of the token whose embedding each position takes in; -1 for the condition: (n_tokens,)."""
        if self.config.order == "token":
            return torch.arange(-1, self.config.n_tokens - 1, device=self.parents.device)
        sizes = torch.tensor((0, *self.config.scales), device=self.parents.device)
        starts = sizes.cumsum(0)[:-1] - sizes[:-1]
        offsets = torch.cat([s.expand(n) for s, n in zip(starts, self.config.scales, strict=True)])
        return torch.where(self.parents < 0, -1, self.parents + offsets)

    def mask(self) -> Tensor:
        """(n_tokens, n_tokens), True where a position (row) may attend to another (column)."""
        block = torch.zeros(self.config.n_tokens, dtype=torch.long, device=self.parents.device)
        for i, (_, start, stop) in enumerate(self.blocks):
            block[start:stop] = i
        return block[:, None] >= block

    def project_memory(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The condition's keys and values for every layer, computed once a spot."""
        return [layer.cross_attention.project(memory) for layer in self.layers]  # type: ignore[union-attr,operator]

    def inputs(self, embeddings: Tensor, memory: Tensor, start: int, stop: int) -> Tensor:
        """Inputs of the positions from `start` to `stop`.

        Parameters
        ----------
        embeddings
            (n_spots, at least the tokens of earlier blocks, width).
        memory
            (n_spots, n_memory, width).
        start, stop
            Range of positions.

        Returns
        -------
        Tensor
            (n_spots, stop - start, width).
        """
        table = torch.cat([memory.mean(1, keepdim=True), embeddings], 1)
        return table[:, self.sources()[start:stop] + 1] + self.positions[start:stop]

    def forward(self, embeddings: Tensor, memory: Tensor) -> Tensor:
        """Hidden states of all tokens at once, as in training.

        Parameters
        ----------
        embeddings
            (n_spots, n_tokens, width): embeddings of the true tokens.
        memory
            (n_spots, n_memory, width): the condition.

        Returns
        -------
        Tensor
            (n_spots, n_tokens, width).
        """
        x = self.inputs(embeddings, memory, 0, self.config.n_tokens)
        mask = self.mask()
        for layer, projected in zip(self.layers, self.project_memory(memory), strict=True):
            x = layer(x, projected, mask, None)
        out: Tensor = self.norm(x)
        return out

    def caches(self, memory: Tensor) -> list[KeyValueCache]:
        """Empty caches, one a layer, for generating as many spots as `memory` has."""
        heads = self.config.n_heads
        shape = (len(memory), heads, self.config.n_tokens, self.config.width // heads)
        return [KeyValueCache(shape, memory) for _ in self.layers]

    def step(self, x: Tensor, projected: list[tuple[Tensor, Tensor]], caches: list[KeyValueCache]) -> Tensor:
        """Hidden states of the next block, (n_spots, n, width), from its inputs and the caches."""
        for layer, memory, cache in zip(self.layers, projected, caches, strict=True):
            x = layer(x, memory, None, cache)
        out: Tensor = self.norm(x)
        return out
