"""Read measured expression: layers, counts, total counts and log-normalised values."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from histovar._keys import DEFAULT_KEY, LOGNORM, LOGNORM_UNITS, TARGET_SUM, Keys
from histovar._spots import SAMPLED_SPOTS
from histovar._torch_state import keep_threads
from histovar._warn_once import warn_once

from . import fingerprint, gate, slots
from .matrix import canonical, dense_float32, on_disk, row_blocks, rows_of_blocks, stored_values, take_rows
from .normalization import LARGEST_LOG, Normalization, SpotTotals

logger = logging.getLogger(__name__)


class Expression(NamedTuple):
    """Expression of the panel, (n_spots, n_genes), and the spots' totals by section, which tell its normalisation."""

    values: NDArray[np.float32]
    totals: dict[str, SpotTotals]


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers, without the None under which anndata 0.13 lists X."""
    return sorted(name for name in adata.layers if name is not None)


def stored_layer(adata: AnnData, layer: str) -> Any:
    """Get the matrix of a layer; ``"X"`` is X.

    Raises
    ------
    KeyError
        If there is no such layer.
    ValueError
        If X is empty.
    """
    if layer == "X":
        if adata.X is None:
            raise ValueError("layer: X is empty; name a layer with expression")
        return adata.X
    if layer not in adata.layers:
        raise KeyError(f"layer: no {layer!r} in layers, which has {layer_names(adata)}; 'X' is adata.X")
    return adata.layers[layer]


def is_stored(adata: AnnData, layer: str = LOGNORM, obsm: Sequence[str] = ()) -> bool:
    """True if X, the layer, or an array of ``obsm`` under these keys is on disk."""
    matrices = (adata.X, adata.layers.get(layer), *(adata.obsm.get(key) for key in obsm))
    return bool(adata.isbacked) or any(on_disk(matrix) for matrix in matrices)


def count_blocks(adata: AnnData) -> Iterator[Any]:
    """Yield blocks of rows of X, which must hold counts.

    Raises
    ------
    ValueError
        If X does not hold counts; the message names a layer that does, if there is one.
    """
    count_layers = _layers_of_counts(adata)
    mend = (
        f"layers[{count_layers[0]!r}] holds counts: adata.X = adata.layers[{count_layers[0]!r}]"
        if count_layers
        else "put raw counts there; if it is normalised and log1p was taken, use adata.layers['lognorm'] = adata.X"
    )
    if adata.X is None:
        advice = ": " + mend if count_layers else ", or pass layer= with log-normalised values"
        raise ValueError(
            f"adata: X is empty; counts are needed to log-normalise{advice} (histovar predict does not copy counts "
            "from one .zarr store to another: predict from an .h5ad file, or copy X of the input)"
        )
    for block in row_blocks(adata.X, adata.n_obs):
        gate.check_counts(stored_values(block), "X", mend)
        yield block


def _layers_of_counts(adata: AnnData) -> list[str]:
    """List the layers whose first rows hold counts; those with "count" in their name first."""
    names = []
    for name in layer_names(adata):
        values = stored_values(next(row_blocks(adata.layers[name], min(adata.n_obs, 64)), np.zeros((0, 0))))
        if values.size and values.dtype.kind in "fiu" and (values >= 0).all() and (values == np.round(values)).all():
            names.append(name)
    return sorted(names, key=lambda name: "count" not in name.lower())


class Counts(NamedTuple):
    """Counts of the panel, (n_spots, n_genes), and total counts over all genes, (n_spots,)."""

    panel: NDArray[np.float32]
    totals: NDArray[np.float64]


def panel_counts(
    adata: AnnData, columns: NDArray[np.integer], rows: NDArray[np.integer] | None = None
) -> Counts | None:
    """Read counts of genes and each spot's total count; None if X holds no counts.

    Parameters
    ----------
    adata
        The object.
    columns
        The genes.
    rows
        The spots, increasing; all by default.
    """
    if adata.X is None:
        return None
    panels, totals = [], []
    try:
        for _, block_rows in rows_of_blocks(count_blocks(adata), _chosen(adata, rows)):
            panels.append(dense_float32(block_rows[:, columns]))
            totals.append(np.asarray(block_rows.sum(1), dtype=np.float64).ravel())
    except ValueError:
        return None
    return Counts(np.concatenate(panels), np.concatenate(totals))


def _chosen(adata: AnnData, rows: NDArray[np.integer] | None) -> NDArray[np.integer]:
    """Chosen rows; all by default."""
    return np.arange(adata.n_obs) if rows is None else np.asarray(rows)


def from_counts(adata: AnnData, units: str, columns: NDArray[np.integer]) -> NDArray[np.float32]:
    """Read genes from the counts in X as ``"counts"``, ``"log_counts"`` or ``"rates"`` (counts per 10,000).

    Raises
    ------
    ValueError
        If X holds no counts.
    """
    counts = panel_counts(adata, columns)
    if counts is None:
        raise ValueError(f"adata: X must hold counts, so that predicted {units} can be compared with measured ones")
    if units == "log_counts":
        return np.log1p(counts.panel)
    if units == "rates":
        totals = _over_all_genes(adata, columns, counts, TARGET_SUM)
        return (counts.panel * (TARGET_SUM / totals.clip(min=1))[:, None]).astype(np.float32)
    return counts.panel


def spot_totals(
    adata: AnnData, columns: NDArray[np.integer], target_sum: float = TARGET_SUM
) -> NDArray[np.float64] | None:
    """Total count of every spot over all measured genes, (n_obs,); None if X holds no counts.

    The totals are recovered from ``layers["lognorm"]`` if it was computed from the counts in X, since genes may have
    been dropped afterwards; otherwise they are the row sums of X.

    Parameters
    ----------
    adata
        The object.
    columns
        Genes by which counts and ``layers["lognorm"]`` are compared.
    target_sum
        Total count to which every spot was normalised.
    """
    counts = panel_counts(adata, columns)
    return None if counts is None else _over_all_genes(adata, columns, counts, target_sum)


def _over_all_genes(
    adata: AnnData, columns: NDArray[np.integer], counts: Counts, target_sum: float
) -> NDArray[np.float64]:
    """Rescale total counts of the panel to all measured genes, see :func:`spot_totals`."""
    if LOGNORM not in adata.layers:
        return counts.totals
    values = dense_float32(take_rows(adata.layers[LOGNORM], np.arange(adata.n_obs))[:, columns])
    recovered = _normalized_to(counts, values, target_sum)
    return counts.totals if recovered is None else recovered.totals


def counts_of_values(
    adata: AnnData,
    columns: NDArray[np.integer],
    values: NDArray[np.float32],
    target_sum: float,
    rows: NDArray[np.integer] | None = None,
) -> Counts | None:
    """Read the counts in X from which log-normalised values were computed; None if X holds no or other counts.

    The total counts are those by which the values were normalised, so genes may have been dropped since. If the sum to
    which spots were normalised is unknown, it is taken to be 10,000.

    Parameters
    ----------
    adata, columns, rows
        As in :func:`panel_counts`.
    values
        (n_spots, n_genes) of the same spots.
    target_sum
        Total count to which every spot was normalised; 0 where unknown.
    """
    counts = panel_counts(adata, columns, rows)
    return None if counts is None else _normalized_to(counts, values, target_sum or TARGET_SUM)


def require_counts(counts: Counts | None) -> Counts:
    """Return the counts that :func:`counts_of_values` read, for a model that needs them.

    Raises
    ------
    ValueError
        If there are none.
    """
    if counts is None:
        raise ValueError(
            "adata: X must hold the counts from which the log-normalised values were computed, as in training: the "
            "model learnt from counts"
        )
    return counts


def _normalized_to(counts: Counts, values: NDArray[np.float32], target_sum: float) -> Counts | None:
    """Counts with the totals by which they were log-normalised to `values`; None if these are not of the counts."""
    normalized = np.expm1(values.astype(np.float64)).sum(1)
    measured = counts.panel.sum(1, dtype=np.float64)
    totals = np.where(normalized > 0, target_sum * measured / np.where(normalized > 0, normalized, 1), counts.totals)
    expected = np.log1p(counts.panel * (target_sum / totals.clip(min=1))[:, None])
    # A relative tolerance, since the values may be stored in half precision.
    return counts._replace(totals=totals) if np.allclose(expected, values, rtol=0.01, atol=0.01) else None


def lognorm_blocks(adata: AnnData) -> Iterator[Any]:
    """Yield blocks of rows of ``layers["lognorm"]``, or else log1p(counts per 10,000) of X; nothing is written.

    Raises
    ------
    ValueError
        If the layer is absent and X is missing or does not hold counts, or as :func:`has_lognorm`.
    """
    if has_lognorm(adata):
        if not _follows_counts(adata):
            warn_once(logger, f"layers[{LOGNORM!r}] is not log1p of scaled counts in X: it is used as it is")
        yield from row_blocks(adata.layers[LOGNORM], adata.n_obs)
        return
    import scanpy as sc

    for block in count_blocks(adata):
        normalized = AnnData(sparse.csr_matrix(block, dtype=np.float32))
        with keep_threads():
            sc.pp.normalize_total(normalized, target_sum=TARGET_SUM)
            sc.pp.log1p(normalized)
        yield normalized.X


def lognorm(adata: AnnData) -> sparse.csr_matrix:
    """Read the log-normalised values of :func:`lognorm_blocks` as one sparse matrix."""
    return sparse.vstack([sparse.csr_matrix(block) for block in lognorm_blocks(adata)], format="csr")


def add_lognorm(adata: AnnData, values: sparse.csr_matrix | None = None) -> None:
    """Add ``layers["lognorm"]`` from the counts in X, with its fingerprint and a log line; not to an object on disk.

    Parameters
    ----------
    adata
        The object; left as it is if it has the layer already, computed from the counts in X.
    values
        The result of :func:`lognorm`, if already computed.
    """
    if is_stored(adata) or has_lognorm(adata):
        return
    why = "was computed from other counts: computed again as" if LOGNORM in adata.layers else "added:"
    values = lognorm(adata) if values is None else values
    entry = {"lognorm": {"shape": np.array(values.shape), "fingerprint": fingerprint.of_matrix(values)}}
    slots.write(adata, Keys(DEFAULT_KEY), {("layers", LOGNORM): values}, entry)
    logger.info("layers[%r] %s %s of X", LOGNORM, why, LOGNORM_UNITS)


def has_lognorm(adata: AnnData) -> bool:
    """True if there is a ``layers["lognorm"]`` to be used as it is.

    A layer that histovar computed from counts that X no longer holds is not used: it is computed again. The user's own
    layer always is, with a warning (in :func:`lognorm_blocks`) if it is not log1p of scaled counts in X.

    Raises
    ------
    ValueError
        If histovar computed it from other counts than X has, and it cannot be told whether the user has replaced it
        since: because spots or genes were dropped, or it is on disk.
    """
    if LOGNORM not in adata.layers:
        return False
    if _follows_counts(adata):
        return True
    record = slots.record(adata, Keys(DEFAULT_KEY)).get("lognorm")
    if record is not None and (is_stored(adata) or tuple(record["shape"]) != adata.shape):
        raise ValueError(
            f"adata: layers[{LOGNORM!r}] was computed from other counts than X has now; delete it to have it computed "
            f"again (del adata.layers[{LOGNORM!r}]), or keep it under another name and pass that as layer="
        )
    if record is not None and record["fingerprint"] == fingerprint.of_matrix(adata.layers[LOGNORM]):
        return False
    return True


def _follows_counts(adata: AnnData) -> bool:
    """True if ``layers["lognorm"]`` is log1p of X times a factor for each spot, or X holds no counts to compare with.

    Checked on 10,000 evenly spaced spots, or on the first few thousand of an object on disk.
    """
    if adata.X is None:
        return True
    n_spots = adata.n_obs
    if is_stored(adata):
        counts, values = (next(row_blocks(m, n_spots)) for m in (adata.X, adata.layers[LOGNORM]))
    else:
        rows = np.unique(np.linspace(0, n_spots - 1, min(n_spots, SAMPLED_SPOTS)).astype(np.int64))
        counts, values = (canonical(take_rows(m, rows)) for m in (adata.X, adata.layers[LOGNORM]))
    stored = stored_values(counts)
    if stored.dtype.kind not in "fiub" or (stored < 0).any() or not np.array_equal(stored, np.round(stored)):
        return True
    return _are_scaled(counts, values)


def _are_scaled(counts: Any, values: Any) -> bool:
    """True if each row of expm1(values) is a multiple of the same row of counts, up to rounding."""
    counts, values = sparse.csr_matrix(counts, dtype=np.float64), sparse.csr_matrix(values, dtype=np.float64)
    if counts.shape != values.shape or (values.nnz and not values.data.max() <= LARGEST_LOG):
        return False
    linear = values.expm1()
    total, sums = (np.asarray(m.sum(1)).ravel() for m in (counts, linear))
    factor = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    error = abs(linear - sparse.diags(factor) @ counts)
    # Relative to the largest value of the row, since the values may be stored in half precision.
    return bool((error.max(1).toarray().ravel() <= 0.01 * linear.max(1).toarray().ravel() + 1e-6).all())


def check_layer(adata: AnnData, layer: str | None) -> None:
    """Refuse a layer with NaN, infinite or negative values; None (the default layer) is not checked.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If it has such values.
    """
    if layer is not None:
        for block in row_blocks(stored_layer(adata, layer), adata.n_obs):
            gate.check_nonnegative(stored_values(block), f"layer: {layer!r}")


def units(layer: str, normalization: Normalization) -> str:
    """Describe a layer's units in words."""
    return f"those of {layer!r}" if normalization.kind == "values" else normalization.units


def expression(
    adata: AnnData,
    layer: str,
    columns: NDArray[np.integer],
    rows: NDArray[np.integer] | None = None,
    sections: NDArray[np.str_] | None = None,
) -> Expression:
    """Read expression of genes as a dense array, with totals of the spots by section.

    Parameters
    ----------
    adata
        The object, which is not changed.
    layer
        Its layer; an absent ``layers["lognorm"]`` is computed from the counts in X.
    columns
        The genes.
    rows
        The spots, increasing; all by default.
    sections
        (n_obs,) section of each spot of the object; None for a single section.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If it holds NaN, infinite or negative values.
    """
    blocks = lognorm_blocks(adata) if layer == LOGNORM else row_blocks(stored_layer(adata, layer), adata.n_obs)
    panels: list[NDArray[np.float32]] = []
    totals: dict[str, list[SpotTotals]] = {}
    labels = np.full(adata.n_obs, "all") if sections is None else sections
    for spots, block_rows in rows_of_blocks(blocks, _chosen(adata, rows)):
        panels.append(dense_float32(block_rows[:, columns]))
        for label in np.unique(labels[spots]).tolist():
            in_section = np.flatnonzero(labels[spots] == label)
            totals.setdefault(label, []).append(SpotTotals.of(block_rows[in_section], panels[-1][in_section]))
    values = np.concatenate(panels)
    gate.check_nonnegative(values, f"layer: {layer!r}")
    return Expression(values, {label: SpotTotals.concat(block_totals) for label, block_totals in totals.items()})


def read_expression(
    adata: AnnData,
    layer: str,
    columns: NDArray[np.integer],
    rows: NDArray[np.integer] | None = None,
    *,
    sections: NDArray[np.str_] | None,
    trained: Normalization | None,
) -> NDArray[np.float32]:
    """Read expression in the units of training; refuse expression that is normalised in another way.

    Parameters
    ----------
    adata, layer, columns, rows, sections
        As in :func:`expression`; each section is checked separately.
    trained
        Normalisation of the expression of training.

    Raises
    ------
    KeyError, ValueError
        As :func:`expression` and :meth:`Normalization.check`.
    """
    values, totals = expression(adata, layer, columns, rows, sections)
    for section, section_totals in totals.items():
        where = f"layers[{layer!r}]" + (f" of section {section!r}" if len(totals) > 1 else "")
        section_totals.normalization(layer, adata.n_vars, len(columns)).check(trained, where)
    return values
