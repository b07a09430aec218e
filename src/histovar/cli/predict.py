"""``histovar predict``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histovar._limits import MOST_SAMPLES

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
    SpatialKey,
    UseRep,
    hardware,
    not_empty,
    positive,
    section_column,
)

if TYPE_CHECKING:
    from histovar import TwoStageVARST


class Decoding(StrEnum):
    """Modes of decoding tokens, as in :class:`histovar.model.Decoding`."""

    expected = "expected"
    greedy = "greedy"
    sample = "sample"


class Units(StrEnum):
    """Units of :func:`histovar.tl.predict`."""

    lognorm = "lognorm"
    log_counts = "log_counts"
    counts = "counts"
    rates = "rates"


class Precision(StrEnum):
    """Precisions of :func:`histovar.tl.predict`."""

    fp32 = "fp32"
    bf16 = "bf16"


def _column_or_number(value: str | None) -> str | float | None:
    """Parse text as a number if it is one; otherwise it names a column."""
    not_empty(value)
    try:
        return value if value is None else float(value)
    except ValueError:
        return value


def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Sections with histology embeddings, as .h5ad files or .zarr stores.", **FILES),
    ],
    model: Model = Path("histovar_model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .h5ad or .zarr.", **PATH)] = Path(
        "predicted.h5ad"
    ),
    use_rep: UseRep = None,
    library_key: LibraryKey = None,
    spatial_key: SpatialKey = None,
    key_added: KeyAdded = "histovar",
    units: Annotated[
        Units | None,
        typer.Option(
            help="Units of the prediction, for a model that learnt from counts. lognorm: log1p of counts normalised as "
            "in training. log_counts: log1p of counts. counts. rates: expected counts per 10,000, without counting "
            "noise. Those of training by default.",
        ),
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(
            callback=_column_or_number,
            help="Total count at which to predict: a column of obs with each spot's own, or one number for all spots, "
            "so that maps of sections can be compared. Predicted from histology by default.",
        ),
    ] = None,
    quantile: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Quantile of each gene's expression to add; repeatable. --quantile 0.05 --quantile 0.95 are the ends "
            "of an interval that contains the true expression in 90 % of the spots.",
        ),
    ] = None,
    n_samples: Annotated[
        int,
        typer.Option(
            "--n-samples",
            "--n_samples",
            min=0,
            max=MOST_SAMPLES,
            help="Number of random draws of each spot's expression to add, in which genes are correlated as in tissue.",
        ),
    ] = 0,
    tokens: Annotated[
        bool,
        typer.Option(
            help="Write the predicted tokens. Without them, expression and intervals are the same, and models of "
            "counts mostly predict several times faster."
        ),
    ] = True,
    decoding: Annotated[
        Decoding,
        typer.Option(
            help="How tokens are decoded. expected: the mean over all tokens. greedy: the likeliest token. sample: one "
            "draw."
        ),
    ] = Decoding.expected,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            callback=positive,
            help="Temperature of draws: below 1 they stay closer to likely tokens, above 1 they vary more.",
        ),
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option("--top-k", "--top_k", min=0, help="Draw from this many likeliest tokens; 0 for all."),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p",
            "--top_p",
            min=0,
            max=1,
            callback=positive,
            help="Draw from the likeliest tokens that together have this probability; 1 for all.",
        ),
    ] = 1.0,
    batch_size: BatchSize = 64,
    gpus: Gpus = None,
    precision: Annotated[
        Precision,
        typer.Option(help="bf16: 16-bit arithmetic, faster on hardware that supports it, slower on other CPUs."),
    ] = Precision.fp32,
    seed: Seed = 0,
    scheduler: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="Address of a dask.distributed scheduler for .zarr stores; threads by default.",
        ),
    ] = None,
) -> None:
    """Predict expression from histology; no measured genes are needed.

    From a .zarr store to a .zarr store, spots are streamed chunk by chunk; the output has the panel's genes and no
    embeddings. To continue after an interruption, repeat the command.
    """
    outputs.check_data(out, [*inputs, model])
    streamed = len(inputs) == 1 and inputs[0].suffix == out.suffix == ".zarr"
    if scheduler is not None and not streamed:
        raise ValueError("--scheduler needs a single .zarr store as input and --out ending in .zarr")
    from histovar import TwoStageVARST, tl
    from histovar.anndata_io import files

    accelerator, _ = hardware(gpus)
    trained = TwoStageVARST.load(model)
    library_key, sections = section_column(library_key, trained, len(inputs))
    options: dict[str, Any] = {
        "use_rep": use_rep if use_rep else None,
        "library_key": library_key,
        "spatial_key": spatial_key,
        "units": units and units.value,
        "depth": depth,
        "decoding": decoding.value,
        "n_samples": n_samples,
        "tokens": tokens,
        "quantiles": list(quantile or []),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "key_added": key_added,
        "batch_size": batch_size,
        "device": accelerator,
        "precision": precision.value,
        "random_state": seed,
    }
    if streamed:
        _stream(inputs[0], sections, trained, model, out, options, scheduler)
    else:
        adata = files.read_files(inputs, sections)
        tl.predict(adata, trained, **options, show_progress_bar=True)
        outputs.write_data(adata, out)
    typer.echo(f"prediction written to {out}")


def _stream(
    store: Path,
    sections: str,
    trained: TwoStageVARST,
    model: Path,
    out: Path,
    options: dict[str, Any],
    scheduler: str | None,
) -> None:
    """Predict a .zarr store chunk by chunk into another .zarr store with dask."""
    from dask.diagnostics.progress import ProgressBar

    from histovar import tl
    from histovar.anndata_io import files, zarr_check, zarr_store
    from histovar.model.checkpoint import verify

    identity = {
        "input": str(store.resolve()),
        "content of the input": zarr_check.content_digest(store),
        "model": verify(model),
        **options,
    }
    adata = files.read_store(store, sections, trained.registry["genes"])
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(ProgressBar(out=sys.stderr))
        else:
            stack.enter_context(_client(scheduler))
        tl.predict(adata, trained, **options)
        for key in options["use_rep"] or trained.registry["use_rep"]:
            del adata.obsm[key]
        out.parent.mkdir(parents=True, exist_ok=True)
        zarr_store.write_zarr(adata, out, identity)


def _client(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise ValueError("--scheduler needs dask.distributed: pip install 'histovar[dask]'") from None
    return Client(scheduler)
