"""Predicted against measured expression."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd

from histovar import metrics
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys
from histovar.anndata_io import read, validate
from histovar.anndata_io.table import Data, as_table, writing
from histovar.anndata_io.write import merge_uns, predicted_genes, read_prediction

logger = logging.getLogger(__name__)


def evaluate(
    data: Data,
    *,
    key: str = DEFAULT_KEY,
    layer: str | None = None,
    library_key: str | None = None,
    table_name: str | None = None,
) -> pd.DataFrame:
    """Score a prediction where expression was measured.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`predict` has written to, with the panel's genes.
    key
        Prefix of the slots, the `key_added` of :func:`predict`.
    layer
        Layer with measured expression; the layer trained on by default.
    library_key
        Column of ``obs`` with the section; that of :func:`predict` by default. Scores are taken within sections and
        averaged over them.
    table_name
        Table of a SpatialData.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``mse``, ``mae``, means over the sections, and ``constant``,
        whether the prediction is constant in any section (its correlation then counts as 0). Also written to
        ``var[f"{key}_pearson"]`` and so on. ``uns[key]["evaluation"]`` gets a DataFrame of ``PCC-10``, ``PCC-50``,
        ``PCC-200``, ``PCC-all``, ``Spearman``, ``MSE``, ``MAE``, ``n_genes`` and ``n_constant`` for each section and
        their ``mean``; see :func:`histovar.metrics.summary`.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite.
    """
    adata = as_table(data, table_name)
    keys = Keys(key)
    validate.check_object(adata, needs_genes=True)
    genes = predicted_genes(adata, keys)
    predicted, _ = read_prediction(adata, keys, genes)
    columns = validate.check_genes(adata, genes)
    stored = adata.uns[keys.uns]
    layer = layer or str(stored["layer"])
    names = validate.sections(adata, library_key or str(stored["params"]["library_key"]) or None)
    if layer == LOGNORM:
        read.add_lognorm(adata)
    measured = read.expression(adata, layer, columns)
    labels = np.full(adata.n_obs, "all") if names is None else names
    tables = {
        str(label): metrics.per_gene(predicted[labels == label], measured[labels == label], genes)
        for label in np.unique(labels)
    }
    trained_on = {str(s) for s in np.asarray(stored["trained_on"]).ravel()}
    seen = sorted(set(tables) & trained_on)
    if seen:
        logger.warning("sections %s were among those trained on: their scores are not those of unseen tissue", seen)
    summary = pd.DataFrame({label: metrics.summary(table) for label, table in tables.items()}).T
    summary.loc["mean"] = summary.mean()
    summary.index.name = "section"
    everything = pd.concat(tables)
    scores = everything.drop(columns="constant").groupby(level=1).mean().loc[genes]
    scores["constant"] = everything["constant"].groupby(level=1).any().loc[genes]
    with writing():
        for name in scores:
            adata.var[keys.score(str(name))] = scores[name].reindex(adata.var_names)
            if name == "constant":
                adata.var[keys.score(str(name))] = scores[name].reindex(adata.var_names, fill_value=False).astype(bool)
    merge_uns(adata, keys, {"evaluation": summary})
    mean = summary.loc["mean"]
    best = [c for c in ("PCC-10", "PCC-50", "PCC-200", "PCC-all") if c in mean]
    logger.info(
        "evaluated on %s, trained on %s: %s, MSE %.3f, %d constant predictions",
        sorted(tables),
        sorted(trained_on),
        ", ".join(f"{c} {mean[c]:.3f}" for c in best),
        mean["MSE"],
        int(summary.drop(index="mean")["n_constant"].sum()),
    )
    return scores
