"""Predict lazily from embeddings that are dask arrays, chunk by chunk."""

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

# One chunk at a time in each process: torch already uses all threads it was given.
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
    """Make a :class:`Prediction` of lazy dask arrays, with the chunks of the embeddings.

    Parameters
    ----------
    adata
        Object whose embeddings are dask arrays.
    model
        Model with both stages trained; a single task of the dask graph, which every worker fetches once.
    predictor
        What to predict, and how.
    random_state
        Seed of the draws, from which the seed of each chunk is derived.
    depth, place
        As in :class:`Predictor`.
    **condition
        Further arguments of :class:`ChunkedHistology`.
    """
    import dask.array as da
    from dask.delayed import delayed

    inputs = ChunkedHistology(adata, model.config, **condition)
    shared = delayed(model, traverse=False)
    seeds = np.random.SeedSequence(random_state).generate_state(len(inputs.chunks))
    chunk_predictions = [
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

    def concat_chunks(field: int, like: Any) -> Any:
        if like is None:
            return None
        arrays = [
            da.from_delayed(
                prediction[field],  # type: ignore[index]
                (chunk.stop - chunk.start, *like.shape[1:]),
                like.dtype,
            )
            for prediction, chunk in zip(chunk_predictions, inputs.chunks, strict=True)
        ]
        return da.concatenate(arrays)

    return Prediction(*(concat_chunks(i, like) for i, like in enumerate(empty)))


def _predict(
    predictor: Predictor,
    model: TwoStageVARST,
    inputs: Histology,
    random_state: int,
    depth: Tensor | None,
    place: Tensor | None,
    first_row: int,
) -> Prediction:
    """Predict one chunk."""
    with _ONE_AT_A_TIME:
        return predictor(model, inputs, random_state, depth=depth, place=place, first_row=first_row)
