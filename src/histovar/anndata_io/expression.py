"""Measured expression: layers, counts and log-normalisation."""

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
    """Expression of the panel, (n_spots, n_genes), and totals of the spots of each section: how it is normalised."""

    values: NDArray[np.float32]
    totals: dict[str, SpotTotals]


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; anndata 0.13 counts X among them, under None."""
    return sorted(name for name in adata.layers if name is not None)


def stored_layer(adata: AnnData, layer: str) -> Any:
    """The matrix of a layer; ``"X"`` is X.

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
    """Whether X, the layer, or what ``obsm`` has under these keys is on disk."""
    matrices = (adata.X, adata.layers.get(layer), *(adata.obsm.get(key) for key in obsm))
    return bool(adata.isbacked) or any(on_disk(matrix) for matrix in matrices)


def count_blocks(adata: AnnData) -> Iterator[Any]:
    """Blocks of rows of X, which must hold counts.

    Raises
    ------
    ValueError
        If it does not; the message says where there are counts, if a layer has them.
    """
    elsewhere = _layers_of_counts(adata)
    mend = (
        f"layers[{elsewhere[0]!r}] holds counts: adata.X = adata.layers[{elsewhere[0]!r}]"
        if elsewhere
        else "put raw counts there; if it is log-normalised already, say adata.layers['lognorm'] = adata.X"
    )
    if adata.X is None:
        more = "" if elsewhere else ", or pass layer= with log-normalised values"
        raise ValueError(f"adata: X is empty; counts are needed to log-normalise{': ' + mend if elsewhere else more}")
    for block in row_blocks(adata.X, adata.n_obs):
        gate.check_counts(stored_values(block), "X", mend)
        yield block


def _layers_of_counts(adata: AnnData) -> list[str]:
    """Layers whose first rows hold counts, those named so first."""
    found = []
    for name in layer_names(adata):
        values = stored_values(next(row_blocks(adata.layers[name], min(adata.n_obs, 64)), np.zeros((0, 0))))
        if values.size and values.dtype.kind in "fiu" and (values >= 0).all() and (values == np.round(values)).all():
            found.append(name)
    return sorted(found, key=lambda name: "count" not in name.lower())


class Counts(NamedTuple):
    """Counts of the panel, (n_spots, n_genes), and total counts over all genes, (n_spots,)."""

    panel: NDArray[np.float32]
    totals: NDArray[np.float64]


def panel_counts(
    adata: AnnData, columns: NDArray[np.integer], rows: NDArray[np.integer] | None = None
) -> Counts | None:
    """Counts of some genes, and the total of each spot; None where X holds no counts.

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
    parts, totals = [], []
    try:
        for _, some in rows_of_blocks(count_blocks(adata), _chosen(adata, rows)):
            parts.append(dense_float32(some[:, columns]))
            totals.append(np.asarray(some.sum(1), dtype=np.float64).ravel())
    except ValueError:
        return None
    return Counts(np.concatenate(parts), np.concatenate(totals))


def _chosen(adata: AnnData, rows: NDArray[np.integer] | None) -> NDArray[np.integer]:
    """Rows that were chosen, or else all."""
    return np.arange(adata.n_obs) if rows is None else np.asarray(rows)


def from_counts(adata: AnnData, units: str, columns: NDArray[np.integer]) -> NDArray[np.float32]:
    """Counts of some genes in X: themselves, their ``"log_counts"`` or ``"rates"`` (counts per 10,000).

    Raises
    ------
    ValueError
        If X holds no counts.
    """
    counts = panel_counts(adata, columns)
    if counts is None:
        raise ValueError(f"adata: X must hold counts, for {units} to be compared with what was measured")
    if units == "log_counts":
        return np.log1p(counts.panel)
    if units == "rates":
        totals = _over_all_genes(adata, columns, counts, TARGET_SUM)
        return (counts.panel * (TARGET_SUM / totals.clip(min=1))[:, None]).astype(np.float32)
    return counts.panel


def spot_totals(
    adata: AnnData, columns: NDArray[np.integer], target_sum: float = TARGET_SUM
) -> NDArray[np.float64] | None:
    """Total count of every spot over all genes that were measured; None where X holds no counts.

    By ``layers["lognorm"]``, where that is of the counts in X, since genes may have been dropped after it was made;
    else the sums of X.

    Parameters
    ----------
    adata
        The object.
    columns
        Genes by which to tell.
    target_sum
        Counts that every spot was normalised to.
    """
    counts = panel_counts(adata, columns)
    return None if counts is None else _over_all_genes(adata, columns, counts, target_sum)


def _over_all_genes(
    adata: AnnData, columns: NDArray[np.integer], counts: Counts, target_sum: float
) -> NDArray[np.float64]:
    """See :func:`spot_totals`."""
    if LOGNORM not in adata.layers:
        return counts.totals
    values = dense_float32(take_rows(adata.layers[LOGNORM], np.arange(adata.n_obs))[:, columns])
    found = _normalized_to(counts, values, target_sum)
    return counts.totals if found is None else found.totals


def counts_of_values(
    adata: AnnData,
    columns: NDArray[np.integer],
    values: NDArray[np.float32],
    target_sum: float,
    rows: NDArray[np.integer] | None = None,
) -> Counts | None:
    """The counts of X, if log-normalised values are those of these very counts; else None.

    Total counts are those by which the values were normalised, so that genes may have been dropped since. The values
    then do not tell to what sum, which is taken to be 10,000.

    Parameters
    ----------
    adata, columns, rows
        As in :func:`panel_counts`.
    values
        (n_spots, n_genes) of the same spots.
    target_sum
        Counts that every spot was normalised to; 0 where that is not known.
    """
    counts = panel_counts(adata, columns, rows)
    return None if counts is None else _normalized_to(counts, values, target_sum or TARGET_SUM)


def required(counts: Counts | None) -> Counts:
    """What :func:`counts_of_values` found, for a model that learnt from counts.

    Raises
    ------
    ValueError
        If it found none.
    """
    if counts is None:
        raise ValueError(
            "adata: X must hold the counts of which the log-normalised values are, as in training: the model learnt "
            "from them"
        )
    return counts


def _normalized_to(counts: Counts, values: NDArray[np.float32], target_sum: float) -> Counts | None:
    """Counts with the totals by which log-normalised values were made of them; None if they were not."""
    normalized = np.expm1(values.astype(np.float64)).sum(1)
    measured = counts.panel.sum(1, dtype=np.float64)
    totals = np.where(normalized > 0, target_sum * measured / np.where(normalized > 0, normalized, 1), counts.totals)
    expected = np.log1p(counts.panel * (target_sum / totals.clip(min=1))[:, None])
    # Relative, as half precision would have it.
    return counts._replace(totals=totals) if np.allclose(expected, values, rtol=0.01, atol=0.01) else None


def lognorm_blocks(adata: AnnData) -> Iterator[Any]:
    """Blocks of rows of ``layers["lognorm"]``, or of log1p(counts per 10,000) of the counts in X; writes nothing.

    Raises
    ------
    ValueError
        If it is needed and X is missing or does not hold counts, or as :func:`has_lognorm`.
    """
    if has_lognorm(adata):
        if not _follows_counts(adata):
            what = f"layers[{LOGNORM!r}] is not the logarithm of scaled counts of X: it is taken as it is"
            warn_once(logger, what)
        yield from row_blocks(adata.layers[LOGNORM], adata.n_obs)
        return
    import scanpy as sc

    for block in count_blocks(adata):
        light = AnnData(sparse.csr_matrix(block, dtype=np.float32))
        with keep_threads():
            sc.pp.normalize_total(light, target_sum=TARGET_SUM)
            sc.pp.log1p(light)
        yield light.X


def lognorm(adata: AnnData) -> sparse.csr_matrix:
    """All of :func:`lognorm_blocks`, sparse."""
    return sparse.vstack([sparse.csr_matrix(block) for block in lognorm_blocks(adata)], format="csr")


def add_lognorm(adata: AnnData, values: sparse.csr_matrix | None = None) -> None:
    """Add ``layers["lognorm"]``, with its fingerprint, from the counts in X, and say so; not to an object on disk.

    Parameters
    ----------
    adata
        The object; nothing is done where it has the layer, made from the counts that are in X.
    values
        What :func:`lognorm` gave, where that has been made already.
    """
    if is_stored(adata) or has_lognorm(adata):
        return
    why = "was made from other counts: made again as" if LOGNORM in adata.layers else "added:"
    values = lognorm(adata) if values is None else values
    entry = {"lognorm": {"shape": np.array(values.shape), "fingerprint": fingerprint.of_matrix(values)}}
    slots.write(adata, Keys(DEFAULT_KEY), {("layers", LOGNORM): values}, entry)
    logger.info("layers[%r] %s %s of X", LOGNORM, why, LOGNORM_UNITS)


def has_lognorm(adata: AnnData) -> bool:
    """Whether there is a ``layers["lognorm"]`` to be taken as it is.

    One that histovar made, from counts that are no longer in X, is not: it is made again. The user's own always is,
    with a warning (of :func:`lognorm_blocks`) where it is not the logarithm of scaled counts of X.

    Raises
    ------
    ValueError
        If histovar made it, but not from the counts that are in X, and spots or genes were dropped since or it is on
        disk, so that it cannot be told whether it is the user's own by now.
    """
    if LOGNORM not in adata.layers:
        return False
    if _follows_counts(adata):
        return True
    made = slots.record(adata, Keys(DEFAULT_KEY)).get("lognorm")
    if made is not None and (is_stored(adata) or tuple(made["shape"]) != adata.shape):
        raise ValueError(
            f"adata: layers[{LOGNORM!r}] was made from other counts than X has now; delete it to have it made again "
            f"(del adata.layers[{LOGNORM!r}]), or keep it under another name and pass that as layer="
        )
    if made is not None and made["fingerprint"] == fingerprint.of_matrix(adata.layers[LOGNORM]):
        return False
    return True


def _follows_counts(adata: AnnData) -> bool:
    """Whether log-normalised values are log1p of X times a factor a spot; true where X has no counts to tell by.

    Looked at are 10,000 spots, evenly spaced, or the first few thousand of an object on disk.
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
    """Whether each row of expm1(values) is a multiple of the same row of counts, up to rounding."""
    counts, values = sparse.csr_matrix(counts, dtype=np.float64), sparse.csr_matrix(values, dtype=np.float64)
    if counts.shape != values.shape or (values.nnz and not values.data.max() <= LARGEST_LOG):
        return False
    linear = values.expm1()
    total, sums = (np.asarray(m.sum(1)).ravel() for m in (counts, linear))
    factor = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
    off = abs(linear - sparse.diags(factor) @ counts)
    # Relative to the largest value of the row, as half precision would have it.
    return bool((off.max(1).toarray().ravel() <= 0.01 * linear.max(1).toarray().ravel() + 1e-6).all())


def check_layer(adata: AnnData, layer: str | None) -> None:
    """Refuse a layer with NaN, infinite or negative values; None (the default layer) is not looked at.

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
    """A layer's units in words."""
    return f"those of {layer!r}" if normalization.kind == "values" else normalization.units


def expression(
    adata: AnnData,
    layer: str,
    columns: NDArray[np.integer],
    rows: NDArray[np.integer] | None = None,
    sections: NDArray[np.str_] | None = None,
) -> Expression:
    """Expression of some genes, dense, and totals of the spots.

    Parameters
    ----------
    adata
        The object, untouched.
    layer
        Its layer; ``layers["lognorm"]`` is made from the counts in X where it is absent.
    columns
        The genes.
    rows
        The spots, increasing; all by default.
    sections
        (n_obs,) section of each spot of the object; None takes all for one.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If it holds NaN, infinite or negative values.
    """
    blocks = lognorm_blocks(adata) if layer == LOGNORM else row_blocks(stored_layer(adata, layer), adata.n_obs)
    parts: list[NDArray[np.float32]] = []
    totals: dict[str, list[SpotTotals]] = {}
    labels = np.full(adata.n_obs, "all") if sections is None else sections
    for here, some in rows_of_blocks(blocks, _chosen(adata, rows)):
        parts.append(dense_float32(some[:, columns]))
        for label in np.unique(labels[here]).tolist():
            own = np.flatnonzero(labels[here] == label)
            totals.setdefault(label, []).append(SpotTotals.of(some[own], parts[-1][own]))
    values = np.concatenate(parts)
    gate.check_nonnegative(values, f"layer: {layer!r}")
    return Expression(values, {label: SpotTotals.concat(of_blocks) for label, of_blocks in totals.items()})


def read_expression(
    adata: AnnData,
    layer: str,
    columns: NDArray[np.integer],
    rows: NDArray[np.integer] | None = None,
    *,
    sections: NDArray[np.str_] | None,
    trained: Normalization | None,
) -> NDArray[np.float32]:
    """Expression in the units of training: :func:`expression`, refused where it is normalised otherwise.

    Parameters
    ----------
    adata, layer, columns, rows, sections
        As in :func:`expression`; each section is checked by itself.
    trained
        How that of training was normalised.

    Raises
    ------
    KeyError, ValueError
        As :func:`expression` and :meth:`Normalization.check`.
    """
    values, totals = expression(adata, layer, columns, rows, sections)
    for section, of_section in totals.items():
        where = f"layers[{layer!r}]" + (f" of section {section!r}" if len(totals) > 1 else "")
        of_section.normalization(layer, adata.n_vars, len(columns)).check(trained, where)
    return values
