"""The command line."""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from anndata import AnnData

    from histovar import TwoStageVARST


app = typer.Typer(
    name="histovar",
    help="Predict spatial gene expression from H&E histology, with uncertainty, in AnnData files.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Preset(StrEnum):
    """Named configurations."""

    default = "default"
    reference = "reference"


class ModelName(StrEnum):
    """Models that can be trained."""

    two_stage_var_st = "TWO_STAGE_VAR_ST"


DataDir = Annotated[
    Path, typer.Option("--data-dir", "--data_dir", help="Directory that holds the data sets, in HEST's layout.")
]
UseRep = Annotated[
    list[str] | None,
    typer.Option("--use-rep", "--use_rep", help="Key of obsm with histology embeddings; repeat for wider fields."),
]
LibraryKey = Annotated[
    str | None, typer.Option("--library-key", "--library_key", help="Column of obs that names the tissue section.")
]
Gpus = Annotated[int | None, typer.Option(help="Number of GPUs; 0 is the CPU. One where there is any by default.")]


@app.command()
def train(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(help="Training sections, as .h5ad files, or one .zarr store, read section by section."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set in --data-dir, in place of files: PRAD, her2st.")
    ] = None,
    data_dir: DataDir = Path(),
    embedding: Annotated[str, typer.Option(help="Encoder whose embeddings to read with --dataset.")] = "uni",
    model: Annotated[ModelName, typer.Option(help="Model to train.")] = ModelName.two_stage_var_st,
    training_stage: Annotated[
        int | None,
        typer.Option(
            "--training-stage",
            "--training_stage",
            min=1,
            max=2,
            help="1: gene tokens. 2: tokens from histology. Both by default.",
        ),
    ] = None,
    stage1_ckpt: Annotated[
        Path | None,
        typer.Option(
            "--stage1-ckpt", "--stage1_ckpt", help="Model directory whose stage 1 training stage 2 builds on."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Most epochs of a stage; chosen by the amount of data by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Spots in a batch.")] = 64,
    gpus: Gpus = None,
    devices: Annotated[
        int | None, typer.Option(help="Number of processes, with --strategy ddp; one for each GPU by default.")
    ] = None,
    num_nodes: Annotated[int, typer.Option("--num-nodes", "--num_nodes", help="Number of machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning's strategy, such as ddp.")] = "auto",
    use_rep: UseRep = None,
    library_key: LibraryKey = "section",
    hold_out: Annotated[
        list[str] | None, typer.Option("--hold-out", "--hold_out", help="Section to leave out of training; repeatable.")
    ] = None,
    n_genes: Annotated[
        int, typer.Option("--n-genes", "--n_genes", help="Genes to model, the most variable ones.")
    ] = 200,
    preset: Annotated[
        Preset, typer.Option(help="Configuration: small and accurate, or the 85 M parameter reference.")
    ] = Preset.default,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the model to.")] = Path("histovar_model"),
) -> None:
    """Train a model on sections with measured expression and histology embeddings."""
    from histovar import TwoStageVARST, pp, tl

    accelerator, n_gpus = _hardware(gpus)
    adata = _training_data(inputs, dataset, data_dir, None if training_stage == 1 and not use_rep else embedding)
    if hold_out:
        adata = _without(adata, library_key, hold_out)
    options: dict[str, Any] = {
        "max_epochs": epochs,
        "batch_size": batch_size,
        "accelerator": accelerator,
        "devices": devices or n_gpus,
        "num_nodes": num_nodes,
        "strategy": strategy,
    }
    shared: dict[str, Any] = {"library_key": library_key, "random_state": seed, **options}
    if training_stage == 2:
        if stage1_ckpt is None:
            raise ValueError("--stage1-ckpt: stage 2 needs a trained stage 1; give its model directory")
        trained = TwoStageVARST.load(stage1_ckpt)
        n_panel = len(trained.registry["genes"])
    else:
        if "histovar_panel" not in adata.var:
            pp.gene_panel(adata, n_genes=n_genes, library_key=library_key)
        n_panel = int(adata.var["histovar_panel"].sum())
    config = None if preset is Preset.default else _reference(n_panel)
    if training_stage != 2:
        trained = tl.train_stage1(adata, config=config, **shared)
    if training_stage != 1:
        tl.train_stage2(adata, trained, use_rep=use_rep or _embeddings(adata), config=config, **shared)
    trained.save(out)
    typer.echo(f"model written to {out}")


@app.command()
def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="Sections with histology embeddings, as .h5ad files or .zarr stores."),
    ],
    model: Annotated[Path, typer.Option("--model", "-m", help="Model directory.")] = Path("histovar_model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .h5ad or .zarr.")] = Path("predicted.h5ad"),
    use_rep: UseRep = None,
    library_key: LibraryKey = None,
    n_samples: Annotated[int, typer.Option("--n-samples", "--n_samples", help="Joint draws to add.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", help="Spots at once.")] = 64,
    gpus: Gpus = None,
    seed: Annotated[int, typer.Option(help="Random seed of the draws.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a dask.distributed scheduler for .zarr stores; threads by default.")
    ] = None,
) -> None:
    """Predict expression from histology; no measured genes are needed.

    A .zarr store is streamed to a .zarr store, chunk by chunk, with the panel's genes and without the embeddings. What
    was interrupted is continued when the same command is given again.
    """
    from histovar import TwoStageVARST, tl

    accelerator, _ = _hardware(gpus)
    trained = TwoStageVARST.load(model)
    options: dict[str, Any] = {
        "use_rep": use_rep or None,
        "library_key": library_key,
        "n_samples": n_samples,
        "batch_size": batch_size,
        "device": accelerator,
        "random_state": seed,
    }
    if len(inputs) == 1 and inputs[0].suffix == out.suffix == ".zarr":
        _stream(inputs[0], trained, model, out, options, scheduler)
    elif scheduler:
        raise ValueError("--scheduler is for one .zarr store and --out .zarr")
    else:
        adata = _read(inputs)
        tl.predict(adata, trained, **options, show_progress_bar=True)
        _write(adata, out)
    typer.echo(f"prediction written to {out}")


@app.command()
def evaluate(
    inputs: Annotated[list[Path], typer.Argument(help="Predicted sections with measured expression, as .h5ad files.")],
    library_key: LibraryKey = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file for the scores of every gene.")] = None,
) -> None:
    """Score predictions against measured expression."""
    from histovar import tl

    adata = _read(inputs)
    scores = tl.evaluate(adata, library_key=library_key)
    typer.echo(adata.uns["histovar"]["evaluation"].round(4).to_string())
    if out is not None:
        scores.to_csv(out)
        typer.echo(f"scores written to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write to.")] = Path("demo_output"),
    n_spots: Annotated[int, typer.Option("--n-spots", "--n_spots", help="Spots of each of the four sections.")] = 400,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Run the whole path on simulated sections: train, predict a held-out section, score it and draw its map."""
    from histovar.demo import run

    typer.echo(run(out, n_spots=n_spots, random_state=seed))


@app.command()
def info(model: Annotated[Path, typer.Argument(help="Model directory.")]) -> None:
    """Say what a saved model was trained on and what it needs."""
    from histovar.model.checkpoint import read_card

    card = read_card(model)
    registry, config = card["registry"], card["config"]
    genes = registry.get("genes", [])
    lines = {
        "written by": f"histovar {card['version']}, format {card['format_version']}",
        "stages": ", ".join(map(str, card["stages"])),
        "genes": f"{len(genes)}: {', '.join(genes[:6])}, ...",
        "units": registry.get("units"),
        "scales": config["scales"],
        "codebook": f"{config['codebook_size']} x {config['codebook_dim']}",
        "embeddings": dict(zip(registry.get("use_rep", []), registry.get("embedding_dims", []), strict=True)),
        "neighbourhoods": config["n_neighbors"],
        "covariates": list(registry.get("covariates", {})),
        "trained on": f"stage 1 {registry.get('sections_stage1')}, stage 2 {registry.get('sections_stage2')}",
    }
    for name, value in lines.items():
        typer.echo(f"{name:>15}  {value}")


def _hardware(gpus: int | None) -> tuple[str, int]:
    """Lightning's accelerator and devices."""
    import torch

    if gpus is None:
        return "auto", 1
    if gpus < 0:
        raise ValueError(f"--gpus must not be negative, got {gpus}")
    there = torch.cuda.device_count()
    if gpus > there:
        raise ValueError(
            f"--gpus {gpus}: this machine has {there} CUDA GPUs; use --gpus {there}" + " (the CPU)" * (there == 0)
        )
    return ("cuda", gpus) if gpus else ("cpu", 1)


def _training_data(inputs: list[Path] | None, dataset: str | None, data_dir: Path, embedding: str | None) -> AnnData:
    from histovar import datasets
    from histovar.anndata_io import zarr_store

    if bool(inputs) == bool(dataset):
        raise ValueError("give .h5ad files or --dataset, one of the two")
    if inputs and len(inputs) == 1 and inputs[0].suffix == ".zarr":
        return zarr_store.read_zarr(inputs[0])
    if inputs:
        return _read(inputs)
    if (data_dir / str(dataset) / "data" / "ST-cnts").is_dir():
        return datasets.her2st(data_dir / str(dataset))
    return datasets.hest(data_dir, dataset, embedding=embedding)


def _read(files: list[Path]) -> AnnData:
    import anndata as ad

    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no file {str(file)!r}")
    parts = [ad.read_zarr(f) if f.suffix == ".zarr" else ad.read_h5ad(f) for f in files]
    if len(parts) == 1:
        return parts[0]
    return ad.concat(parts, join="inner", uns_merge="unique", merge="same")


def _stream(
    store: Path, trained: TwoStageVARST, model: Path, out: Path, options: dict[str, Any], scheduler: str | None
) -> None:
    """From store to store, in the order and by the workers of dask's scheduler."""
    from contextlib import ExitStack
    from hashlib import sha256

    from dask.diagnostics.progress import ProgressBar

    from histovar import tl
    from histovar.anndata_io import zarr_store

    if store.resolve() == out.resolve():
        raise ValueError(f"--out: {str(out)!r} is the input itself; write to another store")
    adata = zarr_store.read_zarr(store, trained.registry["genes"])
    weights = b"".join(file.read_bytes() for file in sorted(model.iterdir()))
    with ExitStack() as stack:
        if scheduler is None:
            stack.enter_context(ProgressBar())
        else:
            from distributed import Client

            stack.enter_context(Client(scheduler))
        tl.predict(adata, trained, **options)
        for key in options["use_rep"] or trained.registry["use_rep"]:
            del adata.obsm[key]
        identity = {"input": str(store.resolve()), "model": sha256(weights).hexdigest(), **options}
        zarr_store.write_zarr(adata, out, identity)


def _write(adata: AnnData, out: Path) -> None:
    if out.suffix == ".zarr":
        adata.write_zarr(out)
    elif out.suffix == ".h5ad":
        adata.write_h5ad(out)
    else:
        raise ValueError(f"--out must end in .h5ad or .zarr, got {str(out)!r}")


def _without(adata: AnnData, library_key: str | None, sections: list[str]) -> AnnData:
    if library_key is None or library_key not in adata.obs:
        raise KeyError(f"--hold-out needs --library-key, a column of obs; obs has {list(adata.obs.columns)}")
    names = adata.obs[library_key].astype(str)
    unknown = sorted(set(sections) - set(names))
    if unknown:
        raise ValueError(f"--hold-out: no sections {unknown}; there are {sorted(set(names))}")
    return adata[~names.isin(sections)].copy()


def _embeddings(adata: AnnData) -> list[str]:
    """The embeddings of an object, where they can be told from their names."""
    found = [key for key in adata.obsm if key.startswith("X_") and key not in ("X_pca", "X_umap", "X_tsne")]
    if not found:
        raise KeyError(f"--use-rep: no embeddings found; obsm has {sorted(adata.obsm)}. Name the key with --use-rep")
    return sorted(found, key=len)


def _reference(n_genes: int) -> Any:
    from histovar import ModelConfig

    scales = (*(n for n in (1, 8, 32) if n < n_genes), n_genes)
    return ModelConfig.reference(
        n_genes=n_genes,
        scales=scales,
        components=(1,) * len(scales),
        encoder_hidden=(64, 64, 96, 256)[-len(scales) :],
    )


def main() -> None:
    """Run the command line; errors of the user are one line and exit code 2."""
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    package = logging.getLogger("histovar")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, KeyError, TypeError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        _refuse(str(text))
    except Exception as error:  # click's own usage errors, whose class typer does not export
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        _refuse(show())


def _refuse(message: str) -> None:
    line = " ".join(message.split())
    typer.echo(f"histovar: {line}", err=True)
    sys.exit(2)
