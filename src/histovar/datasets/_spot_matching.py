"""Match the rows of a file of embeddings to the spots of a slide, by id, coordinates or order."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ._embedding_files import COORDS_NAMES, ID_NAMES, EmbeddingFile, describe_array

logger = logging.getLogger(__name__)


def match_spots(
    file: EmbeddingFile, spot_names: pd.Index, spatial: NDArray[Any], slide: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Match embeddings to spots: rows of the slide that have an embedding, and the embeddings in this order.

    Rows of the file are matched to spots by id; coordinates, if they vary, must then agree with the spots. Without ids,
    coordinates must show that the file is in the slide's order; without either, equal numbers of rows and spots are
    assumed to be in the same order.

    Raises
    ------
    ValueError
        If ids are duplicated, ambiguous or of other spots, if coordinates disagree, or if there are no ids and the
        numbers of rows and spots differ.
    """
    coords = _coords(file)
    key_and_ids = _find_ids(file, spot_names, slide)
    if key_and_ids is None:
        _check_slide_order(file, coords, spot_names, spatial, slide)
        return np.arange(len(spot_names)), file.values
    key, ids = key_and_ids
    order = ids.get_indexer(spot_names)
    rows = np.flatnonzero(order >= 0)
    if coords is not None:
        offset = _largest_offset(coords[order[rows]], spatial[rows], spatial)
        if offset is not None and offset.disagrees:
            raise ValueError(
                f"embedding: coords of {file.name} disagree with obsm['spatial'] of slide {slide!r}: matched by "
                f"{key!r}, {offset.describe(spot_names[rows])}; correct them, or leave coords out of the file"
            )
    numbers = file.arrays[key].dtype.kind in "iu"
    if numbers and len(rows) < max(len(spot_names), len(ids)) and (coords is None):
        raise ValueError(
            f"embedding: the numbers {key!r} of {file.name} match only {len(rows)} of the {len(spot_names)} spot names "
            f"of slide {slide!r}, and may be mere row numbers; store the slide's spot names as 'barcodes'"
        )
    if len(rows) < len(spot_names):
        n_missing = len(spot_names) - len(rows)
        logger.info("hest: %d spots of slide %s have no embedding and are left out", n_missing, slide)
    return rows, file.values[order[rows]]


def _find_ids(file: EmbeddingFile, spot_names: pd.Index, slide: str) -> tuple[str, pd.Index] | None:
    """Find the file's array of spot ids: its name and values; None if there is none."""
    n_rows = len(file.values)
    candidates: dict[str, pd.Index] = {}
    unfit = []
    for key, array in file.arrays.items():
        is_known = key.lower() in ID_NAMES
        if array.ndim not in (1, 2) or (array.size == 1 and n_rows > 1):
            continue  # a property of the file
        if array.size == n_rows and (_is_text(array) or (is_known and array.dtype.kind in "iu")):
            ids = pd.Index([_to_text(value) for value in array.ravel()], dtype=object)
            # If most strings are repeated, they are labels, such as regions, not ids.
            if is_known or ids.nunique() > n_rows / 2:
                candidates[key] = ids
        elif is_known:
            unfit.append(describe_array(key, array))
    matching = {key: ids for key, ids in candidates.items() if ids.isin(spot_names).any()}
    matching = {key: ids for key, ids in matching.items() if key.lower() in ID_NAMES} or matching
    if not matching and candidates:
        examples = "; ".join(f"{key!r}: {_examples(ids)}" for key, ids in candidates.items())
        raise ValueError(
            f"embedding: no barcode of {file.name} ({examples}) is a spot of slide {slide!r} "
            f"({_examples(spot_names)}); store the slide's spot names as 'barcodes'"
        )
    if not matching and unfit:
        raise ValueError(
            f"embedding: {file.name} has {', '.join(unfit)} for {n_rows} embeddings; "
            "ids must be strings or integers, one for each embedding"
        )
    for key, ids in matching.items():
        if not ids.is_unique:
            raise ValueError(
                f"embedding: {key!r} of {file.name} has {n_rows} rows for {ids.nunique()} different barcodes, "
                f"duplicates are {_examples(ids[ids.duplicated()].unique())}; keep one embedding for each spot"
            )
    orders = [ids.get_indexer(spot_names) for ids in matching.values()]
    if any((order != orders[0]).any() for order in orders):
        raise ValueError(
            f"embedding: {' and '.join(map(repr, matching))} of {file.name} name spots of slide {slide!r} in different "
            "orders; keep the one that belongs to the embeddings"
        )
    return next(iter(matching.items()), None)


def _is_text(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "SU" or (
        array.dtype.kind == "O" and all(isinstance(value, str | bytes) for value in array.ravel())
    )


def _to_text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _examples(names: Iterable[Any]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:2])) + (", ..." if len(names) > 2 else "")


def _coords(file: EmbeddingFile) -> NDArray[np.float64] | None:
    """Find the file's array of coordinates, (n_rows, 2); None if there is none with finite values."""
    for key, coords in file.arrays.items():
        if key.lower() not in COORDS_NAMES:
            continue
        if coords.ndim == 3 and len(coords) == 1:
            coords = coords[0]
        if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "fiu":
            continue
        if len(coords) != len(file.values):
            raise ValueError(
                f"embedding: {key!r} of {file.name} has {len(coords)} rows for {len(file.values)} embeddings; "
                "store one for each embedding, or none"
            )
        if np.isfinite(coords).all():
            return coords.astype(np.float64)
    return None


def _check_slide_order(
    file: EmbeddingFile, coords: NDArray[np.float64] | None, spot_names: pd.Index, spatial: NDArray[Any], slide: str
) -> None:
    """Refuse a file without ids if its number of rows is not that of the spots, or its order is not the slide's."""
    if len(file.values) != len(spot_names):
        raise ValueError(
            f"embedding: {file.name} has {len(file.values)} rows and no barcodes, but slide {slide!r} has "
            f"{len(spot_names)} spots, so they cannot be matched; store barcodes with the embeddings"
        )
    offset = None if coords is None else _largest_offset(coords, spatial, spatial)
    if offset is None:
        level = logging.INFO if file.is_tensor else logging.WARNING
        message = "hest: %s has neither barcodes nor distinct coords: assumed to be in the order of slide %s"
        logger.log(level, message, file.name, slide)
    elif offset.disagrees:
        raise ValueError(
            f"embedding: {file.name} has no barcodes, and its coords are not in the order of obsm['spatial'] of "
            f"slide {slide!r}: {offset.describe(spot_names)}; store barcodes with the embeddings"
        )


@dataclass(frozen=True)
class Offset:
    """Distance of an embedding's coordinates from its spot, in pixels of the slide."""

    row: int
    distance: float
    spacing: float

    @property
    def disagrees(self) -> bool:
        """True if the embedding may belong to another spot."""
        return self.distance >= self.spacing / 2

    def describe(self, spot_names: pd.Index) -> str:
        """Describe the distance for a message."""
        spot, distance, spacing = spot_names[self.row], f"{self.distance:.4g}", f"{self.spacing:.4g}"
        return f"spot {spot!r} lies {distance} pixels off, spots are {spacing} pixels apart"


def _largest_offset(coords: NDArray[np.float64], spatial: NDArray[Any], all_spatial: NDArray[Any]) -> Offset | None:
    """Largest distance of matched coordinates from their spots; None if positions do not tell spots apart.

    Coordinates may be corners of patches, or belong to another magnification. Each axis is scaled to the mean and
    standard deviation of the spots, which do not depend on the order of the spots.
    """
    distinct = np.unique(all_spatial[np.isfinite(all_spatial).all(1)], axis=0).astype(np.float64)
    finite = np.flatnonzero(np.isfinite(spatial).all(1))
    coords, spatial = coords[finite], spatial[finite].astype(np.float64)
    if not len(finite) or min(np.ptp(coords, axis=0).max(), np.ptp(spatial, axis=0).max()) == 0:
        return None
    spacing = float(np.median(cKDTree(distinct).query(distinct, k=2)[0][:, 1]))
    spread = coords.std(0)
    scale = spatial.std(0) / np.where(spread > 0, spread, np.inf)
    distance = np.linalg.norm((coords - coords.mean(0)) * scale - (spatial - spatial.mean(0)), axis=1)
    farthest = int(distance.argmax())
    return Offset(int(finite[farthest]), float(distance[farthest]), spacing)
