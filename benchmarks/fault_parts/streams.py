"""Predictions from zarr store to zarr store: killed, continued after a change, from stores that lack chunk files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anndata as ad
import dask
import numpy as np
import zarr

import histovar as hv
from histovar.anndata_io import files, zarr_check, zarr_store

from .cases import compare, outcome, run_and_kill

if TYPE_CHECKING:
    from faults import Setting

KEY = "X_histology"
ROWS = 6


def streams(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Kill streams at random moments and continue them, also with another input or option; remove chunk files."""
    store, out = setting.scratch / "in.zarr", setting.scratch / "out.zarr"
    setting.query.write_zarr(store)
    start = time.monotonic()
    _stream(setting, store, out)
    seconds = time.monotonic() - start
    expected = _read(out)
    for _ in range(max(1, round(40 * share))):
        _remove(out)
        n_kills = sum(
            run_and_kill(lambda: _stream(setting, store, out), setting.rng.uniform(0, 1.1 * seconds))
            for _ in range(setting.rng.integers(1, 4))
        )
        if n_kills:
            what = outcome(lambda: _continued(setting, store, out, expected))
            yield "streams, killed and continued", what if what == "whole" else f"after {n_kills} kills: {what}"
    for i in range(max(2, round(20 * share))):
        yield (
            "streams, continued after a change",
            _continued_after_change(setting, store, out, expected, change_input=i % 2 == 0),
        )
    yield from _lost_chunks(setting, share)


def _stream(setting: Setting, store: Path, out: Path, **options: Any) -> None:
    """As ``histovar predict store --out out``, in smaller chunks."""
    with dask.config.set(scheduler="synchronous"):
        identity = {"content of the input": zarr_check.content_digest(store), **options}
        adata = zarr_store.read_zarr(store, setting.models[0].registry["genes"], rows_at_once=ROWS)
        hv.tl.predict(adata, setting.models[0], **setting.keys, **options)
        del adata.obsm[KEY]
        zarr_store.write_zarr(adata, out, identity)


def _read(out: Path) -> np.ndarray:
    return np.asarray(ad.read_zarr(out).layers["histovar"])


def _remove(out: Path) -> None:
    for path in out.parent.glob(f"*{out.name}*"):
        shutil.rmtree(path, ignore_errors=True)


def _continued(setting: Setting, store: Path, out: Path, expected: np.ndarray) -> str:
    try:
        _stream(setting, store, out)
    except ValueError as error:
        return f"cannot be continued: {error}"
    left = sorted(path.name for path in out.parent.glob(f"*{out.name}*"))
    return compare(_read(out), expected).replace("unseen", "another prediction") if left == [out.name] else str(left)


def _continued_after_change(
    setting: Setting, store: Path, out: Path, expected: np.ndarray, *, change_input: bool
) -> str:
    """Continue after the input, or an option, has changed, which must be refused."""
    _remove(out)
    part = zarr_store.unfinished(out)
    if not run_and_kill(lambda: _stream(setting, store, out), lambda: any((part / "done").glob("*"))):
        return "whole"
    array = zarr.open_group(store, mode="r+")[f"obsm/{KEY}"]
    before = array[:]
    if change_input:
        array[0] = before[1]
    said = outcome(lambda: _stream(setting, store, out, **({} if change_input else {"n_samples": 2})) or "not refused")
    array[:] = before
    again = outcome(lambda: _continued(setting, store, out, expected))
    return said if again == "whole" else f"then {again}"


def _lost_chunks(setting: Setting, share: float) -> Iterator[tuple[str, str]]:
    """Remove a chunk file of a slot, in each zarr format, and read the store as a whole or streamed."""
    expected = setting.expected
    for i in range(max(3, round(90 * share))):
        path = setting.scratch / "lost.zarr"
        shutil.rmtree(path, ignore_errors=True)
        with ad.settings.override(zarr_write_format=2 if i % 3 == 0 else 3):
            setting.query.write_zarr(path)
        if i % 3 == 2:
            root = zarr.open_group(path, mode="r+", use_consolidated=False)
            attributes = dict(root[f"obsm/{KEY}"].attrs)
            values = root[f"obsm/{KEY}"][:]
            array = root.create_array(f"obsm/{KEY}", data=values, chunks=(10, 4), shards=(20, 8), overwrite=True)
            array.attrs.update(attributes)
            zarr.consolidate_metadata(path)
        slots = (f"obsm/{KEY}", "obsm/spatial", "obs", "X")
        slot = slots[setting.rng.integers(len(slots))]
        chunks = [f for f in (path / slot).rglob("*") if f.is_file() and not f.name.startswith((".z", "zarr."))]
        setting.rng.choice(np.array(chunks, object)).unlink()

        def case(path: Path = path, lazily: bool = bool(i % 2)) -> str:
            adata = files.read_store(path, genes=["none"]) if lazily else files.read_files([path])
            hv.tl.predict(adata, setting.models[0], **setting.keys)
            return compare(np.asarray(adata.obsm["histovar"]), expected).replace("unseen", "read as zeros")

        yield "streams, chunk files lost", outcome(case)
