"""Train baselines on the same genes and embeddings as a model."""

from __future__ import annotations

import logging

import numpy as np

from histovar._arguments import Key, KeyOrKeys, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._torch_state import in_float32
from histovar._warn_once import warns_once
from histovar.anndata_io import expression, gate, slots
from histovar.anndata_io.gate import Data
from histovar.anndata_io.normalization import common_normalization
from histovar.baselines.model import METHODS, Baseline, MethodName, Standardize

from ._panel import ensure_panel

logger = logging.getLogger(__name__)


@check_arguments
@warns_once
@in_float32
def baseline(
    data: Data,
    method: MethodName = "ridge",
    *,
    use_rep: KeyOrKeys,
    layer: Key | None = None,
    library_key: Key | None = None,
    group_key: Key | None = None,
    spatial_key: Key = "spatial",
    standardize: Standardize = "training",
    key_added: Prefix = DEFAULT_KEY,
    random_state: Seed | None = None,
    table_name: Key | None = None,
) -> Baseline:
    """Train another method (ridge, kNN, MLP, ...) to compare with, on the same genes and embeddings.

    Its ``predict`` writes the same slots as :func:`predict` under its own key.

    >>> ridge = hv.tl.baseline(adata, "ridge", use_rep="X_uni", library_key="section")
    >>> ridge.predict(query)
    >>> hv.tl.evaluate(query, key="ridge")

    Parameters
    ----------
    data
        AnnData or SpatialData of the training sections.
    method
        ``"ridge_hest"`` (HEST-Benchmark's recipe: 256 components, fixed penalty), ``"ridge"`` (penalty chosen by
        leaving out training sections or individuals), ``"pls"`` (15 components), ``"kernel_ridge"``, ``"knn"``
        (retrieval in embedding space), ``"mlp"`` (mean of four heavily regularised perceptrons), ``"mfbp"`` (attention
        to a pooled context of the section), ``"var_st"`` (genes as an image, next-scale transformer).
        ``"ridge_hest"``, ``"mfbp"`` and ``"var_st"`` use only the first embedding; the others use all embeddings and
        the means of the first over 8 and 24 neighbours (``"mlp"`` also means of the others over 8).
    use_rep, library_key, spatial_key
        As in :func:`train_stage2`.
    group_key
        Column of ``obs`` with the individual (patient, animal) of each section. If there are several, individuals
        instead of sections are left out to choose the penalty of ``"ridge"`` and to measure the standard deviation.
    layer
        Layer to predict; log-normalised counts by default.
    standardize
        ``"training"``: as the methods were published. ``"section"``: features are standardised within each section
        first, as histovar does.
    key_added
        Prefix of the slots with the panel.
    random_state
        Seed of ``"mlp"``, ``"mfbp"`` and ``"var_st"``, 0 by default; the other methods are deterministic.
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
        If the method is unknown or the input is malformed; if a seed is given for a deterministic method.
    """
    if random_state is not None and not METHODS[method].is_random:
        raise ValueError(f"random_state: {method!r} is deterministic; leave it out, got {random_state}")
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key_added)
    reps = list(use_rep)  # a single key has become a list
    for key in reps:
        gate.embedding(adata, key)
    names = gate.sections(adata, library_key, spatial_key)
    gate.groups(adata, group_key, names)
    niche = METHODS[method].niche
    if niche is not None:
        gate.coordinates(adata, spatial_key)
        gate.check_neighbors(names, adata.n_obs, sorted({size for sizes in niche for size in sizes}))
    gate.check_enough_spots(adata, 10, "train on")
    expression.check_layer(adata, layer)
    with slots.writing(adata):
        ensure_panel(adata, keys)
        if layer is None:
            expression.add_lognorm(adata)
            layer = LOGNORM
        genes = adata.var_names[gate.panel(adata, keys)].tolist()
        values, totals = expression.expression(adata, layer, gate.gene_columns(adata, genes), sections=names)
        normalization = common_normalization(totals, layer, adata.n_vars, len(genes))
        seed = 0 if random_state is None else random_state
        slots_used = (reps, library_key, spatial_key)
        trained = Baseline(method, genes, layer, normalization, *slots_used, standardize, seed, group_key)
        trained.fit(adata, values)
    logger.info(
        "%s trained on %d spots of %s: errors on spots left out have a standard deviation of %.3f",
        method,
        adata.n_obs,
        "one section" if names is None else np.unique(names).tolist(),
        trained.std.mean(),
    )
    return trained
