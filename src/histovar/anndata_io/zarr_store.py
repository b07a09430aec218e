"""Read and write zarr stores chunk by chunk, for objects that do not fit into memory."""

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

# Spots in a chunk: 8 MB of embeddings of width 1,024.
ROWS_AT_ONCE = 2048
# Files of an unfinished store: identity of the content, marks of finished chunks, and the store itself, until and after
# all its chunks are written.
IDENTITY, DONE, STORE, COMPLETE = "identity.json", "done", "store.zarr", "complete.zarr"


def read_zarr(path: Path, genes: list[str] | None = None, rows_at_once: int = ROWS_AT_ONCE) -> AnnData:
    """Read an AnnData in zarr lazily: expression, embeddings and other arrays of ``obsm`` as dask arrays.

    Parameters
    ----------
    path
        AnnData as zarr.
    genes
        Names of genes that the object gets in place of the store's; expression is then not read.
    rows_at_once
        Spots in a chunk.

    Raises
    ------
    ValueError
        If it is not AnnData in zarr, is pickled or lacks chunk files; for damaged chunks, when they are computed.
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
    """A matrix of a store, whose read errors name it."""

    def __init__(self, matrix: Any, what: str) -> None:
        self.matrix, self.what = matrix, what
        self.shape, self.dtype, self.ndim = matrix.shape, matrix.dtype, len(matrix.shape)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.matrix[index]
        except MemoryError:
            raise
        except Exception as error:  # codecs raise errors of different types
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.what} is damaged; copy or write the store again ({reason})") from error


def _lazy(element: Any, rows_at_once: int, what: str) -> Any:
    """Read a stored matrix as a dask array; a table into memory."""
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
    """Directory in which :func:`write_zarr` keeps an unfinished store."""
    return path.with_name(f"{path.name}.part")


def write_zarr(adata: AnnData, path: Path, identity: Mapping[str, Any]) -> None:
    """Write an object chunk by chunk to a zarr store; resume an interrupted write.

    All dask arrays are written in the same chunks of spots, each chunk by one task of the active scheduler. Until all
    are written, the store is in ``{path}.part`` (visible to all workers), beside its identity and marks of the finished
    chunks. This directory appears complete or not at all, and is removed when the store has got its name, so that after
    a kill at any moment the next call can resume.

    Parameters
    ----------
    adata
        The object.
    path
        Where to write; an existing store is replaced.
    identity
        Facts that identify the content, in plain types; users see their names in messages.

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
    identity_record = json.loads(json.dumps({"histovar": __version__, **identity, "chunks": bounds.tolist()}))
    if not _can_be_continued(part, identity_record):
        _begin(part, adata, lazy, identity_record)
    with _locked(part):
        done = _chunks_done(part, list(lazy))
        # One block holds all columns. Optimised one by one, the arrays would not share the task that predicts a chunk.
        blocks = {name: values.to_delayed(optimize_graph=False).ravel() for name, values in lazy.items()}
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


def _can_be_continued(part: Path, identity: Mapping[str, Any]) -> bool:
    """True if there is an unfinished store of this identity; False if there is none, or another without chunks.

    Raises
    ------
    ValueError
        If the directory was not written by histovar, or has chunks of another identity.
    """
    if not part.exists():
        return False
    if part.is_dir():
        with _locked(part):
            if not any(part.iterdir()):
                return False
    try:
        recorded = json.loads((part / IDENTITY).read_text())
        is_ours = isinstance(recorded, dict) and "histovar" in recorded
    except (OSError, ValueError):
        is_ours = False
    if not is_ours:
        raise ValueError(
            f"{str(part)!r} is needed for the unfinished output, but was not written by histovar; move it, or give "
            "another --out"
        )
    n_done = len(list((part / DONE).glob("*")))
    if not (part / STORE).exists() or (recorded != identity and not n_done):
        return False
    if recorded != identity:
        names = sorted(name for name in {*recorded, *identity} if recorded.get(name) != identity.get(name))
        raise ValueError(
            f"{str(part)!r} has {n_done} chunks of an unfinished prediction that differs in {', '.join(names)}; finish "
            f"it with the same arguments, or delete it (rm -r {str(part)!r})"
        )
    return True


def _begin(part: Path, adata: AnnData, lazy: Mapping[str, da.Array], identity: Mapping[str, Any]) -> None:
    """Create an unfinished store, complete but for its chunks."""
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
            # Write a file for every chunk, so that missing ones are noticed.
            config: Any = {"write_empty_chunks": True}
            array = root.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype, config=config)
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def write_whole(adata: AnnData, path: Path) -> None:
    """Write an object in memory to a store with a file for every chunk, so that missing ones are noticed."""
    import zarr

    with zarr.config.set({"array.write_empty_chunks": True}):
        adata.write_zarr(path)


def _chunks_done(part: Path, names: list[str]) -> set[int]:
    """Numbers of the chunks that are marked as finished and whose files exist."""
    import zarr

    root: Any = zarr.open_group(part / STORE, mode="r", use_consolidated=False)
    lost = [np.flatnonzero(missing_chunks(root[name])) for name in names]  # one chunk holds all columns
    return {int(mark.name) for mark in (part / DONE).iterdir()} - set(np.concatenate(lost).tolist())


def _finish(part: Path, path: Path) -> None:
    """Rename a finished store to its destination, replacing an earlier one, and remove the temporary directory."""
    import zarr

    zarr.consolidate_metadata(part / STORE)
    flush_tree(part / STORE)
    # Exchanging two stores puts the earlier one here: under this name it is not mistaken for an unfinished store.
    os.rename(part / STORE, part / COMPLETE)
    rename_directory(part / COMPLETE, path)
    shutil.rmtree(part)


def _lazy_arrays(adata: AnnData) -> dict[str, da.Array]:
    """Dask arrays of an object by slot, rechunked to the same chunks of whole rows, of equal size but for the last."""
    import dask.array as da

    arrays = {
        f"{name}/{key}": values
        for name, store in (("layers", adata.layers), ("obsm", adata.obsm))
        for key, values in store.items()
        if isinstance(values, da.Array)
    }
    rows = max(next(iter(arrays.values())).chunks[0])
    return {name: values.rechunk((rows, *values.shape[1:])) for name, values in arrays.items()}


def _write_chunk(path: str, number: int, start: int, blocks: Mapping[str, Any]) -> None:
    import zarr

    root: Any = zarr.open_group(Path(path) / STORE, mode="r+", use_consolidated=False)
    for name, values in blocks.items():
        root[name][start : start + len(values)] = values
    (Path(path) / DONE / str(number)).touch()
