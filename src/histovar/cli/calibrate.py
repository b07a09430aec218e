"""``histovar calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import FILES, PATH, BatchSize, Gpus, KeyAdded, LibraryKey, Model, Seed, hardware, section_column


def calibrate(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Sections with measured expression that were held out from training, as .h5ad files or .zarr stores.",
            **FILES,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Directory to write the calibrated model to; give the model's own directory to replace it.",
            **PATH,
        ),
    ],
    model: Model = Path("histovar_model"),
    library_key: LibraryKey = None,
    key_added: KeyAdded = "histovar",
    batch_size: BatchSize = 64,
    gpus: Gpus = None,
    seed: Seed = 0,
) -> None:
    """Calibrate a model's uncertainty, so that its intervals contain the true expression as often as they should.

    'train' does this on its own sections; held-out sections, best of another patient, give better intervals.
    """
    in_place = out.resolve() == model.resolve()
    outputs.check_model(out, inputs if in_place else [*inputs, model])
    from histovar import TwoStageVARST, tl
    from histovar.anndata_io import files

    accelerator, _ = hardware(gpus)
    trained = TwoStageVARST.load(model)
    library_key, sections = section_column(library_key, trained, len(inputs))
    adata = files.read_files(inputs, sections)
    tl.calibrate(
        adata,
        trained,
        library_key,
        key_added=key_added,
        batch_size=batch_size,
        device=accelerator,
        random_state=seed,
        show_progress_bar=True,
    )
    trained.save(out)
    typer.echo(f"model written to {out}")
