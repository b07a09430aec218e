"""From arrays to the slots of AnnData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import Keys
from histovar._version import __version__

from .table import writing


def merge_uns(adata: AnnData, keys: Keys, values: Mapping[str, Any]) -> None:
    """Add entries to ``uns[key]``, of plain types only, and stamp it with the version."""
    with writing():
        adata.uns[keys.uns] = {**adata.uns.get(keys.uns, {}), **values, "version": __version__}


class Prediction(NamedTuple):
    """What was predicted, in memory or as dask arrays, in panel order.

    Parameters
    ----------
    mean, std
        (n_obs, n_genes).
    tokens
        (n_obs, n_tokens).
    samples
        (n_obs, n_genes, n_samples), or None.
    quantiles
        (n_obs, n_genes, n_quantiles), or None.
    """

    mean: Any
    std: Any
    tokens: Any
    samples: Any
    quantiles: Any

    @classmethod
    def empty(cls, n_obs: int, n_genes: int, n_tokens: int, n_samples: int, n_quantiles: int) -> Prediction:
        """Room for a prediction; None for what was not asked for."""

        def room(n: int) -> NDArray[np.float32] | None:
            return np.empty((n_obs, n_genes, n), np.float32) if n else None

        mean, std = np.empty((2, n_obs, n_genes), np.float32)
        return cls(mean, std, np.empty((n_obs, n_tokens), np.int32), room(n_samples), room(n_quantiles))


def write_prediction(adata: AnnData, keys: Keys, genes: Sequence[str], made: Prediction) -> None:
    """Write predicted expression: layers where the object's genes are exactly the panel, else ``obsm``.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    genes
        The panel.
    made
        What was predicted.
    """
    with writing():
        for store in (adata.layers, adata.obsm):
            for key in (keys.mean, keys.std):
                if key in store:
                    del store[key]
        for key, cube in ((keys.tokens, made.tokens), (keys.samples, made.samples), (keys.quantiles, made.quantiles)):
            if key in adata.obsm:
                del adata.obsm[key]
            if cube is not None:
                adata.obsm[key] = cube
        if set(genes) == set(adata.var_names) and len(genes) == adata.n_vars:
            order = pd.Index(genes).get_indexer(adata.var_names)
            unchanged = np.array_equal(order, np.arange(len(order)))
            for key, values in ((keys.mean, made.mean), (keys.std, made.std)):
                adata.layers[key] = values if unchanged else values[:, order]
        else:
            for key, values in ((keys.mean, made.mean), (keys.std, made.std)):
                named = isinstance(values, np.ndarray)  # dask arrays have no names for their columns
                adata.obsm[key] = pd.DataFrame(values, adata.obs_names, list(genes)) if named else values


def read_prediction(adata: AnnData, keys: Keys, genes: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation that :func:`write_prediction` wrote, (n_obs, n_genes) in panel order.

    Raises
    ------
    KeyError
        If they are missing.
    """
    if keys.mean in adata.obsm:
        mean, std = (adata.obsm[k] for k in (keys.mean, keys.std))
        if isinstance(mean, pd.DataFrame):
            mean, std = mean[list(genes)], std[list(genes)]
        return np.asarray(mean), np.asarray(std)
    if keys.mean in adata.layers:
        order = adata.var_names.get_indexer(pd.Index(genes))
        return np.asarray(adata.layers[keys.mean])[:, order], np.asarray(adata.layers[keys.std])[:, order]
    raise KeyError(
        f"key: neither layers nor obsm has {keys.mean!r}; predict first with histovar.tl.predict(adata, model, "
        f"key_added={keys.prefix!r})"
    )


def predicted_genes(adata: AnnData, keys: Keys) -> list[str]:
    """The panel of a prediction.

    Raises
    ------
    KeyError
        If there is no prediction.
    """
    genes = adata.uns.get(keys.uns, {}).get("genes")
    if genes is None:
        raise KeyError(
            f"key: uns has no prediction {keys.uns!r}; predict first with histovar.tl.predict(adata, model, "
            f"key_added={keys.prefix!r})"
        )
    return [str(g) for g in genes]
