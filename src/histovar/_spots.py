"""Number sections and sample spots."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Spots in a random sample, where not all are needed: for statistics, and to initialise codes.
SAMPLED_SPOTS = 10_000


def section_numbers(sections: NDArray[Any] | None, n_spots: int) -> NDArray[np.int64]:
    """Number the sections from 0, (n_spots,); without sections, all spots are in section 0."""
    if sections is None:
        return np.zeros(n_spots, np.int64)
    return np.unique(sections, return_inverse=True)[1].astype(np.int64)


def sampled_spots(n_spots: int, random_state: int) -> NDArray[np.int64]:
    """Rows of a random sample of 10,000 spots, increasing; all rows if there are fewer."""
    return np.sort(np.random.default_rng(random_state).permutation(n_spots)[:SAMPLED_SPOTS])
