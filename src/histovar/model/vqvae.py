"""Stage 1: expression to tokens at nested scales, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .at_once import at_once
from .config import ModelConfig
from .precision import full_precision
from .quantizer import LATENTS_PER_START, SharedVectorQuantizer, some, usage
from .scales import GeneScales

# Tokens that are made at once on a CPU; an encoder's hidden layer takes a kilobyte for each.
TOKENS_AT_ONCE = 2**15


class Stage1Losses(NamedTuple):
    """Losses of one batch (scalars), its tokens and its standardised expression rebuilt from them.

    Both of the genes that were asked for: (n_spots, number of coarser tokens + n) and (n_spots, n).
    """

    total: Tensor
    reconstruction: Tensor
    hierarchical: Tensor
    vq: Tensor
    tokens: Tensor
    rebuilt: Tensor


class MultiScaleEncoder(nn.Module):
    """One network a scale: a group's values to a latent.

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
        """(..., n_groups, components) to (..., n_groups, codebook_dim)."""
        latents: Tensor = self.scales[scale](values)
        return latents


class MultiScaleDecoder(nn.Module):
    """One network a scale: a code to a group's values.

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
        """(..., codebook_dim) to (..., components)."""
        values: Tensor = self.scales[scale](codes)
        return values


class MultiScaleGeneVQVAE(nn.Module):
    """Multi-scale vector-quantised autoencoder of a spot's expression.

    Scale by scale, coarse to fine: pool what is left of the genes to group values, encode them, take the
    nearest code, decode it, subtract what it explains. The reconstruction is the sum over the scales.

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
        """Place the codes by k-means over the latents of training spots, (n_spots, n_genes); once only."""
        if self.quantizer.needs_start:
            genes = self.scales.standardize(expression)
            latents = []
            for k in range(len(self.config.scales)):
                values = self.scales.pool(genes, k)
                latents.append(self.encoder(some(values.flatten(0, 1), LATENTS_PER_START), k))
                if k < len(self.config.scales) - 1:
                    parts = values.split(max(1, TOKENS_AT_ONCE // values.shape[1]))
                    decoded = torch.cat([self.decoder(self.encoder(part, k), k) for part in parts])
                    genes = genes - self.scales.spread(decoded, k)
            self.quantizer.start(latents)

    def forward(self, expression: Tensor, genes_made: Tensor | None = None) -> Stage1Losses:
        """Losses of a batch, in full precision; in training mode the codebook moves too.

        Parameters
        ----------
        expression
            (n_spots, n_genes) in layer units.
        genes_made
            Genes whose tokens are made at the finest scale; all by default.

        Returns
        -------
        Stage1Losses
        """
        with full_precision(expression.device):
            return self._losses(expression, genes_made)

    def _losses(self, expression: Tensor, genes_made: Tensor | None) -> Stage1Losses:
        genes = self.scales.standardize(expression)
        total = torch.zeros_like(genes)
        latents, tokens = [], []
        hierarchical = vq = genes.new_zeros(())
        for k in range(len(self.config.scales)):
            if genes_made is not None and k == len(self.config.scales) - 1:
                genes, total = genes[:, genes_made], total[:, genes_made]
            target = self.scales.pool(genes - total.detach() if self.config.residual else genes, k)
            latent = self.encoder(target, k)
            if self.quantizer.needs_start:  # the encoders settle first; see Stage1Trainer
                quantized, ids, vq_loss = latent, torch.zeros_like(latent[..., 0], dtype=torch.long), vq
            else:
                quantized, ids, vq_loss = self.quantizer(latent)
            values = self.decoder(quantized, k)
            total = total + self.scales.spread(values, k)
            # A residual scale is scored on all that is reconstructed so far, a plain one on its own average.
            fit = F.mse_loss(total, genes) if self.config.residual else F.mse_loss(values, target)
            hierarchical, vq = hierarchical + fit, vq + vq_loss
            latents.append(latent.detach())
            tokens.append(ids)
        if self.training and not self.quantizer.needs_start:
            self.quantizer.update(latents, tokens)
        reconstruction = F.mse_loss(total, genes)
        loss = reconstruction + self.config.hierarchical_weight * hierarchical + self.config.vq_weight * vq
        return Stage1Losses(loss, reconstruction, hierarchical, vq, torch.cat(tokens, 1), total)

    @torch.no_grad()
    def tokenize(self, expression: Tensor) -> Tensor:
        """Tokens of spots.

        Parameters
        ----------
        expression
            (n_spots, n_genes) in layer units.

        Returns
        -------
        Tensor
            (n_spots, n_tokens), int64, coarse to fine.
        """
        most = max(1, at_once(TOKENS_AT_ONCE, expression.device) // self.config.n_tokens)
        return torch.cat([self._tokenize(part) for part in expression.split(most)])

    def _tokenize(self, expression: Tensor) -> Tensor:
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
        """Expression in layer units from every scale's group values, each (..., n_groups, components)."""
        parts = [self.scales.spread(v, k) for k, v in enumerate(values)]
        return self.scales.restore(torch.stack(parts).sum(0))

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Expression of tokens.

        Parameters
        ----------
        tokens
            (..., n_tokens).

        Returns
        -------
        Tensor
            (..., n_genes) in layer units.
        """
        parts = tokens.split(self.config.scales, -1)
        return self.assemble([self.decoder(self.quantizer.decode(ids), k) for k, ids in enumerate(parts)])

    @torch.no_grad()
    def code_values(self, scale: int) -> Tensor:
        """What every code means at a scale: (codebook_size, components)."""
        return self.decoder(self.quantizer.codebook, scale)

    @torch.no_grad()
    def count_codes(self, tokens: Tensor) -> None:
        """Keep how often each code occurs at each scale in tokens of training spots, (n_spots, n_tokens)."""
        parts = tokens.split(self.config.scales, 1)
        self.code_counts.copy_(torch.stack([usage(ids, self.config.codebook_size) for ids in parts]))
