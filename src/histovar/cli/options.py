"""Options that several commands share, and their defaults: devices, embeddings, files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histovar._limits import MOST_RANDOM_STATE

if TYPE_CHECKING:
    from anndata import AnnData

    from histovar import TwoStageVARST

logger = logging.getLogger(__name__)


def path_of(value: str | Path) -> Path:
    """Parse a path; refuse an empty one."""
    if not str(value).strip():
        raise typer.BadParameter("the path is empty")
    return Path(value).expanduser()


def not_empty(value: Any) -> Any:
    """Refuse empty text, which would look as if the option was not given."""
    texts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise typer.BadParameter("the text is empty; leave the option out, or give a name")
    return value


def positive(value: float) -> float:
    """Refuse 0, which typer's ``min=0`` accepts."""
    if not value > 0:
        raise typer.BadParameter(f"{value:g} is not more than 0")
    return value


def positive_or_none(value: float | None) -> float | None:
    """Refuse 0, for an option that may be left out."""
    return value if value is None else positive(value)


def strictly_between(value: float) -> float:
    """Refuse 0 and 1, which typer's ``min=0, max=1`` accepts."""
    if not 0 < value < 1:
        raise typer.BadParameter(f"must be more than 0 and less than 1, got {value:g}")
    return value


PATH: dict[str, Any] = {"parser": path_of, "metavar": "PATH"}
FILES: dict[str, Any] = {"parser": path_of, "metavar": "INPUTS"}

Model = Annotated[
    Path, typer.Option("--model", "-m", help="Directory of the trained model, or hf://owner/name.", **PATH)
]
UseRep = Annotated[
    list[str] | None,
    typer.Option(
        "--use-rep",
        "--use_rep",
        callback=not_empty,
        help="Key of obsm with the embedding of the H&E around each spot, such as X_uni; repeat it for embeddings of "
        "wider fields. By default the only X_* key, or the embeddings that the model was trained on.",
    ),
]
LibraryKey = Annotated[
    str | None,
    typer.Option(
        "--library-key",
        "--library_key",
        callback=not_empty,
        help="Column of obs that names the tissue section of each spot; 'section' or, after training, that of the "
        "model by default. A file without it is one section, named after the file.",
    ),
]
GroupKey = Annotated[
    str | None,
    typer.Option(
        "--group-key",
        "--group_key",
        callback=not_empty,
        help="Column of obs that names the individual (patient, animal) of each section; that of training by default.",
    ),
]
SpatialKey = Annotated[
    str | None,
    typer.Option(
        "--spatial-key",
        "--spatial_key",
        callback=not_empty,
        help="Key of obsm with the spots' coordinates; 'spatial' or, after training, that of the model by default.",
    ),
]
KeyAdded = Annotated[
    str,
    typer.Option(
        "--key-added",
        "--key_added",
        callback=not_empty,
        help="Prefix of all slots that histovar writes, such as var['histovar_panel']; give another prefix to keep two "
        "models' results side by side.",
    ),
]
Prediction = Annotated[
    str, typer.Option("--key", callback=not_empty, help="Name of the prediction: the --key-added of 'predict'.")
]
Layer = Annotated[
    str | None,
    typer.Option(
        callback=not_empty,
        help="Layer with measured expression, in the units of training; the layer trained on by default.",
    ),
]
Gene = Annotated[
    list[str] | None,
    typer.Option("--gene", callback=not_empty, help="Gene to include; repeatable. All predicted genes by default."),
]
Interval = Annotated[
    float,
    typer.Option(
        "--confidence-level",
        "--confidence_level",
        min=0,
        max=1,
        callback=strictly_between,
        help="Share of measured values that the interval should contain.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Spots in a batch.")]
Gpus = Annotated[
    int | None, typer.Option(min=0, help="Number of GPUs; 0 is the CPU. By default one, if there is a GPU.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_RANDOM_STATE, help="Seed of all random numbers; the same seed repeats a run.")
]


def hardware(gpus: int | None) -> tuple[str, int]:
    """Translate --gpus to Lightning's accelerator and number of devices.

    Parameters
    ----------
    gpus
        The option; None for one GPU if there is any.

    Raises
    ------
    ValueError
        If the machine has fewer GPUs.
    """
    import torch

    if gpus is None:
        return "auto", 1
    n_gpus = torch.cuda.device_count()
    if gpus > n_gpus:
        raise ValueError(
            f"--gpus {gpus}: this machine has {n_gpus} CUDA GPUs; use --gpus {n_gpus}" + " (the CPU)" * (n_gpus == 0)
        )
    return ("cuda", gpus) if gpus else ("cpu", 1)


def section_column(library_key: str | None, model: TwoStageVARST, n_files: int) -> tuple[str | None, str]:
    """Column of ``obs`` with the section, once for the Python function and once for reading the files.

    Parameters
    ----------
    library_key
        The option, or None.
    model
        A trained model, whose column is the default.
    n_files
        Number of files: several files are several sections, also for a model trained on a single section.
    """
    from histovar.anndata_io.files import SECTION

    if library_key is None:
        library_key = model.registry.get("library_key")
    if library_key is None and n_files > 1:
        library_key = SECTION
    return library_key, SECTION if library_key is None else library_key


def embeddings(adata: AnnData, use_rep: list[str] | None) -> list[str]:
    """Keys of the embeddings to train on: those given, or else the only one.

    Parameters
    ----------
    adata
        Training sections.
    use_rep
        The option, or None.

    Raises
    ------
    KeyError
        If none are given and there are none.
    ValueError
        If none are given and there are several.
    """
    from histovar.anndata_io.files import OF_ONE_FILE

    if use_rep:
        return use_rep
    candidates = sorted(key for key in adata.obsm if key.startswith("X_") and key not in OF_ONE_FILE)
    if not candidates:
        raise KeyError(
            f"--use-rep: no embeddings found; obsm has {sorted(adata.obsm)}. Name the key with --use-rep KEY"
        )
    if len(candidates) > 1:
        raise ValueError(
            f"--use-rep: obsm has several embeddings, {candidates}; say which to use with --use-rep KEY (repeatable: "
            "the spot's own first, then those of wider fields)"
        )
    logger.info("use_rep: obsm[%r], the only embedding of the input", candidates[0])
    return candidates
