"""Check --out before any work, and write outputs atomically."""

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
# Columns of the tables that evaluate and info write, and entries of uns that predict writes.
SCORES = {"pearson", "spearman", "mse", "mae", "crps", "coverage", "constant"}
TRUST = {"expected_pearson", "ceiling", "q_value"}
RECORD = {"genes", "units", "params", "version"}
# Marks of histovar's reports and GeoJSON files, among their first characters.
REPORT, GEOJSON, FIRST_CHARACTERS = '<meta name="generator" content="histovar', '"generator": "histovar', 10_000
EXPORT_SUFFIXES = {"geojson": ".geojson", "spatialdata": ".zarr"}


def check_data(out: Path, inputs: Iterable[Path], what: str = "prediction") -> None:
    """Refuse an output file that cannot be written, or would overwrite an input or a file of another kind.

    Parameters
    ----------
    out
        The option --out.
    inputs
        Files that the command reads, which must not change.
    what
        Kind of the output, a key of :data:`HOLDS`; a file of this kind is replaced.

    Raises
    ------
    ValueError
        If it must not be written; the message says why.
    """
    if out.suffix not in DATA_SUFFIXES:
        raise ValueError(f"--out must end in .h5ad or .zarr, got {str(out)!r}")
    from histovar.anndata_io.zarr_store import unfinished

    inputs = list(inputs)
    _check_path(out, inputs, directory=out.suffix == ".zarr")
    if out.suffix == ".zarr":
        for path in inputs:
            _check_apart(unfinished(out), unfinished(out).resolve(), path)
    if out.exists() and not _holds(out, HOLDS[what]):
        _refuse_replacing(out, f"it holds no {what} of histovar")


def check_model(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output directory for a model, as :func:`check_data` does for files."""
    if out.suffix in (*DATA_SUFFIXES, ".csv"):
        raise ValueError(f"--out is the model's directory, which must not end in {out.suffix}; got {str(out)!r}")
    _check_path(out, inputs, directory=True)
    if out.exists() and any(out.iterdir()) and not _holds_model(out):
        _refuse_replacing(out, "it is neither empty nor a model of histovar")


def check_evaluated(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output file for scores, a table or sections, as :func:`check_data` does."""
    if out.suffix in DATA_SUFFIXES:
        check_data(out, inputs)
    elif out.suffix == ".csv":
        _check_table(out, inputs, SCORES, "a table of scores")
    else:
        raise ValueError(f"--out must end in .csv, .h5ad or .zarr, got {str(out)!r}")


def check_genes(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output file for the expected accuracy of genes, as :func:`check_data` does."""
    _check_table(out, inputs, TRUST, "a table of expected accuracy")


def _check_table(out: Path, inputs: Iterable[Path], columns: set[str], what: str) -> None:
    if out.suffix != ".csv":
        raise ValueError(f"--out must end in .csv, got {str(out)!r}")
    _check_path(out, inputs, directory=False)
    if out.exists() and not _holds_table(out, columns):
        _refuse_replacing(out, f"it is not {what} of histovar")


def check_report(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output file for a report, as :func:`check_data` does."""
    if out.suffix != ".html":
        raise ValueError(f"--out must end in .html, got {str(out)!r}")
    _check_path(out, inputs, directory=False)
    if out.exists() and not _begins_with(out, REPORT):
        _refuse_replacing(out, "it is not a report of histovar")


def check_export(out: Path, inputs: Iterable[Path], to: str) -> None:
    """Refuse an output file for an export, as :func:`check_data` does."""
    suffix = EXPORT_SUFFIXES[to]
    if out.suffix != suffix:
        raise ValueError(f"--out must end in {suffix} for --to {to}, got {str(out)!r}")
    _check_path(out, inputs, directory=out.suffix == ".zarr")
    if out.exists() and not (_holds_spatialdata(out) if out.is_dir() else _begins_with(out, GEOJSON)):
        _refuse_replacing(out, "histovar did not export it")


def check_demo(out: Path) -> None:
    """Refuse an output directory for the demo, as :func:`check_data` does for files."""
    _check_path(out, [], directory=True)
    if out.exists() and any(out.iterdir()) and not _holds_model(out / "model"):
        _refuse_replacing(out, "it is neither empty nor of an earlier demo")


def _refuse_replacing(out: Path, reason: str) -> None:
    raise ValueError(f"--out: {str(out)!r} exists and is not replaced, since {reason}; give another --out")


def _check_path(out: Path, inputs: Iterable[Path], *, directory: bool) -> None:
    """Refuse a file in place of a directory or the reverse, a path below a file, inputs, and unwritable paths."""
    if out.exists() and out.is_dir() != directory:
        existing, expected = ("directory", "file") if out.is_dir() else ("file", "directory")
        raise ValueError(f"--out: {str(out)!r} is a {existing}, but the output is a {expected}; give another --out")
    resolved = out.resolve()
    for path in inputs:
        _check_apart(out, resolved, path)
    ancestor = next(parent for parent in resolved.parents if parent.exists())
    if not ancestor.is_dir():
        raise ValueError(f"--out: {str(out)!r} lies below {str(ancestor)!r}, which is a file")
    try:
        with tempfile.TemporaryFile(dir=resolved if resolved.is_dir() else ancestor):
            pass
    except OSError as error:
        raise ValueError(f"--out: {str(out)!r} cannot be written ({error.strerror or error})") from None
    if resolved.is_file() and not os.access(resolved, os.W_OK):
        raise ValueError(f"--out: {str(out)!r} cannot be replaced, it is write-protected")


def _check_apart(out: Path, resolved: Path, path: Path) -> None:
    other = path.resolve()
    same = resolved == other or (resolved.exists() and other.exists() and resolved.samefile(other))
    relation = (
        "is" if same else "contains" if resolved in other.parents else "lies in" if other in resolved.parents else ""
    )
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
    """True if a file of AnnData passes a test; only what the test looks at is read."""
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
    """True if an AnnData holds tiles and no genes."""
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
    """True if a store is SpatialData made by :func:`histovar.get.spatialdata`."""
    import zarr

    try:
        return "histovar" in zarr.open_group(path, mode="r").attrs
    except (OSError, KeyError, ValueError, TypeError):
        return False


def write_data(adata: AnnData, out: Path) -> None:
    """Write an object as .h5ad or .zarr, by its suffix; missing parent directories are created."""
    from histovar.anndata_io.zarr_store import write_whole

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".zarr":
        with atomic_directory(out) as temporary:
            write_whole(adata, temporary)
    else:
        with atomic_file(out) as temporary:
            adata.write_h5ad(temporary)


# Tests that an open file of AnnData holds what a command writes.
HOLDS: dict[str, Callable[[Any], bool]] = {
    "prediction": _has_prediction,
    "embeddings": _has_embeddings,
    "tiles": _has_tiles,
}


def write_genes(table: pd.DataFrame, out: Path) -> None:
    """Write a table of genes as .csv; missing parent directories are created."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        table.to_csv(temporary)


def write_spatialdata(sdata: SpatialData, out: Path) -> None:
    """Write SpatialData as .zarr; missing parent directories are created."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as temporary:
        temporary.rmdir()  # spatialdata refuses to write to a directory that is not a store
        sdata.write(temporary)
