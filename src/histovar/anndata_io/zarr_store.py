"""Zarr stores read and written chunk by chunk, so that an object need never be in memory whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from histovar._atomic import atomic_directory, directory_lock, flush_tree, rename_directory
from histovar._version import __version__

from .zarr_check import missing_chunks, open_store

if TYPE_CHECKING:
    import dask.array as da

# Spots of a chunk: 8 MB of embeddings 1,024 wide.
ROWS_AT_ONCE = 2048
# An unfinished store: what it will be, marks of the chunks that are done, and the store itself, before and after all
# its chunks are.
IDENTITY, DONE, STORE, COMPLETE = "identity.json", "done", "store.zarr", "complete.zarr"


def read_zarr(path: Path, genes: list[str] | None = None, rows_at_once: int = ROWS_AT_ONCE) -> AnnData:
    """A store's spots; expression, embeddings and other arrays of ``obsm`` as dask arrays.

    Parameters
    ----------
    path
        AnnData as zarr.
    genes
        Names of the genes that the object is to have, whose expression is then left alone.
    rows_at_once
        Spots in a chunk.

    Raises
    ------
    ValueError
        If it is no such store, is pickled or lacks chunk files; of damaged chunks, when they are computed.
    """
    try:
        group: Any = open_store(path)
        obs, stored = group["obs"], group["obsm"]
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{str(path)!r} is not an AnnData in zarr: {error}") from None

    def lazy(slot: str) -> Any:
        return _lazy(group[slot], rows_at_once, f"{slot} of {str(path)!r}")

    adata = AnnData(obs=ad.io.read_elem(obs), var=pd.DataFrame(index=pd.Index(genes or [], dtype=str)))
    if genes is None:
        adata = AnnData(obs=adata.obs, var=ad.io.read_elem(group["var"]))
        adata.X = lazy("X") if "X" in group else None
        for key in group["layers"]:
            adata.layers[key] = lazy(f"layers/{key}")
    for key in stored:
        adata.obsm[key] = lazy(f"obsm/{key}")
    if "uns" in group and "spatial" in group["uns"]:
        adata.uns["spatial"] = ad.io.read_elem(group["uns"]["spatial"])
    return adata


class _Stored:
    """A matrix of a store, whose errors say which it is."""

    def __init__(self, matrix: Any, what: str) -> None:
        self.matrix, self.what = matrix, what
        self.shape, self.dtype, self.ndim = matrix.shape, matrix.dtype, len(matrix.shape)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.matrix[index]
        except MemoryError:
            raise
        except Exception as error:  # every codec has its own
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.what} is damaged; copy or write the store again ({reason})") from error


def _lazy(element: Any, rows_at_once: int, what: str) -> Any:
    """A stored matrix as dask array; a table in memory."""
    import dask.array as da

    shape = element.attrs.get("shape", getattr(element, "shape", None))
    if shape is None:
        return ad.io.read_elem(element)
    is_sparse = not hasattr(element, "chunks")
    matrix = _Stored(ad.io.sparse_dataset(element) if is_sparse else element, what)
    meta = sparse.csr_matrix((0, 0), dtype=matrix.dtype) if is_sparse else None
    chunks = (min(rows_at_once, shape[0]), *shape[1:])
    return da.from_array(matrix, chunks=chunks, name=False, asarray=not is_sparse, meta=meta)


def unfinished(path: Path) -> Path:
    """Where :func:`write_zarr` keeps what is done of a store until all is."""
    return path.with_name(f"{path.name}.part")


def write_zarr(adata: AnnData, path: Path, identity: Mapping[str, Any]) -> None:
    """Write an object whose dask arrays share their chunks of spots, and continue what was interrupted.

    Each chunk is computed and written by one task of the active scheduler. Until all are, the store is in
    ``{path}.part`` (seen by all workers), beside its identity and marks of the chunks that are done. The directory is
    there whole or not at all, and goes when the store has its name, so that a process killed at any moment leaves
    what the next call continues.

    Parameters
    ----------
    adata
        The object.
    path
        Where to write; what is there is replaced.
    identity
        What tells this content from any other, in plain types, under names that a user knows.

    Raises
    ------
    ValueError
        If ``{path}.part`` is being written by another process, was not written by histovar, or has chunks of another
        identity.
    """
    from dask.base import compute
    from dask.delayed import delayed

    part = unfinished(path)
    lazy = _lazy_arrays(adata)
    bounds = np.concatenate([[0], np.cumsum(next(iter(lazy.values())).chunks[0])])
    wanted = json.loads(json.dumps({"histovar": __version__, **identity, "chunks": bounds.tolist()}))
    if not _can_be_continued(part, wanted):
        _begin(part, adata, lazy, wanted)
    with _locked(part):
        done = _chunks_done(part, list(lazy))
        blocks = {name: values.to_delayed().reshape(len(bounds) - 1, -1)[:, 0] for name, values in lazy.items()}
        tasks = [
            delayed(_write_chunk)(str(part.resolve()), i, int(bounds[i]), {name: b[i] for name, b in blocks.items()})
            for i in range(len(bounds) - 1)
            if i not in done
        ]
        compute(tasks)
        _finish(part, path)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    with directory_lock(part, seconds=0) as locked:
        if locked is False:
            raise ValueError(f"{str(part)!r} is being written by another process; wait for it, or give another --out")
        yield


def _can_be_continued(part: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether there is an unfinished store of this identity; False where there is none, or nothing is done of another.

    Raises
    ------
    ValueError
        If the directory is not histovar's, or has chunks of another identity.
    """
    if not part.exists():
        return False
    if part.is_dir():
        with _locked(part):
            if not any(part.iterdir()):
                return False
    try:
        there = json.loads((part / IDENTITY).read_text())
        is_ours = isinstance(there, dict) and "histovar" in there
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{str(part)!r} is needed for what is unfinished, and was not written by histovar; move it, or give "
            "another --out"
        )
    n_done = len(list((part / DONE).glob("*")))
    if not (part / STORE).exists() or (there != wanted and not n_done):
        return False
    if there != wanted:
        names = sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name))
        raise ValueError(
            f"{str(part)!r} has {n_done} chunks of an unfinished prediction that differs in {', '.join(names)}; finish "
            f"it as it was begun, or delete it (rm -r {str(part)!r})"
        )
    return True


def _begin(part: Path, adata: AnnData, lazy: Mapping[str, da.Array], identity: Mapping[str, Any]) -> None:
    """Make an unfinished store with all but its chunks, in one step."""
    import zarr

    in_memory = AnnData(obs=adata.obs, var=adata.var, uns=adata.uns)
    for name, slots in (("layers", adata.layers), ("obsm", adata.obsm)):
        for key, values in slots.items():
            if f"{name}/{key}" not in lazy:
                getattr(in_memory, name)[key] = values
    with atomic_directory(part) as beside:
        (beside / IDENTITY).write_text(json.dumps(identity))
        (beside / DONE).mkdir()
        write_whole(in_memory, beside / STORE)
        root = zarr.open_group(beside / STORE, mode="r+", use_consolidated=False)
        for name, values in lazy.items():
            chunks: Any = values.chunksize
            # Every chunk has a file, so that it is known which are lost.
            config: Any = {"write_empty_chunks": True}
            array = root.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, config=config)
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def write_whole(adata: AnnData, path: Path) -> None:
    """Write an object in memory to a store in which every chunk has a file, so that it is known which are lost."""
    import zarr

    with zarr.config.set({"array.write_empty_chunks": True}):
        adata.write_zarr(path)


def _chunks_done(part: Path, names: list[str]) -> set[int]:
    """Numbers of the chunks that were marked as done, and whose files are there."""
    import zarr

    root: Any = zarr.open_group(part / STORE, mode="r", use_consolidated=False)
    lost = [np.flatnonzero(missing_chunks(root[name])) for name in names]  # one chunk holds all columns
    return {int(mark.name) for mark in (part / DONE).iterdir()} - set(np.concatenate(lost).tolist())


def _finish(part: Path, path: Path) -> None:
    """Give a store its name, in place of what has it, and remove the rest."""
    import zarr

    zarr.consolidate_metadata(part / STORE)
    flush_tree(part / STORE)
    # Under another name while two stores are exchanged, lest the earlier one is taken for what is unfinished.
    os.rename(part / STORE, part / COMPLETE)
    rename_directory(part / COMPLETE, path)
    shutil.rmtree(part)


def _lazy_arrays(adata: AnnData) -> dict[str, da.Array]:
    """Dask arrays of an object by their place, in the same chunks of whole rows, all of a size but the last."""
    import dask.array as da

    found = {
        f"{name}/{key}": values
        for name, store in (("layers", adata.layers), ("obsm", adata.obsm))
        for key, values in store.items()
        if isinstance(values, da.Array)
    }
    rows = max(next(iter(found.values())).chunks[0])
    return {name: values.rechunk((rows, *values.shape[1:])) for name, values in found.items()}


def _write_chunk(path: str, number: int, start: int, blocks: Mapping[str, Any]) -> None:
    import zarr

    root: Any = zarr.open_group(Path(path) / STORE, mode="r+", use_consolidated=False)
    for name, values in blocks.items():
        root[name][start : start + len(values)] = values
    (Path(path) / DONE / str(number)).touch()
