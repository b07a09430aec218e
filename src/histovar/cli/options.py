"""Options that commands share, and what they mean: devices, embeddings, files."""

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
    """A path as it was typed; an empty one is refused."""
    if not str(value).strip():
        raise typer.BadParameter("the path is empty")
    return Path(value).expanduser()


def not_empty(value: Any) -> Any:
    """Refuse empty text, which would pass for an option that was not given."""
    texts = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise typer.BadParameter("the text is empty; leave the option out, or give a name")
    return value


def positive(value: float) -> float:
    """Refuse 0, which a range of typer would let pass."""
    if not value > 0:
        raise typer.BadParameter(f"{value:g} is not more than 0")
    return value


def positive_or_none(value: float | None) -> float | None:
    """The same of an option that may be left out."""
    return value if value is None else positive(value)


def strictly_between(value: float) -> float:
    """Refuse 0 and 1, which a range of typer would let pass."""
    if not 0 < value < 1:
        raise typer.BadParameter(f"{value:g} is not more than 0 and less than 1")
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
        "wider fields. By default the only X_* that is there, or what the model was trained on.",
    ),
]
LibraryKey = Annotated[
    str | None,
    typer.Option(
        "--library-key",
        "--library_key",
        callback=not_empty,
        help="Column of obs that names the tissue section of each spot; 'section', or that of training, by default. "
        "A file without it is one section, named after the file.",
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
        help="Key of obsm with the spots' coordinates; 'spatial', or that of training, by default.",
    ),
]
KeyAdded = Annotated[
    str,
    typer.Option(
        "--key-added",
        "--key_added",
        callback=not_empty,
        help="Prefix of the names under which a file holds what histovar has made, such as var['histovar_panel']; "
        "another prefix keeps two models' results side by side.",
    ),
]
Prediction = Annotated[
    str, typer.Option("--key", callback=not_empty, help="Name of the prediction, the --key-added of predict.")
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
    typer.Option("--gene", callback=not_empty, help="Gene to take; repeatable. All that were predicted by default."),
]
Interval = Annotated[
    float,
    typer.Option(
        "--confidence-level",
        "--confidence_level",
        min=0,
        max=1,
        callback=strictly_between,
        help="Share of what would be measured that the interval between lower and upper bound is to hold.",
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Spots at once.")]
Gpus = Annotated[
    int | None, typer.Option(min=0, help="Number of GPUs; 0 is the CPU. One where there is any by default.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=MOST_RANDOM_STATE, help="Seed of all random choices; the same seed repeats them.")
]


def hardware(gpus: int | None) -> tuple[str, int]:
    """Lightning's accelerator and devices for a number of GPUs.

    Parameters
    ----------
    gpus
        As it was given; None for a GPU where there is one.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    import torch

    if gpus is None:
        return "auto", 1
    there = torch.cuda.device_count()
    if gpus > there:
        raise ValueError(
            f"--gpus {gpus}: this machine has {there} CUDA GPUs; use --gpus {there}" + " (the CPU)" * (there == 0)
        )
    return ("cuda", gpus) if gpus else ("cpu", 1)


def section_column(library_key: str | None, model: TwoStageVARST, n_files: int) -> tuple[str | None, str]:
    """The column of ``obs`` with the section: to use, and to read the files with.

    Parameters
    ----------
    library_key
        As it was given.
    model
        A trained model, whose column is the default.
    n_files
        Several files are several sections, also to a model of a single one.
    """
    from histovar.anndata_io.files import SECTION

    if library_key is None:
        library_key = model.registry.get("library_key")
    if library_key is None and n_files > 1:
        library_key = SECTION
    return library_key, SECTION if library_key is None else library_key


def embeddings(adata: AnnData, use_rep: list[str] | None) -> list[str]:
    """Keys of the embeddings to train on: those given, or the only one there is.

    Parameters
    ----------
    adata
        Training sections.
    use_rep
        Keys as they were given.

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
    logger.info("embedding: obsm[%r], the only one there is", candidates[0])
    return candidates
