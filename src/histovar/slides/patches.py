"""Cut square patches around points from an image, resized to an encoder's input size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .image import TissueImage

# A resolution is fine enough if its pixels are at most this factor wider than those of the patch.
LEVEL_TOLERANCE = 1.01
# Colour beyond the image's edge: white, like glass.
BACKGROUND = 255
N_THREADS = 4


@dataclass(frozen=True)
class Patches:
    """Square patches of an image around points.

    Parameters
    ----------
    image
        The image.
    centers
        (n, 2), x and y in pixels at full resolution.
    field_px
        Side of the field in pixels at full resolution.
    out_px
        Side of the patches after resizing, in pixels.
    """

    image: TissueImage
    centers: NDArray[np.floating]
    field_px: float
    out_px: int

    @property
    def level(self) -> int:
        """Number of the coarsest resolution that is fine enough for the patches, or else of the finest."""
        widest = LEVEL_TOLERANCE * self.field_px / self.out_px
        fitting = [i for i in range(len(self.image.sizes)) if self.image.downsample(i) <= widest]
        return max(fitting, key=self.image.downsample, default=0)

    @property
    def beyond_edge(self) -> NDArray[np.bool_]:
        """Mask of the points whose patches reach beyond the image."""
        low, high = self.centers - self.field_px / 2, self.centers + self.field_px / 2
        return np.asarray((low < 0).any(1) | (high > (self.image.width, self.image.height)).any(1))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Read the patch around a point, (out_px, out_px, 3), white beyond the image's edge.

        It begins at a whole pixel, so that a field of exactly `out_px` pixels is not interpolated.
        """
        level = self.level
        scale = self.image.downsample(level)
        side = self.field_px / scale
        left, top = (int(value) for value in np.floor(self.centers[i] / scale - side / 2))
        n = max(1, int(np.ceil(side - 1e-6)))
        width, height = self.image.sizes[level]
        x, y = max(left, 0), max(top, 0)
        right, bottom = min(left + n, width), min(top + n, height)
        window = np.full((n, n, 3), BACKGROUND, np.uint8)
        if right > x and bottom > y:
            window[y - top : bottom - top, x - left : right - left] = self.image.read(
                level, x, y, right - x, bottom - y
            )
        if n == self.out_px and abs(side - n) < 0.5:
            return window
        box = (0.0, 0.0, min(side, float(n)), min(side, float(n)))
        return np.asarray(
            Image.fromarray(window).resize((self.out_px, self.out_px), Image.Resampling.BICUBIC, box, reducing_gap=3)
        )

    def batches(self, rows_of_batches: Sequence[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """Yield patches batch by batch, (batch, out_px, out_px, 3), reading the next batch in the background."""
        with ThreadPoolExecutor(N_THREADS) as pool:

            def submit(rows: NDArray[np.int64]) -> list[Future[NDArray[np.uint8]]]:
                return [pool.submit(self.read, int(i)) for i in rows]

            pending = submit(rows_of_batches[0]) if rows_of_batches else []
            for i in range(len(rows_of_batches)):
                batch = np.stack([patch.result() for patch in pending])
                pending = submit(rows_of_batches[i + 1]) if i + 1 < len(rows_of_batches) else []
                yield batch
