"""``histovar embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import outputs
from .options import FILES, PATH, Gpus, LibraryKey, SpatialKey, hardware, not_empty, path_of, positive, positive_or_none
from .predict import Precision


def _all_positive(values: list[float] | None) -> list[float] | None:
    for value in values or []:
        positive(value)
    return values


def embed(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Sections with coordinates of spots, cells or tiles, as .h5ad files or .zarr stores.", **FILES
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .h5ad or .zarr.", **PATH)] = Path(
        "embedded.h5ad"
    ),
    image: Annotated[
        list[str] | None,
        typer.Option(
            callback=not_empty,
            help="Slide or image to whose pixels the coordinates refer: a file, or SECTION=FILE for each of several "
            "sections. By default the slide recorded by 'histovar tile', or the small image in the .h5ad file, which "
            "gives poorer embeddings.",
        ),
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            callback=not_empty,
            help="Network that computes the embeddings: dinov2_vits14 is free for everyone; uni, uni2_h, virchow2, "
            "h_optimus_0, h_optimus_1, conch, phikon_v2 and gigapath were trained on pathology, and most need access "
            "granted on huggingface.co.",
        ),
    ] = "dinov2_vits14",
    field_um: Annotated[
        list[float] | None,
        typer.Option(
            "--field-um",
            "--field_um",
            callback=_all_positive,
            help="Side in microns of the square around each spot that is embedded; repeatable, the smallest first. 112 "
            "and 224 by default.",
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option(
            callback=positive_or_none,
            help="Microns per pixel of the image, if its file does not say: about 0.5 at 20x, 0.25 at 40x.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="File with the encoder's weights, instead of a download from huggingface.co.", **PATH),
    ] = None,
    library_key: LibraryKey = None,
    spatial_key: SpatialKey = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Patches in a batch.")] = 32,
    gpus: Gpus = None,
    precision: Annotated[
        Precision,
        typer.Option(help="bf16: 16-bit arithmetic, faster on hardware that supports it, slower on other CPUs."),
    ] = Precision.fp32,
) -> None:
    """Embed the H&E around each spot: the step before 'train' and 'predict'.

    Sections to train on and sections to predict must be embedded with the same encoder and fields. Images may be
    scanned at different magnifications, since fields are in microns.
    """
    outputs.check_data(out, inputs, "embeddings")
    images = _images(image or [])
    from histovar import pp
    from histovar.anndata_io import files

    accelerator, _ = hardware(gpus)
    column = files.SECTION if library_key is None else library_key
    adata = files.read_files(inputs, column)
    pp.embed(
        adata,
        encoder,
        image=images,
        field_um=tuple(field_um) if field_um else (112.0, 224.0),
        mpp=mpp,
        library_key=column,
        spatial_key="spatial" if spatial_key is None else spatial_key,
        weights=weights,
        batch_size=batch_size,
        device=accelerator,
        precision=precision.value,
    )
    outputs.write_data(adata, out)
    typer.echo(f"embeddings written to {out}")


def _images(given: list[str]) -> str | dict[str, str] | None:
    """Parse --image: one file, or files by section."""
    if len(given) == 1 and ("=" not in given[0] or path_of(given[0]).exists()):
        return str(path_of(given[0]))
    unnamed = [text for text in given if "=" not in text]
    if unnamed:
        raise ValueError(f"--image: {unnamed[0]!r} is one of several; name the section of each as SECTION=FILE")
    pairs = [text.split("=", 1) for text in given]
    return {section: str(path_of(path)) for section, path in pairs} or None
