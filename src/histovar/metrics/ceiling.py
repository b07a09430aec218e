"""Noise ceiling: the highest correlation that any prediction can reach against noisy counts."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from histovar._arguments import Converted, Count, ListOf, Number, Seed, check_arguments, refuse_type, refuse_value
from histovar._keys import TARGET_SUM

from .accuracy import is_constant, pearson

# More splits would not visibly change the ceiling.
MOST_SPLITS = 10_000


def _counts(value: Any) -> sparse.csr_matrix:
    expected = "counts of shape (spots, genes), integers that are not negative"
    if not sparse.issparse(value):
        try:
            value = np.asarray(value)
        except (TypeError, ValueError):
            refuse_type(expected)
    if value.ndim != 2 or value.dtype.kind not in "fiub":
        refuse_type(expected)
    matrix = sparse.csr_matrix(value)
    whole = np.isfinite(matrix.data) & (matrix.data >= 0) & (matrix.data == np.round(matrix.data))
    return matrix.astype(np.int64) if whole.all() else refuse_value(expected)


@check_arguments
def noise_ceiling(
    counts: Annotated[Any, Converted(_counts)],
    genes: ListOf[Number] | None = None,
    *,
    n_splits: Annotated[Count, Field(le=MOST_SPLITS)] = 10,
    log_counts: bool = False,
    random_state: Seed = 0,
) -> NDArray[np.float64]:
    r"""Noise ceiling of every gene: the Pearson correlation that no prediction can exceed, since counts are noisy.

    Every count is split into two binomial halves, which are two measurements of the same spot, independent given its
    true expression (exactly so for Poisson counts). Both halves are normalised like the expression and correlated,
    which gives the reliability :math:`r` of a measurement of half the depth. The Spearman-Brown formula turns it into
    the reliability of the full depth, whose square root bounds the correlation of the measurement with any prediction:

    .. math:: \mathrm{ceiling} = \sqrt{\frac{2 r}{1 + r}}

    It is an estimate: both halves share the spot's depth, and the formula assumes the same reliability for all spots,
    although spots of low depth are noisier.

    Parameters
    ----------
    counts
        (n_spots, n_measured) raw counts of one section, dense or sparse, all genes.
    genes
        Columns of the genes to score; all by default.
    n_splits
        Number of splits over which :math:`r` is averaged.
    log_counts
        Use log1p of counts instead of log1p of counts per 10,000.
    random_state
        Seed.

    Returns
    -------
    ndarray
        (n_genes,); 0 where the halves do not correlate, NaN where the measurement is constant.
    """
    rng = np.random.default_rng(random_state)
    whole: sparse.csr_matrix = counts
    columns = np.arange(whole.shape[1]) if genes is None else np.array(genes, dtype=int)
    if len(columns) and columns.max() >= whole.shape[1]:
        raise ValueError(f"genes: expected columns of counts, which has {whole.shape[1]}, got {columns.max()}")

    def normalised(half: sparse.csr_matrix) -> NDArray[np.float64]:
        values = half[:, columns].toarray().astype(np.float64)
        if not log_counts:
            values *= TARGET_SUM / np.maximum(np.asarray(half.sum(1), dtype=np.float64), 1)
        return np.log1p(values)

    total = np.zeros(len(columns))
    for _ in range(n_splits):
        first = whole.copy()
        first.data = rng.binomial(whole.data, 0.5)
        # A rare gene's counts may all fall into one half; the other half is then constant: 0.
        total += np.nan_to_num(pearson(normalised(first), normalised(whole - first)))
    reliability = np.clip(total / n_splits, 0, None)
    ceiling: NDArray[np.float64] = np.sqrt(2 * reliability / (1 + reliability))
    return np.where(is_constant(normalised(whole)), np.nan, ceiling)
