"""Spots by section, and samples of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Spots that are a sample of all where all are not needed: for statistics, and a first look at the codes.
SAMPLED_SPOTS = 10_000


def section_numbers(sections: NDArray[Any] | None, n_spots: int) -> NDArray[np.int64]:
    """Sections numbered from 0, (n_spots,); where none are given all spots are one section."""
    if sections is None:
        return np.zeros(n_spots, np.int64)
    return np.unique(sections, return_inverse=True)[1].astype(np.int64)


def sampled_spots(n_spots: int, random_state: int) -> NDArray[np.int64]:
    """Rows of a random sample of the spots, increasing; all where they are no more than that."""
    return np.sort(np.random.default_rng(random_state).permutation(n_spots)[:SAMPLED_SPOTS])
