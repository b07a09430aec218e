"""Write predictions as GeoJSON for QuPath: a detection for every spot, with measurements."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import AfterValidator

from histovar._arguments import ConfidenceLevel, Key, KeyOrKeys, PathLike, Positive, check_arguments, refuse_value
from histovar._atomic import atomic_file
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar._version import __version__
from histovar.anndata_io import gate
from histovar.anndata_io.comparison import read_interval
from histovar.anndata_io.gate import Data
from histovar.anndata_io.predicted_slides import read_slide
from histovar.anndata_io.prediction import genes_of_panel, predicted_genes, predicted_sections, read_prediction

Shape = Literal["circle", "square"]

# Vertices of a circle, a multiple of 4; significant digits of measurements; decimal places of pixels.
VERTICES, DIGITS, DECIMALS = 32, 5, 2
# With this namespace, the same spot of the same section has the same id in every file.
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "histovar")


def _geojson_file(value: Path) -> Path:
    return (
        value
        if value.suffix.lower() in (".geojson", ".json")
        else refuse_value("a file that ends in .geojson or .json")
    )


@check_arguments
def write_geojson(
    data: Data,
    path: Annotated[PathLike, AfterValidator(_geojson_file)],
    *,
    genes: KeyOrKeys | None = None,
    section: Key | int | None = None,
    key: Prefix = DEFAULT_KEY,
    library_key: Key | None = None,
    confidence_level: ConfidenceLevel = 0.9,
    shape: Shape = "circle",
    diameter: Positive | None = None,
    table_name: Key | None = None,
) -> None:
    """Write a section's prediction as GeoJSON, to be imported in QuPath (File, Import objects from file).

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    path
        File to write, such as ``"S4.geojson"`` (or ``.json``); its directory exists. An existing file is replaced.
    genes
        Genes of the panel; all by default, about 100 bytes for each spot and gene.
    section
        Section to write, compared as a string; needed if there are several, since QuPath shows one slide at a time.
    key
        Prefix of the slots.
    library_key
        Column of ``obs`` with the section; that of the prediction by default.
    confidence_level
        Share of the measured values that intervals should contain, between 0 and 1 (both excluded).
    shape
        ``"circle"`` for spots and cells, ``"square"`` for tiles.
    diameter
        Diameter of the circles, or side of the squares, in pixels of the full-resolution slide. By default
        ``spot_diameter_fullres`` in ``uns["spatial"]``, or else 0.55 times the median distance between nearest spots.
    table_name
        Table of a SpatialData.

    Notes
    -----
    Every spot is a feature with a polygon around its coordinates, in pixels of the full-resolution slide as in QuPath
    (x to the right, y down). Its properties are QuPath's: ``"objectType": "detection"``, ``"name"`` from ``obs_names``
    and ``"measurements"``: for each gene ``"ERBB2 mean"``, ``"ERBB2 lower"`` and ``"ERBB2 upper"``, to 5 digits and in
    the units of the prediction, which are stored as ``"units"`` beside the features. Coordinates are not longitudes
    and latitudes as RFC 7946 requires; QuPath ignores this, too.

    Raises
    ------
    KeyError
        If there is no prediction, a gene is not in the panel, or there are no coordinates.
    ValueError
        If there are several sections and `section` is None, or no such section; if a value is not finite.
    OSError
        If the file cannot be written.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    panel = predicted_genes(adata, keys)
    chosen = genes_of_panel(panel, genes)
    slide = read_slide(adata, keys, predicted_sections(adata, keys, library_key), library_key, section)
    mean, std = read_prediction(adata, keys, panel)
    in_section = np.isin(np.arange(adata.n_obs), slide.rows)
    lower, upper = read_interval(adata, keys, mean, std, confidence_level, in_section)
    columns = np.array([panel.index(gene) for gene in chosen])
    values = np.stack([m[:, columns] for m in (mean[in_section], lower, upper)], axis=2)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any((1, 2)).sum())
        raise ValueError(
            f"key: the prediction {key!r} (or {keys.std}, {keys.quantiles}, {keys.rates} or {keys.spots}) has NaN or "
            f"infinite values in {bad} spots, which GeoJSON does not allow; predict again"
        )
    names = [f"{gene} {what}" for gene in chosen for what in ("mean", "lower", "upper")]
    outlines = _outlines(slide.coordinates, slide.diameter if diameter is None else diameter, shape)
    spots = adata.obs_names[slide.rows].astype(str)
    metadata = {
        "generator": f"histovar {__version__}",
        "units": str(adata.uns[keys.uns]["units"]),
        "confidence_level": confidence_level,
    }
    with atomic_file(Path(path)) as file, file.open("w", encoding="utf-8") as stream:
        stream.write('{"type": "FeatureCollection", ')
        stream.writelines(f"{json.dumps(name)}: {json.dumps(value)}, " for name, value in metadata.items())
        stream.write('"features": [\n')
        features = _features(spots, slide.label, outlines, names, values.reshape(len(values), -1))
        for i, feature in enumerate(features):
            stream.write(",\n" * (i > 0) + json.dumps(feature, allow_nan=False))
        stream.write("\n]}\n")


def _outlines(coordinates: NDArray[np.float64], diameter: float, shape: Shape) -> NDArray[Any]:
    """Make polygons around the centres, (n_spots,), counterclockwise as RFC 7946 requires."""
    if shape == "square":
        corners = np.hstack([coordinates - diameter / 2, coordinates + diameter / 2]).T
        return shapely.box(*corners, ccw=True)
    circles = shapely.buffer(shapely.points(coordinates), diameter / 2, quad_segs=VERTICES // 4)
    return shapely.orient_polygons(circles)


def _features(
    spots: Any, section: str | None, outlines: NDArray[Any], names: list[str], values: NDArray[Any]
) -> Iterator[dict[str, Any]]:
    """Yield one feature per spot, with QuPath's properties."""
    for spot, outline, row in zip(spots, outlines, values, strict=True):
        ring = shapely.get_coordinates(outline).round(DECIMALS).tolist()
        measurements = {name: float(f"{value:.{DIGITS}g}") for name, value in zip(names, row.tolist(), strict=True)}
        yield {
            "type": "Feature",
            "id": str(uuid.uuid5(NAMESPACE, f"{section or ''}\n{spot}")),
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "detection", "name": spot, "measurements": measurements},
        }
