"""Stage 1: a multi-scale VQ-VAE that turns expression into tokens and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunk_size import chunk_size
from .config import ModelConfig
from .precision import full_precision
from .quantizer import LATENTS_PER_START, SharedVectorQuantizer, sample_rows, usage
from .scales import GeneScales

# Tokens that are encoded at once on a CPU; each takes a kilobyte in an encoder's hidden layer.
TOKENS_AT_ONCE = 2**15


class Stage1Losses(NamedTuple):
    """Losses of one batch (scalars), its tokens, and its standardised expression rebuilt from them.

    `tokens` and `rebuilt` are those of n genes, all or the chosen ones: (n_spots, number of coarser tokens + n) and
    (n_spots, n).
    """

    total: Tensor
    reconstruction: Tensor
    hierarchical: Tensor
    vq: Tensor
    tokens: Tensor
    rebuilt: Tensor


class MultiScaleEncoder(nn.Module):
    """Encoders of group values to latents, one network for each scale.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Linear(c, hidden), nn.ReLU(), nn.Linear(hidden, config.codebook_dim))
            for c, hidden in zip(config.components, config.encoder_hidden, strict=True)
        )

    def forward(self, values: Tensor, scale: int) -> Tensor:
        """Encode group values of a scale: (..., n_groups, components) to (..., n_groups, codebook_dim)."""
        latents: Tensor = self.scales[scale](values)
        return latents


class MultiScaleDecoder(nn.Module):
    """Decoders of codes to group values, one network for each scale.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Linear(config.codebook_dim, hidden), nn.ReLU(), nn.Linear(hidden, c))
            for c, hidden in zip(config.components, config.encoder_hidden, strict=True)
        )

    def forward(self, codes: Tensor, scale: int) -> Tensor:
        """Decode codes at a scale: (..., codebook_dim) to (..., components)."""
        values: Tensor = self.scales[scale](codes)
        return values


class MultiScaleGeneVQVAE(nn.Module):
    """Multi-scale vector-quantised autoencoder (VQ-VAE) of a spot's expression.

    Scale by scale, coarse to fine: pool the genes' residuals to group values, encode them, take the
    nearest code, decode it, and subtract it from the residuals. The reconstruction is the sum over the scales.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scales = GeneScales(config)
        self.encoder = MultiScaleEncoder(config)
        self.quantizer = SharedVectorQuantizer(config)
        self.decoder = MultiScaleDecoder(config)
        shape = (len(config.scales), config.codebook_size)
        self.register_buffer("code_counts", torch.zeros(shape, dtype=torch.long))

    code_counts: Tensor

    @torch.no_grad()
    def start_codebook(self, expression: Tensor) -> None:
        """Initialise the codebook by k-means over latents of training spots, (n_spots, n_genes), if not yet done."""
        if self.quantizer.needs_start:
            genes = self.scales.standardize(expression)
            latents = []
            for k in range(len(self.config.scales)):
                values = self.scales.pool(genes, k)
                latents.append(self.encoder(sample_rows(values.flatten(0, 1), LATENTS_PER_START), k))
                if k < len(self.config.scales) - 1:
                    chunks = values.split(max(1, TOKENS_AT_ONCE // values.shape[1]))
                    decoded = torch.cat([self.decoder(self.encoder(chunk, k), k) for chunk in chunks])
                    genes = genes - self.scales.spread(decoded, k)
            self.quantizer.start(latents)

    def forward(self, expression: Tensor, genes_made: Tensor | None = None) -> Stage1Losses:
        """Losses of a batch, in full precision; in training mode the codebook is updated, too.

        Parameters
        ----------
        expression
            (n_spots, n_genes) in layer units.
        genes_made
            Indices of the genes to encode at the finest scale; all by default.

        Returns
        -------
        Stage1Losses
        """
        with full_precision(expression.device):
            return self._losses(expression, genes_made)

    def _losses(self, expression: Tensor, genes_made: Tensor | None) -> Stage1Losses:
        """Losses of a batch, see :meth:`forward`."""
        genes = self.scales.standardize(expression)
        total = torch.zeros_like(genes)
        latents, tokens = [], []
        hierarchical = vq = genes.new_zeros(())
        for k in range(len(self.config.scales)):
            if genes_made is not None and k == len(self.config.scales) - 1:
                genes, total = genes[:, genes_made], total[:, genes_made]
            target = self.scales.pool(genes - total.detach() if self.config.residual else genes, k)
            latent = self.encoder(target, k)
            if self.quantizer.needs_start:  # encoders warm up before the codebook is placed; see Stage1Trainer
                quantized, ids, vq_loss = latent, torch.zeros_like(latent[..., 0], dtype=torch.long), vq
            else:
                quantized, ids, vq_loss = self.quantizer(latent)
            values = self.decoder(quantized, k)
            total = total + self.scales.spread(values, k)
            # A residual scale is scored on the reconstruction so far, a plain one on its own average.
            scale_loss = F.mse_loss(total, genes) if self.config.residual else F.mse_loss(values, target)
            hierarchical, vq = hierarchical + scale_loss, vq + vq_loss
            latents.append(latent.detach())
            tokens.append(ids)
        if self.training and not self.quantizer.needs_start:
            self.quantizer.update(latents, tokens)
        reconstruction = F.mse_loss(total, genes)
        loss = reconstruction + self.config.hierarchical_weight * hierarchical + self.config.vq_weight * vq
        return Stage1Losses(loss, reconstruction, hierarchical, vq, torch.cat(tokens, 1), total)

    @torch.no_grad()
    def tokenize(self, expression: Tensor) -> Tensor:
        """Turn expression into tokens.

        Parameters
        ----------
        expression
            (n_spots, n_genes) in layer units.

        Returns
        -------
        Tensor
            (n_spots, n_tokens), int64, coarse to fine.
        """
        n_spots = max(1, chunk_size(TOKENS_AT_ONCE, expression.device) // self.config.n_tokens)
        return torch.cat([self._tokenize(chunk) for chunk in expression.split(n_spots)])

    def _tokenize(self, expression: Tensor) -> Tensor:
        """Tokens of one chunk of spots."""
        genes = self.scales.standardize(expression)
        total = torch.zeros_like(genes)
        tokens = []
        for k in range(len(self.config.scales)):
            target = self.scales.pool(genes - total if self.config.residual else genes, k)
            ids = self.quantizer.encode(self.encoder(target, k))
            total = total + self.scales.spread(self.decoder(self.quantizer.decode(ids), k), k)
            tokens.append(ids)
        return torch.cat(tokens, 1)

    def assemble(self, values: Sequence[Tensor]) -> Tensor:
        """Add up the group values of every scale, (..., n_groups, components), to expression in layer units."""
        genes = [self.scales.spread(v, k) for k, v in enumerate(values)]
        return self.scales.restore(torch.stack(genes).sum(0))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens into expression.

        Parameters
        ----------
        tokens
            (..., n_tokens).

        Returns
        -------
        Tensor
            (..., n_genes) in layer units.
        """
        by_scale = tokens.split(self.config.scales, -1)
        return self.assemble([self.decoder(self.quantizer.decode(ids), k) for k, ids in enumerate(by_scale)])

    @torch.no_grad()
    def code_values(self, scale: int) -> Tensor:
        """Values that all codes decode to at a scale: (codebook_size, components)."""
        return self.decoder(self.quantizer.codebook, scale)

    @torch.no_grad()
    def count_codes(self, tokens: Tensor) -> None:
        """Store how often each code occurs at each scale, in tokens of training spots, (n_spots, n_tokens)."""
        by_scale = tokens.split(self.config.scales, 1)
        self.code_counts.copy_(torch.stack([usage(ids, self.config.codebook_size) for ids in by_scale]))
