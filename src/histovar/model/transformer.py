"""Stage 2: an autoregressive transformer over gene tokens, conditioned on histology."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .condition import sine_cosine
from .config import ModelConfig
from .dropout import Dropout, dropout
from .feedforward import FeedForward

# Tokens of a wide scale that are generated at once.
TOKENS_AT_ONCE = 512

# Most keys with which attention on CPUs is computed by plain matrix products.
FEW_KEYS = 64

# Weights, offsets and results of FewKeysAttention.fold.
Folded = tuple[Tensor, Tensor, Tensor]


class KeyValueCache:
    """Keys and values of one layer's self-attention, filled as tokens are generated.

    Parameters
    ----------
    shape
        (n_spots, n_heads, n_tokens, head_width).
    like
        Tensor with the device and data type to use.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, (n_spots, n_heads, n, head_width), of the tokens from `start` on."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop] = keys
        self.values[:, :, start:stop] = values

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `n` tokens."""
        return self.keys[:, :, :n], self.values[:, :, :n]


class Block(NamedTuple):
    """A block of tokens that are generated together.

    Parameters
    ----------
    scale
        Index of their scale.
    start, stop
        Range of the tokens.
    n_seen
        Number of leading tokens to which they attend.
    """

    scale: int
    start: int
    stop: int
    n_seen: int


class Attention(nn.Module):
    """Multi-head attention.

    It uses ``scaled_dot_product_attention``, but for few keys on CPUs, where plain matrix products are faster.

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
        """Split (n_spots, n, width) into heads: (n_spots, n_heads, n, head_width)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project (n_spots, n, width) to keys and values, each (n_spots, n_heads, n, head_width)."""
        keys, values = self.key_value(x).chunk(2, -1)
        return self._heads(keys), self._heads(values)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from (n_spots, n, width) to keys and values; `mask` is True where attention is allowed."""
        queries = self._heads(self.query(x))
        dropped = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and keys.shape[2] <= FEW_KEYS:
            scores = _scores(queries.flatten(0, 1), keys.flatten(0, 1), mask)
            # In fp32, as softmax in half precision is slower on CPUs.
            shares = dropout(scores.softmax(2, dtype=torch.float32).to(values.dtype), dropped, self.training)
            out = torch.bmm(shares, values.flatten(0, 1)).view(queries.shape)
        else:
            out = F.scaled_dot_product_attention(queries, keys, values, mask, dropped)
        attended: Tensor = self.output(out.transpose(1, 2).flatten(2))
        return attended


def _scores(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Masked and scaled attention scores of queries (n, n_queries, head_width) for keys (n, n_keys, head_width)."""
    scale = keys.shape[-1] ** -0.5
    if mask is None:
        return torch.bmm(queries, (keys * scale).transpose(1, 2))
    offsets = torch.zeros_like(mask, dtype=keys.dtype).masked_fill_(~mask, -torch.inf)
    return torch.baddbmm(offsets, queries, keys.transpose(1, 2), alpha=scale)


class FewKeysAttention(Attention):
    """Attention to a handful of keys, the condition, with the weights of :class:`Attention`.

    For every spot, the query projection is folded into the keys and the output projection into the values. So a token's
    scores and its result take one product each, and the queries of many tokens are never computed.
    """

    def fold(self, memory: Tensor) -> Folded:
        """Fold the query projection into the keys and the output projection into the values.

        Parameters
        ----------
        memory
            (n_spots, n_memory, width).

        Returns
        -------
        tuple of Tensor
            Weights of the scores, (n_spots, n_memory x n_heads, width), offsets of the scores,
            (n_spots, n_memory x n_heads, 1), and results, shaped as the weights.
        """
        keys, values = self.project(memory)
        keys = keys * keys.shape[-1] ** -0.5

        def by_head(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (self.n_heads, -1))

        def memory_first(folded: Tensor) -> Tensor:
            # So that the softmax over the memory runs along whole rows of tokens, which vectorises.
            return folded.transpose(1, 2).flatten(1, 2)

        weights = keys @ by_head(self.query.weight)
        offsets = keys @ by_head(self.query.bias)[..., None]
        results = values @ by_head(self.output.weight.T)
        return memory_first(weights), memory_first(offsets), memory_first(results)

    def attend(self, x: Tensor, folded: Folded) -> Tensor:
        """Attend from (n_spots, n, width) to the folded condition, see :meth:`fold`."""
        weights, offsets, results = folded
        scores = torch.baddbmm(offsets, weights, x.transpose(1, 2)).unflatten(1, (-1, self.n_heads))
        shares = dropout(scores.softmax(1), self.dropout, self.training)
        return torch.baddbmm(self.output.bias, shares.flatten(1, 2).transpose(1, 2), results)


class DecoderLayer(nn.Module):
    """Transformer layer: self-attention, cross-attention to the condition, feed-forward.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.style == "modern"
        # Dropout inside the sublayers takes longer than the sublayers; after each of them is enough.
        inside = 0.0 if self.pre_norm else config.dropout
        self.self_attention = Attention(config.width, config.n_heads, inside)
        self.cross_attention = FewKeysAttention(config.width, config.n_heads, inside)
        activation = "gelu" if self.pre_norm else "relu"
        self.feedforward = FeedForward(config.width, config.feedforward, activation, inside)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Folded, attend: Callable[[Attention, Tensor], Tensor]) -> Tensor:
        """Update the hidden states of tokens.

        Parameters
        ----------
        x
            (n_spots, n, width).
        memory
            The condition, from ``cross_attention.fold``.
        attend
            Function that attends from hidden states to tokens, given the layer's self-attention.
        """
        steps: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: attend(self.self_attention, x),
            lambda x: self.cross_attention.attend(x, memory),
            self.feedforward,
        )
        for norm, step in zip(self.norms, steps, strict=True):
            x = x + self.dropout(step(norm(x))) if self.pre_norm else norm(x + self.dropout(step(x)))
        return x


class GeneVARTransformer(nn.Module):
    """Compute hidden states of gene tokens, each from the tokens before it and the condition.

    Tokens are generated in blocks: one token a block with ``order="token"``, one scale a block with
    ``order="scale"``. The input at a position is the embedding of a token of an earlier block (with
    ``order="token"`` the previous token, with ``order="scale"`` the token of the parent group) plus the position's
    own embedding; the first block's input is the condition. A position attends to its own and to earlier blocks;
    as their inputs come from earlier tokens, it never sees a token of its own block or of a later one.
    The two orders have the same weights.

    A wide scale, of more than ``config.attention_limit`` groups, attends to earlier blocks only. Given the coarser
    scales its tokens are independent of each other, so they can be generated, and trained on, in chunks: time and
    memory grow linearly with the number of genes.

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
        # For every token, the number of tokens it attends to, and where its parent's scale starts.
        seen = torch.tensor([block.n_seen for block in self.blocks for _ in range(block.start, block.stop)])
        starts = torch.tensor([0, 0, *config.scales]).cumsum(0)[:-2]
        offsets = starts.repeat_interleave(torch.tensor(config.scales), output_size=config.n_tokens)
        self.register_buffer("n_seen", seen, persistent=False)
        self.register_buffer("offsets", offsets, persistent=False)

    parents: Tensor
    n_seen: Tensor
    offsets: Tensor

    @property
    def blocks(self) -> list[Block]:
        """Blocks of tokens in the order in which they are generated; wide scales are cut into several."""
        starts = [sum(self.config.scales[:k]) for k in range(len(self.config.scales) + 1)]
        blocks = []
        for k, (start, stop) in enumerate(pairwise(starts)):
            if self.config.order == "token":
                blocks += [Block(k, t, t + 1, t + 1) for t in range(start, stop)]
            elif self.config.is_wide(k):
                cuts = [*range(start, stop, TOKENS_AT_ONCE), stop]
                blocks += [Block(k, low, high, start) for low, high in pairwise(cuts)]
            else:
                blocks.append(Block(k, start, stop, stop))
        return blocks

    @property
    def n_keys(self) -> int:
        """Number of leading tokens to which others attend."""
        return max(block.n_seen for block in self.blocks)

    def sources(self) -> Tensor:
        """Index of the token whose embedding is each position's input, -1 for the condition: (n_tokens,)."""
        if self.config.order == "token":
            return torch.arange(-1, self.config.n_tokens - 1, device=self.parents.device)
        return torch.where(self.parents < 0, -1, self.parents + self.offsets)

    def mask(self) -> Tensor:
        """Attention mask, (n_tokens, n_keys): True where a position (row) may attend to another (column)."""
        return torch.arange(self.n_keys, device=self.n_seen.device) < self.n_seen[:, None]

    def project_memory(self, memory: Tensor) -> list[Folded]:
        """Fold the condition for the cross-attention of every layer, once for all tokens of a spot."""
        return [layer.cross_attention.fold(memory) for layer in self.layers]  # type: ignore[union-attr,operator]

    def forward(self, embeddings: Tensor, memory: Tensor, positions: Tensor | None = None) -> Tensor:
        """Hidden states of many tokens at once given the true ones (teacher forcing), as in training.

        Parameters
        ----------
        embeddings
            (n_spots, :attr:`ModelConfig.n_feeding` or more, width): embeddings of the true tokens.
        memory
            (n_spots, n_memory, width): the condition.
        positions
            Indices of the tokens, increasing; all by default. Either all of the first :attr:`n_keys` tokens and any
            later ones, or only a leading part of the first :attr:`n_keys`.

        Returns
        -------
        Tensor
            (n_spots, n_positions, width).
        """
        n_keys, rows = self.n_keys, slice(None) if positions is None else positions
        mask, sources = self.mask()[rows], self.sources()[rows]
        x = torch.cat([memory.mean(1, keepdim=True), embeddings], 1)[:, sources + 1] + self.positions[rows]

        def attend(attention: Attention, x: Tensor) -> Tensor:
            attended: Tensor = attention(x, *attention.project(x[:, :n_keys]), mask[:, : x.shape[1]])
            return attended

        for layer, projected in zip(self.layers, self.project_memory(memory), strict=True):
            x = layer(x, projected, attend)
        out: Tensor = self.norm(x)
        return out

    def caches(self, memory: Tensor) -> list[KeyValueCache]:
        """Empty key-value caches, one for each layer, for as many spots as `memory` has."""
        heads = self.config.n_heads
        shape = (len(memory), heads, self.n_keys, self.config.width // heads)
        return [KeyValueCache(shape, memory) for _ in self.layers]

    def step(self, x: Tensor, block: Block, projected: list[Folded], caches: list[KeyValueCache]) -> Tensor:
        """Hidden states of the next block, (n_spots, n, width), from its inputs and the caches."""
        for layer, memory, cache in zip(self.layers, projected, caches, strict=True):

            def attend(attention: Attention, x: Tensor, cache: KeyValueCache = cache) -> Tensor:
                if block.start < cache.keys.shape[2]:
                    cache.write(block.start, *attention.project(x))
                attended: Tensor = attention(x, *cache.first(block.n_seen))
                return attended

            x = layer(x, memory, attend)
        out: Tensor = self.norm(x)
        return out
