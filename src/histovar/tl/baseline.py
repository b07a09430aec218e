"""Other methods, on the same split, genes and embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import get_args

import numpy as np

from histovar._keys import DEFAULT_KEY, LOGNORM
from histovar._torch_state import in_float32
from histovar.anndata_io import expression, gate, slots
from histovar.anndata_io.gate import Data
from histovar.baselines.model import METHODS, Baseline, Standardize

from ._panel import ensure_panel

logger = logging.getLogger(__name__)


@in_float32
def baseline(
    data: Data,
    method: str = "ridge",
    *,
    use_rep: str | Sequence[str],
    layer: str | None = None,
    library_key: str | None = None,
    spatial_key: str = "spatial",
    standardize: Standardize = "training",
    key_added: str = DEFAULT_KEY,
    random_state: int = 0,
    table_name: str | None = None,
) -> Baseline:
    """Train a method to compare with; its ``predict`` writes the slots of :func:`predict` under a key of its own.

    >>> ridge = hv.tl.baseline(adata, "ridge", use_rep="X_uni", library_key="section")
    >>> ridge.predict(query)
    >>> hv.tl.evaluate(query, key="ridge")

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections.
    method
        ``"ridge_hest"`` (HEST-Benchmark's recipe: 256 components, fixed penalty), ``"ridge"`` (penalty chosen by
        leaving training sections out), ``"pls"`` (15 components), ``"kernel_ridge"``, ``"knn"`` (retrieval in
        embedding space), ``"mlp"`` (mean of four heavily regularised perceptrons), ``"mfbp"`` (attention to a pooled
        context of the section), ``"var_st"`` (genes as an image, next-scale transformer).
        ``"ridge_hest"``, ``"mfbp"`` and ``"var_st"`` see the first embedding alone, the others all of them and the
        means of the first over 8 and 24 neighbours (``"mlp"`` those of the further ones over 8, too).
    use_rep, library_key, spatial_key
        As in :func:`train_stage2`.
    layer
        Layer to predict; log-normalised counts by default.
    standardize
        ``"training"``: as the methods were published. ``"section"``: features are standardised within each section
        first, as histovar does.
    key_added
        Prefix of the slots with the panel.
    random_state
        Seed.
    table_name
        Table of a SpatialData.

    Returns
    -------
    Baseline
        The trained method.

    Raises
    ------
    KeyError
        If a key or layer is missing.
    ValueError
        If the method is not known, or the input is not as it must be.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    if standardize not in get_args(Standardize):
        raise ValueError(f"standardize must be one of {get_args(Standardize)}, got {standardize!r}")
    adata = gate.table(data, table_name, genes=True)
    keys = slots.keys(key_added)
    reps = gate.key_list(use_rep)
    for key in reps:
        gate.embedding(adata, key)
    names = gate.sections(adata, library_key, spatial_key)
    niche = METHODS[method].niche
    if niche is not None:
        gate.coordinates(adata, spatial_key)
        gate.check_neighbors(names, adata.n_obs, sorted({size for sizes in niche for size in sizes}))
    gate.check_enough_spots(adata, 10, "train on")
    expression.check_layer(adata, layer)
    ensure_panel(adata, keys)
    if layer is None:
        expression.add_lognorm(adata)
        layer = LOGNORM
    genes = adata.var_names[adata.var[keys.panel].to_numpy()].tolist()
    values, totals = expression.expression(adata, layer, gate.gene_columns(adata, genes), sections=names)
    normalization = expression.common_normalization(totals, layer, adata.n_vars, len(genes))
    made = Baseline(method, genes, layer, normalization, reps, library_key, spatial_key, standardize, random_state).fit(
        adata, values
    )
    logger.info(
        "%s trained on %d spots of %s: errors of spots left out have a standard deviation of %.3f",
        method,
        adata.n_obs,
        "one section" if names is None else np.unique(names).tolist(),
        made.std.mean(),
    )
    return made
