"""Get a prediction as SpatialData."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData, sanitize_name, sanitize_table
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity, Scale

from histovar._arguments import ConfidenceLevel, Key, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar._version import __version__
from histovar.anndata_io import gate
from histovar.anndata_io.comparison import read_interval
from histovar.anndata_io.gate import Data
from histovar.anndata_io.predicted_slides import Slide, read_slides
from histovar.anndata_io.prediction import predicted_sections

from .prediction import prediction

# Columns of obs by which a SpatialData table refers to shapes: the element, and the shape in it.
REGION, INSTANCE = "histovar_region", "histovar_instance"


@check_arguments
def spatialdata(
    data: Data,
    key: Prefix = DEFAULT_KEY,
    *,
    confidence_level: ConfidenceLevel = 0.9,
    library_key: Key | None = None,
    table_name: Key | None = None,
) -> SpatialData:
    """Get a prediction as SpatialData, for spatialdata-plot, napari-spatialdata and vitessce.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    key
        Prefix of the slots, the `key_added` of :func:`histovar.tl.predict`.
    confidence_level
        Share of the measured values that intervals should contain, between 0 and 1 (both excluded).
    library_key
        Column of ``obs`` with the section; that of the prediction by default. Not for SpatialData, whose table names
        the region of each spot.
    table_name
        Table of a SpatialData.

    Returns
    -------
    SpatialData
        ``tables[key]`` is the result of :func:`prediction` with the layers ``"mean"`` (equal to ``X``), ``"std"``,
        ``"lower"`` and ``"upper"``, the ends of the interval.

        From AnnData, it has for every section ``shapes["{section}_spots"]``, circles of the spots' diameter in pixels
        of the full-resolution slide, and ``images["{section}_image"]``, if ``uns["spatial"]`` has one, scaled to the
        same pixels by its scale factor. Each section has its own coordinate system with the section's name. An object
        that is one section without a name has ``"spots"`` and ``"image"`` in ``"global"``. Characters that SpatialData
        does not allow in names, such as those of columns of ``obs``, become ``_``.

        From SpatialData, it has the same images, labels, points and shapes, not copied, with their transformations; the
        table annotates the same regions.

        ``attrs["histovar"]`` has ``"version"``, ``"key"``, ``"units"`` and ``"confidence_level"``.

    Raises
    ------
    KeyError
        If there is no prediction under `key`, no such column, or there are no coordinates.
    ValueError
        If a slot of the prediction was changed since, draws or quantiles do not reach as far out as
        `confidence_level`, or `library_key` is given for SpatialData.
    """
    if isinstance(data, SpatialData) and library_key is not None:
        raise ValueError(
            f"library_key: the table of a SpatialData names its regions; leave it out, got {library_key!r}"
        )
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    table = prediction(adata, key)
    table.layers["lower"], table.layers["upper"] = (
        end.astype(np.float32) for end in read_interval(adata, keys, table.X, table.layers["std"], confidence_level)
    )
    table.layers["mean"] = table.X.copy()
    sanitize_table(table)
    name = sanitize_name(key)
    metadata = {"version": __version__, "key": key, "units": table.uns["units"], "confidence_level": confidence_level}
    attrs = {"histovar": metadata}
    if isinstance(data, SpatialData):
        elements = {kind: dict(getattr(data, kind)) for kind in ("images", "labels", "points", "shapes")}
        return SpatialData(**elements, tables={name: table}, attrs=attrs)
    images: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    regions = np.empty(adata.n_obs, dtype=object)
    names = predicted_sections(adata, keys, library_key)
    slides = read_slides(adata, keys, names, library_key, whole_images=True)
    for slide, section in zip(slides, _element_names(slides), strict=True):
        prefix, system = (f"{section}_", section) if section else ("", "global")
        regions[slide.rows] = f"{prefix}spots"
        shapes[f"{prefix}spots"] = ShapesModel.parse(
            slide.coordinates,
            geometry=0,
            radius=slide.diameter / 2,
            index=pd.Index(adata.obs_names[slide.rows]),
            transformations={system: Identity()},
        )
        if slide.image is not None:
            factor = 1 / slide.image["scalefactors"]["tissue_hires_scalef"]
            images[f"{prefix}image"] = Image2DModel.parse(
                slide.image["images"]["hires"],
                dims=("y", "x", "c"),
                c_coords=["r", "g", "b"],
                transformations={system: Scale([factor, factor], axes=("y", "x"))},
            )
    table.uns.pop(TableModel.ATTRS_KEY, None)
    table.obs[REGION] = pd.Categorical(regions)
    table.obs[INSTANCE] = table.obs_names.to_numpy()
    # The images are elements of the SpatialData now.
    table.uns.pop("spatial", None)
    table = TableModel.parse(table, region=list(shapes), region_key=REGION, instance_key=INSTANCE)
    return SpatialData(images=images, shapes=shapes, tables={name: table}, attrs=attrs)


def _element_names(slides: list[Slide]) -> list[str]:
    """Make distinct names of sections that SpatialData allows; empty for a section without a name."""
    names: list[str] = []
    for slide in slides:
        name = "" if slide.label is None else sanitize_name(slide.label)
        taken = {n.lower() for n in names}
        candidates = (name, *(f"{name}_{i}" for i in range(2, len(slides) + 2)))
        names.append(next(n for n in candidates if n.lower() not in taken))
    return names
