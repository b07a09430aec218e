"""A first look at the training spots: what is needed of all of them before any can be learnt from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histovar._spots import sampled_spots
from histovar.model import Histology
from histovar.model.condition import Moments

from .data import gathered_rows


class Measured(NamedTuple):
    """Training spots: all, or those of some sections.

    Parameters
    ----------
    histology
        Inputs as they were read.
    expression
        (n_spots, n_genes) in layer units.
    sections
        (n_spots,) number of each spot's section.
    coordinates
        (n_spots, 2), for folds within sections.
    groups
        (n_spots,) number of each spot's individual, where known.
    counts
        (n_spots, n_genes), where `expression` is log-normalised counts.
    total_counts
        (n_spots,) total count of every spot, where known.
    """

    histology: Histology
    expression: Tensor
    sections: NDArray[np.int64]
    coordinates: NDArray[np.floating]
    groups: NDArray[np.int64] | None
    counts: Tensor | None
    total_counts: NDArray[np.floating] | None


class Survey(NamedTuple):
    """What :func:`surveyed` finds.

    Parameters
    ----------
    moments
        Of each section, by its number.
    histology, sections
        Of a random sample of the spots, in their order.
    counts
        (n_genes,) sums over all spots, where there are counts.
    all_sections, groups, coordinates, total_counts
        Of all spots.
    """

    moments: dict[int, Moments]
    histology: Histology
    sections: Tensor
    counts: Tensor | None
    all_sections: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    coordinates: NDArray[np.floating]
    total_counts: NDArray[np.floating] | None


def surveyed(parts: Iterable[Measured], n_spots: int, random_state: int) -> Survey:
    """Go through the spots once.

    Parameters
    ----------
    parts
        The spots, each part of whole sections.
    n_spots
        Number of spots of all parts.
    random_state
        Seed of the sample.
    """
    sample = sampled_spots(n_spots, random_state)
    moments: dict[int, Moments] = {}
    light: list[tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.floating] | None]] = []

    individuals: list[NDArray[np.int64] | None] = []
    sums: list[Tensor | None] = []

    def chosen() -> Iterator[tuple[Histology]]:
        start = 0
        for part in parts:
            moments.update(Moments.by_section(part.histology, torch.from_numpy(part.sections)))
            individuals.append(part.groups)
            sums.append(None if part.counts is None else part.counts.double().sum(0))
            light.append((part.sections, part.coordinates, part.total_counts))
            stop = start + len(part.sections)
            rows = sample[(sample >= start) & (sample < stop)] - start
            yield (part.histology.map(lambda t: t[rows]),)  # noqa: B023
            start = stop

    (histology,) = gathered_rows(chosen(), len(sample))
    sections, coordinates, totals = zip(*light, strict=True)
    all_sections = np.concatenate(sections)
    known = [total for total in totals if total is not None]
    grouped = [of_part for of_part in individuals if of_part is not None]
    counted = [of_part for of_part in sums if of_part is not None]
    return Survey(
        moments,
        histology,
        torch.from_numpy(all_sections[sample]),
        torch.stack(counted).sum(0) if len(counted) == len(sums) else None,
        all_sections,
        np.concatenate(grouped) if len(grouped) == len(individuals) else None,
        np.concatenate(coordinates),
        np.concatenate(known) if len(known) == len(totals) else None,
    )
