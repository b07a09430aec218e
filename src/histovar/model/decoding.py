"""Generate tokens block by block: expected, sampled or greedy decoding, the same code for both orders."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from histovar._arguments import Number, Positive, Share, checked

from .head import CODES_AT_ONCE, TokenHead
from .transformer import Block, GeneVARTransformer
from .vqvae import MultiScaleGeneVQVAE

# Spots that go through the transformer at once on a CPU in fp32; in 16 bits, twice as many. More do not fit its caches
# and take longer. On other devices, as many as need BYTES_AT_ONCE for keys, values and one layer's hidden values, and
# at most MOST_AT_ONCE, which stays below CUDA's limit of blocks along the shorter sides of a grid.
SPOTS_AT_ONCE = 64
BYTES_AT_ONCE, MOST_AT_ONCE = 2**33, 2**15

Mode = Literal["expected", "sample", "greedy"]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen from their distributions.

    Parameters
    ----------
    mode
        ``"expected"``: no token is chosen; the expected embedding of each distribution is fed forward and its
        expected value is decoded, which by linearity gives expected expression. ``"sample"``: tokens are
        drawn at random. ``"greedy"``: the most probable token is chosen.
    temperature
        Divides the logits before sampling.
    top_k
        Sample among the `top_k` most probable codes only; 0 for all.
    top_p
        Sample among the most probable codes whose probabilities together reach `top_p`; 1 for all.
    """

    mode: Mode = "expected"
    temperature: Positive = 1.0
    top_k: Number = 0
    top_p: Share = 1.0

    def __post_init__(self) -> None:
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)

    def filter(self, logits: Tensor) -> Tensor:
        """Probabilities after temperature, top-k and top-p: (..., codebook_size)."""
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k:
            k = min(self.top_k, logits.shape[-1])
            smallest = logits.topk(k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(-1, descending=True)
            surplus = ordered.cumsum(-1) - ordered >= self.top_p
            kept = torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(surplus, 0))
            probabilities = kept / kept.sum(-1, keepdim=True)
        return probabilities

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw codes from logits, (n, codebook_size) to (n,), by inverse transform sampling.

        First a block of codes is drawn, then a code within the block.
        """
        blocks = self.filter(logits).unflatten(1, (-1, gcd(logits.shape[1], CODES_AT_ONCE)))
        cumulative = blocks.sum(2).cumsum(1)
        height = torch.rand(len(logits), 1, device=logits.device, generator=generator) * cumulative[:, -1:]
        block = torch.searchsorted(cumulative, height, right=True).clamp(max=blocks.shape[1] - 1)
        below = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0)
        within = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].cumsum(1)
        # Rounding errors must not lead beyond the block, nor to a code of probability zero.
        height = torch.minimum(height - below, within[:, -1:].nextafter(within.new_zeros(())))
        return block[:, 0] * blocks.shape[2] + torch.searchsorted(within, height, right=True)[:, 0]


class Generation(NamedTuple):
    """Expression, its standard deviation and tokens that were generated for a batch of spots.

    Parameters
    ----------
    expression
        (n_spots, n_genes) in layer units.
    std
        (n_spots, n_genes): standard deviation implied by the token distributions, with tokens taken as
        independent given the condition; zero unless ``mode="expected"``. ``TwoStageVARST.predict`` adds
        the variance between the members of the prior. None if not asked for.
    tokens
        (n_spots, n_tokens): the chosen tokens (in ``"expected"`` mode the most probable ones). None if not asked for.
    values
        For each scale (n_spots, n_groups, components): the groups' decoded or expected values.
    logits
        (n_spots, n_tokens, codebook_size) with ``keep_logits=True``, else None.
    """

    expression: Tensor
    std: Tensor | None
    tokens: Tensor | None
    values: list[Tensor]
    logits: Tensor | None


def pieces_of_spots(n_spots: int, transformer: GeneVARTransformer) -> list[slice]:
    """Slices of spots that go through the transformer together."""
    positions, config = transformer.positions, transformer.config
    if positions.device.type == "cpu":
        n_at_once = SPOTS_AT_ONCE * 4 // positions.element_size()
    else:
        n_values = 2 * config.n_layers * transformer.n_keys * config.width + config.n_tokens * config.feedforward
        n_at_once = max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // (n_values * positions.element_size())))
    return [slice(start, start + n_at_once) for start in range(0, max(1, n_spots), n_at_once)]


@torch.no_grad()
def generate(
    stage1: MultiScaleGeneVQVAE,
    transformer: GeneVARTransformer,
    head: TokenHead,
    memory: Tensor,
    prior: list[Tensor] | None,
    decoding: Decoding,
    *,
    tokens: bool = True,
    std: bool = True,
    generator: torch.Generator | None = None,
    keep_logits: bool = False,
) -> Generation:
    """Generate the tokens of spots from their condition, and decode them to expression.

    Expected decoding of scales whose gate is shut gives the prior's means: where neither `std` nor `tokens` are asked
    for, the transformer stops at the last scale whose gate is open.

    Parameters
    ----------
    stage1, transformer, head
        The trained parts of the model.
    memory
        (n_spots, n_memory, width): the condition.
    prior
        For each scale (n_spots, n_groups, components): the prior's mean of the group values; None without a prior.
    decoding
        How tokens are chosen.
    tokens, std
        Whether to return them.
    generator
        Source of randomness for ``mode="sample"``.
    keep_logits
        Return the logits of all tokens.

    Returns
    -------
    Generation
    """
    needs_distribution = [True] * len(transformer.config.scales)
    if prior is not None and decoding.mode == "expected" and not std:
        needs_distribution = head.gate.gt(0).tolist()
    blocks = transformer.blocks
    if not tokens and not keep_logits:
        n_scales = max((k + 1 for k, needed in enumerate(needs_distribution) if needed), default=0)
        blocks = [block for block in blocks if block.scale < n_scales]
    if prior is not None and not blocks:
        return Generation(stage1.assemble(prior), None, None, prior, None)
    generations = []
    for rows in pieces_of_spots(len(memory), transformer):
        means = None if prior is None else [mean[rows] for mean in prior]
        generations.append(
            _generate(
                stage1,
                transformer,
                head,
                memory[rows],
                means,
                decoding,
                generator,
                std,
                keep_logits,
                blocks,
                needs_distribution,
            )
        )
    expression, spread, chosen, values, logits = zip(*generations, strict=True)
    return Generation(
        torch.cat(expression),
        torch.cat(spread) if std else None,
        torch.cat(chosen) if tokens else None,
        [torch.cat(scale) for scale in zip(*values, strict=True)],
        torch.cat(logits) if keep_logits else None,
    )


def _generate(
    stage1: MultiScaleGeneVQVAE,
    transformer: GeneVARTransformer,
    head: TokenHead,
    memory: Tensor,
    prior: list[Tensor] | None,
    decoding: Decoding,
    generator: torch.Generator | None,
    std: bool,
    keep_logits: bool,
    blocks: list[Block],
    needs_distribution: list[bool],
) -> Generation:
    """Generate one chunk of spots."""
    config = transformer.config
    memory = memory.to(transformer.positions.dtype)
    codebook = stage1.quantizer.codebook
    projected, caches = transformer.project_memory(memory), transformer.caches(memory)
    n_spots = len(memory)
    # Inputs of the blocks: the condition for the first, then the embeddings of tokens for later ones.
    inputs = memory.new_empty(n_spots, 1 + config.n_feeding, config.width)
    inputs[:, 0] = memory.mean(1)
    sources = transformer.sources() + 1
    tokens = torch.zeros(n_spots, config.n_tokens, dtype=torch.long, device=memory.device)
    shapes = zip(config.scales, config.components, strict=True)
    values = [codebook.new_zeros(n_spots, n, c) for n, c in shapes] if prior is None else [m.clone() for m in prior]
    variances = [torch.zeros_like(v) for v in values]
    all_logits = []

    def pick(logits: Tensor) -> Tensor:
        return logits.max(1).indices if decoding.mode == "greedy" else decoding.draw(logits, generator)

    offsets = [sum(config.scales[:k]) for k in range(len(config.scales))]

    for block in blocks:
        scale, start, stop, _ = block
        groups = slice(start - offsets[scale], stop - offsets[scale])
        x = inputs[:, sources[start:stop]].add_(transformer.positions[start:stop])
        hidden = transformer.step(x, block, projected, caches)
        shift = None if prior is None else prior[scale][:, groups]
        if keep_logits:
            all_logits.append(head.logits(hidden, scale, groups, shift))
        feeds = start < config.n_feeding
        embedding = None
        if decoding.mode != "expected":
            chosen = head.choose(hidden, scale, groups, shift, pick)
            values[scale][:, groups] = head.values(chosen, scale)
        elif feeds or needs_distribution[scale]:
            expectation = head.expected(hidden, scale, groups, shift, embed=feeds)
            values[scale][:, groups], variances[scale][:, groups] = expectation.value, expectation.variance
            chosen, embedding = expectation.likeliest, expectation.embedding
        else:
            chosen = head.likeliest(hidden, scale, groups, shift)
        tokens[:, start:stop] = chosen
        if feeds:
            inputs[:, start + 1 : stop + 1] = head.embed(chosen, codebook) if embedding is None else embedding

    spread = None
    if std:
        gene_variances = [stage1.scales.spread_variance(v, k) for k, v in enumerate(variances)]
        spread = torch.stack(gene_variances).sum(0).sqrt() * stage1.scales.std
    logits = torch.cat(all_logits, 1) if keep_logits else None
    return Generation(stage1.assemble(values), spread, tokens, values, logits)
