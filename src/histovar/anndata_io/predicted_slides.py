"""Read the sections of a prediction for plots: spots, coordinates in pixels, tissue image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import Keys

from . import gate, slots
from .images import section_image, spot_diameter

logger = logging.getLogger(__name__)


class Slide(NamedTuple):
    """One section of a prediction.

    Parameters
    ----------
    label
        Name of the section; None for an object that is one section without a name.
    rows
        (n_spots,) rows of its spots in the object.
    coordinates
        (n_spots, 2) centres of the spots, x and y, in pixels of the full-resolution image.
    diameter
        Diameter of a spot, in the same pixels.
    image
        From :func:`section_image`; None if there is none.
    """

    label: str | None
    rows: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    diameter: float
    image: dict[str, dict[str, Any]] | None


def read_slides(
    adata: AnnData,
    keys: Keys,
    names: NDArray[np.str_] | None,
    library_key: str | None,
    *,
    whole_images: bool = False,
) -> list[Slide]:
    """Read the sections of a prediction, in the order of their names.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    names
        (n_obs,) section of each spot, from :func:`predicted_sections`; None for a section without a name.
    library_key
        Column of ``obs`` with the section; that of the prediction by default.
    whole_images
        Keep all pixels of images that are much finer than a screen.

    Raises
    ------
    KeyError
        If there is no prediction, or no coordinates.
    ValueError
        If coordinates are not finite.
    """
    labels: list[str | None] = [None] if names is None else np.unique(names).tolist()
    return _read(adata, keys, names, library_key, labels, whole_images)


def read_slide(
    adata: AnnData, keys: Keys, names: NDArray[np.str_] | None, library_key: str | None, section: str | int | None
) -> Slide:
    """Read one section of a prediction.

    Parameters
    ----------
    adata, keys, names, library_key
        As in :func:`read_slides`.
    section
        Name of the section, compared as text; None for the only one. If spots have no sections, all belong to this one.

    Raises
    ------
    KeyError
        As :func:`read_slides`.
    ValueError
        As :func:`read_slides`; also if there are several sections and `section` is None, or no such section.
    """
    label = None if section is None else str(section)
    if names is not None:
        sections = np.unique(names).tolist()
        if label is None and len(sections) > 1:
            raise ValueError(f"section: the object has sections {sections}; name one of them")
        label = sections[0] if label is None else label
        if label not in sections:
            raise ValueError(f"section: no section {label!r}; the object has {sections}")
    elif label is not None:
        logger.warning("section: without library_key, all spots are treated as section %r", label)
    return _read(adata, keys, names, library_key, [label], False)[0]


def _read(
    adata: AnnData,
    keys: Keys,
    names: NDArray[np.str_] | None,
    library_key: str | None,
    labels: Sequence[str | None],
    whole_images: bool,
) -> list[Slide]:
    params = slots.record(adata, keys)["params"]
    library_key = str(params["library_key"]) or None if library_key is None else library_key
    all_coordinates = gate.coordinates(adata, str(params["spatial_key"]))
    column = None if library_key is None else adata.obs[library_key]
    slides = []
    for label in labels:
        rows = np.arange(adata.n_obs) if names is None else np.flatnonzero(names == label)
        coordinates = all_coordinates[rows]
        image = section_image(adata.uns.get("spatial", {}), label, column, coordinates, whole=whole_images)
        factors = {} if image is None else image["scalefactors"]
        diameter = factors.get("spot_diameter_fullres", spot_diameter(coordinates))
        slides.append(Slide(label, rows, coordinates, diameter, image))
    return slides
