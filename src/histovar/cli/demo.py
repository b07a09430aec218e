"""``histovar demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import PATH, Seed


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.", **PATH)] = Path("demo_output"),
    n_spots: Annotated[
        int, typer.Option("--n-spots", "--n_spots", min=20, max=100_000, help="Spots in each of the four sections.")
    ] = 400,
    seed: Seed = 0,
) -> None:
    """Run the whole workflow on simulated sections: train, predict a held-out section, score it and plot its map."""
    outputs.check_demo(out)
    from histovar.demo import run

    typer.echo(run(out, n_spots=n_spots, random_state=seed))
