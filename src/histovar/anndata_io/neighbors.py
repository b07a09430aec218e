"""Where spots lie: their neighbours within the section, its outline, coordinates scaled to it."""

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

# Of larger sections neighbours are sought in strips of so many spots.
SPOTS_AT_ONCE = 2**16
# Distances that differ by a smaller share are the same: what rounding to whole pixels, and rotation, do to a grid.
SAME_DISTANCE = 0.01


class Neighborhoods(NamedTuple):
    """Each spot's nearest neighbours within its section, itself left out, by squidpy.

    Spots as far away as the last of the nearest belong to the neighbourhood, too, so that it depends neither on the
    order of the spots nor on how the section is turned: on a hexagonal grid the 8 nearest are 12.

    Parameters
    ----------
    graphs
        For each neighbourhood size the row-normalised graph, (n_obs, n_obs).
    outline
        (n_obs, 2 x n_sizes), how near the section's outline a spot lies. For each size: the log of its neighbours' mean
        distance over the section's median, which grows where there is nothing on one side; and how far the neighbours'
        centroid lies from the spot, over that mean distance.
    """

    graphs: list[sparse.csr_matrix]
    outline: NDArray[np.float32]

    @classmethod
    def of(
        cls,
        place: NDArray[np.floating],
        names: NDArray[np.str_ | np.integer] | None,
        n_neighbors: Sequence[int],
        density: NDArray[np.floating] | None = None,
    ) -> Neighborhoods:
        """Find them.

        Parameters
        ----------
        place
            (n_obs, 2).
        names
            (n_obs,) sections, or None.
        n_neighbors
            Neighbourhood sizes; a size above a quarter of a section's spots is that quarter there. The mean over all
            other spots would say of a spot the contrary of what its neighbours say: it is low where the spot itself is
            high. And where a section was sampled sparsely, more spots would reach too far.
        density
            (n_obs,) how many times as densely the spots of each one's section lie as those that `n_neighbors` are meant
            for: so many times as many neighbours reach as far. The same for all by default.
        """
        n_spots = len(place)
        outline = np.zeros((n_spots, N_OUTLINE * len(n_neighbors)), np.float32)
        if not n_neighbors:
            return cls([], outline)
        labels = np.zeros(n_spots) if names is None else names
        members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        centred = np.array(place, np.float64)  # as the graphs' shares have 32 bits
        for rows in members:
            centred[rows] -= centred[rows].mean(0)
        graphs = []
        for i, wanted in enumerate(n_neighbors):
            counts, distance = np.zeros(n_spots, np.int64), np.ones(n_spots)
            found: list[tuple[NDArray[np.int64], _Nearest]] = []
            near, off = outline[:, N_OUTLINE * i : N_OUTLINE * (i + 1)].T
            for rows in members:
                here = wanted if density is None else max(1, round(wanted * float(density[rows[0]])))
                if n := min(here, len(rows) - 1, max(len(rows) // 4, 1)):
                    nearest = (_knn if len(rows) <= SPOTS_AT_ONCE else _knn_in_strips)(place[rows], n)
                    found.append((rows, nearest))
                    counts[rows] = nearest.counts
                    distance[rows] = nearest.distance.clip(min=1e-12)  # spots may lie on top of each other
                    near[rows] = np.log(distance[rows] / np.median(distance[rows]))
            pointers = np.concatenate([[0], counts.cumsum()])
            neighbors = np.empty(pointers[-1], np.int32)
            for rows, nearest in found:
                neighbors[_positions(pointers[rows], nearest.counts)] = rows[nearest.neighbors]
            shares = np.repeat((1 / counts.clip(min=1)).astype(np.float32), counts)
            graph = sparse.csr_matrix((shares, neighbors, pointers), (n_spots, n_spots))
            graph.sort_indices()
            off[:] = np.where(counts > 0, np.linalg.norm(graph @ centred - centred, axis=1) / distance, 0)
            graphs.append(graph)
        return cls(graphs, outline)


def _positions(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """Ranges of numbers that begin at `starts`, one after another."""
    before = np.concatenate([[0], counts.cumsum()[:-1]])
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


class _Nearest(NamedTuple):
    """Nearest neighbours of spots.

    Parameters
    ----------
    neighbors
        Which spots, those of one spot after those of another.
    counts
        (n_spots,) how many are whose.
    distance, farthest
        (n_spots,) mean distance, and the distance up to which spots belong.
    """

    neighbors: NDArray[np.int32]
    counts: NDArray[np.int64]
    distance: NDArray[np.floating]
    farthest: NDArray[np.floating]


def _knn(place: NDArray[np.floating], n_neighbors: int) -> _Nearest:
    """Neighbours of all spots, by squidpy, and those as far away as the last of them."""
    n_spots = len(place)
    # On a hexagonal grid the last ring may add half as many; more is asked for where more spots lie on one another.
    asked, most = n_neighbors + n_neighbors // 2 + 4, min(8 * n_neighbors + 64, n_spots - 1)
    while True:
        asked = min(asked, most)
        neighbors = _asked_of_squidpy(place, asked)
        distance = np.linalg.norm(place[neighbors] - place[:, None], axis=2)
        farthest = np.partition(distance, n_neighbors - 1, axis=1)[:, n_neighbors - 1] * (1 + SAME_DISTANCE)
        within = distance <= farthest[:, None]
        if asked == most or not within.all(1).any():
            break
        asked *= 2
    counts = within.sum(1)
    return _Nearest(neighbors[within], counts, (distance * within).sum(1) / counts, farthest)


def _asked_of_squidpy(place: NDArray[np.floating], n_neighbors: int) -> NDArray[np.int32]:
    """Each spot's nearest, (n_spots, n_neighbors)."""
    light = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(place)).astype(str)))
    light.obsm["spatial"] = np.asarray(place)
    from histovar._squidpy import sq  # its import sets the level of the logger

    with _quiet_squidpy(), keep_threads():
        sq.gr.spatial_neighbors_knn(light, n_neighs=n_neighbors)
    found: NDArray[np.int32] = light.obsp["spatial_connectivities"].indices.reshape(-1, n_neighbors)
    return found


def _knn_in_strips(place: NDArray[np.floating], n_neighbors: int) -> _Nearest:
    """The same, strip by strip along the longer axis, each with as much margin as its spots' neighbours reach.

    As squidpy takes a kilobyte or more for each spot that it looks at.
    """
    n_spots = len(place)
    counts, distance, farthest = np.empty(n_spots, np.int64), np.empty(n_spots), np.empty(n_spots)
    along = place[:, np.ptp(place, axis=0).argmax()].astype(float)
    order = along.argsort(kind="stable")
    padded = np.concatenate([[-np.inf], along[order], [np.inf]])
    found: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = []
    for start in range(0, n_spots, SPOTS_AT_ONCE):
        rows = order[start : start + SPOTS_AT_ONCE]
        margin = max(SPOTS_AT_ONCE // 8, n_neighbors)
        while True:
            low, high = max(start - margin, 0), min(start + len(rows) + margin, n_spots)
            strip, own = _knn(place[order[low:high]], n_neighbors), slice(start - low, start - low + len(rows))
            reach, before, after = strip.farthest[own], padded[low], padded[high + 1]  # the nearest spots left out
            if (along[rows] - reach >= before).all() and (along[rows] + reach <= after).all():
                break
            margin *= 2
        ends = np.concatenate([[0], strip.counts.cumsum()])
        found.append((rows, order[low:high][strip.neighbors[ends[own.start] : ends[own.stop]]].astype(np.int32)))
        counts[rows], distance[rows], farthest[rows] = strip.counts[own], strip.distance[own], reach
    pointers = np.concatenate([[0], counts.cumsum()])
    neighbors = np.empty(pointers[-1], np.int32)
    for rows, theirs in found:
        neighbors[_positions(pointers[rows], counts[rows])] = theirs
    return _Nearest(neighbors, counts, distance, farthest)


@contextmanager
def _quiet_squidpy() -> Iterator[None]:
    """Without squidpy's line for every graph."""
    talker = logging.getLogger("spatialdata._logging")
    level = talker.level
    talker.setLevel(logging.WARNING)
    try:
        yield
    finally:
        talker.setLevel(level)


def section_coordinates(place: NDArray[np.floating], names: NDArray[np.str_] | None) -> NDArray[np.float32]:
    """Coordinates scaled to [0, 1] within each section, the longer side deciding: (n_obs, 2)."""
    scaled = np.empty(place.shape, dtype=np.float32)
    labels = np.zeros(len(place)) if names is None else names
    for label in np.unique(labels):
        rows = labels == label
        low = place[rows].min(0)
        scaled[rows] = (place[rows] - low) / max(np.ptp(place[rows], axis=0).max(), 1e-12)
    return scaled
