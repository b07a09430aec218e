"""Interface of tissue images, however they are stored, and images in arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Largest number of pixels read at once for a thumbnail.
MOST_PIXELS_AT_ONCE = 2**26


class TissueImage(ABC):
    """An RGB image in one or more resolutions, read window by window.

    Attributes
    ----------
    sizes : tuple
        (width, height) of each resolution in its own pixels, full resolution first.
    mpp : float or None
        Microns per pixel at full resolution; None if unknown.
    """

    sizes: tuple[tuple[int, int], ...]
    mpp: float | None = None

    @abstractmethod
    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a window within the image; can be called from several threads.

        Parameters
        ----------
        level
            Number of the resolution, 0 for full resolution.
        left, top, width, height
            The window, in pixels of that resolution.

        Returns
        -------
        ndarray
            (height, width, 3).
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close the file."""

    @property
    def width(self) -> int:
        """Width in pixels at full resolution."""
        return self.sizes[0][0]

    @property
    def height(self) -> int:
        """Height in pixels at full resolution."""
        return self.sizes[0][1]

    def downsample(self, level: int) -> float:
        """Width of a pixel of a resolution, in pixels at full resolution."""
        return self.width / self.sizes[level][0]

    def thumbnail(self, longest: int) -> NDArray[np.uint8]:
        """Read the whole image, scaled down.

        Parameters
        ----------
        longest
            Length of the longer side in pixels; smaller images are not enlarged.

        Returns
        -------
        ndarray
            (height, width, 3).
        """
        from PIL import Image

        scale = min(1.0, longest / max(self.width, self.height))
        size = max(1, round(self.width * scale)), max(1, round(self.height * scale))
        level = next((i for i in reversed(range(len(self.sizes))) if self.sizes[i][0] >= size[0]), 0)
        width, height = self.sizes[level]
        # Read in bands, so that a slide with a single resolution is never in memory in full.
        rows = max(1, MOST_PIXELS_AT_ONCE // width)
        bands = []
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            first, last = round(top * size[1] / height), round(bottom * size[1] / height)
            if last > first:
                band = self.read(level, 0, top, width, bottom - top)
                bands.append(np.asarray(Image.fromarray(band).resize((size[0], last - first), reducing_gap=2)))
        return np.concatenate(bands)


class ArrayImage(TissueImage):
    """An image in arrays, one for each resolution: in memory, or dask or zarr arrays, read window by window.

    Parameters
    ----------
    levels
        (height, width, channels) or (channels, height, width) each, 8 bits; a fourth channel is ignored.
    mpp
        Microns per pixel at full resolution.
    channels_first
        If the first axis is that of the channels.

    Raises
    ------
    ValueError
        If an array has another shape or data type.
    """

    def __init__(self, levels: Sequence[Any], mpp: float | None = None, *, channels_first: bool = False) -> None:
        for level in levels:
            n_channels = level.shape[0 if channels_first else -1] if len(level.shape) == 3 else 0
            if n_channels not in (3, 4) or level.dtype != np.uint8:
                raise ValueError(
                    f"an array of shape {tuple(level.shape)} and data type {level.dtype}, expected 8-bit RGB"
                )
        self.levels, self.mpp, self.channels_first = list(levels), mpp, channels_first
        height = 1 if channels_first else 0
        self.sizes = tuple((int(level.shape[height + 1]), int(level.shape[height])) for level in levels)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a window; see :meth:`TissueImage.read`."""
        rows, columns = slice(top, top + height), slice(left, left + width)
        if self.channels_first:
            return np.moveaxis(np.asarray(self.levels[level][:3, rows, columns]), 0, 2)
        return np.asarray(self.levels[level][rows, columns, :3])
