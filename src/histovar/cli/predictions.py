"""Read several files of one prediction as one object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def read_predictions(inputs: Sequence[Path], library_key: str | None, key: str) -> tuple[AnnData, str | None]:
    """Read files of one prediction as one object; also return the column with the section.

    Parameters
    ----------
    inputs
        The files.
    library_key
        The option; that of the prediction by default.
    key
        Name of the prediction.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    KeyError
        If a file has no such prediction, or no such column.
    ValueError
        If files cannot be read, or were predicted by different models or with different options.
    """
    from histovar.anndata_io import files

    paths = files.check_paths(inputs)
    adatas = [files.read_file(path) for path in paths]
    predicted_with = _library_key(adatas, paths, key)
    library_key = predicted_with if library_key is None else library_key
    if library_key is None and len(adatas) > 1:
        library_key = files.SECTION
    adata = files.combine_files(adatas, paths, files.SECTION if library_key is None else library_key)
    return adata, library_key


def _library_key(adatas: Sequence[AnnData], paths: Sequence[Path], key: str) -> str | None:
    """Column with the section that the prediction used; refuse files of different predictions.

    Raises
    ------
    KeyError
        If a file has no prediction.
    ValueError
        If files were predicted by different models, or with different options.
    """
    import numpy as np

    records = [adata.uns.get(key, {}) for adata in adatas]
    for record, path in zip(records, paths, strict=True):
        if "genes" not in record:
            raise KeyError(
                f"{str(path)!r} has no prediction {key!r}; run histovar predict first, or name it with --key"
            )
        for entry in ("genes", "layer", "units", "quantiles", "trained_on", "trained_on_groups"):
            if not np.array_equal(record.get(entry, []), records[0].get(entry, [])):
                raise ValueError(
                    f"{str(path)!r} and {str(paths[0])!r} were predicted by different models or with different "
                    f"options: {entry!r} differs; give one file at a time"
                )
    keys_used = {str(record["params"]["library_key"]) for record in records}
    return keys_used.pop() or None if len(keys_used) == 1 else None
