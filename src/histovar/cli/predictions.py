"""Files of predictions, put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def read_predictions(inputs: Sequence[Path], library_key: str | None, key: str) -> tuple[AnnData, str | None]:
    """Read files of one prediction as one object, and the column with the section.

    Parameters
    ----------
    inputs
        The files.
    library_key
        The column, as it was given; that of the prediction by default.
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
    parts = [files.read_file(path) for path in paths]
    predicted_with = _library_key(parts, paths, key)
    library_key = predicted_with if library_key is None else library_key
    if library_key is None and len(parts) > 1:
        library_key = files.SECTION
    adata = files.combine_files(parts, paths, files.SECTION if library_key is None else library_key)
    return adata, library_key


def _library_key(parts: Sequence[AnnData], paths: Sequence[Path], key: str) -> str | None:
    """Column with the section that the files were predicted with; refuses files of different predictions.

    Raises
    ------
    KeyError
        If a file has no prediction.
    ValueError
        If files were predicted by different models, or with different options.
    """
    import numpy as np

    records = [part.uns.get(key, {}) for part in parts]
    for record, path in zip(records, paths, strict=True):
        if "genes" not in record:
            raise KeyError(
                f"{str(path)!r} has no prediction {key!r}; run histovar predict first, or name it with --key"
            )
        for entry in ("genes", "layer", "units", "quantiles", "trained_on", "trained_on_groups"):
            if not np.array_equal(record.get(entry, []), records[0].get(entry, [])):
                raise ValueError(
                    f"{str(path)!r} and {str(paths[0])!r} were predicted by other models or with other options: "
                    f"{entry!r} differs; give them one by one"
                )
    recorded = {str(record["params"]["library_key"]) for record in records}
    return recorded.pop() or None if len(recorded) == 1 else None
