"""Tokenise measured expression with a trained stage 1."""

from __future__ import annotations

import logging

import numpy as np
import torch
from anndata import AnnData

from histovar._arguments import Count, Key, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar._torch_state import in_float32
from histovar.anndata_io import gate, slots
from histovar.anndata_io.expression import add_lognorm, read_expression
from histovar.anndata_io.gate import Data
from histovar.anndata_io.normalization import Normalization
from histovar.prediction import Device, on_device

from ._trained import TrainedStage1

logger = logging.getLogger(__name__)


@check_arguments
@in_float32
def tokenize(
    data: Data,
    model: TrainedStage1,
    *,
    layer: Key | None = None,
    key_added: Prefix = DEFAULT_KEY,
    batch_size: Count = 512,
    device: Device = "auto",
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Encode measured expression as gene tokens with a trained stage 1.

    Parameters
    ----------
    data
        AnnData or SpatialData with the panel's genes.
    model
        A model with a trained stage 1.
    layer
        Layer with expression in the units of training; the layer trained on by default.
    key_added
        Prefix of the slots.
    batch_size
        Spots in a batch.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes ``obsm[f"{key_added}_tokens"]``, (n_obs, n_tokens) int32, coarse to fine.

    Raises
    ------
    KeyError
        If the layer or genes of the panel are missing.
    ValueError
        If expression is negative or not finite, or in other units than in training.
    """
    adata = gate.table(data, table_name, genes=True, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, [("obsm", keys.tokens)])
    columns = gate.gene_columns(adata, model.registry["genes"])
    layer = model.registry["layer"] if layer is None else layer
    trained = Normalization.stored(model.registry.get("normalization"))
    values = torch.from_numpy(read_expression(adata, layer, columns, sections=None, trained=trained))
    with on_device(model, device) as compute_device:
        tokens = torch.cat([model.tokenize(batch.to(compute_device)).cpu() for batch in values.split(batch_size)])
    if copy:
        adata = gate.copied(adata)
    with slots.writing(adata):
        if layer == LOGNORM:
            add_lognorm(adata)
        slots.write(adata, keys, {("obsm", keys.tokens): tokens.numpy().astype(np.int32)}, {"tokens": "measured"})
    logger.info("tokenised %d spots, in obsm[%r]", adata.n_obs, keys.tokens)
    return adata if copy else None
