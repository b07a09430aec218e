"""Tokens of measured expression."""

from __future__ import annotations

import logging

import numpy as np
import torch
from anndata import AnnData

from histovar._keys import DEFAULT_KEY, LOGNORM, Keys
from histovar.anndata_io import read, validate
from histovar.anndata_io.table import Data, as_table, copied, writing
from histovar.model import TwoStageVARST
from histovar.prediction import on_device

logger = logging.getLogger(__name__)


def tokenize(
    data: Data,
    model: TwoStageVARST,
    *,
    layer: str | None = None,
    key_added: str = DEFAULT_KEY,
    batch_size: int = 512,
    device: str = "auto",
    table_name: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Write the tokens of measured expression.

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
        Spots at once.
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
        If the layer, or genes of the panel, are missing.
    ValueError
        If expression is negative or not finite.
    """
    adata = as_table(data, table_name)
    validate.check_object(adata, needs_genes=True)
    columns = validate.check_genes(adata, model.registry["genes"])
    layer = layer or model.registry["layer"]
    if layer != LOGNORM:
        read.stored_layer(adata, layer)
    if copy:
        adata = copied(adata)
    if layer == LOGNORM:
        read.add_lognorm(adata)
    values = torch.from_numpy(read.expression(adata, layer, columns))
    with on_device(model, device) as where:
        tokens = torch.cat([model.tokenize(part.to(where)).cpu() for part in values.split(batch_size)])
    keys = Keys(key_added)
    with writing():
        adata.obsm[keys.tokens] = tokens.numpy().astype(np.int32)
    logger.info("tokenised %d spots, in obsm[%r]", adata.n_obs, keys.tokens)
    return adata if copy else None
