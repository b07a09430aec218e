"""What is asked of an image of tissue, whatever it is stored as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Pixels that are read at once for a thumbnail.
MOST_PIXELS_AT_ONCE = 2**26


class TissueImage(ABC):
    """An RGB image in one or more resolutions, of which windows are read.

    Attributes
    ----------
    sizes : tuple
        (width, height) of each resolution in its own pixels, the finest first.
    mpp : float or None
        Microns per pixel of the finest; None if not known.
    """

    sizes: tuple[tuple[int, int], ...]
    mpp: float | None = None

    @abstractmethod
    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a window that lies within the image; safe to be called from several threads.

        Parameters
        ----------
        level
            Which resolution.
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
        """Pixels of the finest resolution."""
        return self.sizes[0][0]

    @property
    def height(self) -> int:
        """Pixels of the finest resolution."""
        return self.sizes[0][1]

    def downsample(self, level: int) -> float:
        """How many pixels of the finest resolution a pixel of another is wide."""
        return self.width / self.sizes[level][0]

    def thumbnail(self, longest: int) -> NDArray[np.uint8]:
        """The whole image, scaled down.

        Parameters
        ----------
        longest
            Pixels of its longer side, unless the image is smaller.

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
        # In bands, so that a slide of one resolution is never in memory as a whole.
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
    """An image of arrays, one a resolution: in memory, or of dask or zarr, which are read window by window.

    Parameters
    ----------
    levels
        (height, width, channels) or (channels, height, width) each, 8 bits; of four channels the first three are taken.
    mpp
        Microns per pixel of the finest.
    channels_first
        Whether the first axis is that of the channels.

    Raises
    ------
    ValueError
        If an array is none of these.
    """

    def __init__(self, levels: Sequence[Any], mpp: float | None = None, *, channels_first: bool = False) -> None:
        for level in levels:
            n_channels = level.shape[0 if channels_first else -1] if len(level.shape) == 3 else 0
            if n_channels not in (3, 4) or level.dtype != np.uint8:
                raise ValueError(
                    f"an array of shape {tuple(level.shape)} and data type {level.dtype}, expected RGB of 8 bits"
                )
        self.levels, self.mpp, self.channels_first = list(levels), mpp, channels_first
        height = 1 if channels_first else 0
        self.sizes = tuple((int(level.shape[height + 1]), int(level.shape[height])) for level in levels)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """See :meth:`TissueImage.read`."""
        rows, columns = slice(top, top + height), slice(left, left + width)
        if self.channels_first:
            return np.moveaxis(np.asarray(self.levels[level][:3, rows, columns]), 0, 2)
        return np.asarray(self.levels[level][rows, columns, :3])
