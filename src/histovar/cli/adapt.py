"""``histovar adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import (
    FILES,
    PATH,
    BatchSize,
    Gpus,
    KeyAdded,
    LibraryKey,
    Model,
    Seed,
    hardware,
    not_empty,
    section_column,
)


def adapt(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="The section with embeddings of all its spots and counts of some, as an .h5ad file or .zarr store, "
            "which may hold other sections, too.",
            **FILES,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the adapted model to.", **PATH)],
    model: Model = Path("histovar_model"),
    measured_key: Annotated[
        str | None,
        typer.Option(
            "--measured-key",
            "--measured_key",
            callback=not_empty,
            help="Boolean column of obs that marks the measured spots: 9 or more, in one section. All by default.",
        ),
    ] = None,
    library_key: LibraryKey = None,
    key_added: KeyAdded = "histovar",
    batch_size: BatchSize = 64,
    gpus: Gpus = None,
    seed: Seed = 0,
) -> None:
    """Adapt a model to a new section in which a few spots are measured, to predict the others.

    Gene levels, depth and intervals are corrected, and measured spots inform predictions near them.
    """
    outputs.check_model(out, [*inputs, model])
    from histovar import TwoStageVARST, tl
    from histovar.anndata_io import files

    accelerator, _ = hardware(gpus)
    trained = TwoStageVARST.load(model)
    library_key, sections = section_column(library_key, trained, len(inputs))
    adapted = tl.adapt(
        files.read_files(inputs, sections),
        trained,
        measured_key,
        library_key=library_key,
        key_added=key_added,
        batch_size=batch_size,
        device=accelerator,
        random_state=seed,
        show_progress_bar=True,
    )
    adapted.save(out)
    typer.echo(f"model written to {out}")
