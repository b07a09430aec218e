"""``histovar describe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import path_of


def describe(
    model: Annotated[Path, typer.Argument(help="Directory of the trained model, which is changed.", parser=path_of)],
    tissue: Annotated[
        str | None, typer.Option(help="Tissue of the training data, such as 'breast cancer'; '' removes it.")
    ] = None,
    species: Annotated[str | None, typer.Option(help="Species, such as human; '' removes it.")] = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the model: the hub's identifier or any name; '' removes it.")
    ] = None,
) -> None:
    """Set tissue, species and licence in the description of a saved model, which README.md and 'histovar info' show.

    What is not given stays as it was.
    """
    if tissue is None and species is None and licence is None:
        raise ValueError(f"nothing to change in model {str(model)!r}: give --tissue, --species or --licence")
    from histovar import TwoStageVARST
    from histovar.model.hub import ADDRESS

    if ADDRESS.fullmatch(model.as_posix()):
        address = model.as_posix().replace("hf:/", "hf://", 1)
        raise ValueError(f"model: {address!r} is on the hub; load it, describe it and push it from Python")
    trained = TwoStageVARST.load(model)
    trained.describe(tissue=tissue, species=species, licence=licence)
    trained.save(model)
    typer.echo(f"description written to {model}")
