"""Training data: spots in memory or on disk, reproducible batches, held-out spots and cross-fitting folds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from histovar._spots import section_numbers
from histovar.model import Histology

Item = Tensor | Histology

# Spots of a chunk on disk, and number of chunks that are shuffled together.
CHUNK_SPOTS, SHUFFLED_CHUNKS = 1024, 16
# Most held-out spots: enough to tell one epoch from another, and quicker than training even on small data.
WATCHED_SPOTS = 256


class Spots(Dataset[tuple[Item, ...]]):
    """Data set of spots: tensors and :class:`Histology` with one row for each spot, indexed by lists of rows.

    Parameters
    ----------
    *items
        Tensors and histology that make up a batch.
    """

    def __init__(self, *items: Item) -> None:
        self.items = items

    def __len__(self) -> int:
        return _length(self.items[0])

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer]) -> tuple[Item, ...]:
        index = np.asarray(rows)
        return tuple(_map_tensors(item, lambda t: t[index]) for item in self.items)

    def take(self, rows: NDArray[np.integer]) -> Spots:
        """Select spots."""
        return Spots(*self[rows])

    def fill_last(self, rows: NDArray[np.integer], values: Tensor) -> None:
        """Set the last item of consecutive spots."""
        self.items[-1][torch.from_numpy(rows)] = values  # type: ignore[index]

    def shuffled(self, seed: int, world_size: int, rank: int) -> DistributedSampler[Any]:
        """Make a sampler of rows in random order, split over the processes."""
        return DistributedSampler(self, world_size, rank, shuffle=True, seed=seed)


class StoredSpots(Spots):
    """Data set of spots on disk, as a matrix of 32-bit floats in a zarr store; a few chunks are kept in memory.

    Parameters
    ----------
    parts
        Items of a batch, for consecutive parts of the spots.
    n_spots
        Number of spots in all parts.
    scratch
        Directory for the store.
    """

    def __init__(self, parts: Iterable[tuple[Item, ...]], n_spots: int, scratch: Path) -> None:
        import zarr

        start = 0
        for items in parts:
            block = np.concatenate([t.reshape(len(t), -1).numpy().astype(np.float32) for t in _tensors(items)], 1)
            if start == 0:
                # One spot, whose shapes and types say how to split a row into items again.
                self.items = tuple(_map_tensors(item, lambda t: t[:1].clone()) for item in items)
                self.store: Any = zarr.create_array(
                    scratch / "spots.zarr",
                    shape=(n_spots, block.shape[1]),
                    chunks=(CHUNK_SPOTS, block.shape[1]),
                    dtype=np.float32,
                    compressors=None,
                    overwrite=True,
                )
            self.store[start : start + len(block)] = block
            start += len(block)
        self.rows: NDArray[np.integer] = np.arange(n_spots)
        self._chunks: dict[int, NDArray[np.float32]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer]) -> tuple[Item, ...]:
        stored_rows = self.rows[np.asarray(rows)]
        numbers = stored_rows // CHUNK_SPOTS
        block = np.empty((len(stored_rows), self.store.shape[1]), np.float32)
        for number in np.unique(numbers).tolist():
            in_chunk = numbers == number
            block[in_chunk] = self._chunk(number)[stored_rows[in_chunk] - number * CHUNK_SPOTS]
        widths = [t[0].numel() for t in _tensors(self.items)]
        columns = iter(torch.from_numpy(block).split(widths, 1))
        return tuple(
            _map_tensors(item, lambda t: next(columns).reshape(len(stored_rows), *t.shape[1:]).to(t.dtype))
            for item in self.items
        )

    def _chunk(self, number: int) -> NDArray[np.float32]:
        """Read a chunk through a cache that drops the least recently used one."""
        if number in self._chunks:
            self._chunks[number] = self._chunks.pop(number)
        else:
            if len(self._chunks) >= SHUFFLED_CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = self.store[number * CHUNK_SPOTS : (number + 1) * CHUNK_SPOTS]
        return self._chunks[number]

    def fill_last(self, rows: NDArray[np.integer], values: Tensor) -> None:
        """Set the last item of consecutive spots."""
        self.store[rows[0] : rows[-1] + 1, -values[0].numel() :] = values.reshape(len(values), -1).numpy()
        self._chunks.clear()

    def take(self, rows: NDArray[np.integer]) -> Self:
        """Select spots; they stay in the same store."""
        other = object.__new__(type(self))
        other.__dict__ |= {**self.__dict__, "rows": self.rows[rows], "_chunks": {}}
        return other

    def shuffled(self, seed: int, world_size: int, rank: int) -> DistributedSampler[Any]:
        """Make a sampler that shuffles chunks, and the rows of several chunks at a time."""
        return _ChunkSampler(self, world_size, rank, shuffle=True, seed=seed)


def collect_spots(parts: Iterable[tuple[Item, ...]], n_spots: int, scratch: Path | None) -> Spots:
    """Collect spots to a data set on disk, or in memory if `scratch` is None and there is only one part."""
    if scratch is not None:
        return StoredSpots(parts, n_spots, scratch)
    (items,) = parts
    return Spots(*items)


def concat_rows(parts: Iterable[tuple[Item, ...]], n_rows: int) -> tuple[Any, ...]:
    """Concatenate the rows of several parts, in memory that is allocated for all of them with the first.

    Keeping the rows of each part until the end would fragment the memory that is freed in between.
    """
    concatenated: tuple[Any, ...] = ()
    start = 0
    for items in parts:
        if not concatenated:
            concatenated = tuple(_map_tensors(item, lambda t: t.new_empty(n_rows, *t.shape[1:])) for item in items)
        for target, rows in zip(_tensors(concatenated), _tensors(items), strict=True):
            target[start : start + len(rows)] = rows
        start += _length(items[0])
    return concatenated


class _ChunkSampler(DistributedSampler[Any]):
    """Sampler that shuffles chunks, then the spots of several chunks at a time; rows must be sorted."""

    def __iter__(self) -> Iterator[int]:
        # All processes draw equally many spots; if there are too few, the first are drawn again.
        return islice(chain(self._order(), self._order()), self.rank, self.total_size, self.num_replicas)

    def _order(self) -> Iterator[int]:
        """Yield all positions in shuffled order."""
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = self.dataset.rows  # type: ignore[attr-defined]
        bounds = np.searchsorted(rows, np.arange(0, rows[-1] + CHUNK_SPOTS + 1, CHUNK_SPOTS))
        chunks = rng.permutation(len(bounds) - 1)
        for group in np.split(chunks, range(SHUFFLED_CHUNKS, len(chunks), SHUFFLED_CHUNKS)):
            spots = np.concatenate([np.arange(bounds[chunk], bounds[chunk + 1]) for chunk in group])
            yield from rng.permutation(spots).tolist()


def _length(item: Item) -> int:
    """Number of spots."""
    return len(item.novelty if isinstance(item, Histology) else item)


def _map_tensors(item: Item, function: Callable[[Tensor], Tensor]) -> Item:
    """Apply a function to a tensor, or to every tensor of a :class:`Histology`."""
    return item.map(function) if isinstance(item, Histology) else function(item)


def _tensors(items: Iterable[Item]) -> list[Tensor]:
    """List all tensors, in the order in which :meth:`Histology.map` visits them."""
    tensors: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    for item in items:
        _map_tensors(item, visit)
    return tensors


class _EpochBatches(BatchSampler):
    """Batches reshuffled by seed and epoch, so that a resumed run draws the same as an uninterrupted one."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this."""
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


def train_loader(dataset: Spots, batch_size: int, seed: int, world_size: int = 1, rank: int = 0) -> DataLoader[Any]:
    """Make a loader of shuffled batches, split over the processes of a distributed run.

    Parameters
    ----------
    dataset
        Training spots.
    batch_size
        Spots in a batch of each process.
    seed
        Seed of the order.
    world_size, rank
        Number of processes, and index of this one.
    """
    return _loader(dataset, _EpochBatches(dataset.shuffled(seed, world_size, rank), batch_size, drop_last=False))


def validation_loader(dataset: Spots, batch_size: int) -> DataLoader[Any]:
    """Make a loader of all validation spots in order, the same in every process of a distributed run."""
    rows: Any = range(len(dataset))
    return _loader(dataset, BatchSampler(rows, batch_size, drop_last=False))


def _loader(dataset: Spots, batches: BatchSampler) -> DataLoader[Any]:
    """Make a loader of given batches."""
    # With a generator of its own: otherwise every new iterator draws from the global one, at times that differ
    # between a resumed and an uninterrupted run.
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())


def held_out_spots(
    sections: NDArray[Any] | None, n_spots: int, random_state: int, groups: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the training spots into those to learn from and those on which training is monitored.

    Parameters
    ----------
    sections
        (n_spots,) section of each spot, or None.
    n_spots
        Number of spots.
    random_state
        Seed.
    groups
        (n_spots,) individual of each spot, or None.

    Returns
    -------
    seen
        Rows to learn from.
    watched
        Held-out rows: of one individual if there are three or more, else of one section if there are several, else a
        random tenth of all; at most ``WATCHED_SPOTS`` of them, at random.
    """
    rng = np.random.default_rng(random_state)
    if groups is not None and len(np.unique(groups)) > 2:  # of only two, half of the spots would be lost
        sections = groups
    names = np.unique(sections) if sections is not None else np.zeros(1)
    order = rng.permutation(n_spots)
    if sections is not None and len(names) > 1:
        held_out = sections == rng.choice(names)
    else:
        held_out = np.isin(np.arange(n_spots), order[: max(1, n_spots // 10)])
    watched = order[held_out[order]][:WATCHED_SPOTS]
    return np.flatnonzero(~held_out), np.sort(watched)


def cross_fit_folds(
    sections: NDArray[Any] | None,
    coordinates: NDArray[np.floating],
    n_members: int,
    groups: NDArray[Any] | None = None,
) -> NDArray[np.int64]:
    """Assign training spots to folds for cross-fitting the prior: individuals, else sections, else strips of sections.

    Parameters
    ----------
    sections
        (n_spots,) section of each spot, or None.
    coordinates
        (n_spots, 2).
    n_members
        Number of members of the prior; there are at most half as many folds.
    groups
        (n_spots,) individual of each spot, or None.

    Returns
    -------
    ndarray
        (n_spots,) fold of each spot, numbered from 0. With two individuals or more, a fold is one individual, or
        several if there are more than folds; otherwise, with three sections or more, one or several sections; otherwise
        sections are cut into strips along their longer axis, as with random folds a spot's neighbours would be in the
        other folds.
    """
    n_spots = len(coordinates)
    if n_members < 2:
        return np.zeros(n_spots, np.int64)
    # With four members or more, each fold is left out by at least two, whose disagreement can be measured.
    n_folds = max(2, n_members // 2)
    individuals = section_numbers(groups, n_spots)
    if individuals.max() > 0:
        return individuals % n_folds
    codes = section_numbers(sections, n_spots)
    n_sections = codes.max() + 1
    if n_sections >= 3:
        return codes % n_folds
    folds = np.zeros(n_spots, np.int64)
    n_strips = max(1, min(4, n_folds) // n_sections)
    for section in range(n_sections):
        rows = np.flatnonzero(codes == section)
        xy = coordinates[rows]
        longer = np.ptp(xy, axis=0).argmax()
        # Ties are broken by the other coordinate, so that folds do not depend on the order of spots in the object.
        rank = np.lexsort((xy[:, 1 - longer], xy[:, longer])).argsort(kind="stable")
        folds[rows] = section * n_strips + rank * n_strips // len(rows)
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)
