"""Read the inputs of stage 2 chunk by chunk from embeddings that are dask or zarr arrays, for any dask scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from histovar._spots import section_numbers
from histovar.model import Histology, ModelConfig, TwoStageVARST
from histovar.model.condition import Moments

from . import fingerprint, gate, histology, matrix, spacing
from .neighbors import Neighborhoods, section_coordinates
from .zarr_check import check_chunks

if TYPE_CHECKING:
    import dask.array as da
    from dask.delayed import Delayed


def is_lazy(adata: AnnData, keys: Sequence[str]) -> bool:
    """True if an embedding is a dask or zarr array."""
    return any(matrix.is_lazy(adata.obsm.get(key)) for key in keys)


class Chunk(NamedTuple):
    """A chunk of consecutive spots, with the rows of their neighbours.

    Parameters
    ----------
    start, stop
        First row, and the row after the last.
    blocks
        Numbers of the embeddings' chunks that hold the spots and their neighbours.
    rows
        Rows needed of these blocks, when the blocks are concatenated.
    own
        Positions of the spots themselves in `rows`.
    neighbors
        For each neighbourhood, index pointers and indices into `rows` of the spots' neighbours.
    """

    start: int
    stop: int
    blocks: list[int]
    rows: NDArray[np.integer]
    own: NDArray[np.integer]
    neighbors: list[tuple[NDArray[np.integer], NDArray[np.integer]]]

    @classmethod
    def of(cls, number: int, bounds: NDArray[np.integer], graphs: Sequence[sparse.csr_matrix]) -> Chunk:
        """Find the rows needed for a chunk, from the chunks' bounds and the neighbour graphs."""
        start, stop = int(bounds[number]), int(bounds[number + 1])
        subgraphs = [graph[start:stop] for graph in graphs]
        needed = np.unique(np.concatenate([np.arange(start, stop), *(graph.indices for graph in subgraphs)]))
        block_of_row = np.searchsorted(bounds, needed, side="right") - 1
        blocks, index = np.unique(block_of_row, return_inverse=True)
        offsets = np.concatenate([[0], np.diff(bounds)[blocks].cumsum()[:-1]])
        dtype = np.min_scalar_type(len(needed))  # small: neighbours of all chunks are in memory and sent to workers
        return cls(
            start,
            stop,
            blocks.tolist(),
            (needed - bounds[blocks][index] + offsets[index]).astype(np.int32),
            np.searchsorted(needed, np.arange(start, stop)).astype(dtype),
            [
                (graph.indptr.astype(np.int32), np.searchsorted(needed, graph.indices).astype(dtype))
                for graph in subgraphs
            ],
        )

    def sources(self, embeddings: Sequence[Sequence[Any]], keys: Sequence[str]) -> tuple[Tensor, ...]:
        """Compute each embedding and its mean over each neighbourhood, from the embeddings' blocks."""
        tensors = []
        for key, blocks in zip(keys, embeddings, strict=True):
            stacked = np.concatenate([matrix.dense_float32(block) for block in blocks])
            values = gate.embedding_values(stacked[self.rows], key, self.start)
            tensors.append(torch.from_numpy(values[self.own]))
            for pointers, indices in self.neighbors:
                shares = np.repeat(1 / np.diff(pointers).clip(min=1), np.diff(pointers)).astype(np.float32)
                graph = sparse.csr_matrix((shares, indices.astype(np.int32), pointers), (len(self.own), len(values)))
                tensors.append(torch.from_numpy(graph @ values))
        return tuple(tensors)


def embedding(adata: AnnData, key: str, width: int | None = None) -> da.Array:
    """Get an embedding as a dask array with whole rows in each chunk; values are checked when they are read.

    Raises
    ------
    KeyError, ValueError
        As :func:`gate.embedding_matrix`.
    """
    import dask.array as da

    values = gate.embedding_matrix(adata, key, width)
    if matrix.library(values) == "zarr":
        check_chunks(values, f"use_rep: obsm[{key!r}]")
        values = da.from_zarr(values)
    elif matrix.library(values) != "dask":
        values = da.from_array(gate.embedding_values(values, key))
    return values.rechunk({1: -1})


def niche(
    adata: AnnData, use_rep: Sequence[str], n_neighbors: Sequence[int], spatial_key: str, library_key: str | None
) -> tuple[da.Array, da.Array]:
    """Compute niche features and fingerprints for :func:`histovar.pp.niche`, as dask arrays.

    They are chunked as the first embedding.

    Raises
    ------
    KeyError, ValueError
        If an embedding, coordinates or sections are missing or malformed.
    """
    import dask.array as da
    from dask.delayed import delayed

    widths = [embedding(adata, key).shape[1] for key in use_rep]
    config = ModelConfig.default(2, widths, n_neighbors=n_neighbors)
    inputs = ChunkedHistology(
        adata, config, use_rep=use_rep, spatial_key=spatial_key, library_key=library_key, encoders={}
    )
    n_sources = len(config.source_dims)
    means = [i for i in range(n_sources) if i % (1 + len(n_neighbors)) or i == n_sources - 1]
    width = sum(config.source_dims[i] for i in means)
    features = [
        da.from_delayed(delayed(_concat_sources)(histology, means), (chunk.stop - chunk.start, width), np.float32)
        for histology, chunk in zip(inputs.histology("niche"), inputs.chunks, strict=True)
    ]
    names = gate.sections(adata, library_key)
    columns = [gate.coordinates(adata, spatial_key), *([] if names is None else [names])]
    blocks = [values.to_delayed().ravel() for values in inputs.embeddings]
    fingerprints = [
        da.from_delayed(
            delayed(_fingerprints)([column[i] for column in blocks], [c[chunk.start : chunk.stop] for c in columns]),
            (chunk.stop - chunk.start, 1),
            np.uint64,
        )
        for i, chunk in enumerate(inputs.chunks)
    ]
    return da.concatenate(features), da.concatenate(fingerprints)


def _fingerprints(embeddings: list[Any], columns: list[NDArray[Any]]) -> NDArray[np.uint64]:
    return fingerprint.of_rows(*(matrix.dense_float32(values) for values in embeddings), *columns)


class ChunkedHistology:
    """Inputs of stage 2 as delayed chunks, for embeddings that do not fit into memory.

    Neighbours are found immediately, from the coordinates, which are in memory. Embeddings are read twice: for the
    mean and variance of every section, and for the spots themselves.

    Parameters
    ----------
    adata
        The object; its first embedding sets the chunks.
    config
        The model's configuration.
    use_rep, spatial_key, library_key, encoders, spacing_um
        As in :func:`histovar.anndata_io.histology.histology`.

    Raises
    ------
    KeyError, ValueError
        If an input is missing or not as the model needs it.
    """

    def __init__(
        self,
        adata: AnnData,
        config: ModelConfig,
        *,
        use_rep: Sequence[str],
        spatial_key: str,
        library_key: str | None,
        encoders: dict[str, Any],
        spacing_um: float | None = None,
    ) -> None:
        histology.check_number_of_embeddings(use_rep, config)
        self.use_rep, self.config = list(use_rep), config
        arrays = [embedding(adata, k, w) for k, w in zip(use_rep, config.embedding_dims, strict=True)]
        self.embeddings = [values.rechunk({0: arrays[0].chunks[0]}) for values in arrays]
        names = gate.sections(adata, library_key, spatial_key)
        self.sections = section_numbers(names, adata.n_obs)
        self.labels = np.full(adata.n_obs, "all spots") if names is None else names
        self.covariates = histology.covariates(adata, encoders)
        self.coordinates = np.empty((adata.n_obs, 0), np.float32)
        self.outline = np.empty((adata.n_obs, 0), np.float32)
        graphs: list[sparse.csr_matrix] = []
        if config.coordinates or config.n_neighbors:
            xy = gate.coordinates(adata, spatial_key)
            if config.coordinates:
                self.coordinates = section_coordinates(xy, names)
            if config.n_neighbors:
                gate.check_neighbors(names, adata.n_obs, config.n_neighbors)
                density = spacing.density(adata, xy, names, library_key, spacing_um)
                graphs, self.outline = Neighborhoods.of(xy, names, config.n_neighbors, density)
        self.bounds = np.concatenate([[0], np.cumsum(arrays[0].chunks[0])])
        self.chunks = [Chunk.of(i, self.bounds, graphs) for i in range(len(self.bounds) - 1)]

    def histology(self, reading: str) -> list[Delayed]:
        """Delayed :class:`Histology` of every chunk, not yet aligned; `reading` names this pass over the data."""
        from dask.delayed import delayed

        # Each pass names its tasks, or dask would keep blocks in memory from one pass to the next.
        blocks = [
            values.map_blocks(
                matrix.dense, dtype=values.dtype, meta=np.empty((0, 0), values.dtype), name=f"{reading}-{values.name}"
            )
            .to_delayed()
            .ravel()
            for values in self.embeddings
        ]
        return [
            delayed(_histology)(
                chunk,
                [[column[i] for i in chunk.blocks] for column in blocks],
                self.use_rep,
                self.outline[chunk.start : chunk.stop] if self.config.has_outline else None,
                self.coordinates[chunk.start : chunk.stop],
                self.covariates[chunk.start : chunk.stop],
            )
            for chunk in self.chunks
        ]

    def aligned(self, model: Delayed) -> list[Delayed]:
        """Delayed :class:`Histology` of every chunk, aligned with the statistics of its sections for the model."""
        from dask.delayed import delayed

        numbers = [self.sections[chunk.start : chunk.stop] for chunk in self.chunks]
        by_section: dict[int, list[Delayed]] = {}
        for inputs, sections in zip(self.histology("moments"), numbers, strict=True):
            chunk_moments = delayed(_moments)(inputs, sections)
            for section in np.unique(sections).tolist():
                by_section.setdefault(section, []).append(chunk_moments[section])
        moments = {section: delayed(Moments.combined)(chunks) for section, chunks in by_section.items()}
        firsts = np.unique(self.sections, return_index=True)[1]
        starts = [firsts[(chunk.start <= firsts) & (firsts < chunk.stop)] for chunk in self.chunks]
        return [
            delayed(_aligned)(
                model,
                inputs,
                sections,
                {section: moments[section] for section in np.unique(sections).tolist()},
                first - chunk.start,
                self.labels[first],
            )
            for inputs, sections, first, chunk in zip(
                self.histology("spots"), numbers, starts, self.chunks, strict=True
            )
        ]


def _histology(
    chunk: Chunk,
    blocks: list[list[Any]],
    keys: list[str],
    outline: NDArray[np.float32] | None,
    coordinates: NDArray[np.float32],
    covariates: NDArray[np.float32],
) -> Histology:
    sources = chunk.sources(blocks, keys) + (() if outline is None else (torch.from_numpy(outline.copy()),))
    return Histology(
        sources,
        torch.from_numpy(coordinates.copy()),
        torch.from_numpy(covariates.copy()),
        torch.zeros(len(coordinates)),
    )


def _concat_sources(histology: Histology, indices: list[int]) -> NDArray[np.float32]:
    """Concatenate the columns of selected sources."""
    return np.concatenate([histology.sources[i].numpy() for i in indices], axis=1)


def _moments(histology: Histology, sections: NDArray[np.integer]) -> dict[int, Moments]:
    return Moments.by_section(histology, torch.from_numpy(sections))


def _aligned(
    model: TwoStageVARST,
    inputs: Histology,
    sections: NDArray[np.integer],
    moments: dict[int, Moments],
    first: NDArray[np.integer],
    labels: NDArray[np.str_],
) -> Histology:
    """Align a chunk; warn of novel sections whose first spot, `first`, is in this chunk."""
    device = model.device
    on_device = {section: section_moments.to(device) for section, section_moments in moments.items()}
    numbers = torch.from_numpy(sections).to(device)
    aligned = model.var_stage.condition.align(inputs.map(lambda t: t.to(device)), numbers, on_device).map(Tensor.cpu)
    histology.warn_of_novelty(aligned.novelty[first].numpy(), labels)
    return aligned
