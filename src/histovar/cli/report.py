"""``histovar report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import FILES, PATH, Gene, Interval, Layer, LibraryKey, Prediction, not_empty
from .predictions import read_predictions


def report(
    inputs: Annotated[list[Path], typer.Argument(help="Predicted sections, as .h5ad files or .zarr stores.", **FILES)],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            help="Directory of the model that made the prediction, to report its training data and which genes to "
            "trust.",
            **PATH,
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write, ending in .html.", **PATH)] = Path(
        "report.html"
    ),
    gene: Gene = None,
    title: Annotated[str, typer.Option(callback=not_empty, help="Heading of the page.")] = "Predicted gene expression",
    library_key: LibraryKey = None,
    key: Prediction = "histovar",
    layer: Layer = None,
    confidence_level: Interval = 0.9,
    gene_symbols: Annotated[
        str | None,
        typer.Option(
            "--gene-symbols",
            "--gene_symbols",
            callback=not_empty,
            help="Column of var with the genes' symbols, to show and to ask for in place of identifiers such as "
            "Ensembl's.",
        ),
    ] = None,
) -> None:
    """Write an interactive HTML report of a prediction: one file for any browser, which needs no network.

    Choose a gene to see its predicted map on the H&E, its uncertainty and, if measured, its measured map; the report
    also shows how well intervals are calibrated, and what to be careful about.
    """
    outputs.check_report(out, [*inputs, *([] if model is None else [model])])
    from histovar import TwoStageVARST, pl

    trained = None if model is None else TwoStageVARST.load(model)
    adata, library_key = read_predictions(inputs, library_key, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    pl.report(
        adata,
        out,
        trained,
        genes=gene if gene else None,
        title=title,
        key=key,
        library_key=library_key,
        layer=layer,
        confidence_level=confidence_level,
        gene_symbols=gene_symbols,
    )
    typer.echo(f"report written to {out}")
