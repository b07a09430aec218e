"""A prediction beside what was measured."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import LOGNORM, Keys

from . import read, validate
from .write import predicted_genes, read_prediction


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
