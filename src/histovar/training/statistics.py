"""Statistics of the training spots, collected in one pass before stage 2 is trained."""

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

from .data import concat_rows


class MeasuredSpots(NamedTuple):
    """Training spots with histology and measured expression, of all sections or of some of them.

    Parameters
    ----------
    histology
        Histology inputs, not yet aligned.
    expression
        (n_spots, n_genes) in layer units.
    sections
        (n_spots,) number of each spot's section.
    coordinates
        (n_spots, 2) coordinates, for folds within sections.
    groups
        (n_spots,) number of each spot's individual, if known.
    counts
        (n_spots, n_genes) counts, if `expression` is log-normalised counts.
    total_counts
        (n_spots,) total count of every spot, if known.
    """

    histology: Histology
    expression: Tensor
    sections: NDArray[np.int64]
    coordinates: NDArray[np.floating]
    groups: NDArray[np.int64] | None
    counts: Tensor | None
    total_counts: NDArray[np.floating] | None


class TrainingStatistics(NamedTuple):
    """Statistics of the training spots, and a random sample of their histology; see :func:`collect_statistics`.

    Parameters
    ----------
    moments
        Mean and variance of the embeddings of each section, by its number.
    histology, sections
        Inputs and sections of a random sample of the spots, in their order.
    counts
        (n_genes,) sums over all spots, if there are counts.
    all_sections, groups, coordinates, total_counts
        Values of all spots, as in :class:`MeasuredSpots`.
    """

    moments: dict[int, Moments]
    histology: Histology
    sections: Tensor
    counts: Tensor | None
    all_sections: NDArray[np.int64]
    groups: NDArray[np.int64] | None
    coordinates: NDArray[np.floating]
    total_counts: NDArray[np.floating] | None


def collect_statistics(parts: Iterable[MeasuredSpots], n_spots: int, random_state: int) -> TrainingStatistics:
    """Collect statistics of the training spots in one pass.

    Parameters
    ----------
    parts
        Training spots, in parts of whole sections.
    n_spots
        Number of spots in all parts.
    random_state
        Seed of the sample.
    """
    sample = sampled_spots(n_spots, random_state)
    moments: dict[int, Moments] = {}
    spot_columns: list[tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.floating] | None]] = []
    individuals: list[NDArray[np.int64] | None] = []
    sums: list[Tensor | None] = []

    def sampled_histology() -> Iterator[tuple[Histology]]:
        start = 0
        for part in parts:
            moments.update(Moments.by_section(part.histology, torch.from_numpy(part.sections)))
            individuals.append(part.groups)
            sums.append(None if part.counts is None else part.counts.double().sum(0))
            spot_columns.append((part.sections, part.coordinates, part.total_counts))
            stop = start + len(part.sections)
            rows = sample[(sample >= start) & (sample < stop)] - start
            yield (part.histology.map(lambda t: t[rows]),)  # noqa: B023
            start = stop

    (histology,) = concat_rows(sampled_histology(), len(sample))
    sections, coordinates, totals = zip(*spot_columns, strict=True)
    all_sections = np.concatenate(sections)
    known_totals = [total for total in totals if total is not None]
    known_individuals = [numbers for numbers in individuals if numbers is not None]
    known_sums = [gene_sums for gene_sums in sums if gene_sums is not None]
    return TrainingStatistics(
        moments,
        histology,
        torch.from_numpy(all_sections[sample]),
        torch.stack(known_sums).sum(0) if len(known_sums) == len(sums) else None,
        all_sections,
        np.concatenate(known_individuals) if len(known_individuals) == len(individuals) else None,
        np.concatenate(coordinates),
        np.concatenate(known_totals) if len(known_totals) == len(totals) else None,
    )
