"""Zarr stores read and written chunk by chunk, so that an object need never be in memory whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

if TYPE_CHECKING:
    import dask.array as da

# Spots of a chunk: 8 MB of embeddings 1,024 wide.
ROWS_AT_ONCE = 2048
DONE = "done"
IDENTITY = "identity.json"


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
        If it is no such store.
    """
    import zarr

    try:
        group: Any = zarr.open_group(path, mode="r")
        obs, stored = group["obs"], group["obsm"]
    except (KeyError, FileNotFoundError) as error:
        raise ValueError(f"{str(path)!r} is not an AnnData in zarr: {error}") from None
    adata = AnnData(obs=ad.io.read_elem(obs), var=pd.DataFrame(index=pd.Index(genes or [], dtype=str)))
    if genes is None:
        adata = AnnData(obs=adata.obs, var=ad.io.read_elem(group["var"]))
        adata.X = _lazy(group["X"], rows_at_once) if "X" in group else None
        for key in group["layers"]:
            adata.layers[key] = _lazy(group["layers"][key], rows_at_once)
    for key in stored:
        adata.obsm[key] = _lazy(stored[key], rows_at_once)
    if "uns" in group and "spatial" in group["uns"]:
        adata.uns["spatial"] = ad.io.read_elem(group["uns"]["spatial"])
    return adata


def _lazy(element: Any, rows_at_once: int) -> Any:
    """A stored matrix as dask array; a table in memory."""
    shape = element.attrs.get("shape", getattr(element, "shape", None))
    if shape is None:
        return ad.io.read_elem(element)
    return ad.experimental.read_elem_lazy(element, chunks=(min(rows_at_once, shape[0]), *shape[1:]))


def write_zarr(adata: AnnData, path: Path, identity: Mapping[str, Any]) -> None:
    """Write an object whose dask arrays share their chunks of spots, and continue what was interrupted.

    Each chunk is computed and written by one task of the active scheduler. Until all are, the store is at
    ``{path}.part`` (seen by all workers), with the chunks that are done.

    Parameters
    ----------
    adata
        The object.
    path
        Where to write; what is there is replaced.
    identity
        What tells this content from any other, in plain types; an interrupted store of another is refused.

    Raises
    ------
    ValueError
        If there is an interrupted store of another identity.
    """
    import zarr
    from dask.base import compute
    from dask.delayed import delayed

    part = path.with_name(f"{path.name}.part")
    lazy = _lazy_arrays(adata)
    bounds = np.concatenate([[0], np.cumsum(next(iter(lazy.values())).chunks[0])])
    wanted = json.dumps({**identity, "chunks": bounds.tolist()}, sort_keys=True)
    if part.exists() and (not (part / IDENTITY).is_file() or (part / IDENTITY).read_text() != wanted):
        raise ValueError(
            f"{str(part)!r} is an interrupted run of other input, model or options; finish it as it was begun, or "
            "delete it"
        )
    if not part.exists():
        light = AnnData(obs=adata.obs, var=adata.var, uns=adata.uns)
        for name, store in (("layers", adata.layers), ("obsm", adata.obsm)):
            for key, values in store.items():
                if f"{name}/{key}" not in lazy:
                    getattr(light, name)[key] = values
        light.write_zarr(part)
        root = zarr.open_group(part, mode="r+")
        for name, values in lazy.items():
            chunks = (int(np.diff(bounds).max()), *values.shape[1:])
            array = root.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        (part / DONE).mkdir()
        (part / IDENTITY).write_text(wanted)
    done = {int(mark.name) for mark in (part / DONE).iterdir()}
    blocks = {name: values.to_delayed().reshape(len(bounds) - 1, -1)[:, 0] for name, values in lazy.items()}
    tasks = [
        delayed(_write_chunk)(str(part.resolve()), i, int(bounds[i]), {name: b[i] for name, b in blocks.items()})
        for i in range(len(bounds) - 1)
        if i not in done
    ]
    compute(tasks)
    shutil.rmtree(part / DONE)
    (part / IDENTITY).unlink()
    zarr.consolidate_metadata(part)
    if path.exists():
        shutil.rmtree(path)
    part.rename(path)


def _lazy_arrays(adata: AnnData) -> dict[str, da.Array]:
    """Dask arrays of an object by their place, each with whole rows in a chunk."""
    import dask.array as da

    found = {
        f"{name}/{key}": values
        for name, store in (("layers", adata.layers), ("obsm", adata.obsm))
        for key, values in store.items()
        if isinstance(values, da.Array)
    }
    first = next(iter(found.values())).chunks[0]
    return {name: values.rechunk((first, *values.shape[1:])) for name, values in found.items()}


def _write_chunk(path: str, number: int, start: int, blocks: Mapping[str, Any]) -> None:
    import zarr

    root: Any = zarr.open_group(path, mode="r+", use_consolidated=False)
    for name, values in blocks.items():
        root[name][start : start + len(values)] = values
    (Path(path) / DONE / str(number)).touch()
