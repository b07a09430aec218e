"""What made the embeddings of an object: recorded with them, kept by models, compared when a model is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from anndata import AnnData

logger = logging.getLogger(__name__)

RECORDS = "embeddings"
FACTS = ("encoder", "layers", "pooling", "input_px", "field_um")
# How much a field may differ, as a share of that of training: by rounding alone.
FIELD_TOLERANCE = 0.01
# How many times as wide the pixels of an image may be, as of training's images, without a warning.
COARSER = 2.0


def describe(
    encoder: str, layers: Sequence[int], pooling: str, input_px: int, field_um: float, mpp: float
) -> dict[str, Any]:
    """What made an embedding, in plain types.

    Parameters
    ----------
    encoder, layers, pooling, input_px
        Of :class:`histovar.encoders.Encoder`.
    field_um
        Side of the patches, in microns.
    mpp
        Microns per pixel of the coarsest image that was read.
    """
    return {
        "encoder": encoder,
        "layers": ",".join(map(str, layers)),
        "pooling": pooling,
        "input_px": int(input_px),
        "field_um": float(field_um),
        "mpp": float(mpp),
    }


def record_of(adata: AnnData, key: str) -> dict[str, Any] | None:
    """What made ``obsm[key]``; None if ``uns`` does not say. Of objects joined from several scans, ``mpp`` may be None.

    Parameters
    ----------
    adata
        The object.
    key
        Key of ``obsm``.
    """
    for stored in adata.uns.values():
        records = stored.get(RECORDS) if isinstance(stored, Mapping) and "version" in stored else None
        facts = records.get(key) if isinstance(records, Mapping) else None
        if isinstance(facts, Mapping) and all(name in facts for name in FACTS):
            plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in facts.items()}
            return {"mpp": None, **plain}
    return None


def check_like_training(adata: AnnData, use_rep: Sequence[str], trained: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse embeddings that were made otherwise than those of training; warn of coarser images.

    Parameters
    ----------
    adata
        The object.
    use_rep
        Keys of ``obsm``, in the order of training.
    trained
        What made those of training, None where that is not known.

    Raises
    ------
    ValueError
        If encoder, layers, pooling, input size or field differ.
    """
    for key, ours in zip(use_rep, trained, strict=False):
        theirs = record_of(adata, key)
        if ours is None or theirs is None:
            continue
        same_field = abs(theirs["field_um"] - ours["field_um"]) <= FIELD_TOLERANCE * ours["field_um"]
        differing = [name for name in FACTS[:-1] if theirs[name] != ours[name]]
        differing += [] if same_field else ["field_um"]
        if differing:
            unlike = ", ".join(f"{name}={theirs[name]!r}, of training {ours[name]!r}" for name in differing)
            raise ValueError(
                f"use_rep: obsm[{key!r}] was made otherwise than what the model was trained on ({unlike}); "
                "embed again with histovar.pp.embed as for training"
            )
        if theirs["mpp"] and ours["mpp"] and theirs["mpp"] > COARSER * ours["mpp"]:
            logger.warning(
                "use_rep: obsm[%r] was made of an image of %.3g um per pixel, that of training had %.3g: finer detail "
                "than the model was trained on is missing",
                key,
                theirs["mpp"],
                ours["mpp"],
            )
