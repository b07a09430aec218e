"""Moran's I of predicted and measured expression."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histovar._arguments import Converted, check_arguments, refuse_type, refuse_value

from ._arrays import Matrix, Values
from .accuracy import is_constant, pearson


def _graph(value: Any) -> sparse.csr_matrix:
    expected = "a graph of the spots: a sparse matrix of shape (spots, spots) with non-negative weights"
    if not sparse.issparse(value):
        refuse_type(expected)
    if value.shape[0] != value.shape[1] or not (value.data >= 0).all():
        refuse_value(expected)
    return sparse.csr_matrix(value)


# Weights of each spot's neighbours, (n_spots, n_spots).
Graph = Annotated[Any, Converted(_graph)]


@check_arguments
def morans_i(values: Values, neighbors: Graph) -> NDArray[np.float64]:
    r"""Moran's I of every gene: spatial autocorrelation of its expression (Moran 1950).

    .. math:: I = \frac{n}{\sum_{ij} w_{ij}} \frac{\sum_{ij} w_{ij} z_i z_j}{\sum_i z_i^2}, \quad z = x - \bar x

    Parameters
    ----------
    values
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws, over which it is averaged.
    neighbors
        (n_spots, n_spots) sparse weights :math:`w`, such as ``obsp["spatial_connectivities"]`` of squidpy.

    Returns
    -------
    ndarray
        (n_genes,); 0 for constant genes, for which it is undefined; NaN for genes with NaN, or if no spot has
        neighbours.
    """
    cube = np.asarray(values, dtype=np.float64)
    if len(cube) != neighbors.shape[0]:
        raise ValueError(f"neighbors: expected a graph of {len(cube)} spots, as in values, got {neighbors.shape[0]}")
    if cube.ndim == 3:
        result: NDArray[np.float64] = np.mean([morans_i(draw, neighbors) for draw in np.moveaxis(cube, 2, 0)], axis=0)
        return result
    total = neighbors.sum()
    if not total > 0:
        return np.full(cube.shape[1], np.nan)
    constant = is_constant(cube)
    with np.errstate(invalid="ignore"):  # infinite values: NaN
        centred = cube - cube.mean(0)
        covariance = (centred * (neighbors @ centred)).sum(0) * len(cube) / total
        return np.where(constant, 0.0, covariance / np.where(constant, 1.0, (centred**2).sum(0)))


@check_arguments
def moran_agreement(predicted: Values, measured: Matrix, neighbors: Graph) -> tuple[float, float]:
    """Compare Moran's I of prediction and measurement over the genes: correlation and mean absolute difference.

    Parameters
    ----------
    predicted
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws.
    measured
        (n_spots, n_genes).
    neighbors
        As in :func:`morans_i`.

    Returns
    -------
    correlation
        Pearson correlation over the genes whose measurement varies; NaN if there are fewer than 3 such genes, or all
        have the same Moran's I.
    error
        Mean absolute difference over these genes; NaN if there are none.

        Genes predicted as constant count as 0, without pattern; genes with NaN are left out.
    """
    p, m = morans_i(predicted, neighbors), morans_i(measured, neighbors)
    kept = ~is_constant(measured) & np.isfinite(p) & np.isfinite(m)
    p, m = p[kept], m[kept]
    correlation = float(pearson(p[:, None], m[:, None])[0]) if len(m) > 2 else float("nan")
    return correlation, float(np.abs(p - m).mean()) if len(m) else float("nan")
