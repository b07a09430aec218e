"""Read annotations drawn in QuPath into a column of ``obs``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import shapely
from anndata import AnnData

from histovar._arguments import Key, PathLike, check_arguments
from histovar._keys import Keys, Prefix
from histovar.anndata_io import gate, slots
from histovar.anndata_io.gate import Data

logger = logging.getLogger(__name__)

UNCLASSIFIED = "unclassified"
# Types of QuPath objects other than annotations.
OTHER_OBJECTS = {"detection", "cell", "tile", "tmaCore", "root"}


class Annotation(NamedTuple):
    """A region with its class."""

    label: str
    region: Any


@check_arguments
def read_geojson(
    data: Data,
    path: PathLike,
    *,
    key_added: Prefix = "annotation",
    section: Key | int | None = None,
    library_key: Key | None = None,
    spatial_key: Key = "spatial",
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Read annotations drawn in QuPath (File, Export objects as GeoJSON) as the region of each spot.

    Parameters
    ----------
    data
        AnnData or SpatialData with coordinates in pixels of the full-resolution slide.
    path
        GeoJSON file: a FeatureCollection, a feature or a list of them.
    key_added
        Column of ``obs`` to write.
    section
        Section of the annotated slide, compared as a string; needed if there are several. Other sections keep the
        annotations read from their own slides.
    library_key
        Column of ``obs`` with the section.
    spatial_key
        Key of ``obsm`` with the coordinates.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes ``obs[key_added]``, categorical: the class of the annotation that contains the spot's centre, edge
        included; missing if none does. The name stands in for a missing class, or else ``"unclassified"``. Holes are
        outside. If annotations overlap, the smallest is used, since one drawn inside another is more specific; if two
        have the same area, the later in the file. A multipolygon is one annotation; self-intersecting outlines are
        repaired. Detections, cells and tiles are ignored; points and lines are left out with a warning.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    KeyError
        If coordinates or the column of sections are missing.
    ValueError
        If the file is not GeoJSON or has no regions; if there are several sections and `section` is None, or no such
        section; if the annotations' bounding box does not overlap that of the spots, as with coordinates of another
        resolution; or if ``obs`` has a column of that name which this function did not write.
    """
    adata = gate.table(data, table_name, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, [("obs", key_added)])
    rows = _rows(adata, library_key, spatial_key, None if section is None else str(section))
    points = shapely.points(gate.coordinates(adata, spatial_key)[rows])
    annotations = _read(Path(path))
    labels, n_overlapping = _assign(points, annotations)
    if labels.isna().all():
        _check_near(points, annotations, path)
    if copy:
        adata = gate.copied(adata)
    column = (
        adata.obs[key_added].astype(object)
        if key_added in adata.obs
        else pd.Series(index=adata.obs_names, dtype=object)
    )
    column = column.copy()
    column.iloc[rows] = labels.to_numpy()
    column = pd.Categorical(column, categories=sorted({*column.dropna(), *(a.label for a in annotations)}))
    slots.write(adata, keys, {("obs", key_added): column})
    logger.info(
        "%d annotations of %d classes: %d of %d spots lie in one, %d of them in overlapping ones, where the smallest "
        "is used",
        len(annotations),
        len({a.label for a in annotations}),
        int(labels.notna().sum()),
        len(rows),
        n_overlapping,
    )
    return adata if copy else None


def _rows(adata: AnnData, library_key: str | None, spatial_key: str, section: str | None) -> Any:
    """Find the rows of the slide's spots."""
    names = gate.sections(adata, library_key, spatial_key)
    if names is None:
        if section is not None:
            raise ValueError(f"section: {section!r} needs library_key=, the column of obs with the sections")
        return np.arange(adata.n_obs)
    sections = np.unique(names).tolist()
    if section is None and len(sections) > 1:
        raise ValueError(f"section: the object has sections {sections}; name the one that was annotated")
    if section is not None and section not in sections:
        raise ValueError(f"section: no section {section!r}; the object has {sections}")
    return np.flatnonzero(names == (sections[0] if section is None else section))


def _read(path: Path) -> list[Annotation]:
    """Read the annotations of a file, in its order."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no file {str(path)!r}")
    try:
        content = json.loads(path.read_bytes())
        features = list(_features(content))
        regions = [_region(feature) for feature in features]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, shapely.errors.ShapelyError) as error:
        raise ValueError(
            f"path: {str(path)!r} is not GeoJSON ({' '.join(str(error).split())[:120]}); export it from QuPath again"
        ) from None
    annotations = [Annotation(_label(f), r) for f, r in zip(features, regions, strict=True) if not r.is_empty]
    if len(annotations) < len(features):
        logger.warning(
            "%d of %d annotations are points, lines or empty, and are left out",
            len(features) - len(annotations),
            len(features),
        )
    if not annotations:
        raise ValueError(f"path: {str(path)!r} has no annotation with an area; draw regions and export them")
    return annotations


def _features(content: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all annotations of a file, including those nested in other objects."""
    if isinstance(content, list):
        for item in content:
            yield from _features(item)
    elif content["type"] == "FeatureCollection":
        yield from _features(content["features"])
    elif content["type"] == "Feature":
        properties = content.get("properties") or {}
        if properties.get("objectType", "annotation") not in OTHER_OBJECTS:
            yield content
        yield from _features(properties.get("childObjects", []))
    else:
        raise ValueError(f"expected features, got {str(content['type'])[:40]!r}")


def _region(feature: Mapping[str, Any]) -> Any:
    """Union of a feature's polygons; empty if it has none."""
    if feature["geometry"] is None:
        return shapely.Polygon()
    shape = shapely.make_valid(shapely.from_geojson(json.dumps(feature["geometry"])))
    return shapely.union_all([part for part in shapely.get_parts(shape) if shapely.get_dimensions(part) == 2])


def _label(feature: Mapping[str, Any]) -> str:
    """Class of a feature, or else its name, or else "unclassified"."""
    properties = feature.get("properties") or {}
    label = properties.get("classification")
    if isinstance(label, Mapping):
        label = label.get("name") or ": ".join(map(str, label.get("names", [])))
    return str(label or properties.get("name") or UNCLASSIFIED)


def _assign(points: Any, annotations: list[Annotation]) -> tuple[pd.Series, int]:
    """Assign a class to each point; also count the points in annotations of several classes."""
    # From large to small, and in the file's order if equal: the last label written stays.
    order = sorted(range(len(annotations)), key=lambda i: (-annotations[i].region.area, i))
    tree = shapely.STRtree(points)
    labels = np.full(len(points), None, dtype=object)
    overlapping = np.zeros(len(points), dtype=bool)
    for i in order:
        inside = tree.query(annotations[i].region, predicate="intersects")
        others = [label not in (None, annotations[i].label) for label in labels[inside]]
        overlapping[inside] |= np.array(others, dtype=bool)
        labels[inside] = annotations[i].label
    return pd.Series(labels), int(overlapping.sum())


def _check_near(points: Any, annotations: list[Annotation], path: Any) -> None:
    """Refuse annotations whose bounding box does not overlap the spots'; warn if they merely contain no spot."""
    spots, drawn = (shapely.total_bounds(x).round().tolist() for x in (points, [a.region for a in annotations]))
    if shapely.box(*spots).intersects(shapely.box(*drawn)):
        logger.warning("no spot lies in any of the %d annotations of %s", len(annotations), path)
        return
    raise ValueError(
        f"path: the annotations of {str(path)!r} do not overlap the spots: annotations x {drawn[0]:g} to {drawn[2]:g}, "
        f"y {drawn[1]:g} to {drawn[3]:g}; spots x {spots[0]:g} to {spots[2]:g}, y {spots[1]:g} to {spots[3]:g}; give "
        "the section that was annotated, and coordinates in pixels of the full-resolution slide"
    )
