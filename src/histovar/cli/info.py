"""``histovar info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import path_of
from .text import printable


def info(model: Annotated[Path, typer.Argument(help="Directory of the trained model.", parser=path_of)]) -> None:
    """Say what a saved model was trained on and what it needs, and check that it is whole."""
    from histovar import TwoStageVARST
    from histovar.model.card import read_card
    from histovar.model.checkpoint import verify
    from histovar.model.hub import local_directory

    model = local_directory(model)
    sha256, stage2 = verify(model), TwoStageVARST.load(model).stage2
    learnt = {} if stage2 is None else {"learnt from": "counts" if stage2.of_counts else "values"}
    for name, value in {**_summary(read_card(model)), **learnt, "SHA-256": sha256}.items():
        typer.echo(f"{name:>15}  {printable(str(value))}")


def _summary(card: dict[str, Any]) -> dict[str, Any]:
    registry, config = card["registry"], card["config"]
    genes = registry.get("genes", [])
    calibration = registry.get("calibration")
    return {
        "written by": f"histovar {card['version']}, format {card['format_version']}",
        "stages": ", ".join(map(str, card["stages"])),
        "genes": f"{len(genes)}: {', '.join(genes[:6])}{', ...' * (len(genes) > 6)}",
        "units": registry.get("units"),
        "scales": config["scales"],
        "codebook": f"{config['codebook_size']} x {config['codebook_dim']}",
        "embeddings": dict(zip(registry.get("use_rep", []), registry.get("embedding_dims", []), strict=True)),
        "neighbourhoods": config["n_neighbors"],
        "covariates": list(registry.get("covariates", {})),
        "trained on": f"stage 1 {registry.get('sections_stage1')}, stage 2 {registry.get('sections_stage2')}",
        "individuals": registry.get("groups_stage2") or "not named",
        "calibrated on": f"{calibration['n_spots']} spots of {calibration['sections']}" if calibration else "nothing",
    }
