"""Embed the H&E around every spot with an image encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from histovar._arguments import (
    Converted,
    Count,
    Key,
    PathLike,
    Positive,
    TupleOf,
    check_arguments,
    refuse_type,
    refuse_value,
)
from histovar._keys import Keys, Prefix
from histovar._progress import progress
from histovar.anndata_io import embeddings, gate, slots, spacing
from histovar.anndata_io.gate import Data
from histovar.anndata_io.images_to_embed import SectionSlide, SectionSlides
from histovar.encoders import Encoder, registry
from histovar.encoders.features import Features
from histovar.prediction.device import Device
from histovar.slides import Patches

logger = logging.getLogger(__name__)

# Fields with fewer image pixels on a side are refused: a nucleus would hardly be visible.
LEAST_PIXELS = 8
# A warning is given if a field must be enlarged by more than this factor to the encoder's input size.
ENLARGED = 2.0
# Spots are read in rows this many fields high, so that spots close in the image are read one after another.
FIELDS_A_ROW = 2


def _encoder(value: Any) -> Encoder:
    if isinstance(value, Encoder):
        return value
    if isinstance(value, torch.nn.Module):
        return Encoder(name=type(value).__name__, module=value)
    if not isinstance(value, str):
        refuse_type("the name of an encoder, a histovar.encoders.Encoder or a torch.nn.Module")
    return registry.get(value) if value in registry.ENCODERS else refuse_value(f"one of {sorted(registry.ENCODERS)}")


def _distinct(fields: tuple[float, ...]) -> tuple[float, ...]:
    names = [f"{field:g}" for field in fields]
    return fields if len(set(names)) == len(names) else refuse_value("fields, each once")


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else value


EncoderLike = Annotated[Any, Converted(_encoder)]
Fields = Annotated[TupleOf[Positive], BeforeValidator(_one_or_more), Field(min_length=1), AfterValidator(_distinct)]


@check_arguments
def embed(
    data: Data,
    encoder: EncoderLike = "dinov2_vits14",
    *,
    image: PathLike | Mapping[str, PathLike] | None = None,
    field_um: Fields = (112.0, 224.0),
    mpp: Positive | Mapping[str, Positive] | None = None,
    library_key: Key | None = None,
    spatial_key: Key = "spatial",
    weights: PathLike | None = None,
    key_added: Prefix | None = None,
    batch_size: Count = 32,
    device: Device = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    show_progress_bar: bool = True,
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed the H&E around every spot or cell with an image encoder.

    Patches are cut by their physical size, so that images of different resolutions give the same fields. They are read
    window by window, in the coarsest resolution that has enough pixels, and resized (bicubic) to the encoder's input.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    encoder
        Name listed by :func:`histovar.encoders.describe`, an :class:`histovar.encoders.Encoder`, or any
        :class:`torch.nn.Module` that maps images (n, 3, 224, 224), normalised as for ImageNet, to features (n, width).
    image
        File of the slide or image to whose full-resolution pixels the coordinates refer; for several sections a
        dictionary from section to file. For SpatialData the name of an image, or a dictionary from section to name; the
        spots' positions in it follow from the elements that the table annotates and their transformations. None uses
        the only image of a SpatialData; else the file that ``uns["spatial"]`` names as
        ``metadata["source_image_path"]``, if it exists; else the largest image in ``uns["spatial"]``.
    field_um
        Sides of the patches, in microns: one, or several from the spot's own size to wider ones.
    mpp
        Microns per pixel of the full-resolution image, or a dictionary from section to these; by default read from the
        file, or from ``uns["spatial"][section]["scalefactors"]["microns_per_pixel"]``.
    library_key
        Column of ``obs`` with the section.
    spatial_key
        Key of ``obsm`` with coordinates, in pixels of the full-resolution image.
    weights
        Checkpoint file of the encoder, instead of a download from the Hugging Face hub.
    key_added
        Prefix of the slots; ``"X_"`` and the encoder's name by default.
    batch_size
        Patches in a batch.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    precision
        ``"fp32"``, or ``"bf16"``, which is faster on hardware that supports it.
    show_progress_bar
        Show progress.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes for each field ``obsm[f"{key_added}_{field}um"]``, such as ``obsm["X_dinov2_vits14_112um"]``, (n_obs,
        width) float32, and how it was made to ``uns[key_added]["embeddings"]``: encoder, a digest of its weights,
        layers, pooling, input size, normalisation, field, precision and microns per pixel of the image. Models keep
        this record, and :func:`histovar.tl.predict` refuses embeddings made in another way (except for precision, which
        hardly matters). ``uns[key_added]["scale"]`` has microns per unit of each section's coordinates. Patches are
        white beyond the image's edge, with a warning. There is also a warning if a field has less than half as many
        image pixels on a side as the encoder's input.

    Raises
    ------
    KeyError
        If a key is missing, or a section has no image.
    FileNotFoundError, PermissionError, ConnectionError
        If a file is missing, or weights are gated or cannot be downloaded.
    ModuleNotFoundError
        If timm (extra ``embed``) or, for slides, wsidata (extra ``wsi``) is not installed.
    ValueError
        If microns per pixel are unknown, an image cannot be read or spots lie outside it, a field has fewer than 8
        image pixels on a side or is larger than the image, or a slot holds data that histovar did not write.
    """
    adata = gate.table(data, table_name, writes=not copy)
    encoder = _encoder(encoder)  # check_arguments does not convert defaults
    checkpoint = None if weights is None else Path(weights)
    prefix = f"X_{encoder.name}" if key_added is None else key_added
    keys, reps = Keys(prefix), {field: f"{prefix}_{field:g}um" for field in field_um}
    slots.check_free(adata, keys, [("obsm", rep) for rep in reps.values()])
    slides = SectionSlides(data, adata, image, mpp, library_key, spatial_key)
    scales = _check_slides(slides, encoder, field_um)
    coarsest, section_scales = max(scales.values()), {}
    features = Features.load(encoder, checkpoint)

    by_field: dict[float, NDArray[np.float32]] = {}
    with features.on(device) as on_device:
        for i in range(len(slides.names)):
            slide = slides.open(i)
            try:
                for field in field_um:
                    values = _embed_section(
                        features, slide, field, batch_size, on_device, precision, show_progress_bar=show_progress_bar
                    )
                    if field not in by_field:
                        by_field[field] = np.empty((adata.n_obs, values.shape[1]), np.float32)
                    by_field[field][slide.rows] = values
                if spatial_key in adata.obsm:
                    section_scales[slide.name] = slide.mpp * _pixels(slide, gate.coordinates(adata, spatial_key))
            finally:
                slide.image.close()
    for field, rep in reps.items():
        gate.check_embedding(
            by_field[field], f"encoder: the embedding {rep!r}", "use precision='fp32' or another encoder"
        )

    if copy:
        adata = gate.copied(adata)
    records = dict(slots.record(adata, keys).get(embeddings.RECORDS, {}))
    for field, rep in reps.items():
        records[rep] = features.record(field, coarsest, precision)
    slots.write(
        adata,
        keys,
        {("obsm", rep): by_field[field] for field, rep in reps.items()},
        {embeddings.RECORDS: records, spacing.SCALE: spacing.scale_entry(section_scales)},
    )
    logger.info(
        "embed: %d spots by %s, in obsm %s, from images of %.3g um per pixel",
        adata.n_obs,
        encoder.name,
        list(reps.values()),
        coarsest,
    )
    return adata if copy else None


def _check_slides(slides: SectionSlides, encoder: Encoder, field_um: tuple[float, ...]) -> dict[str | None, float]:
    """Check every image before any work; return microns per pixel of each section."""
    scales: dict[str | None, float] = {}
    for i in range(len(slides.names)):
        slide = slides.open(i)
        try:
            for field in field_um:
                _check_field(slide, field, encoder.input_px)
            scales[slide.name] = slide.mpp
        finally:
            slide.image.close()
    return scales


def _pixels(slide: SectionSlide, coordinates: NDArray[np.floating]) -> float:
    """Image pixels per unit of a section's coordinates, also if these are rotated; 1 for a single spot."""
    in_image, in_object = (
        float(np.linalg.norm(points - points.mean(0))) for points in (slide.centers, coordinates[slide.rows])
    )
    return in_image / in_object if min(in_image, in_object) > 0 else 1.0


def _check_field(slide: SectionSlide, field: float, input_px: int) -> None:
    """Refuse a field if the image is too small or too coarse for it; warn if it is enlarged or crosses the edge."""
    image, side = slide.image, field / slide.mpp
    size = f"{image.width * slide.mpp:.0f} x {image.height * slide.mpp:.0f} um"
    if side > max(image.width, image.height):
        raise ValueError(
            f"field_um: {field:g} um is larger than the whole image of {slide.words}, {size} at {slide.mpp:.3g} um per "
            "pixel; give a smaller field, or correct mpp"
        )
    if side < LEAST_PIXELS:
        raise ValueError(
            f"field_um: {field:g} um is {side:.1f} pixels of the image of {slide.words} ({slide.mpp:.3g} um each), "
            f"fewer than {LEAST_PIXELS}; give a larger field, the slide itself with image=, or correct mpp"
        )
    if side * ENLARGED < input_px:
        logger.warning(
            "image: a field of %g um is only %.0f pixels of the image of %s, but the encoder's input is %d; for better "
            "embeddings give the slide itself with image=",
            field,
            side,
            slide.words,
            input_px,
        )
    n_beyond = int(Patches(image, slide.centers, side, input_px).beyond_edge.sum())
    if n_beyond:
        logger.warning(
            "image: for %d of %d spots%s the field of %g um reaches beyond the image; it is white there",
            n_beyond,
            len(slide.rows),
            "" if slide.name is None else f" of {slide.words}",
            field,
        )


def _embed_section(
    features: Features,
    slide: SectionSlide,
    field: float,
    batch_size: int,
    device: torch.device,
    precision: str,
    *,
    show_progress_bar: bool,
) -> NDArray[np.float32]:
    """Embed the spots of a section, (n_spots, width), in the order of its rows."""
    patches = Patches(slide.image, slide.centers, field / slide.mpp, features.encoder.input_px)
    order = np.lexsort((slide.centers[:, 0], slide.centers[:, 1] // (FIELDS_A_ROW * patches.field_px)))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    step = f"embed {slide.name or ''} {field:g} um".replace("  ", " ")
    embedded = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        tracked = progress(batches, step, show=show_progress_bar)
        for _, batch in zip(tracked, patches.batches(batches), strict=True):
            embedded.append(features(torch.from_numpy(batch).to(device)).float().cpu().numpy())
    values = np.concatenate(embedded)
    result = np.empty_like(values)
    result[order] = values
    return result
