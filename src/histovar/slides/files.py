"""Open whole-slide images and image files."""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histovar._extras import import_extra

from .image import ArrayImage, TissueImage

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TIFFS = (".tif", ".tiff", ".btf")
TO_PYRAMID = "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
# Pictures are decoded in full. This many pixels take 1.6 GB, as a progressive JPEG somewhat more.
MOST_PIXELS = 400_000_000
# Range of microns per pixel of scanned tissue; values outside it are resolutions of a printer or a screen.
PLAUSIBLE_MPP = (0.05, 20.0)
UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}


class SlideImage(TissueImage):
    """A whole-slide image, read by wsidata (OpenSlide and others).

    Parameters
    ----------
    reader
        A reader of wsidata.
    """

    def __init__(self, reader: Any) -> None:
        properties = reader.properties
        self.reader = reader
        self.sizes = tuple((int(width), int(height)) for height, width in properties.level_shape)
        self.mpp = plausible_mpp(properties.mpp)
        self._downsamples = [float(d) for d in properties.level_downsample]

    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a window; see :meth:`TissueImage.read`."""
        # The corner at full resolution, rounded up so that it lies within the requested pixel.
        x, y = (int(np.ceil(value * self._downsamples[level])) for value in (left, top))
        return np.asarray(self.reader.get_region(x, y, width, height, level=level))[..., :3]

    def close(self) -> None:
        """Close the file."""
        self.reader.detach_reader()


class Picture(TissueImage):
    """A JPEG, PNG or other picture, decoded in full by Pillow when it is first read.

    Parameters
    ----------
    path
        The file.
    """

    def __init__(self, path: Path) -> None:
        from PIL import Image

        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's limit is for photographs; ours follows
        try:
            picture = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(
                f"its {picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}, too many to decode at "
                f"once; convert it to a pyramid: {TO_PYRAMID}"
            )
        self.picture: Image.Image = picture
        self.path, self.decoded, self.lock = path, False, Lock()
        self.sizes = (picture.size,)

    def read(self, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        """Read a window; see :meth:`TissueImage.read`."""
        with self.lock:
            if not self.decoded:
                self._decode()
        return np.asarray(self.picture.crop((left, top, left + width, top + height)))

    def _decode(self) -> None:
        try:
            self.picture.load()
            if self.picture.mode != "RGB":  # convert would copy an RGB picture
                self.picture = self.picture.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image: {str(self.path)!r} is damaged ({error})") from None
        self.decoded = True

    def close(self) -> None:
        """Free the memory."""
        self.picture.close()


def plausible_mpp(value: Any) -> float | None:
    """Microns per pixel; None if they cannot be those of a scan of tissue."""
    low, high = PLAUSIBLE_MPP
    return float(value) if value is not None and low <= float(value) <= high else None


def open_image(path: Path, argument: str = "image") -> TissueImage:
    """Open a slide or an image file.

    Slides are opened by wsidata, in all formats that its readers support; JPEG, PNG and the like by Pillow; TIFF files
    that no slide reader supports, such as those without tiles, by tifffile.

    Parameters
    ----------
    path
        The file.
    argument
        Name of the caller's argument, for messages.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an image, or is damaged.
    ModuleNotFoundError
        If it is a slide and wsidata is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{argument}: no file {str(path)!r}")
    suffix = path.suffix.lower()
    try:
        if suffix in PICTURES:
            return Picture(path)
        if suffix not in TIFFS:
            return _slide(path)
        try:
            return _slide(path)
        except (ValueError, ModuleNotFoundError):
            return _tiff(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 (readers raise errors of many classes)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{argument}: {str(path)!r} cannot be read as an image ({reason})") from None


def _slide(path: Path) -> TissueImage:
    readers = import_extra("wsidata.reader", "wsi", f"reading the slide {path.name}").READERS
    return SlideImage(readers.try_open(path))


def _tiff(path: Path) -> TissueImage:
    import tifffile

    file = tifffile.TiffFile(path)
    try:
        return TiffImage(file)
    except BaseException:
        file.close()
        raise


class TiffImage(ArrayImage):
    """A TIFF file of any layout; tifffile decodes only the strips or tiles that a window needs.

    Parameters
    ----------
    file
        A :class:`tifffile.TiffFile`, which stays open.
    """

    def __init__(self, file: Any) -> None:
        import zarr

        series = file.series[0]
        levels = [zarr.open_array(series.aszarr(level=i), mode="r") for i in range(len(series.levels))]
        channels_first = series.axes.startswith(("S", "C"))
        super().__init__(levels, _mpp_of_ome(file) or _mpp_of_tags(series.pages[0]), channels_first=channels_first)
        self.file = file

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _mpp_of_ome(file: Any) -> float | None:
    """Microns per pixel from OME metadata."""
    if not file.is_ome:
        return None
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*", file.ome_metadata)
    size = pixels and re.search(r"\bPhysicalSizeX=[\"']([^\"']+)", pixels[0])
    unit = pixels and re.search(r"\bPhysicalSizeXUnit=[\"']([^\"']+)", pixels[0])
    if not size or (unit and unit[1] not in ("µm", "μm", "um")):
        return None
    return plausible_mpp(size[1])


def _mpp_of_tags(page: Any) -> float | None:
    """Microns per pixel from the resolution tags of a TIFF file."""
    try:
        numerator, denominator = page.tags["XResolution"].value
        return plausible_mpp(UM_PER_UNIT[int(page.tags["ResolutionUnit"].value)] * denominator / numerator)
    except (KeyError, ZeroDivisionError, TypeError, ValueError):
        return None
