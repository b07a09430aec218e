"""Histology of embeddings that are dask or zarr arrays, chunk by chunk, for any scheduler."""

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
    """Whether the embeddings are dask or zarr arrays."""
    return any(matrix.is_lazy(adata.obsm.get(key)) for key in keys)


class Chunk(NamedTuple):
    """Some consecutive spots, and where they and their neighbours are.

    Parameters
    ----------
    start, stop
        The spots.
    blocks
        Chunks of the embeddings that hold them and their neighbours.
    rows
        Rows of these blocks, side by side, that are needed.
    own
        Which of `rows` are the spots themselves.
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
        """The chunk of some number, given where chunks begin and the last ends."""
        start, stop = int(bounds[number]), int(bounds[number + 1])
        parts = [graph[start:stop] for graph in graphs]
        needed = np.unique(np.concatenate([np.arange(start, stop), *(part.indices for part in parts)]))
        home = np.searchsorted(bounds, needed, side="right") - 1
        blocks, which = np.unique(home, return_inverse=True)
        before = np.concatenate([[0], np.diff(bounds)[blocks].cumsum()[:-1]])
        small = np.min_scalar_type(len(needed))  # neighbours of all chunks are in memory, and sent to the workers
        return cls(
            start,
            stop,
            blocks.tolist(),
            (needed - bounds[blocks][which] + before[which]).astype(np.int32),
            np.searchsorted(needed, np.arange(start, stop)).astype(small),
            [(part.indptr.astype(np.int32), np.searchsorted(needed, part.indices).astype(small)) for part in parts],
        )

    def sources(self, embeddings: Sequence[Sequence[Any]], keys: Sequence[str]) -> tuple[Tensor, ...]:
        """Each embedding and its mean over each neighbourhood, from the blocks of each embedding."""
        found = []
        for key, blocks in zip(keys, embeddings, strict=True):
            stacked = np.concatenate([matrix.dense_float32(block) for block in blocks])
            values = gate.embedding_values(stacked[self.rows], key, self.start)
            found.append(torch.from_numpy(values[self.own]))
            for pointers, indices in self.neighbors:
                shares = np.repeat(1 / np.diff(pointers).clip(min=1), np.diff(pointers)).astype(np.float32)
                graph = sparse.csr_matrix((shares, indices.astype(np.int32), pointers), (len(self.own), len(values)))
                found.append(torch.from_numpy(graph @ values))
        return tuple(found)


def embedding(adata: AnnData, key: str, width: int | None = None) -> da.Array:
    """An embedding as dask array with whole rows in each chunk; values are checked when they are read.

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
    """What :func:`histovar.pp.niche` writes, features and fingerprints, as dask arrays chunked as the first embedding.

    Raises
    ------
    KeyError, ValueError
        If anything is missing or not as it should be.
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
    parts = [
        da.from_delayed(delayed(_side_by_side)(part, means), (chunk.stop - chunk.start, width), np.float32)
        for part, chunk in zip(inputs.histology("niche"), inputs.chunks, strict=True)
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
    return da.concatenate(parts), da.concatenate(fingerprints)


def _fingerprints(embeddings: list[Any], columns: list[NDArray[Any]]) -> NDArray[np.uint64]:
    return fingerprint.of_rows(*(matrix.dense_float32(values) for values in embeddings), *columns)


class ChunkedHistology:
    """Inputs of stage 2 for every chunk of embeddings, each computed when it is asked for.

    Neighbours are found at once, from coordinates, which are in memory. Embeddings are read twice: for the moments of
    every section, and for the spots themselves.

    Parameters
    ----------
    adata
        The object; its first embedding sets the chunks.
    config
        Of the model.
    use_rep, spatial_key, library_key, encoders, spacing_um
        As in :func:`histovar.anndata_io.histology.histology`.

    Raises
    ------
    KeyError, ValueError
        If anything is missing or not as the model needs it.
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
            place = gate.coordinates(adata, spatial_key)
            if config.coordinates:
                self.coordinates = section_coordinates(place, names)
            if config.n_neighbors:
                gate.check_neighbors(names, adata.n_obs, config.n_neighbors)
                density = spacing.density(adata, place, names, library_key, spacing_um)
                graphs, self.outline = Neighborhoods.of(place, names, config.n_neighbors, density)
        self.bounds = np.concatenate([[0], np.cumsum(arrays[0].chunks[0])])
        self.chunks = [Chunk.of(i, self.bounds, graphs) for i in range(len(self.bounds) - 1)]

    def histology(self, reading: str) -> list[Delayed]:
        """:class:`Histology` of every chunk, not aligned; blocks are not shared with readings of other names."""
        from dask.delayed import delayed

        # Names of their own: else blocks would be kept in memory from one reading to the next.
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
        """:class:`Histology` of every chunk as the model takes it."""
        from dask.delayed import delayed

        numbers = [self.sections[chunk.start : chunk.stop] for chunk in self.chunks]
        parts: dict[int, list[Delayed]] = {}
        for chunk, own in zip(self.histology("moments"), numbers, strict=True):
            of_chunk = delayed(_moments)(chunk, own)
            for section in np.unique(own).tolist():
                parts.setdefault(section, []).append(of_chunk[section])
        moments = {section: delayed(Moments.combined)(some) for section, some in parts.items()}
        firsts = np.unique(self.sections, return_index=True)[1]
        starts = [firsts[(chunk.start <= firsts) & (firsts < chunk.stop)] for chunk in self.chunks]
        return [
            delayed(_aligned)(
                model,
                inputs,
                own,
                {s: moments[s] for s in np.unique(own).tolist()},
                first - chunk.start,
                self.labels[first],
            )
            for inputs, own, first, chunk in zip(self.histology("spots"), numbers, starts, self.chunks, strict=True)
        ]


def _histology(
    chunk: Chunk,
    blocks: list[list[Any]],
    keys: list[str],
    outline: NDArray[np.float32] | None,
    coordinates: NDArray[np.float32],
    covariates: NDArray[np.float32],
) -> Histology:
    place, extra = torch.from_numpy(coordinates.copy()), torch.from_numpy(covariates.copy())
    sources = chunk.sources(blocks, keys) + (() if outline is None else (torch.from_numpy(outline.copy()),))
    return Histology(sources, place, extra, torch.zeros(len(place)))


def _side_by_side(histology: Histology, which: list[int]) -> NDArray[np.float32]:
    """Some of the sources."""
    return np.concatenate([histology.sources[i].numpy() for i in which], axis=1)


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
    """Align a chunk; of sections that begin in it, at its spots `first`, warn if they are unlike those of training."""
    where = model.device
    there = {section: own.to(where) for section, own in moments.items()}
    numbers = torch.from_numpy(sections).to(where)
    aligned = model.var_stage.condition.align(inputs.map(lambda t: t.to(where)), numbers, there).map(Tensor.cpu)
    histology.warn_of_novelty(aligned.novelty[first].numpy(), labels)
    return aligned
