"""Results as objects that scanpy and squidpy understand."""

from __future__ import annotations

import numpy as np
from anndata import AnnData

from ._arguments import Key, check_arguments
from ._keys import DEFAULT_KEY, Keys, Prefix
from .anndata_io import gate, slots
from .anndata_io.gate import Data
from .anndata_io.matrix import dense
from .anndata_io.prediction import (
    SPOT_COLUMNS,
    predicted_genes,
    read_draws,
    read_prediction,
    read_quantiles,
    read_rates,
)


@check_arguments
def prediction(data: Data, key: Prefix = DEFAULT_KEY, *, table_name: Key | None = None) -> AnnData:
    """A prediction as an AnnData of its own.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    key
        Prefix of the slots, the `key_added` of :func:`histovar.tl.predict`.
    table_name
        Table of a SpatialData.

    Returns
    -------
    AnnData
        Of the panel's genes: ``X`` expected expression, ``layers["std"]``, where they were asked for
        ``layers["q0.05"]`` and so on and ``layers["sample_0"]`` and so on; of a model that learnt from counts
        ``layers["rates"]``, counts per 10,000, and in ``obs``, in place of columns of the same names, the predicted
        ``total_count``, ``excess``, ``depth_spread`` and ``novelty`` of each spot. ``obs``, ``obsm["spatial"]``
        (whatever its key was) and ``uns["spatial"]`` are carried along, so that scanpy and squidpy work on it as it is.

    Raises
    ------
    KeyError
        If there is no prediction under `key`.
    ValueError
        If what was predicted was changed since.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    genes = predicted_genes(adata, keys)
    mean, std = read_prediction(adata, keys, genes)
    quantiles, draws = read_quantiles(adata, keys, len(genes)), read_draws(adata, keys, len(genes))
    result = AnnData(np.array(mean, dtype=np.float32), obs=adata.obs.copy())
    result.var_names = genes
    result.layers["std"] = np.array(std, dtype=np.float32)
    stored = slots.record(adata, keys)
    if quantiles is not None:
        for i, level in enumerate(quantiles[1]):
            result.layers[f"q{level:g}"] = quantiles[0][:, :, i]
    if draws is not None:
        for i in range(draws.shape[2]):
            result.layers[f"sample_{i}"] = draws[:, :, i]
    predicted_rates = read_rates(adata, keys, len(genes))
    if predicted_rates is not None:
        rates, spots = predicted_rates
        result.layers["rates"] = np.array(rates, dtype=np.float32)
        result.obs[list(SPOT_COLUMNS)] = np.array(spots, dtype=np.float32)
    spatial_key = str(stored["params"]["spatial_key"])
    if spatial_key in adata.obsm:
        result.obsm["spatial"] = dense(adata.obsm[spatial_key]).copy()
    for name in ("spatial", "spatialdata_attrs"):
        if name in adata.uns:
            result.uns[name] = adata.uns[name]
    result.uns["units"] = str(stored["units"])
    return result
