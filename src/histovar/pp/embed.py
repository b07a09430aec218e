"""Embed the H&E around every spot."""

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

# A field is refused that has fewer pixels of the image a side: hardly a nucleus would be seen.
LEAST_PIXELS = 8
# The image is too coarse, and that is warned of, if the encoder's pixels are so many times as fine as its own.
ENLARGED = 2.0
# Spots are read in rows of so many fields, so that neighbours in the image are neighbours in time.
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
    """Embed the H&E around every spot or cell.

    Patches are cut by their physical size, so that images of other resolutions give the same fields. They are read
    window by window, in the coarsest resolution that has enough pixels, and resized (bicubic) to the encoder's input.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    encoder
        Name of one of :func:`histovar.encoders.describe`, an :class:`histovar.encoders.Encoder`, or any
        :class:`torch.nn.Module` that maps images (n, 3, 224, 224), normalised as ImageNet's, to features (n, width).
    image
        File of the slide or image in whose full-resolution pixels the coordinates are; of several sections a dictionary
        of the section to its file. Of a SpatialData, the name of an image, or a dictionary of those; where the spots
        lie in it is known by the elements that the table annotates and by their transformations. None: the only image
        of a SpatialData; else the file that the entry of ``uns["spatial"]`` names as
        ``metadata["source_image_path"]``, if it is there; else the largest image that the entry holds.
    field_um
        Sides of the patches, in microns: one, or several from the spot's own to wider ones.
    mpp
        Microns per pixel of the full-resolution image, or a dictionary of the section to those; by default what the
        file says, or ``uns["spatial"][section]["scalefactors"]["microns_per_pixel"]``.
    library_key
        Column of ``obs`` with the section.
    spatial_key
        Key of ``obsm`` with coordinates, in pixels of the full-resolution image.
    weights
        Checkpoint file of the encoder, in place of a download from the Hugging Face hub.
    key_added
        Prefix of the slots; ``"X_"`` and the encoder's name by default.
    batch_size
        Patches at once.
    device
        ``"auto"`` (CUDA if there is any, else the CPU) or a torch device.
    precision
        ``"fp32"``, or ``"bf16"``, which is faster on hardware that has it.
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
        width) float32, and in ``uns[key_added]["embeddings"]`` what made it: encoder, a digest of its weights, layers,
        pooling, input pixels, normalisation, field, precision and microns per pixel of the image. Models keep that, and
        :func:`histovar.tl.predict` refuses embeddings that were made otherwise (but in another precision, which makes
        hardly a difference). ``uns[key_added]["scale"]`` has microns per unit of each section's coordinates.
        Patches that reach beyond the image are white there, which is warned of, as is an image with less than half as
        many pixels a field as the encoder takes.

    Raises
    ------
    KeyError
        If a key is missing, or a section has no image.
    FileNotFoundError, PermissionError, ConnectionError
        If a file is missing, or weights are gated or cannot be downloaded.
    ModuleNotFoundError
        If timm (extra ``embed``) or, for slides, wsidata (extra ``wsi``) is not installed.
    ValueError
        If microns per pixel are not known, an image cannot be read or spots lie outside of it, a field has fewer than
        8 pixels of the image or is larger than it, or a slot holds what histovar did not write.
    """
    adata = gate.table(data, table_name, writes=not copy)
    encoder = _encoder(encoder)  # the default is not converted
    checkpoint = None if weights is None else Path(weights)
    prefix = f"X_{encoder.name}" if key_added is None else key_added
    keys, reps = Keys(prefix), {field: f"{prefix}_{field:g}um" for field in field_um}
    slots.check_free(adata, keys, [("obsm", rep) for rep in reps.values()])
    slides = SectionSlides(data, adata, image, mpp, library_key, spatial_key)
    scales = _check(slides, encoder, field_um)
    coarsest, by_section = max(scales.values()), {}
    features = Features.load(encoder, checkpoint)

    found: dict[float, NDArray[np.float32]] = {}
    with features.on(device) as where:
        for i in range(len(slides.names)):
            slide = slides.open(i)
            try:
                for field in field_um:
                    values = _embed_section(
                        features, slide, field, batch_size, where, precision, show_progress_bar=show_progress_bar
                    )
                    if field not in found:
                        found[field] = np.empty((adata.n_obs, values.shape[1]), np.float32)
                    found[field][slide.rows] = values
                if spatial_key in adata.obsm:
                    by_section[slide.name] = slide.mpp * _pixels(slide, gate.coordinates(adata, spatial_key))
            finally:
                slide.image.close()
    for field, rep in reps.items():
        gate.check_embedding(found[field], f"encoder: the embedding {rep!r}", "use precision='fp32' or another encoder")

    if copy:
        adata = gate.copied(adata)
    records = dict(slots.record(adata, keys).get(embeddings.RECORDS, {}))
    for field, rep in reps.items():
        records[rep] = features.record(field, coarsest, precision)
    slots.write(
        adata,
        keys,
        {("obsm", rep): found[field] for field, rep in reps.items()},
        {embeddings.RECORDS: records, spacing.SCALE: spacing.scale_entry(by_section)},
    )
    logger.info(
        "embed: %d spots by %s, in obsm %s, from images of %.3g um per pixel",
        adata.n_obs,
        encoder.name,
        list(reps.values()),
        coarsest,
    )
    return adata if copy else None


def _check(slides: SectionSlides, encoder: Encoder, field_um: tuple[float, ...]) -> dict[str | None, float]:
    """Open every image once, before any work; microns per pixel of each section."""
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


def _pixels(slide: SectionSlide, place: NDArray[np.floating]) -> float:
    """Pixels of a section's image for one unit of its coordinates, however they are turned; 1 of a single spot."""
    in_image, own = (float(np.linalg.norm(at - at.mean(0))) for at in (slide.centers, place[slide.rows]))
    return in_image / own if min(in_image, own) > 0 else 1.0


def _check_field(slide: SectionSlide, field: float, input_px: int) -> None:
    """Refuse a field that the image is too small or too coarse for; warn of what is not as it should be."""
    image, side = slide.image, field / slide.mpp
    size = f"{image.width * slide.mpp:.0f} x {image.height * slide.mpp:.0f} um"
    if side > max(image.width, image.height):
        raise ValueError(
            f"field_um: {field:g} um is more than the whole image of {slide.words}, {size} at {slide.mpp:.3g} um per "
            "pixel; give a smaller field, or mend mpp"
        )
    if side < LEAST_PIXELS:
        raise ValueError(
            f"field_um: {field:g} um is {side:.1f} pixels of the image of {slide.words} ({slide.mpp:.3g} um each), "
            f"fewer than {LEAST_PIXELS}; give a larger field, the slide itself with image=, or mend mpp"
        )
    if side * ENLARGED < input_px:
        logger.warning(
            "image: a field of %g um is only %.0f pixels of the image of %s, and the encoder takes %d; embeddings of "
            "the slide itself, with image=, would tell more",
            field,
            side,
            slide.words,
            input_px,
        )
    n_beyond = int(Patches(image, slide.centers, side, input_px).beyond_edge.sum())
    if n_beyond:
        logger.warning(
            "image: of %d of %d spots%s the field of %g um reaches beyond the image; it is white there",
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
    """Embeddings of the spots of a section, (n_spots, width), in the order of its rows."""
    patches = Patches(slide.image, slide.centers, field / slide.mpp, features.encoder.input_px)
    order = np.lexsort((slide.centers[:, 0], slide.centers[:, 1] // (FIELDS_A_ROW * patches.field_px)))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    step = f"embed {slide.name or ''} {field:g} um".replace("  ", " ")
    embedded = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        shown = progress(batches, step, show=show_progress_bar)
        for _, batch in zip(shown, patches.batches(batches), strict=True):
            embedded.append(features(torch.from_numpy(batch).to(device)).float().cpu().numpy())
    values = np.concatenate(embedded)
    result = np.empty_like(values)
    result[order] = values
    return result
