"""Predicted and measured expression, in the same units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar import metrics
from histovar._keys import LOGNORM, Keys

from . import expression, gate, slots
from .prediction import (
    predicted_genes,
    predicted_normalization,
    predicted_sections,
    read_draws,
    read_prediction,
    read_quantiles,
)

# Draws enough for 95 % intervals, the ends of those intervals, and levels that stand for a normal distribution.
LEAST_DRAWS, ENDS, NORMAL_LEVELS = 20, (0.025, 0.975), 100


class Comparison(NamedTuple):
    """Predicted and measured expression, (n_obs, n_genes), and of what they are."""

    genes: list[str]
    layer: str
    mean: NDArray[Any]
    std: NDArray[Any]
    measured: NDArray[np.float32]
    sections: NDArray[np.str_] | None


def read_comparison(adata: AnnData, keys: Keys, layer: str | None, library_key: str | None = None) -> Comparison:
    """Prediction and measurement in the same units; nothing is written.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite, or in other units than the prediction.
    """
    genes = predicted_genes(adata, keys)
    mean, std = read_prediction(adata, keys, genes)
    layer = str(slots.record(adata, keys)["layer"]) if layer is None else layer
    sections = predicted_sections(adata, keys, library_key)
    measured = read_measured(adata, keys, genes, layer, sections)
    return Comparison(genes, layer, mean, std, measured, sections)


def read_measured(
    adata: AnnData, keys: Keys, genes: Sequence[str], layer: str, sections: NDArray[np.str_] | None
) -> NDArray[np.float32]:
    """Measured expression of a prediction's genes, refused where its units are not the prediction's.

    Where `genes` are not all of the prediction's, it is only known whether most genes of training are there.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_comparison`.
    """
    columns = gate.gene_columns(adata, genes)
    trained = predicted_normalization(adata, keys)
    if len(genes) == len(predicted_genes(adata, keys)):
        return expression.read_expression(adata, layer, columns, sections=sections, trained=trained)
    if layer == LOGNORM and not expression.has_lognorm(adata) and trained is not None:
        if 2 * adata.n_vars < trained.n_genes:
            raise ValueError(
                f"layers[{layer!r}] would be normalised over {adata.n_vars} genes, that of training over "
                f"{trained.n_genes}; normalise before genes are dropped"
            )
    return expression.expression(adata, layer, columns).values


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
        What :func:`read_comparison` gave.

    Returns
    -------
    kind
        ``"draws"``, ``"quantiles"`` or ``"normal"``.
    quantiles
        (n_obs, n_genes, n_levels), increasing.
    levels
        (n_levels,), of which the outermost reach at least to 0.025 and 0.975.
    """
    draws, quantiles = read_draws(adata, keys, mean.shape[1]), read_quantiles(adata, keys, mean.shape[1])
    if draws is not None and draws.shape[2] >= LEAST_DRAWS:
        return "draws", *metrics.sample_quantiles(draws)
    if quantiles is not None:
        cube, levels = quantiles
        order = levels.argsort()
        if levels.min() <= min(ENDS) and levels.max() >= max(ENDS):
            return "quantiles", cube[:, :, order], levels[order]
    levels = (np.arange(NORMAL_LEVELS) + 0.5) / NORMAL_LEVELS
    return "normal", metrics.normal_quantiles(mean, std, levels).astype(np.float32), levels
