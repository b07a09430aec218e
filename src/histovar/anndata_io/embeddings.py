"""Record the encoder of embeddings in ``uns``, and check that a model gets embeddings made as in training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData

logger = logging.getLogger(__name__)

RECORDS = "embeddings"
FACTS = ("encoder", "layers", "pooling", "input_px", "field_um")
# Missing from records of earlier versions, and then not compared.
ADDED_FACTS = ("weights", "mean", "std")
# Recorded, but not compared.
OTHER_FACTS = ("mpp", "precision")
# Allowed difference of the field, as a share of that of training: enough for rounding.
FIELD_TOLERANCE = 0.01
# Pixels wider than in training by more than this factor give a warning.
COARSER = 2.0


def embed_entries(adata: AnnData) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the entries of ``uns`` that :func:`histovar.pp.embed` wrote, with their keys.

    They are recognised by their records of embeddings, not by the version, which is lost when objects of two versions
    are concatenated.
    """
    for key, entry in adata.uns.items():
        records = entry.get(RECORDS) if isinstance(entry, Mapping) else None
        if isinstance(records, Mapping) and any(map(_is_record, records.values())):
            yield key, entry


def _is_record(facts: Any) -> bool:
    """True for a record of how an embedding was made, or what concatenation left of one."""
    return isinstance(facts, Mapping) and not facts.keys().isdisjoint((*FACTS, *ADDED_FACTS, *OTHER_FACTS))


def record_of(adata: AnnData, key: str) -> dict[str, Any] | None:
    """Read how ``obsm[key]`` was made from ``uns``; None if there is no record.

    Parameters
    ----------
    adata
        The object.
    key
        Key of ``obsm``.

    Returns
    -------
    dict or None
        Facts that an earlier version did not record are None, and so may be ``mpp`` and ``precision`` of concatenated
        objects.

    Raises
    ------
    ValueError
        If objects were concatenated whose embeddings were made in different ways: ``uns`` then lacks what differed.
    """
    for _, entry in embed_entries(adata):
        facts = entry[RECORDS].get(key)
        if _is_record(facts):
            added = [name for name in ADDED_FACTS if name in facts]
            lacking = [name for name in (*FACTS, *(ADDED_FACTS if added else ())) if name not in facts]
            if lacking:
                raise ValueError(
                    f"use_rep: obsm[{key!r}] holds embeddings that were made in different ways "
                    f"({', '.join(lacking)} differ); embed all with one encoder, weights and field"
                )
            record = {name: value.item() if isinstance(value, np.generic) else value for name, value in facts.items()}
            return {**dict.fromkeys((*ADDED_FACTS, *OTHER_FACTS)), **record}
    return None


class _Difference(NamedTuple):
    """A fact about embeddings that differs from training, with both values."""

    name: str
    here: Any
    in_training: Any


def _differences(here: Mapping[str, Any], in_training: Mapping[str, Any]) -> list[_Difference]:
    """List the facts that are known of both embeddings and differ."""
    pairs = [_Difference(name, here[name], in_training.get(name)) for name in (*FACTS, *ADDED_FACTS)]
    comparable = [fact for fact in pairs if fact.here is not None and fact.in_training is not None]
    return [
        fact
        for fact in comparable
        if (
            abs(fact.here - fact.in_training) > FIELD_TOLERANCE * fact.in_training
            if fact.name == "field_um"
            else fact.here != fact.in_training
        )
    ]


def check_like_training(adata: AnnData, use_rep: Sequence[str], trained: Sequence[Mapping[str, Any] | None]) -> None:
    """Refuse embeddings made in another way than those of training; warn if their image is coarser.

    Parameters
    ----------
    adata
        The object.
    use_rep
        Keys of ``obsm``, in the order of training.
    trained
        Records of the embeddings of training, None where unknown.

    Raises
    ------
    ValueError
        If encoder, weights, layers, pooling, input size, normalisation or field differ, from training or between
        objects that were concatenated.
    """
    for key, in_training in zip(use_rep, trained, strict=False):
        here = record_of(adata, key)
        if in_training is None or here is None:
            continue
        if differences := _differences(here, in_training):
            listed = ", ".join(f"{d.name}={d.here!r}, in training {d.in_training!r}" for d in differences)
            raise ValueError(
                f"use_rep: obsm[{key!r}] was made in another way than the embeddings of training ({listed}); "
                "embed again with histovar.pp.embed as for training"
            )
        if here["mpp"] and in_training["mpp"] and here["mpp"] > COARSER * in_training["mpp"]:
            logger.warning(
                "use_rep: obsm[%r] was made from an image of %.3g um per pixel, in training it was %.3g: detail that "
                "the model was trained on is missing",
                key,
                here["mpp"],
                in_training["mpp"],
            )
