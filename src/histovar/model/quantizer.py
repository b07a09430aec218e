"""One codebook for the tokens of all scales."""

from __future__ import annotations

from collections.abc import Sequence

import loguru
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from .at_once import at_once
from .config import ModelConfig
from .distributed import gathered

# Latents a scale that place the codes (k-means) and that update the moving averages in one step. The same
# number from every scale: the finest has most tokens, and would leave the coarser ones no codes of their own.
LATENTS_PER_START = 2048
LATENTS_PER_UPDATE = 1024
# Latents whose distances to all codes are held at once on a CPU.
LATENTS_PER_LOOKUP = 1024


class SharedVectorQuantizer(nn.Module):
    """Nearest-code quantisation with one codebook for all scales, over ``vector-quantize-pytorch``.

    With ``codebook_update="ema"`` the library owns the codebook: k-means start, moving averages, revival of
    dead codes. With ``"gradient"`` it is a parameter trained by the codebook loss. Never both: a codebook
    under moving averages that also follows a gradient explodes.

    Parameters
    ----------
    config
        The model's configuration.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        ema = config.codebook_update == "ema"
        self.vq = VectorQuantize(
            dim=config.codebook_dim,
            codebook_size=config.codebook_size,
            kmeans_init=ema,
            decay=config.codebook_decay,
            threshold_ema_dead_code=config.dead_code_threshold if ema else 0,
            ema_update=ema,
            learnable_codebook=not ema,
        )
        if not ema:
            bound = 1 / config.codebook_size
            nn.init.uniform_(self.vq.codebook, -bound, bound)
        # Whether the codebook still waits for its k-means start; known here, as to ask a device has it waited for.
        self.needs_start = ema
        self.register_load_state_dict_post_hook(_is_started)

    @property
    def codebook(self) -> Tensor:
        """The codes, (codebook_size, codebook_dim)."""
        return self.vq.codebook

    @torch.no_grad()
    def start(self, latents: Sequence[Tensor]) -> None:
        """Place the codes by k-means over latents of every scale, each (n, codebook_dim)."""
        sample = torch.cat(list(latents))
        training = self.vq.training
        self.vq.train()
        # Fewer latents than codes are no cause for alarm: codes start double and are revived elsewhere.
        loguru.logger.disable("vector_quantize_pytorch")
        self.vq(sample[None])
        loguru.logger.enable("vector_quantize_pytorch")
        self.vq.train(training)
        self.needs_start = False

    @torch.no_grad()
    def update(self, latents: Sequence[Tensor], tokens: Sequence[Tensor]) -> None:
        """Move the codes towards the latents assigned to them in all processes, and revive dead codes.

        Parameters
        ----------
        latents, tokens
            Of every scale: (n_spots, n_groups, codebook_dim) and (n_spots, n_groups).
        """
        if self.config.codebook_update == "ema":
            pairs = [
                some(gathered(torch.cat([x, ids[..., None]], -1)).flatten(0, 1), LATENTS_PER_UPDATE)
                for x, ids in zip(latents, tokens, strict=True)
            ]
            sample = torch.cat(pairs)
            self.vq.update_indices(sample[None, :, :-1], sample[None, :, -1].long())

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Index of the nearest code of each latent.

        Parameters
        ----------
        latents
            (..., codebook_dim).

        Returns
        -------
        Tensor
            (...), int64.
        """
        codes = self.codebook
        offset = -codes.square().sum(1)
        flat = latents.reshape(-1, codes.shape[1])
        # On CPUs max is several times as fast as argmax.
        parts = flat.split(at_once(LATENTS_PER_LOOKUP, flat.device))
        chunks = [torch.addmm(offset, part, codes.T, alpha=2).max(1).indices for part in parts]
        return torch.cat(chunks).reshape(latents.shape[:-1])

    def decode(self, tokens: Tensor) -> Tensor:
        """The codes of tokens, (...) to (..., codebook_dim)."""
        return F.embedding(tokens, self.codebook)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise.

        Parameters
        ----------
        latents
            (n_spots, n_groups, codebook_dim).

        Returns
        -------
        quantized
            Same shape; its gradient passes straight through to `latents`.
        tokens
            (n_spots, n_groups), int64.
        loss
            Codebook loss (``"gradient"`` only) plus ``commitment_weight`` times commitment loss.
        """
        tokens = self.encode(latents)
        codes = self.decode(tokens)
        loss = self.config.commitment_weight * F.mse_loss(latents, codes.detach())
        if self.config.codebook_update == "gradient":
            loss = loss + F.mse_loss(codes, latents.detach())
        return latents + (codes - latents).detach(), tokens, loss


def _is_started(quantizer: SharedVectorQuantizer, _: object) -> None:
    """Hook after a state is loaded: a codebook that it says is initialised needs no k-means start."""
    quantizer.needs_start = not bool(quantizer.vq._codebook.initted)


def some(rows: Tensor, n: int) -> Tensor:
    """At most so many of the rows, at random."""
    return rows if len(rows) <= n else rows[torch.randperm(len(rows), device=rows.device)[:n]]


def usage(tokens: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs.

    Parameters
    ----------
    tokens
        Integer codes of any shape.
    codebook_size
        Number of codes.

    Returns
    -------
    Tensor
        (codebook_size,), int64.
    """
    return torch.bincount(tokens.flatten(), minlength=codebook_size)


def perplexity(counts: Tensor) -> Tensor:
    """Exponential of the entropy of code frequencies, over the last dimension: 1 when one code does it all.

    Parameters
    ----------
    counts
        (..., codebook_size).

    Returns
    -------
    Tensor
        (...,), float.
    """
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-torch.xlogy(p, p).sum(-1))
