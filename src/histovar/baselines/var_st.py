"""VAR_ST baseline: genes as an image, generated scale by scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from ._torch import TorchRegressor, shuffle_batches, train

CODES, DIM, WIDTH, LAYERS = 512, 32, 64, 2


class _ImageVQVAE(nn.Module):
    """VQ-VAE with residual multi-scale quantisation of a small image, as in VAR (Tian et al. 2024)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.sides = sorted({max(1, round(side * s / 14)) for s in (1, 2, 4, 7, 14)})
        self.side = side

        def stack(n_in: int, n_out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(n_in, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, n_out, 3, padding=1))

        self.encoder, self.decoder = stack(1, DIM), stack(DIM, 1)
        self.quantizer = VectorQuantize(DIM, CODES, threshold_ema_dead_code=0.1, decay=0.95)

    def up(self, vectors: Tensor, side: int) -> Tensor:
        """Upsample vectors of one scale, (n, side**2, DIM), to the image: (n, DIM, self.side, self.side)."""
        grid = vectors.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(grid, (self.side, self.side), mode="bicubic") if side < self.side else grid

    def tokens(self, image: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Tokenise images: tokens of every scale, sum of the quantised maps, and commitment loss."""
        residual = self.encoder(image)
        total, tokens, commitment = torch.zeros_like(residual), [], image.new_zeros(())
        for side in self.sides:
            pooled = F.adaptive_avg_pool2d(residual, side).flatten(2).transpose(1, 2)
            quantised, ids, loss = self.quantizer(pooled)
            upsampled = self.up(quantised, side)
            total, residual = total + upsampled, residual - upsampled
            tokens.append(ids)
            commitment = commitment + loss.sum()
        return tokens, total, commitment

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and commitment loss."""
        _, total, commitment = self.tokens(image)
        return self.decoder(total), commitment


class _Block(nn.Module):
    """Transformer block with layer norms modulated by the condition (adaptive layer norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.feedforward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """Update tokens (n, n_tokens, WIDTH), given the condition (n, WIDTH)."""
        a, b, c, d, e, f = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + a) + b
        x = x + (1 + c) * self.attention(h, h, h, attn_mask=mask, need_weights=False)[0]
        h = F.layer_norm(x, (WIDTH,)) * (1 + d) + e
        out: Tensor = x + (1 + f) * self.feedforward(h)
        return out


class _NextScale(nn.Module):
    """Transformer that predicts all tokens of a scale at once, from the sum of the coarser scales and histology."""

    def __init__(self, width: int, sides: list[int]) -> None:
        super().__init__()
        self.sides = sides
        self.condition = nn.Sequential(nn.LayerNorm(width), nn.Dropout(0.2), nn.Linear(width, WIDTH))
        self.inputs = nn.Linear(DIM, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(sum(s * s for s in sides), WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.output = nn.Linear(WIDTH, CODES)
        scale = torch.cat([torch.full((s * s,), i) for i, s in enumerate(sides)])
        self.register_buffer("mask", scale[:, None] < scale[None])

    mask: Tensor

    def forward(self, histology: Tensor, coarser: Tensor) -> Tensor:
        """Logits (n, n_tokens, CODES) of the scales whose inputs (n, n_tokens, DIM) are given."""
        n = coarser.shape[1]
        condition = self.condition(histology)
        x = self.inputs(coarser) + self.place[:n] + condition[:, None]
        for block in self.blocks:
            x = block(x, condition, self.mask[:n, :n])
        out: Tensor = self.output(x)
        return out


class VARST(TorchRegressor):
    """Next-scale transformer over tokens of an image-like VQ-VAE, with genes in panel order as a square image.

    The image has one channel, and is padded if the number of genes is not a square (the original has 196 genes). Chosen
    here, as not published: codebook 512 x 32, scales 1, 2, 4, 7, 14, two blocks of width 64, and expected decoding,
    which scores better than arg-max and samples.

    Parameters
    ----------
    random_state
        Seed.
    """

    def fit(self, features: NDArray[Any], expression: NDArray[Any]) -> Self:
        """Fit to features (n_spots, n_features) and expression (n_spots, n_genes)."""
        x = self._fit_inputs(features)._inputs(features)
        y = self._fit_targets(expression)
        side = math.ceil(math.sqrt(y.shape[1]))
        images = F.pad(y, (0, side * side - y.shape[1])).view(-1, 1, side, side)

        def image_batches() -> Iterator[Tensor]:
            return (images[rows] for rows in shuffle_batches(len(images)))

        def reconstruction(network: nn.Module, image: Tensor) -> Tensor:
            rebuilt, commitment = network(image)
            return F.mse_loss(rebuilt, image) + commitment

        options: dict[str, Any] = {"weight_decay": 0.05, "random_state": self.random_state}
        self.vqvae_ = train(
            lambda: _ImageVQVAE(side), reconstruction, image_batches, epochs=12, learning_rate=2e-3, **options
        )
        with torch.no_grad():
            tokens = [self.vqvae_.tokens(batch)[0] for batch in images.split(256)]
        targets = [torch.cat(scale) for scale in zip(*tokens, strict=True)]
        codes = self._codes()
        coarser = self._coarser([codes[ids] for ids in targets])
        flat = torch.cat(targets, 1)

        def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            return ((x[rows], coarser[rows], flat[rows]) for rows in shuffle_batches(len(x)))

        def loss(network: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(network(*batch[:2]).transpose(1, 2), batch[2])

        self.transformer_ = train(
            lambda: _NextScale(x.shape[1], self.vqvae_.sides), loss, batches, epochs=12, learning_rate=2e-3, **options
        )
        return self

    def _codes(self) -> Tensor:
        """Codebook vectors, (CODES, DIM)."""
        codes: Tensor = self.vqvae_.quantizer.codebook
        return codes

    def _coarser(self, vectors: list[Tensor]) -> Tensor:
        """Inputs of every scale, the sum of the coarser maps pooled to its size: (n, n_tokens, DIM)."""
        sides, side = self.vqvae_.sides, self.vqvae_.side
        total = torch.zeros(len(vectors[0]) if vectors else 1, DIM, side, side)
        inputs = [torch.zeros(len(total), 1, DIM)]
        for k, vector in enumerate(vectors[: len(sides) - 1]):
            total = total + self.vqvae_.up(vector, sides[k])
            inputs.append(F.adaptive_avg_pool2d(total, sides[k + 1]).flatten(2).transpose(1, 2))
        return torch.cat(inputs, 1)

    def predict(self, features: NDArray[Any]) -> NDArray[Any]:
        """Predict expression, (n_spots, n_genes)."""
        return self._restore(torch.cat([self._predict(batch) for batch in self._inputs(features).split(256)]))

    def _predict(self, x: Tensor) -> Tensor:
        """Predict standardised genes of a batch by expected decoding."""
        codes = self._codes()
        vectors: list[Tensor] = []
        start = torch.zeros(len(x), 1, DIM)
        for side in self.vqvae_.sides:
            coarser = self._coarser(vectors) if vectors else start
            logits = self.transformer_(x, coarser)[:, -side * side :]
            vectors.append(logits.softmax(-1) @ codes)
        total = sum(self.vqvae_.up(v, s) for v, s in zip(vectors, self.vqvae_.sides, strict=True))
        genes: Tensor = self.vqvae_.decoder(total).flatten(1)[:, : len(self.mean_)]
        return genes
