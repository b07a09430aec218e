"""Vector quantisation with one codebook shared by the tokens of all scales."""

from __future__ import annotations

from collections.abc import Sequence

import loguru
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from .chunk_size import chunk_size
from .config import ModelConfig
from .distributed import gather_rows

# Latents of each scale that initialise the codebook (k-means), and that update the moving averages in one step. The
# same number from every scale: the finest has most tokens, and would leave the coarser ones no codes of their own.
LATENTS_PER_START = 2048
LATENTS_PER_UPDATE = 1024
# Latents whose distances to all codes are in memory at once on a CPU.
LATENTS_PER_LOOKUP = 1024


class SharedVectorQuantizer(nn.Module):
    """Nearest-code quantisation with one codebook for all scales, over ``vector-quantize-pytorch``.

    With ``codebook_update="ema"`` the library owns the codebook: k-means start, moving averages, revival of
    dead codes. With ``"gradient"`` it is a parameter trained by the codebook loss. The two are never combined: a
    codebook that follows both moving averages and a gradient diverges.

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
        # Whether k-means has yet to initialise the codebook; a Python bool, as reading a buffer waits for the device.
        self.needs_start = ema
        self.register_load_state_dict_post_hook(_is_started)

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors, (codebook_size, codebook_dim)."""
        return self.vq.codebook

    @torch.no_grad()
    def start(self, latents: Sequence[Tensor]) -> None:
        """Initialise the codebook by k-means over latents of every scale, each (n, codebook_dim)."""
        sample = torch.cat(list(latents))
        training = self.vq.training
        self.vq.train()
        # The library warns of fewer latents than codes, but duplicate codes are revived elsewhere in training.
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
                sample_rows(gather_rows(torch.cat([x, ids[..., None]], -1)).flatten(0, 1), LATENTS_PER_UPDATE)
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
        chunks = flat.split(chunk_size(LATENTS_PER_LOOKUP, flat.device))
        nearest = [torch.addmm(offset, chunk, codes.T, alpha=2).max(1).indices for chunk in chunks]
        return torch.cat(nearest).reshape(latents.shape[:-1])

    def decode(self, tokens: Tensor) -> Tensor:
        """Look up the codebook vectors of tokens, (...) to (..., codebook_dim)."""
        return F.embedding(tokens, self.codebook)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace each latent by the nearest code, with a straight-through gradient.

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
    """Skip the k-means start after loading a state dict whose codebook is initialised."""
    quantizer.needs_start = not bool(quantizer.vq._codebook.initted)


def sample_rows(rows: Tensor, n: int) -> Tensor:
    """Draw at most `n` rows at random, without replacement."""
    return rows if len(rows) <= n else rows[torch.randperm(len(rows), device=rows.device)[:n]]


def usage(tokens: Tensor, codebook_size: int) -> Tensor:
    """Count how often each code occurs.

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
    """Perplexity of code frequencies, the exponential of their entropy: 1 where only one code is used.

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
