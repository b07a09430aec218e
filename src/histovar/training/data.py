"""Spots, in memory or on disk, drawn in batches that depend on nothing but the seed and the epoch."""

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

# Spots of a chunk on disk, and chunks that are read, shuffled together and used up before the next are.
CHUNK_SPOTS, SHUFFLED_CHUNKS = 1024, 16
# Enough to tell one epoch from another, few enough not to cost more than training on small data.
WATCHED_SPOTS = 256


class Spots(Dataset[tuple[Item, ...]]):
    """Tensors and :class:`Histology` with one row a spot, indexed by lists of rows.

    Parameters
    ----------
    *items
        What a batch consists of.
    """

    def __init__(self, *items: Item) -> None:
        self.items = items

    def __len__(self) -> int:
        return _length(self.items[0])

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer]) -> tuple[Item, ...]:
        index = np.asarray(rows)
        return tuple(_mapped(item, lambda t: t[index]) for item in self.items)

    def take(self, rows: NDArray[np.integer]) -> Spots:
        """Some of the spots."""
        return Spots(*self[rows])

    def fill_last(self, rows: NDArray[np.integer], values: Tensor) -> None:
        """Set the last item of some spots, which are consecutive."""
        self.items[-1][torch.from_numpy(rows)] = values  # type: ignore[index]

    def shuffled(self, seed: int, world_size: int, rank: int) -> DistributedSampler[Any]:
        """Rows in random order, each process's share of them."""
        return DistributedSampler(self, world_size, rank, shuffle=True, seed=seed)


class StoredSpots(Spots):
    """Spots on disk, of which a few chunks are in memory: a matrix of 32-bit floats in a zarr store.

    Parameters
    ----------
    parts
        What batches consist of, part after part.
    n_spots
        Number of spots of all parts.
    scratch
        Directory of the store.
    """

    def __init__(self, parts: Iterable[tuple[Item, ...]], n_spots: int, scratch: Path) -> None:
        import zarr

        start = 0
        for items in parts:
            block = np.concatenate([t.reshape(len(t), -1).numpy().astype(np.float32) for t in _tensors(items)], 1)
            if start == 0:
                # A spot of what is stored, which says how to take a row apart again.
                self.items = tuple(_mapped(item, lambda t: t[:1].clone()) for item in items)
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
        wanted = self.rows[np.asarray(rows)]
        numbers = wanted // CHUNK_SPOTS
        block = np.empty((len(wanted), self.store.shape[1]), np.float32)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            block[here] = self._chunk(number)[wanted[here] - number * CHUNK_SPOTS]
        widths = [t[0].numel() for t in _tensors(self.items)]
        columns = iter(torch.from_numpy(block).split(widths, 1))
        return tuple(
            _mapped(item, lambda t: next(columns).reshape(len(wanted), *t.shape[1:]).to(t.dtype)) for item in self.items
        )

    def _chunk(self, number: int) -> NDArray[np.float32]:
        """A chunk, the one least recently read making room for it."""
        if number in self._chunks:
            self._chunks[number] = self._chunks.pop(number)
        else:
            if len(self._chunks) >= SHUFFLED_CHUNKS:
                del self._chunks[next(iter(self._chunks))]
            self._chunks[number] = self.store[number * CHUNK_SPOTS : (number + 1) * CHUNK_SPOTS]
        return self._chunks[number]

    def fill_last(self, rows: NDArray[np.integer], values: Tensor) -> None:
        """Set the last item of some spots, which are consecutive."""
        self.store[rows[0] : rows[-1] + 1, -values[0].numel() :] = values.reshape(len(values), -1).numpy()
        self._chunks.clear()

    def take(self, rows: NDArray[np.integer]) -> Self:
        """Some of the spots, in the same store."""
        other = object.__new__(type(self))
        other.__dict__ |= {**self.__dict__, "rows": self.rows[rows], "_chunks": {}}
        return other

    def shuffled(self, seed: int, world_size: int, rank: int) -> DistributedSampler[Any]:
        """Rows in random order of the chunks, and in random order among the chunks read together."""
        return _ChunkSampler(self, world_size, rank, shuffle=True, seed=seed)


def collected(parts: Iterable[tuple[Item, ...]], n_spots: int, scratch: Path | None) -> Spots:
    """The spots of several parts on disk, or of a single one in memory where there is no directory for them."""
    if scratch is not None:
        return StoredSpots(parts, n_spots, scratch)
    (items,) = parts
    return Spots(*items)


def gathered_rows(parts: Iterable[tuple[Item, ...]], n_rows: int) -> tuple[Any, ...]:
    """Rows of several parts, one after another, in room made for all of them when the first comes.

    Small pieces kept from each part would lie between what is freed of it, and keep it from being used again.
    """
    whole: tuple[Any, ...] = ()
    start = 0
    for items in parts:
        whole = whole or tuple(_mapped(item, lambda t: t.new_empty(n_rows, *t.shape[1:])) for item in items)
        for room, rows in zip(_tensors(whole), _tensors(items), strict=True):
            room[start : start + len(rows)] = rows
        start += _length(items[0])
    return whole


class _ChunkSampler(DistributedSampler[Any]):
    """Shuffles chunks, then the spots of several chunks at a time, of rows that increase."""

    def __iter__(self) -> Iterator[int]:
        # Processes draw equally many: where spots run out, the first are drawn again.
        return islice(chain(self._order(), self._order()), self.rank, self.total_size, self.num_replicas)

    def _order(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        rows = self.dataset.rows  # type: ignore[attr-defined]
        bounds = np.searchsorted(rows, np.arange(0, rows[-1] + CHUNK_SPOTS + 1, CHUNK_SPOTS))
        chunks = rng.permutation(len(bounds) - 1)
        for group in np.split(chunks, range(SHUFFLED_CHUNKS, len(chunks), SHUFFLED_CHUNKS)):
            spots = np.concatenate([np.arange(bounds[chunk], bounds[chunk + 1]) for chunk in group])
            yield from rng.permutation(spots).tolist()


def _length(item: Item) -> int:
    return len(item.novelty if isinstance(item, Histology) else item)


def _mapped(item: Item, function: Callable[[Tensor], Tensor]) -> Item:
    """A function of a tensor, or of every tensor of a :class:`Histology`."""
    return item.map(function) if isinstance(item, Histology) else function(item)


def _tensors(items: Iterable[Item]) -> list[Tensor]:
    """All tensors, in the order in which :meth:`Histology.map` visits them."""
    found: list[Tensor] = []

    def visit(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for item in items:
        _mapped(item, visit)
    return found


class _EpochBatches(BatchSampler):
    """Batches reshuffled by seed and epoch, so that a resumed run draws what an uninterrupted one would."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


def train_loader(dataset: Spots, batch_size: int, seed: int, world_size: int = 1, rank: int = 0) -> DataLoader[Any]:
    """Shuffled batches, split over the processes of a distributed run.

    Parameters
    ----------
    dataset
        Training spots.
    batch_size
        Spots a batch and process.
    seed
        Seed of the order.
    world_size, rank
        Number of processes, and which of them this is.
    """
    return _loader(dataset, _EpochBatches(dataset.shuffled(seed, world_size, rank), batch_size, drop_last=False))


def validation_loader(dataset: Spots, batch_size: int) -> DataLoader[Any]:
    """All validation spots in order; every process of a distributed run validates on all of them."""
    rows: Any = range(len(dataset))
    return _loader(dataset, BatchSampler(rows, batch_size, drop_last=False))


def _loader(dataset: Spots, batches: BatchSampler) -> DataLoader[Any]:
    # A generator of its own: otherwise every new iterator draws from the global one, at moments that differ
    # between a resumed and an uninterrupted run.
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())


def held_out_spots(
    sections: NDArray[Any] | None, n_spots: int, random_state: int, groups: NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the training spots into those learnt from and those on which training is watched.

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
        Rows of one held-out individual of three or more, else of one held-out section (at most ``WATCHED_SPOTS``, at
        random), or of a random tenth of the spots where there is but one section.
    """
    rng = np.random.default_rng(random_state)
    if groups is not None and len(np.unique(groups)) > 2:  # of two, half of the spots would be lost
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
    """Folds of the training spots for the prior: individuals, or sections where there are enough, else strips of them.

    Parameters
    ----------
    sections
        (n_spots,) section of each spot, or None.
    coordinates
        (n_spots, 2).
    n_members
        Members of the prior: there are half as many folds at most.
    groups
        (n_spots,) individual of each spot, or None.

    Returns
    -------
    ndarray
        (n_spots,) numbered from 0. With two individuals or more a fold is an individual (or several, where there are
        more than members); else with three sections or more a fold is a section (or several); otherwise sections are
        cut into strips along their longer axis, since random spots would leave a spot's neighbours in the other folds.
    """
    n_spots = len(coordinates)
    if n_members < 2:
        return np.zeros(n_spots, np.int64)
    # So many that each is left out by two members, which disagree.
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
        place = coordinates[rows]
        longer = np.ptp(place, axis=0).argmax()
        # Spots equally far along are told apart by where they lie across, not by their order in the object.
        rank = np.lexsort((place[:, 1 - longer], place[:, longer])).argsort(kind="stable")
        folds[rows] = section * n_strips + rank * n_strips // len(rows)
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)
