"""What made the embeddings of an object: recorded by ``pp.embed``, kept by models, compared when a model is used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData

logger = logging.getLogger(__name__)

RECORDS = "embeddings"
FACTS = ("encoder", "layers", "pooling", "input_px", "field_um")
# What records of earlier versions lack; there nothing is compared.
ADDED_FACTS = ("weights", "mean", "std")
# What is recorded, but not compared.
OTHER_FACTS = ("mpp", "precision")
# How much a field may differ, as a share of that of training: by rounding alone.
FIELD_TOLERANCE = 0.01
# How many times as wide the pixels of an image may be, as of training's images, without a warning.
COARSER = 2.0


def embed_entries(adata: AnnData) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Entries of ``uns`` that :func:`histovar.pp.embed` wrote, with their keys.

    They are known by their records of embeddings: the version is lost where objects of two versions were joined.
    """
    for key, entry in adata.uns.items():
        records = entry.get(RECORDS) if isinstance(entry, Mapping) else None
        if isinstance(records, Mapping) and any(map(_is_record, records.values())):
            yield key, entry


def _is_record(facts: Any) -> bool:
    """Whether it says what made an embedding, or what is left of that after a join."""
    return isinstance(facts, Mapping) and not facts.keys().isdisjoint((*FACTS, *ADDED_FACTS, *OTHER_FACTS))


def record_of(adata: AnnData, key: str) -> dict[str, Any] | None:
    """What made ``obsm[key]``; None if ``uns`` does not say.

    Parameters
    ----------
    adata
        The object.
    key
        Key of ``obsm``.

    Returns
    -------
    dict or None
        Facts that an earlier version did not record are None; so may ``mpp`` and ``precision`` be of joined objects.

    Raises
    ------
    ValueError
        If objects were joined whose embeddings were made otherwise: what differed is then not in ``uns``.
    """
    for _, entry in embed_entries(adata):
        facts = entry[RECORDS].get(key)
        if _is_record(facts):
            added = [name for name in ADDED_FACTS if name in facts]
            lacking = [name for name in (*FACTS, *(ADDED_FACTS if added else ())) if name not in facts]
            if lacking:
                raise ValueError(
                    f"use_rep: obsm[{key!r}] joins embeddings that were not made alike ({', '.join(lacking)}); "
                    "embed all with one encoder, weights and field"
                )
            plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in facts.items()}
            return {**dict.fromkeys((*ADDED_FACTS, *OTHER_FACTS)), **plain}
    return None


class _Difference(NamedTuple):
    """A fact in which embeddings differ from those of training."""

    name: str
    here: Any
    in_training: Any


def _differences(here: Mapping[str, Any], in_training: Mapping[str, Any]) -> list[_Difference]:
    """All facts that are known of both and differ."""
    both = [_Difference(name, here[name], in_training.get(name)) for name in (*FACTS, *ADDED_FACTS)]
    known = [fact for fact in both if fact.here is not None and fact.in_training is not None]
    return [
        fact
        for fact in known
        if (
            abs(fact.here - fact.in_training) > FIELD_TOLERANCE * fact.in_training
            if fact.name == "field_um"
            else fact.here != fact.in_training
        )
    ]


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
        If encoder, weights, layers, pooling, input size, normalisation or field differ, or objects were joined in which
        they do.
    """
    for key, ours in zip(use_rep, trained, strict=False):
        theirs = record_of(adata, key)
        if ours is None or theirs is None:
            continue
        if differences := _differences(theirs, ours):
            unlike = ", ".join(f"{d.name}={d.here!r}, of training {d.in_training!r}" for d in differences)
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
