"""Get a prediction as an AnnData of the panel's genes."""

from __future__ import annotations

import logging
from typing import Annotated

import numpy as np
from anndata import AnnData
from pydantic import Field

from histovar._arguments import Key, Real, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.matrix import dense
from histovar.anndata_io.prediction import (
    SPOT_COLUMNS,
    predicted_genes,
    read_draws,
    read_expected_pearson,
    read_prediction,
    read_quantiles,
    read_rates,
)

logger = logging.getLogger(__name__)


@check_arguments
def prediction(
    data: Data,
    key: Prefix = DEFAULT_KEY,
    *,
    min_trust: Annotated[Real, Field(ge=-1, le=1)] | None = None,
    table_name: Key | None = None,
) -> AnnData:
    """Get a prediction as an AnnData with one column for each gene of the panel.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    key
        Prefix of the slots, the `key_added` of :func:`histovar.tl.predict`.
    min_trust
        Keep only genes whose expected Pearson correlation on an unseen section (individual) is at least this, according
        to the model that predicted them (:func:`genes`); 0.3 keeps maps that are worth looking at. It was estimated in
        training or calibration, not measured in this object. None keeps all.
    table_name
        Table of a SpatialData.

    Returns
    -------
    AnnData
        The panel's genes with expected expression in ``X``, its standard deviation in ``layers["std"]`` and, if they
        were predicted, quantiles in ``layers["q0.05"]`` and so on and draws in ``layers["sample_0"]`` and so on. If the
        model learnt from counts, ``layers["rates"]`` has counts per 10,000, and ``obs`` the predicted ``total_count``,
        ``excess``, ``depth_spread`` and ``novelty`` of each spot, replacing columns of the same names. ``obs``,
        ``obsm["spatial"]`` (from any key) and ``uns["spatial"]`` are copied, so that scanpy and squidpy work on it.

    Raises
    ------
    KeyError
        If there is no prediction under `key`.
    ValueError
        If a slot of the prediction was changed since.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    genes = predicted_genes(adata, keys)
    mean, std = read_prediction(adata, keys, genes)
    expected = read_expected_pearson(adata, keys, len(genes))
    if min_trust is not None and expected is None:
        raise ValueError(
            f"min_trust: the prediction {key!r} holds no expected accuracy of its genes: its model is a baseline, not "
            "calibrated, or of an earlier version; leave min_trust out, or call histovar.tl.calibrate(adata, model) on "
            "training or held-out sections and predict again"
        )
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
    if expected is not None:
        result.var["expected_pearson"] = expected
    if min_trust is None:
        return result
    trusted = result[:, np.nan_to_num(result.var["expected_pearson"], nan=-2.0) >= min_trust].copy()
    if not trusted.n_vars:
        logger.warning(
            "min_trust: no gene has an expected correlation of %g or more; the largest is %.2f",
            min_trust,
            result.var["expected_pearson"].max(),
        )
    return trusted
