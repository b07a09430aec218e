"""Check zarr stores for pickles and missing or truncated chunk files before anything is decoded."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histovar.model.weights import file_digest

from .slots import RECORDED

if TYPE_CHECKING:
    import zarr

logger = logging.getLogger(__name__)

# Bytes of Blosc's header; the last four hold the compressed length.
BLOSC_HEADER = 16
# Parts of a store that a prediction reads or copies.
READ_BY_PREDICTION = ("obs", "obsm", "uns/spatial")


class StoreError(ValueError):
    """A zarr store is not safe to read; the message says why in one line."""


def open_store(path: Path) -> zarr.Group:
    """Open an AnnData in zarr after checking its metadata and chunk files; nothing is decoded.

    zarr reads missing chunk files as zeros, and does not write files of chunks that are all zero. So missing files are
    an error where zeros are implausible, and give a warning where expression may be zero.

    Parameters
    ----------
    path
        Directory of the store.

    Raises
    ------
    StoreError
        If an array is pickled, or a chunk file is missing or truncated.
    """
    import zarr

    store = zarr.open_group(path, mode="r")
    for name, array in store.members(max_depth=None):
        if isinstance(array, zarr.Array):
            _refuse_pickles(array, f"{name} of {str(path)!r}")
            slot = "/".join(name.split("/")[: 2 if name.startswith(("layers/", "obsm/", "obs/", "var/")) else 1])
            _refuse_cut(array, f"{slot} of {str(path)!r}")
    written_by_histovar = _recorded_slots(store)
    for slot, element in _elements(store):
        what = f"{slot} of {str(path)!r}"
        if slot in ("obs", "var"):
            _check_table(element, what)
        else:
            may_be_zero = not slot.startswith("obsm/") or slot in written_by_histovar
            _check_matrix(element, what, may_be_zero=may_be_zero)
    return store


def check_chunks(array: zarr.Array, what: str) -> None:
    """Refuse an array of embeddings or coordinates with missing or truncated chunk files.

    Raises
    ------
    StoreError
        If a chunk file is missing or truncated.
    """
    _refuse_lost(array, what)
    _refuse_cut(array, what)


def _refuse_lost(array: zarr.Array, what: str) -> None:
    missing = missing_chunks(array)
    if missing.any():
        _refuse_missing(missing, what)


def missing_chunks(array: zarr.Array) -> NDArray[np.bool_]:
    """Mask of the chunks (shards of a sharded array) that have no file, in the shape of the chunk grid."""
    from zarr.core.sync import sync

    async def stored() -> set[str]:
        return {key async for key in array.store.list_prefix(prefix)}

    prefix = f"{array.path}/" if array.path else ""
    keys = sync(stored())
    sizes = array.shards or array.chunks
    grid = tuple(math.ceil(length / size) for length, size in zip(array.shape, sizes, strict=True))
    missing = np.zeros(grid, bool)
    for position in np.ndindex(grid):
        missing[position] = f"{prefix}{array.metadata.encode_chunk_key(position)}" not in keys
    return missing


def _refuse_cut(array: zarr.Array, what: str) -> None:
    """Refuse an array with a chunk file shorter than its Blosc header says: Blosc would read past its end.

    Other compressors check this themselves; chunks within a shard are not checked.
    """
    if array.shards is not None or not any("blosc" in repr(codec).lower() for codec in array.compressors):
        return
    from zarr.abc.store import RangeByteRequest
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    prefix = f"{array.path}/" if array.path else ""

    async def is_cut(key: str) -> bool:
        header = await array.store.get(key, default_buffer_prototype(), RangeByteRequest(0, BLOSC_HEADER))
        content = b"" if header is None else header.to_bytes()
        return len(content) < BLOSC_HEADER or await array.store.getsize(key) < int.from_bytes(content[12:], "little")

    async def first_cut() -> str | None:
        async for key in array.store.list_prefix(prefix):
            if not key.rsplit("/", 1)[-1].startswith((".", "zarr.json")) and await is_cut(key):
                return key
        return None

    if cut := sync(first_cut()):
        raise StoreError(f"{what} is damaged; copy or write the store again (its chunk file {cut!r} is truncated)")


def content_digest(path: Path) -> str:
    """SHA-256 of the names and contents of all files that a prediction reads from a store; takes about 1 s per GB."""
    files = [file for file in path.iterdir() if file.is_file()]
    files += [file for folder in READ_BY_PREDICTION for file in (path / folder).rglob("*") if file.is_file()]
    names = sorted(str(file.relative_to(path)) for file in files)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: file_digest(path / name), names)
        lines = [f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _refuse_pickles(array: zarr.Array, what: str) -> None:
    metadata: Any = array.metadata
    codecs = metadata.codecs if metadata.zarr_format == 3 else (metadata.compressor, *(metadata.filters or ()))
    if any("pickle" in repr(codec).lower() for codec in codecs):
        raise StoreError(f"{what} is pickled and is not read, since unpickling runs code; have it written as text")


def _recorded_slots(store: zarr.Group) -> set[str]:
    """Read the slots that histovar recorded as its own, such as ``"obsm/histovar"``."""
    import anndata as ad

    uns: Any = store["uns"] if "uns" in store else None
    entries = [entry for _, entry in uns.members()] if uns is not None else []
    records = [entry[RECORDED] for entry in entries if hasattr(entry, "members") and RECORDED in entry]
    return {str(slot) for record in records for slot in np.ravel(ad.io.read_elem(record))}


def _elements(store: zarr.Group) -> Iterator[tuple[str, Any]]:
    """Yield tables and matrices of an AnnData, with their slots."""
    for name in ("obs", "var", "X"):
        if name in store:
            yield name, store[name]
    for name in ("layers", "obsm"):
        group: Any = store[name] if name in store else None
        for key, element in group.members() if group is not None else ():
            yield f"{name}/{key}", element


def _check_table(table: Any, what: str) -> None:
    """Refuse a table whose names, or labels of several categories, are missing; of numbers this cannot be known."""
    index = table.attrs.get("_index")
    for name, column in table.members():
        if name == index and hasattr(column, "chunks"):
            _refuse_lost(column, f"{name} of {what}")
        elif column.attrs.get("encoding-type") == "categorical" and column["categories"].shape[0] > 1:
            missing = missing_chunks(column["codes"])
            if missing.all():
                _refuse_missing(missing, f"{name} of {what}")
            if missing.any():
                logger.warning("%s", _describe(missing, f"{name} of {what}", "as of the first category"))


def _check_matrix(element: Any, what: str, *, may_be_zero: bool) -> None:
    """Refuse a matrix that lacks chunk files; if it may hold zeros, only one that lacks all chunks of some spots."""
    kind = element.attrs.get("encoding-type")
    if hasattr(element, "chunks"):
        missing = missing_chunks(element)
        lost_spots = missing.reshape(len(missing), -1).all(1) if missing.ndim else missing
        if missing.any() and may_be_zero and (missing.all() or not lost_spots.any()):
            logger.warning("%s", _describe(missing, what, "as zeros"))
        elif missing.any():
            _refuse_missing(missing, what)
    elif kind in ("csr_matrix", "csc_matrix") and element["data"].shape[0]:
        # Sparse matrices store no zeros, and at most one index of a row or column is 0: no chunk can be all zero.
        for name in ("data", "indices", "indptr") if 1 not in element.attrs["shape"] else ("data",):
            _refuse_lost(element[name], f"{name} of {what}")
    elif kind == "dataframe" and not may_be_zero:
        for name, column in element.members():
            if hasattr(column, "chunks"):
                _refuse_lost(column, f"{name} of {what}")


def _refuse_missing(missing: NDArray[np.bool_], what: str) -> None:
    raise StoreError(
        f"{_describe(missing, what, 'as zeros')}; copy or write the store again. If they are zeros, write them: "
        "zarr.config.set({'array.write_empty_chunks': True})"
    )


def _describe(missing: NDArray[np.bool_], what: str, read_as: str) -> str:
    return f"{what} lacks {missing.sum()} of {missing.size} chunk files, which would be read {read_as}"
