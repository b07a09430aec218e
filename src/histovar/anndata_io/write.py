"""From arrays to the slots of AnnData."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def write_prediction(
    adata: AnnData,
    keys: Keys,
    genes: Sequence[str],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    samples: NDArray[np.float32] | None,
    quantiles: NDArray[np.float32] | None,
) -> None:
    """Write predicted expression: layers where the object's genes are exactly the panel, else ``obsm``.

    Parameters
    ----------
    adata
        The object.
    keys
        Slot names.
    genes
        The panel.
    mean, std
        (n_obs, n_genes).
    samples
        (n_obs, n_genes, n_samples), or None.
    quantiles
        (n_obs, n_genes, n_quantiles), or None.
    """
    with writing():
        for store in (adata.layers, adata.obsm):
            for key in (keys.mean, keys.std):
                if key in store:
                    del store[key]
        for key, cube in ((keys.samples, samples), (keys.quantiles, quantiles)):
            if key in adata.obsm:
                del adata.obsm[key]
            if cube is not None:
                adata.obsm[key] = cube
        if set(genes) == set(adata.var_names) and len(genes) == adata.n_vars:
            order = pd.Index(genes).get_indexer(adata.var_names)
            adata.layers[keys.mean], adata.layers[keys.std] = mean[:, order], std[:, order]
        else:
            for key, values in ((keys.mean, mean), (keys.std, std)):
                adata.obsm[key] = pd.DataFrame(values, index=adata.obs_names, columns=list(genes))


def read_prediction(adata: AnnData, keys: Keys, genes: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation that :func:`write_prediction` wrote, (n_obs, n_genes) in panel order.

    Raises
    ------
    KeyError
        If they are missing.
    """
    if keys.mean in adata.obsm:
        return tuple(np.asarray(adata.obsm[k][list(genes)]) for k in (keys.mean, keys.std))  # type: ignore[return-value]
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
