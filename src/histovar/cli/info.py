"""``histovar info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from histovar._printable import printable

from . import outputs
from .options import PATH, path_of


def info(
    model: Annotated[Path, typer.Argument(help="Directory of the trained model.", parser=path_of)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="CSV file for the expected accuracy of every gene.", **PATH),
    ] = None,
) -> None:
    """Show what a saved model was trained on and what it needs, and check that its files are complete."""
    if out is not None:
        outputs.check_genes(out, [model])
    from histovar import TwoStageVARST
    from histovar.metrics.gene_trust import gene_table, in_words
    from histovar.model.card import read_card
    from histovar.model.checkpoint import verify
    from histovar.model.hub import local_directory
    from histovar.model.summary import summarize

    model = local_directory(model)
    sha256, loaded, card = verify(model), TwoStageVARST.load(model), read_card(model)
    stage2, registry = loaded.stage2, loaded.registry
    if out is not None:
        outputs.write_genes(gene_table(registry), out)
    facts = {
        "Written by": f"histovar {card['version']}, format {card['format_version']}",
        "Stages": ", ".join(map(str, card["stages"])),
        **summarize(registry, loaded.config),
        "Learnt from": "" if stage2 is None else "counts" if stage2.of_counts else "values",
        "Trust": in_words(gene_table(registry)) if registry.get("trust") else "unknown",
        "SHA-256": sha256,
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        if value:
            typer.echo(f"{name:>{width}}  {printable(value)}")
