"""``histovar info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import outputs
from .options import PATH, path_of
from .text import printable


def info(
    model: Annotated[Path, typer.Argument(help="Directory of the trained model.", parser=path_of)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write how far each gene can be trusted to, as .csv.", **PATH),
    ] = None,
) -> None:
    """Say what a saved model was trained on and what it needs, and check that it is whole."""
    if out is not None:
        outputs.check_genes(out, [model])
    from histovar import TwoStageVARST
    from histovar._gene_trust import gene_table, in_words
    from histovar.model.card import read_card
    from histovar.model.checkpoint import verify
    from histovar.model.hub import local_directory

    model = local_directory(model)
    sha256, loaded = verify(model), TwoStageVARST.load(model)
    stage2, registry = loaded.stage2, loaded.registry
    trust = {"trust": in_words(gene_table(registry)) if registry.get("trust") else "not known"}
    if out is not None:
        outputs.write_genes(gene_table(registry), out)
    learnt = {} if stage2 is None else {"learnt from": "counts" if stage2.of_counts else "values"}
    for name, value in {**_summary(read_card(model)), **trust, **learnt, "SHA-256": sha256}.items():
        typer.echo(f"{name:>15}  {printable(str(value))}")


def _summary(card: dict[str, Any]) -> dict[str, Any]:
    from histovar.model.summary import embedded_by

    registry, config = card["registry"], card["config"]
    genes = registry.get("genes", [])
    calibration, adapted = registry.get("calibration"), registry.get("adapted")
    return {
        "written by": f"histovar {card['version']}, format {card['format_version']}",
        "stages": ", ".join(map(str, card["stages"])),
        "genes": f"{len(genes)}: {', '.join(genes[:6])}{', ...' * (len(genes) > 6)}",
        "units": registry.get("units"),
        "scales": config["scales"],
        "codebook": f"{config['codebook_size']} x {config['codebook_dim']}",
        "embeddings": dict(zip(registry.get("use_rep", []), registry.get("embedding_dims", []), strict=True)),
        "embedded by": embedded_by(registry) or "not recorded",
        "neighbourhoods": config["n_neighbors"],
        "covariates": list(registry.get("covariates", {})),
        "trained on": f"stage 1 {registry.get('sections_stage1')}, stage 2 {registry.get('sections_stage2')}",
        "individuals": registry.get("groups_stage2") or "not named",
        "calibrated on": f"{calibration['n_spots']} spots of {calibration['sections']}" if calibration else "nothing",
        "adapted to": f"{adapted['n_spots']} spots of {adapted['section'] or 'a section'}" if adapted else "no section",
    }
