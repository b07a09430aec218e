"""A prediction beside what was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar import metrics
from histovar._keys import LOGNORM, Keys

from . import read, validate
from .write import predicted_genes, read_prediction

# Draws enough for 95 % intervals, the ends of those intervals, and levels that stand for a normal distribution.
LEAST_DRAWS, ENDS, NORMAL_LEVELS = 20, (0.025, 0.975), 100


class Scored(NamedTuple):
    """Arrays of (n_obs, n_genes), and what they are of."""

    genes: list[str]
    layer: str
    mean: NDArray[Any]
    std: NDArray[Any]
    measured: NDArray[np.float32]


def read_scored(adata: AnnData, keys: Keys, layer: str | None) -> Scored:
    """Prediction and measurement in the same units; ``layers["lognorm"]`` is added where it is needed.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite.
    """
    validate.check_object(adata, needs_genes=True)
    genes = predicted_genes(adata, keys)
    mean, std = read_prediction(adata, keys, genes)
    columns = validate.check_genes(adata, genes)
    layer = layer or str(adata.uns[keys.uns]["layer"])
    if layer == LOGNORM:
        read.add_lognorm(adata)
    return Scored(genes, layer, mean, std, read.expression(adata, layer, columns))


def read_distribution(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any]
) -> tuple[str, NDArray[Any], NDArray[Any]]:
    """The predicted distribution as quantiles, from the best there is: draws, quantiles, or mean and deviation.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    mean, std
        What :func:`read_scored` gave.

    Returns
    -------
    kind
        ``"draws"``, ``"quantiles"`` or ``"normal"``.
    quantiles
        (n_obs, n_genes, n_levels), increasing.
    levels
        (n_levels,), of which the outermost reach at least to 0.025 and 0.975.
    """
    if keys.samples in adata.obsm and np.shape(adata.obsm[keys.samples])[2] >= LEAST_DRAWS:
        return "draws", *metrics.sample_quantiles(np.asarray(adata.obsm[keys.samples]))
    if keys.quantiles in adata.obsm:
        levels = np.asarray(adata.uns[keys.uns]["quantiles"], dtype=float)
        order = levels.argsort()
        if levels.min() <= min(ENDS) and levels.max() >= max(ENDS):
            return "quantiles", np.asarray(adata.obsm[keys.quantiles])[:, :, order], levels[order]
    levels = (np.arange(NORMAL_LEVELS) + 0.5) / NORMAL_LEVELS
    return "normal", metrics.normal_quantiles(mean, std, levels).astype(np.float32), levels
