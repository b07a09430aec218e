"""Prediction of embeddings that are dask arrays."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from anndata import AnnData
from torch import Tensor

from histovar.anndata_io.lazy import ChunkedHistology
from histovar.anndata_io.prediction import Prediction
from histovar.model import Histology, TwoStageVARST

from .predictor import Predictor

# Torch uses all threads that it was given by itself; two chunks at once in one process would hinder each other.
_ONE_AT_A_TIME = threading.Lock()


def predict_lazily(
    adata: AnnData,
    model: TwoStageVARST,
    predictor: Predictor,
    random_state: int,
    *,
    depth: Tensor | None = None,
    place: Tensor | None = None,
    **condition: Any,
) -> Prediction:
    """A :class:`Prediction` of dask arrays, chunked as the embeddings are, each computed when it is asked for.

    Parameters
    ----------
    adata
        The object.
    model
        With both stages trained; one task of the graph, which every worker fetches once.
    predictor
        What to predict.
    random_state
        Seed of the draws; each chunk's own comes from it.
    depth, place
        As in :class:`Predictor`.
    **condition
        As :class:`ChunkedHistology` takes it.
    """
    import dask.array as da
    from dask.delayed import delayed

    inputs = ChunkedHistology(adata, model.config, **condition)
    shared = delayed(model, traverse=False)
    seeds = np.random.SeedSequence(random_state).generate_state(len(inputs.chunks))
    made = [
        delayed(_predict)(
            predictor,
            shared,
            histology,
            int(seed),
            *(None if t is None else t[chunk.start : chunk.stop] for t in (depth, place)),
            chunk.start,
        )
        for chunk, histology, seed in zip(inputs.chunks, inputs.aligned(shared), seeds, strict=True)
    ]
    empty = predictor.empty(model, 0)

    def whole(field: int, like: Any) -> Any:
        if like is None:
            return None
        parts = [
            da.from_delayed(
                part[field],  # type: ignore[index]
                (chunk.stop - chunk.start, *like.shape[1:]),
                like.dtype,
            )
            for part, chunk in zip(made, inputs.chunks, strict=True)
        ]
        return da.concatenate(parts)

    return Prediction(*(whole(i, like) for i, like in enumerate(empty)))


def _predict(
    predictor: Predictor,
    model: TwoStageVARST,
    inputs: Histology,
    random_state: int,
    depth: Tensor | None,
    place: Tensor | None,
    first_row: int,
) -> Prediction:
    with _ONE_AT_A_TIME:
        return predictor(model, inputs, random_state, depth=depth, place=place, first_row=first_row)
