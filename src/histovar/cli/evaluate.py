"""``histovar evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import FILES, PATH, GroupKey, Layer, LibraryKey, Prediction, Seed
from .predictions import read_predictions


def evaluate(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Predicted sections with measured expression, as .h5ad files or .zarr stores.", **FILES),
    ],
    library_key: LibraryKey = None,
    group_key: GroupKey = None,
    key: Prediction = "histovar",
    layer: Layer = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="File to write: .csv for a table of the scores of every gene; .h5ad or .zarr for the sections with "
            "their scores, which 'report' then shows.",
            **PATH,
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Score predictions against measured expression."""
    if out is not None:
        outputs.check_evaluated(out, inputs)
    import pandas as pd

    from histovar import tl

    adata, library_key = read_predictions(inputs, library_key, key)
    columns = {"library_key": library_key, "group_key": group_key}
    scores = tl.evaluate(adata, key=key, layer=layer, **columns, random_state=seed)
    entry = adata.uns[key]
    typer.echo(pd.concat([entry["evaluation"], entry["evaluation_interval"]]).T.round(4).to_string())
    if out is not None:
        if out.suffix == ".csv":
            outputs.write_genes(scores, out)
        else:
            outputs.write_data(adata, out)
        typer.echo(f"scores written to {out}")
