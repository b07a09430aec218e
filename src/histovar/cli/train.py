"""``histovar train``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import outputs
from .options import (
    FILES,
    PATH,
    Gpus,
    KeyAdded,
    LibraryKey,
    Seed,
    SpatialKey,
    UseRep,
    embeddings,
    hardware,
    not_empty,
)

if TYPE_CHECKING:
    from anndata import AnnData

    from histovar import ModelConfig, TwoStageVARST


class Preset(StrEnum):
    """Named configurations of the model."""

    default = "default"
    reference = "reference"


class ModelName(StrEnum):
    """Models that can be trained."""

    two_stage_var_st = "TWO_STAGE_VAR_ST"


def train(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Training sections, as .h5ad files or .zarr stores; a single store is read section by section.",
            **FILES,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(callback=not_empty, help="Data set in --data-dir, instead of files: PRAD, her2st."),
    ] = None,
    data_dir: Annotated[
        Path,
        typer.Option("--data-dir", "--data_dir", help="Directory that holds the data sets, in HEST's layout.", **PATH),
    ] = Path(),
    embedding: Annotated[
        str, typer.Option(callback=not_empty, help="Encoder whose embeddings to read with --dataset.")
    ] = "uni",
    model: Annotated[ModelName, typer.Option(help="Model to train.")] = ModelName.two_stage_var_st,
    training_stage: Annotated[
        int | None,
        typer.Option(
            "--training-stage",
            "--training_stage",
            min=1,
            max=2,
            help="1: learn gene tokens from expression alone. 2: learn to predict tokens from histology. Both by "
            "default.",
        ),
    ] = None,
    stage1_ckpt: Annotated[
        Path | None,
        typer.Option(
            "--stage1-ckpt",
            "--stage1_ckpt",
            help="Directory of the model whose stage 1 is used for --training-stage 2.",
            **PATH,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum epochs of the codebook and of the tokens; by default chosen by the amount of data. Warm-up "
            "and ensemble take a fixed number of steps.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Spots in a batch.")] = 64,
    gpus: Gpus = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes, with --strategy ddp; one for each GPU by default."),
    ] = None,
    num_nodes: Annotated[int, typer.Option("--num-nodes", "--num_nodes", min=1, help="Number of machines.")] = 1,
    strategy: Annotated[str, typer.Option(callback=not_empty, help="Lightning's strategy, such as ddp.")] = "auto",
    use_rep: UseRep = None,
    layer: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="Layer with log-normalised expression; by default 'lognorm', computed from the counts in X if absent.",
        ),
    ] = None,
    library_key: LibraryKey = None,
    group_key: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="Column of obs that names the individual (patient, animal); intervals are then calibrated for unseen "
            "individuals.",
        ),
    ] = None,
    spatial_key: SpatialKey = None,
    covariate: Annotated[
        list[str] | None,
        typer.Option(
            callback=not_empty,
            help="Column of obs to predict from in addition to histology, such as stage or age; repeatable.",
        ),
    ] = None,
    key_added: KeyAdded = "histovar",
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out", "--hold_out", callback=not_empty, help="Section to leave out of training; repeatable."
        ),
    ] = None,
    n_genes: Annotated[
        int | None,
        typer.Option(
            "--n-genes",
            "--n_genes",
            min=2,
            help="Number of genes to model, the most variable ones; by default the panel in the file, else 200 or as "
            "many as are detected in a tenth of the spots.",
        ),
    ] = None,
    preset: Annotated[
        Preset, typer.Option(help="Configuration: small and accurate, or the reference with 85 M parameters.")
    ] = Preset.default,
    seed: Seed = 0,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint-dir", "--checkpoint_dir", help="Directory for checkpoints of unfinished training.", **PATH
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue unfinished training from --checkpoint-dir, if there is any.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to write the model to.", **PATH)] = Path(
        "histovar_model"
    ),
) -> None:
    """Train a model on sections with measured expression and histology embeddings, and calibrate its uncertainty."""
    if bool(inputs) == (dataset is not None):
        raise ValueError("give either input files (.h5ad, .zarr) or --dataset")
    if training_stage == 2 and stage1_ckpt is None:
        raise ValueError("--stage1-ckpt: stage 2 needs a trained stage 1; give its model directory")
    if training_stage != 2 and stage1_ckpt is not None:
        raise ValueError("--stage1-ckpt is for --training-stage 2")
    if training_stage == 1 and covariate:
        raise ValueError("--covariate is for stage 2; stage 1 learns from expression alone")
    if (resume or checkpoint_dir is not None) and training_stage is not None:
        raise ValueError("--checkpoint-dir and --resume are for both stages; leave --training-stage out")
    if resume and checkpoint_dir is None:
        raise ValueError("--resume needs --checkpoint-dir, the directory that holds the unfinished training")
    library_key = "section" if library_key is None else library_key
    sources = [*(inputs or []), *([data_dir / dataset] if dataset else []), *([stage1_ckpt] if stage1_ckpt else [])]
    outputs.check_model(out, sources)
    from histovar import TwoStageVARST, tl

    accelerator, n_gpus = hardware(gpus)
    stage1 = None if stage1_ckpt is None else TwoStageVARST.load(stage1_ckpt)
    if stage1 is not None:
        _check_stage1(stage1, n_genes, layer)
    dataset_embedding = None if training_stage == 1 and not use_rep else embedding
    adata = _training_data(inputs, dataset, data_dir, dataset_embedding, library_key)
    if hold_out:
        adata = _without(adata, library_key, hold_out)
    options: dict[str, Any] = {
        "library_key": library_key,
        "group_key": group_key,
        "key_added": key_added,
        "random_state": seed,
        "max_epochs": epochs,
        "batch_size": batch_size,
        "accelerator": accelerator,
        "devices": n_gpus if devices is None else devices,
        "num_nodes": num_nodes,
        "strategy": strategy,
    }
    histology: dict[str, Any] = {
        "spatial_key": "spatial" if spatial_key is None else spatial_key,
        "covariates": covariate or (),
    }
    if training_stage != 1:
        histology["use_rep"] = embeddings(adata, use_rep)
    if stage1 is None:
        _choose_panel(adata, n_genes, library_key, key_added)
    config = _config(preset, adata, stage1, key_added)
    if training_stage == 1:
        trained = tl.train_stage1(adata, layer=layer, config=config, **options)
    elif stage1 is None:
        trained = tl.train(
            adata, layer=layer, config=config, checkpoint_dir=checkpoint_dir, resume=resume, **histology, **options
        )
    else:
        trained = tl.train_stage2(adata, stage1, config=config, **histology, **options)
        if trained.config.n_members:  # as tl.train does
            tl.calibrate(adata, trained, library_key, key_added=key_added, device=accelerator, random_state=seed)
    trained.save(out)
    typer.echo(f"model written to {out}")


def _check_stage1(stage1: TwoStageVARST, n_genes: int | None, layer: str | None) -> None:
    """Refuse another number of genes or another layer than stage 1 was trained on."""
    n_panel, trained_on = len(stage1.registry["genes"]), stage1.registry["layer"]
    if n_genes not in (None, n_panel):
        raise ValueError(f"--n-genes {n_genes}: stage 1 was trained on {n_panel} genes; leave --n-genes out")
    if layer not in (None, trained_on):
        raise ValueError(f"--layer {layer}: stage 1 was trained on {trained_on!r}; leave --layer out")


def _training_data(
    inputs: list[Path] | None, dataset: str | None, data_dir: Path, embedding: str | None, library_key: str
) -> AnnData:
    """Read the training sections from files or a data set."""
    from histovar import datasets
    from histovar.anndata_io import files

    if inputs and len(inputs) == 1 and inputs[0].suffix == ".zarr":
        return files.read_store(inputs[0], library_key)
    if inputs:
        return files.read_files(inputs, library_key)
    if (data_dir / str(dataset) / "data" / "ST-cnts").is_dir():
        return datasets.her2st(data_dir / str(dataset))
    return datasets.hest(data_dir, dataset, embedding=embedding)


def _without(adata: AnnData, library_key: str, sections: list[str]) -> AnnData:
    """Leave out the sections to hold out."""
    if library_key not in adata.obs:
        raise KeyError(f"--hold-out needs --library-key, a column of obs; obs has {list(adata.obs.columns)}")
    names = adata.obs[library_key].astype(str)
    unknown = sorted(set(sections) - set(names))
    if unknown:
        raise ValueError(f"--hold-out: no sections {unknown}; the input has {sorted(set(names))}")
    return adata[~names.isin(sections)].copy()


def _choose_panel(adata: AnnData, n_genes: int | None, library_key: str, key_added: str) -> None:
    """Choose a panel of the given number of genes; refuse a number other than that of a panel in the file."""
    from histovar import pp
    from histovar._keys import Keys

    if n_genes is None:
        return
    panel = Keys(key_added).panel
    if panel not in adata.var:
        pp.gene_panel(adata, n_genes=n_genes, library_key=library_key, key_added=key_added)
        return
    n_panel = int(adata.var[panel].sum())
    if n_panel != n_genes:
        raise ValueError(
            f"--n-genes {n_genes}: the file already has a panel of {n_panel} genes in var[{panel!r}]; leave --n-genes "
            "out to train on it, or delete that column"
        )


def _config(preset: Preset, adata: AnnData, stage1: TwoStageVARST | None, key_added: str) -> ModelConfig | None:
    """Configuration of the preset for the panel, which is chosen first if need be; None for the default."""
    from histovar import ModelConfig
    from histovar._keys import Keys
    from histovar.tl._panel import ensure_panel

    if preset is Preset.default:
        return None
    keys = Keys(key_added)
    if stage1 is None:
        ensure_panel(adata, keys)
        n_genes = int(adata.var[keys.panel].sum())
    else:
        n_genes = len(stage1.registry["genes"])
    scales = (*(n for n in (1, 8, 32) if n < n_genes), n_genes)
    return ModelConfig.reference(
        n_genes=n_genes,
        scales=scales,
        components=(1,) * len(scales),
        encoder_hidden=(64, 64, 96, 256)[-len(scales) :],
    )
