"""Find each spot's neighbours within its section, its nearness to the outline, and scaled coordinates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from histovar._torch_state import keep_threads
from histovar.model.config import N_OUTLINE

# In sections with more spots, neighbours are sought in strips of this many spots.
SPOTS_AT_ONCE = 2**16
# Distances that differ by a smaller share count as equal: rounding to whole pixels and rotation change them that much.
SAME_DISTANCE = 0.01


class Neighborhoods(NamedTuple):
    """Graphs of each spot's nearest neighbours within its section (by squidpy), and features of the outline.

    A spot is not its own neighbour. All spots as far away as the last of the n nearest are neighbours, too, so that the
    neighbourhood depends neither on the order of the spots nor on the section's orientation: on a hexagonal grid, the 8
    nearest become 12.

    Parameters
    ----------
    graphs
        For each neighbourhood size the row-normalised graph, (n_obs, n_obs).
    outline
        (n_obs, 2 x n_sizes), how near the section's outline a spot lies. For each size: the log of its neighbours' mean
        distance over the section's median, which is larger where tissue is missing on one side; and the distance of the
        neighbours' centroid from the spot, over that mean distance.
    """

    graphs: list[sparse.csr_matrix]
    outline: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        coordinates: NDArray[np.floating],
        names: NDArray[np.str_ | np.integer] | None,
        n_neighbors: Sequence[int],
        density: NDArray[np.floating] | None = None,
    ) -> Neighborhoods:
        """Find the neighbours of all spots.

        Parameters
        ----------
        coordinates
            (n_obs, 2).
        names
            (n_obs,) sections; None for a single section.
        n_neighbors
            Neighbourhood sizes, cut to a quarter of the section's spots. A mean over nearly all other spots would be
            misleading: it is low where the spot itself is high. And in a sparsely sampled section, a larger
            neighbourhood would reach too far.
        density
            (n_obs,) density of spots in each spot's section, relative to the density for which `n_neighbors` was
            chosen; sizes are multiplied by it, so that neighbourhoods span the same distance. 1 by default.
        """
        n_spots = len(coordinates)
        outline = np.zeros((n_spots, N_OUTLINE * len(n_neighbors)), np.float32)
        if not n_neighbors:
            return cls([], outline)
        labels = np.zeros(n_spots) if names is None else names
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        # Centred within each section: large offsets would lose precision in the graphs' 32-bit weights.
        centred = np.array(coordinates, np.float64)
        for rows in members:
            centred[rows] -= centred[rows].mean(0)
        graphs = []
        for i, size in enumerate(n_neighbors):
            counts, distance = np.zeros(n_spots, np.int64), np.ones(n_spots)
            by_section: list[tuple[NDArray[np.int64], _Nearest]] = []
            relative_distance, centroid_offset = outline[:, N_OUTLINE * i : N_OUTLINE * (i + 1)].T
            for rows in members:
                section_size = size if density is None else max(1, round(size * float(density[rows[0]])))
                if n := min(section_size, len(rows) - 1, max(len(rows) // 4, 1)):
                    nearest = (_knn if len(rows) <= SPOTS_AT_ONCE else _knn_in_strips)(coordinates[rows], n)
                    by_section.append((rows, nearest))
                    counts[rows] = nearest.counts
                    distance[rows] = nearest.distance.clip(min=1e-12)  # spots may have the same coordinates
                    relative_distance[rows] = np.log(distance[rows] / np.median(distance[rows]))
            pointers = np.concatenate([[0], counts.cumsum()])
            neighbors = np.empty(pointers[-1], np.int32)
            for rows, nearest in by_section:
                neighbors[_ranges(pointers[rows], nearest.counts)] = rows[nearest.neighbors]
            weights = np.repeat((1 / counts.clip(min=1)).astype(np.float32), counts)
            graph = sparse.csr_matrix((weights, neighbors, pointers), (n_spots, n_spots))
            graph.sort_indices()
            offsets = np.linalg.norm(graph @ centred - centred, axis=1)
            centroid_offset[:] = np.where(counts > 0, offsets / distance, 0)
            graphs.append(graph)
        return cls(graphs, outline)


def _ranges(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Concatenate the ranges that begin at `starts` and have `counts` numbers."""
    before = np.concatenate([[0], counts.cumsum()[:-1]])
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


class _Nearest(NamedTuple):
    """Nearest neighbours of spots.

    Parameters
    ----------
    neighbors
        Indices of the first spot's neighbours, then the second's, and so on.
    counts
        (n_spots,) number of neighbours of each spot.
    distance, farthest
        (n_spots,) mean distance of the neighbours, and largest distance at which a spot is a neighbour.
    """

    neighbors: NDArray[np.int32]
    counts: NDArray[np.int64]
    distance: NDArray[np.floating]
    farthest: NDArray[np.floating]


def _knn(coordinates: NDArray[np.floating], n_neighbors: int) -> _Nearest:
    """Find the n nearest neighbours of all spots with squidpy, and all spots as far away as the last of them."""
    n_spots = len(coordinates)
    # On a hexagonal grid, ties may add half as many neighbours; more are queried if more spots are tied.
    n_queried, most = n_neighbors + n_neighbors // 2 + 4, min(8 * n_neighbors + 64, n_spots - 1)
    while True:
        n_queried = min(n_queried, most)
        neighbors = _query_squidpy(coordinates, n_queried)
        distance = np.linalg.norm(coordinates[neighbors] - coordinates[:, None], axis=2)
        farthest = np.partition(distance, n_neighbors - 1, axis=1)[:, n_neighbors - 1] * (1 + SAME_DISTANCE)
        within = distance <= farthest[:, None]
        if n_queried == most or not within.all(1).any():
            break
        n_queried *= 2
    counts = within.sum(1)
    return _Nearest(neighbors[within], counts, (distance * within).sum(1) / counts, farthest)


def _query_squidpy(coordinates: NDArray[np.floating], n_neighbors: int) -> NDArray[np.int32]:
    """Indices of each spot's nearest neighbours, (n_spots, n_neighbors), from squidpy."""
    adata = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(coordinates)).astype(str)))
    adata.obsm["spatial"] = np.asarray(coordinates)
    from histovar._squidpy import sq  # its import sets the level of the logger

    with _quiet_squidpy(), keep_threads():
        sq.gr.spatial_neighbors_knn(adata, n_neighs=n_neighbors)
    indices: NDArray[np.int32] = adata.obsp["spatial_connectivities"].indices.reshape(-1, n_neighbors)
    return indices


def _knn_in_strips(coordinates: NDArray[np.floating], n_neighbors: int) -> _Nearest:
    """Find the same neighbours as :func:`_knn` strip by strip along the longer axis, with less memory.

    squidpy takes a kilobyte or more for each spot. The margins of a strip are as wide as its neighbourhoods reach.
    """
    n_spots = len(coordinates)
    counts, distance, farthest = np.empty(n_spots, np.int64), np.empty(n_spots), np.empty(n_spots)
    position = coordinates[:, np.ptp(coordinates, axis=0).argmax()].astype(float)
    order = position.argsort(kind="stable")
    padded = np.concatenate([[-np.inf], position[order], [np.inf]])
    by_strip: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
    for start in range(0, n_spots, SPOTS_AT_ONCE):
        rows = order[start : start + SPOTS_AT_ONCE]
        margin = max(SPOTS_AT_ONCE // 8, n_neighbors)
        while True:
            low, high = max(start - margin, 0), min(start + len(rows) + margin, n_spots)
            strip, own = _knn(coordinates[order[low:high]], n_neighbors), slice(start - low, start - low + len(rows))
            # `before` and `after` are the positions of the nearest spots outside the strip and its margins.
            reach, before, after = strip.farthest[own], padded[low], padded[high + 1]
            if (position[rows] - reach >= before).all() and (position[rows] + reach <= after).all():
                break
            margin *= 2
        ends = np.concatenate([[0], strip.counts.cumsum()])
        by_strip.append((rows, order[low:high][strip.neighbors[ends[own.start] : ends[own.stop]]].astype(np.int32)))
        counts[rows], distance[rows], farthest[rows] = strip.counts[own], strip.distance[own], reach
    pointers = np.concatenate([[0], counts.cumsum()])
    neighbors = np.empty(pointers[-1], np.int32)
    for rows, strip_neighbors in by_strip:
        neighbors[_ranges(pointers[rows], counts[rows])] = strip_neighbors
    return _Nearest(neighbors, counts, distance, farthest)


@contextmanager
def _quiet_squidpy() -> Iterator[None]:
    """Silence the line that squidpy logs for every graph."""
    squidpy_logger = logging.getLogger("spatialdata._logging")
    level = squidpy_logger.level
    squidpy_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        squidpy_logger.setLevel(level)


def section_coordinates(coordinates: NDArray[np.floating], names: NDArray[np.str_] | None) -> NDArray[np.float32]:
    """Scale coordinates within each section, (n_obs, 2), so that the longer side spans [0, 1]."""
    scaled = np.empty(coordinates.shape, dtype=np.float32)
    labels = np.zeros(len(coordinates)) if names is None else names
    for label in np.unique(labels):
        rows = labels == label
        low = coordinates[rows].min(0)
        scaled[rows] = (coordinates[rows] - low) / max(np.ptp(coordinates[rows], axis=0).max(), 1e-12)
    return scaled
