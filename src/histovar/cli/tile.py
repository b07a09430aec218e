"""``histovar tile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import PATH, not_empty, positive, positive_or_none


def tile(
    slide: Annotated[
        Path,
        typer.Argument(
            help="Slide of H&E: .svs, .ndpi, .mrxs, pyramidal .tif and others.", **PATH | {"metavar": "SLIDE"}
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .h5ad or .zarr.", **PATH)] = Path(
        "tiles.h5ad"
    ),
    spacing_um: Annotated[
        float,
        typer.Option(
            "--spacing-um",
            "--spacing_um",
            callback=positive,
            help="Distance from tile to tile, in microns. Smaller values give a finer map and take longer.",
        ),
    ] = 100.0,
    mpp: Annotated[
        float | None,
        typer.Option(
            callback=positive_or_none,
            help="Microns per pixel of the slide, if its file does not say: about 0.5 at 20x, 0.25 at 40x.",
        ),
    ] = None,
    section: Annotated[
        str | None, typer.Option(callback=not_empty, help="Name of the section; that of the file by default.")
    ] = None,
    min_tissue: Annotated[
        float,
        typer.Option(
            "--min-tissue",
            "--min_tissue",
            min=0,
            max=1,
            callback=positive,
            help="Smallest share of tissue for a tile to be kept.",
        ),
    ] = 0.5,
) -> None:
    """Lay a grid of tiles over the tissue of a slide: the first step if there is only H&E.

    'embed' then embeds the H&E around each tile, and 'predict' predicts its expression.
    """
    outputs.check_data(out, [slide], "tiles")
    from histovar import pp

    adata = pp.tile(slide, spacing_um=spacing_um, mpp=mpp, section=section, min_tissue=min_tissue)
    outputs.write_data(adata, out)
    typer.echo(f"{adata.n_obs} tiles written to {out}")
