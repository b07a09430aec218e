"""The sections of a prediction as they lie on their slides: spots, coordinates in pixels, image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import Keys

from . import gate, slots
from .images import section_image, spot_diameter
from .prediction import predicted_sections


class Slide(NamedTuple):
    """One section.

    Parameters
    ----------
    label
        Name of the section; None where the object is one section that has no name.
    rows
        (n_spots,) its spots.
    coordinates
        (n_spots, 2) centres, x and y, in pixels of the full-resolution image.
    diameter
        Of a spot, in the same pixels.
    image
        As :func:`section_image` gives it; None where there is none.
    """

    label: str | None
    rows: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    diameter: float
    image: dict[str, dict[str, Any]] | None


def read_slides(
    adata: AnnData, keys: Keys, library_key: str | None, *, section: str | None = None, whole_images: bool = False
) -> list[Slide]:
    """Read the sections of a prediction, in the order of their names.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    library_key
        Column of ``obs`` with the section; that of the prediction by default.
    section
        The only one to read.
    whole_images
        Keep all pixels of images that are much finer than a screen.

    Raises
    ------
    KeyError
        If there is no prediction, no such column, or there are no coordinates.
    ValueError
        If coordinates are not finite, or there is no such section.
    """
    params = slots.record(adata, keys)["params"]
    library_key = str(params["library_key"]) or None if library_key is None else library_key
    names = predicted_sections(adata, keys, library_key)
    places = gate.coordinates(adata, str(params["spatial_key"]))
    column = None if library_key is None else adata.obs[library_key]
    labels: list[str | None] = [None] if names is None else np.unique(names).tolist()
    if section is not None and section not in labels:
        if labels != [None]:
            raise ValueError(f"section: no section {section!r}; the object has {labels}")
        labels = [section]  # all spots are of one section, whose image is asked for
    slides = []
    for label in labels if section is None else [section]:
        rows = np.arange(adata.n_obs) if names is None else np.flatnonzero(names == label)
        coordinates = places[rows]
        image = section_image(adata.uns.get("spatial", {}), label, column, coordinates, whole=whole_images)
        factors = {} if image is None else image["scalefactors"]
        diameter = factors.get("spot_diameter_fullres", spot_diameter(coordinates))
        slides.append(Slide(label, rows, coordinates, diameter, image))
    return slides
