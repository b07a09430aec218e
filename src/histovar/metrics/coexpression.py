"""Compare predicted and measured gene-gene correlations (co-expression)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histovar._arguments import check_arguments

from ._arrays import Matrix, OtherSpots, Values
from .accuracy import is_constant, pearson


@check_arguments
def gene_correlation(values: Values) -> NDArray[np.float64]:
    """Pearson correlation between all genes over the spots.

    Parameters
    ----------
    values
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws, whose correlation matrices are averaged.

    Returns
    -------
    ndarray
        (n_genes, n_genes); 0 off the diagonal for constant genes, for which a correlation is undefined, and NaN for
        genes with NaN.
    """
    cube = np.asarray(values, dtype=np.float64)
    if cube.ndim == 3:
        matrix: NDArray[np.float64] = np.mean([gene_correlation(draw) for draw in np.moveaxis(cube, 2, 0)], axis=0)
        return matrix
    constant = is_constant(cube)
    with np.errstate(invalid="ignore"):  # infinite values: NaN
        centred = cube - cube.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    unit = np.where(constant, 0.0, centred / np.where(constant, 1.0, norm))
    matrix = unit.T @ unit
    np.fill_diagonal(matrix, 1.0)
    return matrix


@check_arguments
def gene_correlation_error(predicted: Values, measured: OtherSpots) -> float:
    """Root mean square difference between predicted and measured gene-gene correlations.

    Parameters
    ----------
    predicted
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws.
    measured
        (n_spots, n_genes), of the same genes; spots may differ.

    Returns
    -------
    float
        Over all pairs of genes whose measurement varies; NaN if there are fewer than 2 such genes. Genes predicted as
        constant count as uncorrelated with all others.
    """
    varies = ~is_constant(measured)
    if varies.sum() < 2:
        return float("nan")
    p, m = (gene_correlation(np.asarray(x)[:, varies]) for x in (predicted, measured))
    pairs = np.triu_indices(len(m), 1)
    return float(np.sqrt(((p - m)[pairs] ** 2).mean()))


@check_arguments
def gene_structure_correlation(predicted: Values, measured: Matrix) -> float:
    """Pearson correlation, over pairs of genes, of predicted and measured gene-gene correlation (Mantel 1967).

    It tells if the same genes are co-expressed, regardless of strength. Expected expression lacks counting noise, so
    its correlations are larger than measured ones, which :func:`gene_correlation_error` penalises and this does not.

    Parameters
    ----------
    predicted
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws, whose matrices are averaged.
    measured
        (n_spots, n_genes).

    Returns
    -------
    float
        Over all pairs of genes whose measurement varies; NaN if there are fewer than 3 such genes, or all measured
        correlations are equal. Genes predicted as constant count as uncorrelated with all others; genes with NaN are
        left out.
    """
    cube, truth = np.asarray(predicted), np.asarray(measured)
    finite = np.isfinite(cube).all(0)
    kept = ~is_constant(truth) & np.isfinite(truth).all(0) & (finite.all(1) if cube.ndim == 3 else finite)
    if kept.sum() < 3:
        return float("nan")
    pairs = np.triu_indices(int(kept.sum()), 1)
    p, m = (gene_correlation(values[:, kept])[pairs] for values in (cube, truth))
    return float(pearson(p[:, None], m[:, None])[0])
