"""Checks of --out before any work, and writing in such a way that no half-written file is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histovar._atomic import atomic_directory, atomic_file

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

DATA_SUFFIXES = (".h5ad", ".zarr")
# What evaluate and info write of every gene, and predict into uns.
SCORES = {"pearson", "spearman", "mse", "mae", "crps", "coverage", "constant"}
TRUST = {"expected_pearson", "ceiling", "q_value"}
RECORD = {"genes", "units", "params", "version"}
# What tells reports and GeoJSON of histovar, within their first characters.
REPORT, GEOJSON, FIRST_CHARACTERS = '<meta name="generator" content="histovar', '"generator": "histovar', 10_000
EXPORT_SUFFIXES = {"geojson": ".geojson", "spatialdata": ".zarr"}


def check_data(out: Path, inputs: Iterable[Path], what: str = "prediction") -> None:
    """Refuse a file of results that cannot be written, or must not be.

    Parameters
    ----------
    out
        What --out is.
    inputs
        What the command reads, which must stay as it is.
    what
        What the command writes, of :data:`HOLDS`; a file that holds it already is replaced.

    Raises
    ------
    ValueError
        With the reason.
    """
    if out.suffix not in DATA_SUFFIXES:
        raise ValueError(f"--out must end in .h5ad or .zarr, got {str(out)!r}")
    from histovar.anndata_io.zarr_store import unfinished

    inputs = list(inputs)
    _check_place(out, inputs, directory=out.suffix == ".zarr")
    if out.suffix == ".zarr":
        for path in inputs:
            _check_apart(unfinished(out), unfinished(out).resolve(), path)
    if out.exists() and not _holds(out, HOLDS[what]):
        _refuse_replacing(out, f"no {what} of histovar is in it")


def check_model(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse a model directory that cannot be written, or must not be; see :func:`check_data`."""
    if out.suffix in (*DATA_SUFFIXES, ".csv"):
        raise ValueError(f"--out is the model's directory, which must not end in {out.suffix}; got {str(out)!r}")
    _check_place(out, inputs, directory=True)
    if out.exists() and any(out.iterdir()) and not _holds_model(out):
        _refuse_replacing(out, "it is neither empty nor a model of histovar")


def check_scores(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse a table of scores that cannot be written, or must not be; see :func:`check_data`."""
    _check_table(out, inputs, SCORES, "a table of scores")


def check_genes(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse a table of trust in genes that cannot be written, or must not be; see :func:`check_data`."""
    _check_table(out, inputs, TRUST, "a table of trust in genes")


def _check_table(out: Path, inputs: Iterable[Path], columns: set[str], what: str) -> None:
    if out.suffix != ".csv":
        raise ValueError(f"--out must end in .csv, got {str(out)!r}")
    _check_place(out, inputs, directory=False)
    if out.exists() and not _holds_table(out, columns):
        _refuse_replacing(out, f"it is not {what} of histovar")


def check_report(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse a report that cannot be written, or must not be; see :func:`check_data`."""
    if out.suffix != ".html":
        raise ValueError(f"--out must end in .html, got {str(out)!r}")
    _check_place(out, inputs, directory=False)
    if out.exists() and not _begins_with(out, REPORT):
        _refuse_replacing(out, "it is not a report of histovar")


def check_export(out: Path, inputs: Iterable[Path], to: str) -> None:
    """Refuse an export that cannot be written, or must not be; see :func:`check_data`."""
    suffix = EXPORT_SUFFIXES[to]
    if out.suffix != suffix:
        raise ValueError(f"--out must end in {suffix} for --to {to}, got {str(out)!r}")
    _check_place(out, inputs, directory=out.suffix == ".zarr")
    if out.exists() and not (_holds_spatialdata(out) if out.is_dir() else _begins_with(out, GEOJSON)):
        _refuse_replacing(out, "histovar did not export it")


def check_demo(out: Path) -> None:
    """Refuse a directory of the demo that cannot be written, or must not be; see :func:`check_data`."""
    _check_place(out, [], directory=True)
    if out.exists() and any(out.iterdir()) and not _holds_model(out / "model"):
        _refuse_replacing(out, "it is neither empty nor of an earlier demo")


def _refuse_replacing(out: Path, reason: str) -> None:
    raise ValueError(f"--out: {str(out)!r} is there already and is not replaced, as {reason}; give another --out")


def _check_place(out: Path, inputs: Iterable[Path], *, directory: bool) -> None:
    """Refuse the wrong kind of what is there, a path below a file, inputs, and places that cannot be written to."""
    if out.exists() and out.is_dir() != directory:
        there, wanted = ("directory", "file") if out.is_dir() else ("file", "directory")
        raise ValueError(f"--out: {str(out)!r} is a {there}, and a {wanted} is to be written; give another --out")
    place = out.resolve()
    for path in inputs:
        _check_apart(out, place, path)
    ancestor = next(parent for parent in place.parents if parent.exists())
    if not ancestor.is_dir():
        raise ValueError(f"--out: {str(out)!r} lies below {str(ancestor)!r}, which is a file")
    try:
        with tempfile.TemporaryFile(dir=place if place.is_dir() else ancestor):
            pass
    except OSError as error:
        raise ValueError(f"--out: {str(out)!r} cannot be written ({error.strerror or error})") from None
    if place.is_file() and not os.access(place, os.W_OK):
        raise ValueError(f"--out: {str(out)!r} cannot be replaced, it is write-protected")


def _check_apart(out: Path, place: Path, path: Path) -> None:
    other = path.resolve()
    same = place == other or (place.exists() and other.exists() and place.samefile(other))
    relation = "is" if same else "contains" if place in other.parents else "lies in" if other in place.parents else ""
    if relation:
        what = f"the input {str(path)!r}" + " itself" * same
        raise ValueError(f"--out: {str(out)!r} {relation} {what}; give another --out")


def _holds_model(path: Path) -> bool:
    from histovar.model.card import CARD, read_card

    if not (path / CARD).is_file():
        return False
    try:
        read_card(path)
    except (ValueError, KeyError):
        return False
    return True


def _holds(path: Path, test: Callable[[Any], bool]) -> bool:
    """Whether a file of AnnData passes a test; nothing is read but what that looks at."""
    import h5py
    import zarr

    try:
        if path.is_dir():
            return test(zarr.open_group(path, mode="r"))
        with h5py.File(path, "r") as store:
            return test(store)
    except (OSError, KeyError, ValueError, TypeError):
        return False


def _has_prediction(store: Any) -> bool:
    return _has_record(store, RECORD)


def _has_embeddings(store: Any) -> bool:
    return _has_record(store, {"embeddings", "version"})


def _has_tiles(store: Any) -> bool:
    """Whether there are tiles, and no genes."""
    return "tissue" in store["obs"] and set(store["var"]) == {store["var"].attrs["_index"]} and "X" not in store


def _has_record(store: Any, names: set[str]) -> bool:
    entries = store["uns"]
    return any(hasattr(entries[key], "keys") and set(entries[key].keys()) >= names for key in entries)


def _holds_table(path: Path, columns: set[str]) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline()
    except (OSError, UnicodeDecodeError):
        return False
    return set(header.strip().split(",")) >= columns


def _begins_with(path: Path, mark: str) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return mark in file.read(FIRST_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return False


def _holds_spatialdata(path: Path) -> bool:
    """Whether a store is a SpatialData that :func:`histovar.get.spatialdata` made."""
    import zarr

    try:
        return "histovar" in zarr.open_group(path, mode="r").attrs
    except (OSError, KeyError, ValueError, TypeError):
        return False


def write_data(adata: AnnData, out: Path) -> None:
    """Write an object as .h5ad or .zarr, as the suffix says; parent directories are made."""
    from histovar.anndata_io.zarr_store import write_whole

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".zarr":
        with atomic_directory(out) as written:
            write_whole(adata, written)
    else:
        with atomic_file(out) as written:
            adata.write_h5ad(written)


# Whether an open file of AnnData holds what a command writes.
HOLDS: dict[str, Callable[[Any], bool]] = {
    "prediction": _has_prediction,
    "embeddings": _has_embeddings,
    "tiles": _has_tiles,
}


def write_genes(table: pd.DataFrame, out: Path) -> None:
    """Write a table of genes as .csv; parent directories are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as written:
        table.to_csv(written)


def write_spatialdata(sdata: SpatialData, out: Path) -> None:
    """Write a SpatialData as .zarr; parent directories are made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as written:
        written.rmdir()  # it is not written to a directory that is no store
        sdata.write(written)
