"""``histovar evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import outputs
from .options import FILES, PATH, GroupKey, LibraryKey, Seed, not_empty

if TYPE_CHECKING:
    from anndata import AnnData


def evaluate(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Predicted sections with measured expression, as .h5ad files or .zarr stores.", **FILES),
    ],
    library_key: LibraryKey = None,
    group_key: GroupKey = None,
    key: Annotated[
        str, typer.Option(callback=not_empty, help="Name of the prediction to score, the --key-added of predict.")
    ] = "histovar",
    layer: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="Layer with measured expression, in the units of training; the layer trained on by default.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="CSV file for the scores of every gene.", **PATH)
    ] = None,
    seed: Seed = 0,
) -> None:
    """Score predictions against measured expression."""
    if out is not None:
        outputs.check_scores(out, inputs)
    import pandas as pd

    from histovar import tl
    from histovar.anndata_io import files

    paths = files.check_paths(inputs)
    parts = [files.read_file(path) for path in paths]
    predicted_with = _library_key(parts, paths, key)
    library_key = predicted_with if library_key is None else library_key
    if library_key is None and len(parts) > 1:
        library_key = files.SECTION
    adata = files.combine_files(parts, paths, files.SECTION if library_key is None else library_key)
    columns = {"library_key": library_key, "group_key": group_key}
    scores = tl.evaluate(adata, key=key, layer=layer, **columns, random_state=seed)
    written = adata.uns[key]
    typer.echo(pd.concat([written["evaluation"], written["evaluation_interval"]]).T.round(4).to_string())
    if out is not None:
        outputs.write_genes(scores, out)
        typer.echo(f"scores written to {out}")


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
                    f"{entry!r} differs; evaluate them one by one"
                )
    recorded = {str(record["params"]["library_key"]) for record in records}
    return recorded.pop() or None if len(recorded) == 1 else None
