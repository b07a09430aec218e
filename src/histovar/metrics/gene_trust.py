"""Expected accuracy of each gene on unseen sections: computed, kept in the model's registry, read as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import false_discovery_control

from .ceiling import noise_ceiling
from .trust import SectionAccuracy, expected_accuracy, p_values, section_accuracy

# What the accuracy was measured on: sections or individuals that the prediction has not seen, or unseen parts of the
# training sections.
Unseen = Literal["section", "individual", "same section"]
NEW = {
    "section": "an unseen section",
    "individual": "an unseen individual",
    "same section": "unseen parts of the sections trained on; not tested on another section",
}
# Sections of fewer than LEAST_SPOTS spots are left out; of the groups, the MOST_GROUPS with most spots are kept.
LEAST_SPOTS, MOST_GROUPS = 10, 50
GENES_AT_ONCE = 2048
# Genes with a q-value below this count as predicted: on average, at most a tenth of them are not.
FALSE_DISCOVERY_RATE = 0.1


class PanelCounts(NamedTuple):
    """Counts of the panel, (n_spots, n_genes), and total counts over all genes, (n_spots,)."""

    panel: NDArray[np.floating]
    totals: NDArray[np.floating]


def gene_trust(
    predicted: NDArray[np.floating],
    measured: NDArray[np.floating],
    counts: PanelCounts | None,
    coordinates: NDArray[np.floating],
    *,
    sections: NDArray[np.integer],
    groups: NDArray[np.str_],
    of: Unseen,
    cross_fitted: bool,
    random_state: int,
) -> dict[str, Any] | None:
    """Accuracy of every gene on unseen spots, in plain types for a model's registry.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    counts
        Counts of these spots, or None where unknown.
    coordinates
        (n_spots, 2).
    sections, groups
        (n_spots,) section of each spot, within which genes are correlated, and its group: Fisher's z is averaged over
        the sections of a group.
    of
        Kind of the groups.
    cross_fitted
        If each section was predicted by ensemble members trained on the other sections.
    random_state
        Seed of the noise ceiling's splits.

    Returns
    -------
    dict or None
        ``of``, ``groups``, ``n_spots`` of each group; ``pearson`` (n_groups, n_genes), ``variance`` of Fisher's z in a
        section, ``p_value`` and ``ceiling`` (n_genes,), None where undefined. None if all sections have fewer than 10
        spots.
    """
    names, n_spots = np.unique(groups, return_counts=True)
    kept = np.isin(groups, names[np.argsort(-n_spots, kind="stable")[:MOST_GROUPS]])
    section_rows = [np.flatnonzero((sections == number) & kept) for number in np.unique(sections)]
    section_rows = [rows for rows in section_rows if len(rows) >= LEAST_SPOTS]
    if not section_rows:
        return None
    section_groups = np.array([groups[rows[0]] for rows in section_rows])
    labels = np.unique(section_groups).tolist()
    blocks = []
    for start in range(0, predicted.shape[1], GENES_AT_ONCE):
        genes = slice(start, start + GENES_AT_ONCE)
        accuracy: list[SectionAccuracy] = []
        ceiling = []
        for rows in section_rows:
            x, y = predicted[rows, genes], measured[rows, genes]
            totals = None if counts is None else counts.totals[rows]
            accuracy.append(section_accuracy(x, y, coordinates[rows], totals))
            ceiling.append(
                np.full(x.shape[1], np.nan) if counts is None else _ceiling(counts, rows, genes, random_state)
            )
        z = pd.DataFrame([section.z for section in accuracy]).groupby(section_groups).mean().to_numpy()
        variance = np.mean([section.variance for section in accuracy], axis=0)
        blocks.append(
            np.vstack(
                [
                    np.tanh(z),
                    variance,
                    p_values(accuracy, cross_fitted=cross_fitted),
                    pd.DataFrame(ceiling).mean().to_numpy(),
                ]
            )
        )
    table = np.hstack(blocks)
    variance, p_value, ceiling_of_genes = table[len(labels) :]
    return {
        "of": of,
        "groups": labels,
        "n_spots": [
            int(sum(len(rows) for rows, group in zip(section_rows, section_groups, strict=True) if group == label))
            for label in labels
        ],
        "pearson": [_plain(row, "{:.4f}") for row in table[: len(labels)]],
        "variance": _plain(variance, "{:.3g}"),
        "p_value": _plain(p_value, "{:.3g}"),
        "ceiling": _plain(ceiling_of_genes, "{:.4f}"),
    }


def _ceiling(counts: PanelCounts, rows: NDArray[np.int64], genes: slice, random_state: int) -> NDArray[np.float64]:
    """Noise ceiling of some genes; the other genes only enter the total counts."""
    panel = np.rint(counts.panel[rows, genes])
    others = np.rint(counts.totals[rows] - panel.sum(1)).clip(min=0)
    matrix = sparse.csr_matrix(np.column_stack([panel, others]))
    return noise_ceiling(matrix, list(range(panel.shape[1])), random_state=random_state)


def _plain(values: NDArray[np.float64], digits: str) -> list[float | None]:
    """Round numbers, with None for NaN, as JSON takes them."""
    return [float(digits.format(value)) if np.isfinite(value) else None for value in values.tolist()]


def gene_table(registry: Mapping[str, Any]) -> pd.DataFrame:
    """Make the table of :func:`histovar.get.genes` from a model's registry.

    Raises
    ------
    ValueError
        If the registry holds no accuracy of genes.
    """
    trust = registry.get("trust")
    if trust is None:
        raise ValueError(
            "model: it holds no expected accuracy of its genes, because it was not calibrated or by an earlier "
            "version; call histovar.tl.calibrate(adata, model) on its training sections, or on held-out ones"
        )
    variance, p_value, ceiling = (np.array(trust[k], dtype=np.float64) for k in ("variance", "p_value", "ceiling"))
    expected = expected_accuracy(np.array(trust["pearson"], dtype=np.float64), variance)
    q_value = np.full(len(p_value), np.nan)
    defined = ~np.isnan(p_value)
    q_value[defined] = false_discovery_control(p_value[defined])
    table = pd.DataFrame(
        {
            "expected_pearson": expected.mean,
            "lower": expected.lower,
            "upper": expected.upper,
            "ceiling": ceiling,
            "share_of_ceiling": expected.mean / np.where(ceiling > 0, ceiling, np.nan),
            "p_value": p_value,
            "q_value": q_value,
        },
        index=pd.Index(list(registry["genes"]), name="gene"),
    )
    table.attrs = {"expected on": NEW[trust["of"]], "groups": list(trust["groups"]), "n_spots": list(trust["n_spots"])}
    return table


def in_words(table: pd.DataFrame) -> str:
    """Summarise in one line how many genes are predicted and how well."""
    n_groups, n_predicted = len(table.attrs["groups"]), int((table["q_value"] < FALSE_DISCOVERY_RATE).sum())
    return (
        f"{n_predicted} of {len(table)} genes predicted at q < {FALSE_DISCOVERY_RATE:g}, median expected Pearson "
        f"{table['expected_pearson'].median():.2f} on {table.attrs['expected on']} ({n_groups} compared)"
    )
