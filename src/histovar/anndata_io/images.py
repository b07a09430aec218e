"""Get the tissue image of a section from ``uns["spatial"]``, in the form that squidpy plots."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

logger = logging.getLogger(__name__)

# Images in order of preference: Visium's larger one, HEST's, Visium's smaller one. Others follow as they are stored.
PREFERRED_IMAGES = ("hires", "downscaled_fullres", "lowres")
# As for Visium: spots of 55 um, 100 um from centre to centre.
DIAMETER_OVER_DISTANCE = 0.55
# Of an image with at least twice as many pixels across the spots, only every n-th pixel is drawn. Visium's hires image,
# which has at most 2,000 pixels a side, is always drawn in full.
PIXELS_ACROSS_SPOTS = 2000
# Largest values of pixels: 1 for floats, then 8, 10, 12, 14 and 16 bits.
FLOAT_RANGES = (1, 255, 1023, 4095, 16383, 65535)
INTEGER_RANGES = FLOAT_RANGES[1:]
# Floats may exceed their range by this share of it, as they do after interpolation; they are clipped.
OVERSHOOT = 0.1


def section_image(
    images: Any,
    section: str | None,
    column: pd.Series | None,
    coordinates: NDArray[np.floating],
    *,
    whole: bool = False,
) -> dict[str, dict[str, Any]] | None:
    """Choose the image of a section and convert it to the form that squidpy plots.

    An image belongs to a section if it is stored under the section's name. If the object has one section and one image,
    they belong together whatever the image's name (Visium's library ids are not the sections' labels), unless it is
    named after another section. Of several resolutions, the first usable one is taken: hires, downscaled_fullres,
    lowres, then any other that has a scale factor ``tissue_{name}_scalef``.

    Parameters
    ----------
    images
        ``uns["spatial"]``, of any content.
    section
        Label of the section; None if the object has no labels.
    column
        Section of every spot of the object; categories without spots count as names of sections, too. None if the
        object has no labels and is one section.
    coordinates
        (n_spots, 2) of the spots of this section, finite, in pixels of the full-resolution image.
    whole
        Take all pixels also of an image much finer than needed for a plot.

    Returns
    -------
    dict or None
        ``images["hires"]``, (height, width, 3) uint8, ``scalefactors["tissue_hires_scalef"]`` and
        ``scalefactors["spot_diameter_fullres"]``, the latter from :func:`spot_diameter` if none is stored. An 8-bit RGB
        image in memory is not copied. None if there is no usable image; a warning says why, unless nothing is stored.
    """
    if isinstance(images, Mapping) and not images:
        return None
    try:
        return _choose_image(_find_entry(images, section, column), coordinates, whole)
    except ValueError as error:
        spots = "the spots" if section is None else f"the spots of section {section!r}"
        logger.warning("uns['spatial']: %s are plotted without a tissue image: %s", spots, error)
        return None


class StoredImage(NamedTuple):
    """An image of ``uns["spatial"]`` in its own resolution.

    Attributes
    ----------
    pixels : ndarray
        (height, width, 3) uint8.
    scale : float
        Its pixels per pixel of the full-resolution image.
    """

    pixels: NDArray[np.uint8]
    scale: float


def finest_image(images: Any, section: str | None, column: pd.Series | None) -> StoredImage:
    """Get the section's image of the highest resolution.

    Parameters
    ----------
    images, section, column
        As in :func:`section_image`.

    Raises
    ------
    ValueError
        If there is no usable image.
    """
    entry = _find_entry(images, section, column)
    named, factors = entry.get("images"), entry.get("scalefactors")
    if not isinstance(named, Mapping) or not isinstance(factors, Mapping):
        raise ValueError("its 'images' and 'scalefactors' are not dictionaries")
    scales = {name: _as_number(factors.get(f"tissue_{name}_scalef")) for name in named}
    usable = {name: scale for name, scale in scales.items() if scale is not None and scale > 0}
    if not usable:
        raise ValueError(f"its images {sorted(map(str, named))} have no scale factors 'tissue_..._scalef'")
    name = max(usable, key=lambda name: usable[name])
    return StoredImage(to_rgb(named[name]), usable[name])


def stored_fact(images: Any, section: str | None, column: pd.Series | None, group: str, name: str) -> Any:
    """Look up a section's metadata in ``uns["spatial"]``, such as ``scalefactors["microns_per_pixel"]``, or None."""
    try:
        facts = _find_entry(images, section, column).get(group)
    except (ValueError, StopIteration):
        return None
    value = facts.get(name) if isinstance(facts, Mapping) else None
    return value if isinstance(value, str) else _as_number(value)


def spot_diameter(coordinates: NDArray[np.floating]) -> float:
    """Diameter to plot spots with: 0.55 times the median distance to the nearest other spot, so that none touch.

    Parameters
    ----------
    coordinates
        (n_spots, 2), finite. Spots with the same coordinates count once.

    Returns
    -------
    float
        In units of the coordinates; 1 if all spots are in one place.
    """
    distinct = np.unique(coordinates, axis=0)
    if len(distinct) < 2:
        return 1.0
    distances, _ = cKDTree(distinct).query(distinct, k=2)
    return DIAMETER_OVER_DISTANCE * float(np.median(distances[:, 1]))


def scale_factors(images: Any) -> dict[str, dict[str, float]]:
    """Collect the scale factors of all images, for a model's record of what it was trained on.

    Parameters
    ----------
    images
        ``uns["spatial"]``, of any content.

    Returns
    -------
    dict
        For each entry its scale factors by name; only finite numbers.
    """
    if not isinstance(images, Mapping):
        return {}
    factors_of_entries: dict[str, dict[str, float]] = {}
    for name, entry in images.items():
        if isinstance(entry, Mapping):
            factors = entry.get("scalefactors")
            stored = factors.items() if isinstance(factors, Mapping) else ()
            numbers = {str(key): _as_number(value) for key, value in stored}
            factors_of_entries[str(name)] = {key: number for key, number in numbers.items() if number is not None}
    return factors_of_entries


def to_rgb(image: Any) -> NDArray[np.uint8]:
    """Convert an image to 8-bit RGB.

    Parameters
    ----------
    image
        An array, or anything that numpy can convert to one (dask, zarr, xarray): (height, width), (height, width,
        channels) or (channels, height, width) with 1, 3 or 4 channels; integers of 8 to 16 bits, or floats of 0..1,
        0..255 or the range of the integers, as told by the largest value. A fourth channel is opacity, over white. NaN
        and infinite pixels become white.

    Returns
    -------
    ndarray
        (height, width, 3) uint8; a view of `image` if that is 8-bit RGB in memory.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    pixels = _as_array(image)
    height_axis = _height_axis(pixels.shape)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif height_axis == 1:
        pixels = np.moveaxis(pixels, 0, 2)
    opacity = pixels[..., 3:] if pixels.shape[2] == 4 else None
    if pixels.dtype.kind == "f" and opacity is not None:  # often 0..1 beside colours of 0..255
        pixels, opacity = _to_8_bits(pixels[..., :3]), _to_8_bits(opacity)
    else:
        pixels = _to_8_bits(pixels)
        opacity = pixels[..., 3:] if opacity is not None else None
        pixels = pixels[..., :3]
    if opacity is not None:
        darkness = (255 - pixels).astype(np.float32) * (opacity.astype(np.float32) / 255)
        pixels = (255 - darkness).round().astype(np.uint8)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def crop_to(
    image: NDArray[np.uint8], factor: float, low: NDArray[np.floating], high: NDArray[np.floating]
) -> tuple[NDArray[np.uint8], tuple[float, float, float, float]]:
    """Crop an image to a region.

    Parameters
    ----------
    image
        (height, width, channels).
    factor
        Pixels of the image per pixel of the full-resolution slide.
    low, high
        (2,) corners x and y of the region, in pixels of the full-resolution slide.

    Returns
    -------
    image
        A view, extended to whole pixels.
    corners
        Its left, top, right and bottom, in pixels of the full-resolution slide.
    """
    size = np.array(image.shape[1::-1])
    start = np.clip(np.floor(low * factor), 0, size - 1).astype(int)
    stop = np.clip(np.ceil(high * factor), start + 1, size).astype(int)
    corners = np.concatenate([start, stop]) / factor
    return image[start[1] : stop[1], start[0] : stop[0]], tuple(corners.tolist())


def _find_entry(images: Any, section: str | None, column: pd.Series | None) -> Mapping[str, Any]:
    if not isinstance(images, Mapping):
        raise ValueError(f"expected a dictionary of sections, found {type(images).__name__}")
    entries = {str(name): entry for name, entry in images.items()}
    name = section
    if section not in entries:
        name = next(iter(entries))
        if len(entries) > 1 or (column is not None and column.nunique() > 1):
            reason = "no section is named" if section is None else "none has the section's name"
            raise ValueError(f"there are images of {sorted(entries)}, but {reason}")
        if column is not None and name in column.astype("category").cat.categories.astype(str):
            raise ValueError(f"the only image is that of section {name!r}")
    entry = entries[str(name)]
    if not isinstance(entry, Mapping):
        raise ValueError(f"entry {name!r} is {type(entry).__name__}, expected a dictionary")
    return entry


def _choose_image(
    entry: Mapping[str, Any], coordinates: NDArray[np.floating], whole: bool
) -> dict[str, dict[str, Any]]:
    """Convert the first usable image; if there is none, raise ValueError that says what is wrong with each."""
    for key in ("images", "scalefactors"):
        if not isinstance(entry.get(key), Mapping):
            raise ValueError(f"its {key!r} are {type(entry.get(key)).__name__}, expected a dictionary")
    factors = entry["scalefactors"]
    named = {str(name): image for name, image in entry["images"].items()}
    if not named:
        raise ValueError("its 'images' are empty")
    candidates = [*(name for name in PREFERRED_IMAGES if name in named), *named]
    problems = []
    for name in dict.fromkeys(candidates):
        try:
            scale = _as_number(factors.get(f"tissue_{name}_scalef"))
            if scale is None or scale <= 0:
                raise ValueError(f"no positive number 'tissue_{name}_scalef' in scalefactors")
            pixels, scale = _take_pixels(named[name], coordinates, scale, whole)
            image = to_rgb(pixels)
        except ValueError as error:
            problems.append(f"image {name!r}: {error}")
            continue
        diameter = _as_number(factors.get("spot_diameter_fullres"))
        if diameter is None or diameter <= 0:
            diameter = spot_diameter(coordinates)
        return {
            "images": {"hires": image},
            "scalefactors": {"tissue_hires_scalef": scale, "spot_diameter_fullres": diameter},
        }
    raise ValueError("; ".join(problems))


def _take_pixels(image: Any, coordinates: NDArray[np.floating], scale: float, whole: bool) -> tuple[Any, float]:
    """Refuse an image that does not cover the spots; take every n-th pixel of one much finer than needed for a plot.

    Arrays that know their shape are neither read nor copied here.
    """
    if not hasattr(image, "shape"):
        image = _as_array(image)
    axis = _height_axis(tuple(image.shape))
    height, width = image.shape[axis : axis + 2]
    xy = coordinates * scale
    n_inside = int(np.count_nonzero(((xy >= 0) & (xy <= (width, height))).all(1)))
    if n_inside < len(xy) / 2:
        raise ValueError(
            f"{len(xy) - n_inside} of {len(xy)} spots are outside its {width} x {height} pixels "
            f"at scale factor {scale:g}"
        )
    step = max(1, int(np.ptp(xy, axis=0).max() // PIXELS_ACROSS_SPOTS))
    if step == 1 or whole:
        return image, scale
    nth = slice(None, None, step)
    return image[:, nth, nth] if axis else image[nth, nth], scale / step


def _as_array(image: Any) -> NDArray[Any]:
    try:
        return np.asarray(image)
    except (TypeError, ValueError, KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"it cannot be read ({' '.join(str(error).split())})") from None


def _height_axis(shape: tuple[int, ...]) -> int:
    """Number of the axis of the image's height; that of its width is the next."""
    if 0 not in shape:
        if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)):
            return 0
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            return 1
    raise ValueError(f"shape {shape} is not that of a grey, RGB or RGBA image")


def _to_8_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"data type {pixels.dtype} is not that of an image")
    is_float = pixels.dtype.kind == "f"
    values = pixels.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("all its pixels are NaN or infinite")
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    overshoot = OVERSHOOT if is_float else 0
    ranges = FLOAT_RANGES if is_float else INTEGER_RANGES
    top = next((top for top in ranges if high <= top * (1 + overshoot)), None)
    if top is None or low < -high * overshoot:
        raise ValueError(f"values from {low:g} to {high:g} are not those of an image")
    values[~finite] = top
    np.clip(values, 0, top, out=values)
    values *= 255 / top
    return values.round(out=values).astype(np.uint8)


def _as_number(value: Any) -> float | None:
    """Convert to a finite number, also from an array of one element, as files hold them; None if it is none."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if np.isfinite(number) else None
