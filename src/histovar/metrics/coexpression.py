"""Whether genes that go together go together in the prediction."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .accuracy import is_constant


def gene_correlation(values: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson correlation between all genes over the spots.

    Parameters
    ----------
    values
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws: then the mean over the draws of each one's matrix.

    Returns
    -------
    ndarray
        (n_genes, n_genes); 0 off the diagonal for constant genes.
    """
    cube = np.asarray(values, dtype=np.float64)
    if cube.ndim == 3:
        matrix: NDArray[np.float64] = np.mean([gene_correlation(draw) for draw in np.moveaxis(cube, 2, 0)], axis=0)
        return matrix
    constant = is_constant(cube)
    centred = cube - cube.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    unit = np.where(constant, 0.0, centred / np.where(constant, 1.0, norm))
    matrix = unit.T @ unit
    np.fill_diagonal(matrix, 1.0)
    return matrix


def gene_correlation_error(predicted: NDArray[Any], measured: NDArray[Any]) -> float:
    """Root mean square difference, over all pairs of genes, of predicted and measured correlation.

    Parameters
    ----------
    predicted
        (n_spots, n_genes), or (n_spots, n_genes, n_samples) draws.
    measured
        (n_spots, n_genes).
    """
    pairs = np.triu_indices(np.shape(measured)[1], 1)
    if not len(pairs[0]):
        return 0.0
    return float(np.sqrt(((gene_correlation(predicted) - gene_correlation(measured))[pairs] ** 2).mean()))
