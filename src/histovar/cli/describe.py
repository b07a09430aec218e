"""``histovar describe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import path_of


def describe(
    model: Annotated[Path, typer.Argument(help="Directory of the trained model, which is changed.", parser=path_of)],
    tissue: Annotated[
        str | None, typer.Option(help="What it was trained on, such as 'breast cancer'; '' takes back what was said.")
    ] = None,
    species: Annotated[str | None, typer.Option(help="Species, such as human; likewise.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the model, by the hub's identifier or by its name; likewise.")
    ] = None,
) -> None:
    """Say of a saved model what its data do not: in its README.md, in 'info' and on the Hugging Face Hub.

    What is not given stays as it was.
    """
    if tissue is None and species is None and licence is None:
        raise ValueError(f"nothing is said of model {str(model)!r}: give --tissue, --species or --licence")
    from histovar import TwoStageVARST
    from histovar.model.hub import ADDRESS

    if ADDRESS.fullmatch(model.as_posix()):
        raise ValueError(f"model: {model.as_posix()!r} is on the hub; load, describe and push it from Python")
    trained = TwoStageVARST.load(model)
    trained.describe(tissue=tissue, species=species, licence=licence)
    trained.save(model)
    typer.echo(f"description written to {model}")
