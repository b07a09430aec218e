"""``histovar export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import FILES, PATH, Gene, Interval, LibraryKey, Prediction, not_empty, positive
from .predictions import read_predictions


class Format(StrEnum):
    """Formats to export to."""

    geojson = "geojson"
    spatialdata = "spatialdata"


class Shape(StrEnum):
    """Shapes of :func:`histovar.io.write_geojson`."""

    circle = "circle"
    square = "square"


def export(
    inputs: Annotated[list[Path], typer.Argument(help="Predicted sections, as .h5ad files or .zarr stores.", **FILES)],
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="geojson: a detection for every spot, to open with its slide in QuPath. spatialdata: a store for "
            "napari, vitessce and spatialdata-plot.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: .geojson for geojson, .zarr for spatialdata.", **PATH)
    ],
    gene: Gene = None,
    section: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="Section to write as geojson, if there are several: a geojson file is for one slide.",
        ),
    ] = None,
    shape: Annotated[
        Shape, typer.Option(help="Outlines in geojson: circle for spots, square for tiles.")
    ] = Shape.circle,
    diameter: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=lambda value: value if value is None else positive(value),
            help="Diameter of the circles in geojson, or side of the squares, in pixels of the full-resolution slide; "
            "read from the file by default.",
        ),
    ] = None,
    library_key: LibraryKey = None,
    key: Prediction = "histovar",
    confidence_level: Interval = 0.9,
) -> None:
    """Export a prediction to other programs: QuPath, or napari and vitessce.

    Both formats hold each gene's predicted mean and the ends of its interval.
    """
    geojson_options = {"--gene": gene, "--section": section, "--diameter": diameter, "--shape": shape != Shape.circle}
    given = [name for name, value in geojson_options.items() if value]
    if to == Format.spatialdata and given:
        raise ValueError(f"{given[0]} is for --to geojson only; leave it out")
    outputs.check_export(out, inputs, to.value)
    from histovar import get, io

    adata, library_key = read_predictions(inputs, library_key, key)
    if to == Format.geojson:
        out.parent.mkdir(parents=True, exist_ok=True)
        io.write_geojson(
            adata,
            out,
            genes=gene if gene else None,
            section=section,
            key=key,
            library_key=library_key,
            confidence_level=confidence_level,
            shape=shape.value,
            diameter=diameter,
        )
    else:
        sdata = get.spatialdata(adata, key, confidence_level=confidence_level, library_key=library_key)
        outputs.write_spatialdata(sdata, out)
    typer.echo(f"prediction written to {out}")
