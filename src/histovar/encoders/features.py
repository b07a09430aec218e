"""Embed image patches: normalise, encode, pool the tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histovar.prediction.device import moved

from . import _checkpoints
from .encoder import Encoder


class Features(nn.Module):
    """An encoder with its weights, which maps image patches to embeddings.

    Parameters
    ----------
    encoder
        Description of the encoder: normalisation, layers, pooling.
    module
        The network.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, module: nn.Module) -> None:
        super().__init__()
        self.encoder, self.module = encoder, module
        self.register_buffer("mean", 255 * torch.tensor(encoder.mean)[:, None, None], persistent=False)
        self.register_buffer("std", 255 * torch.tensor(encoder.std)[:, None, None], persistent=False)

    @classmethod
    def load(cls, encoder: Encoder, weights: Path | None = None) -> Features:
        """Load an encoder with its published weights, or from a file; a module keeps its own weights.

        Parameters
        ----------
        encoder
            The encoder.
        weights
            A checkpoint file; None for the hub.

        Raises
        ------
        FileNotFoundError, ValueError, PermissionError, ConnectionError
            If the weights cannot be loaded; see :func:`_checkpoints.load`.
        """
        return cls(encoder, _checkpoints.load(encoder, weights))

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches.

        Parameters
        ----------
        patches
            (n, input_px, input_px, 3), 0 to 255.

        Returns
        -------
        Tensor
            (n, width), float32; with ``"mean_std"``, for each layer the means and then the standard deviations.
        """
        images = (patches.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        if not self.encoder.layers:
            output = self.module(images)
            if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
                shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(
                    f"encoder: {self.encoder.name!r} returns {shape} for {len(images)} images, expected a tensor of "
                    f"shape ({len(images)}, width)"
                )
            return output.float()
        layers = self.module.forward_intermediates(  # type: ignore[operator]
            images,
            indices=list(self.encoder.layers),
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        pooled = []
        for tokens in layers:
            tokens = tokens.float()
            pooled.append(tokens.mean(1))
            if self.encoder.pooling == "mean_std":
                pooled.append(tokens.std(1, correction=0))
        return torch.cat(pooled, 1)

    def record(self, field_um: float, mpp: float, precision: str) -> dict[str, Any]:
        """Describe how embeddings were made, in plain types under the names that ``anndata_io/embeddings.py`` reads.

        Parameters
        ----------
        field_um
            Side of the patches, in microns.
        mpp
            Microns per pixel of the coarsest image that was read.
        precision
            ``"fp32"`` or ``"bf16"``. Recorded, but not compared: between the two, embeddings of DINOv2 differ by 2 % of
            their spread over spots (cosine 0.99998, 36 spots of her2st's C3).
        """
        encoder = self.encoder
        return {
            "encoder": encoder.name,
            "weights": self.digest,
            "layers": ",".join(map(str, encoder.layers)),
            "pooling": encoder.pooling,
            "input_px": int(encoder.input_px),
            "mean": _numbers(encoder.mean),
            "std": _numbers(encoder.std),
            "field_um": float(field_um),
            "mpp": float(mpp),
            "precision": precision,
        }

    @cached_property
    def digest(self) -> str:
        """Digest of the weights, which identifies the network independently of the file it was read from.

        Weights are compared in half precision, so that a checkpoint stored in half precision has the same digest.
        """
        digest = hashlib.blake2b(digest_size=8)
        for tensor in self.module.state_dict().values():
            if isinstance(tensor, Tensor):
                values = tensor.detach().cpu().contiguous()
                values = values.half() if values.is_floating_point() else values
                digest.update(str(tuple(values.shape)).encode())
                digest.update(values.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @contextmanager
    def on(self, device: str) -> Iterator[torch.device]:
        """Move to a device in evaluation mode; restore device and mode afterwards, as the module may be the user's.

        Raises
        ------
        ValueError
            If the device does not exist.
        """
        parameter = next(self.module.parameters(), None)
        original, was_training = torch.device("cpu") if parameter is None else parameter.device, self.module.training
        try:
            with moved(self, device, original) as on_device:
                self.eval()
                yield on_device
        finally:
            self.module.train(was_training)


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
