"""Spots in memory, drawn in batches that depend on nothing but the seed and the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from histovar.model import Histology

Item = Tensor | Histology

# Enough to tell one epoch from another, few enough not to cost more than training on small data.
WATCHED_SPOTS = 256


class SpotDataset(Dataset[tuple[Item, ...]]):
    """Tensors and :class:`Histology` with one row a spot, indexed by lists of rows.

    Parameters
    ----------
    *items
        What a batch consists of.
    """

    def __init__(self, *items: Item) -> None:
        self.items = items

    def __len__(self) -> int:
        first = self.items[0]
        return len(first.sources[0] if isinstance(first, Histology) else first)

    def __getitem__(self, rows: Sequence[int] | NDArray[np.integer]) -> tuple[Item, ...]:
        index = np.asarray(rows)
        return tuple(
            item.map(lambda t: t[index]) if isinstance(item, Histology) else item[index] for item in self.items
        )


class _EpochBatches(BatchSampler):
    """Batches reshuffled by seed and epoch, so that a resumed run draws what an uninterrupted one would."""

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


def train_loader(
    dataset: SpotDataset, batch_size: int, seed: int, world_size: int = 1, rank: int = 0
) -> DataLoader[Any]:
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
    sampler: Any = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=seed)
    return _loader(dataset, _EpochBatches(sampler, batch_size, drop_last=False))


def validation_loader(dataset: SpotDataset, batch_size: int) -> DataLoader[Any]:
    """All validation spots in order; every process of a distributed run validates on all of them."""
    rows: Any = range(len(dataset))
    return _loader(dataset, BatchSampler(rows, batch_size, drop_last=False))


def _loader(dataset: SpotDataset, batches: BatchSampler) -> DataLoader[Any]:
    # A generator of its own: otherwise every new iterator draws from the global one, at moments that differ
    # between a resumed and an uninterrupted run.
    return DataLoader(dataset, sampler=batches, batch_size=None, generator=torch.Generator())


def section_numbers(sections: NDArray[Any] | None, n_spots: int) -> torch.Tensor:
    """Sections numbered from 0, (n_spots,); where none are given all spots are one section."""
    numbers = np.zeros(n_spots, np.int64) if sections is None else np.unique(sections, return_inverse=True)[1]
    return torch.from_numpy(numbers)


def held_out_spots(
    sections: NDArray[Any] | None, n_spots: int, random_state: int
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

    Returns
    -------
    seen
        Rows to learn from.
    watched
        Rows of one held-out section (at most ``WATCHED_SPOTS``, at random), or of a random tenth of the spots where
        there is but one section.
    """
    rng = np.random.default_rng(random_state)
    names = np.unique(sections) if sections is not None else np.zeros(1)
    order = rng.permutation(n_spots)
    if sections is not None and len(names) > 1:
        held_out = sections == rng.choice(names)
    else:
        held_out = np.isin(np.arange(n_spots), order[: max(1, n_spots // 10)])
    watched = order[held_out[order]][:WATCHED_SPOTS]
    return np.flatnonzero(~held_out), np.sort(watched)


def cross_fit_folds(
    sections: NDArray[Any] | None, coordinates: NDArray[np.floating], n_members: int
) -> NDArray[np.int64]:
    """Folds of the training spots for the prior: sections where there are enough, else strips of sections.

    Parameters
    ----------
    sections
        (n_spots,) section of each spot, or None.
    coordinates
        (n_spots, 2).
    n_members
        Members of the prior, the largest possible number of folds.

    Returns
    -------
    ndarray
        (n_spots,) numbered from 0. With three sections or more a fold is a section (or several, where there
        are more sections than members); otherwise sections are cut into strips along their longer axis, since random
        spots would leave a spot's neighbours in the other folds.
    """
    n_spots = len(coordinates)
    codes = section_numbers(sections, n_spots).numpy()
    n_sections = codes.max() + 1
    if n_sections >= 3 or n_members < 2:
        return codes % max(n_members, 1)
    folds = np.zeros(n_spots, np.int64)
    n_strips = max(1, min(4, n_members) // n_sections)
    for section in range(n_sections):
        rows = np.flatnonzero(codes == section)
        place = coordinates[rows, np.ptp(coordinates[rows], axis=0).argmax()]
        folds[rows] = section * n_strips + place.argsort(kind="stable").argsort(kind="stable") * n_strips // len(rows)
    return np.unique(folds, return_inverse=True)[1].astype(np.int64)
