"""Tile the tissue of a whole-slide image."""

from __future__ import annotations

import logging
import warnings
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from histovar._arguments import Converted, Count, Key, PathLike, Positive, Share, check_arguments, checked, refuse_type
from histovar._extras import import_extra
from histovar.anndata_io.images_to_embed import HOW_TO_GIVE_MPP
from histovar.slides.files import PICTURES, TIFFS, TO_PYRAMID, SlideImage

logger = logging.getLogger(__name__)

# As between the spots of Visium.
SPACING_UM = 100.0
# Tissue is sought in the coarsest resolution with at least this many pixels on a side, or else in the finest.
PIXELS_FOR_TISSUE = 1000
# Tiles with fewer pixels on a side show no histology.
LEAST_PIXELS = 8


def _slide(value: Any) -> Any:
    if isinstance(value, str | Path):
        return checked(_path, {"path": value})["path"]
    if not all(hasattr(value, name) for name in ("shapes", "tables", "reader", "properties")):
        refuse_type("the path of a slide or a WSIData of wsidata")
    return value


def _path(path: PathLike) -> None:
    """Carry the annotation by which a path is checked."""


SlideLike = Annotated[Any, Converted(_slide)]


@check_arguments
def tile(
    slide: SlideLike,
    *,
    spacing_um: Positive | None = None,
    mpp: Positive | None = None,
    section: Key | None = None,
    min_tissue: Share = 0.5,
    thumbnail_px: Count = 2000,
    tile_key: Key = "tiles",
) -> AnnData:
    """Lay a grid of tiles over the tissue of a slide: an AnnData whose tiles are embedded and predicted like spots.

    LazySlide finds the tissue and tiles it. To use existing tiles, pass the WSIData that LazySlide has tiled; its
    features are read, too. Coordinates are the centres of tiles, not the corners as in LazySlide.

    Parameters
    ----------
    slide
        Path of a slide; or a ``wsidata.WSIData`` that LazySlide has tiled.
    spacing_um
        Distance from tile to tile in microns, 100 by default, rounded to whole pixels of the slide. Not for a WSIData.
    mpp
        Microns per pixel of the slide at full resolution, if its file does not say or is wrong.
    section
        Name of the section; the file's by default.
    min_tissue
        Smallest share of tissue for a tile to be kept; all tiles of a WSIData are kept.
    thumbnail_px
        Length of the longer side of the image for maps, in pixels.
    tile_key
        Name of the tiles in a WSIData.

    Returns
    -------
    AnnData
        One row per tile, no genes: ``obs["section"]``, ``obs["tissue"]`` (number of the tissue piece, from 0) and
        ``obs["tile_id"]`` (number of the tile in the slide), ``obsm["spatial"]``, centres in pixels at full resolution,
        and ``uns["spatial"][section]`` with the image, scale factors, among them ``microns_per_pixel``, and the file in
        ``metadata["source_image_path"]``, where :func:`embed` finds it. Features of a WSIData, such as those in the
        table ``uni_tiles``, are in ``obsm["X_uni"]``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ModuleNotFoundError
        If LazySlide is not installed (extra ``wsi``).
    KeyError
        If a WSIData has no such tiles.
    ValueError
        If the file cannot be read as a slide, its microns per pixel are unknown, no tissue is found, or `spacing_um` is
        less than 8 pixels or given for a WSIData.
    """
    is_path = isinstance(slide, Path)
    wsi = _open(slide) if is_path else slide
    if not is_path:
        _check_tiles(wsi, tile_key, spacing_um)
    image = SlideImage(wsi.reader)
    with closing(image) if is_path else nullcontext():
        scale = image.mpp if mpp is None else mpp
        if scale is None:
            raise ValueError(f"mpp: microns per pixel of {str(wsi.reader.file)!r} are unknown; {HOW_TO_GIVE_MPP}")
        if is_path:
            side = round((SPACING_UM if spacing_um is None else spacing_um) / scale)
            if not LEAST_PIXELS <= side <= min(image.width, image.height):
                raise ValueError(
                    f"spacing_um: {side * scale:.3g} um are {side} pixels of {scale:.3g} um, expected at least "
                    f"{LEAST_PIXELS} pixels and no more than the slide's {image.width} x {image.height}; correct "
                    "spacing_um or mpp"
                )
            _tile(wsi, image, side, min_tissue, tile_key)
        name = Path(wsi.reader.file).stem if section is None else section
        adata = _table(wsi, image, name, tile_key)
        hires = image.thumbnail(thumbnail_px)
        bounds = wsi.shapes[tile_key].bounds
        adata.uns["spatial"] = {
            name: {
                "images": {"hires": hires},
                "scalefactors": {
                    "tissue_hires_scalef": hires.shape[1] / image.width,
                    "spot_diameter_fullres": float((bounds["maxx"] - bounds["minx"]).median()),
                    "microns_per_pixel": float(scale),
                },
                "metadata": {"source_image_path": str(Path(wsi.reader.file).resolve())},
            }
        }
        logger.info("tile: %d tiles of %s, %.3g um per pixel", adata.n_obs, name, scale)
        return adata


def _open(path: Path) -> Any:
    wsidata = import_extra("wsidata", "wsi", "tiling of slides")
    if not path.exists():
        raise FileNotFoundError(f"slide: no file {str(path)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wsidata.open_wsi(path, store=None)
    except Exception as error:  # noqa: BLE001 (readers raise errors of many classes)
        mend = ""
        if path.suffix.lower() in (*PICTURES, *TIFFS):
            mend = f"; convert it to a pyramid: {TO_PYRAMID}"
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"slide: {str(path)!r} cannot be read as a slide ({reason}){mend}") from None


def _check_tiles(wsi: Any, tile_key: str, spacing_um: float | None) -> None:
    if tile_key not in wsi.shapes:
        raise KeyError(
            f"tile_key: no {tile_key!r} in the slide's shapes, which has {sorted(wsi.shapes)}; tile it with "
            "lazyslide.pp.tile_tissues, or pass the path of the slide"
        )
    if spacing_um is not None:
        raise ValueError("spacing_um: not for a WSIData, whose tiles are used as they are; leave it out")


def _tile(wsi: Any, image: SlideImage, side: int, min_tissue: float, tile_key: str) -> None:
    """Find tissue, and lay tiles of `side` pixels over it."""
    lazyslide = import_extra("lazyslide", "wsi", "tiling of slides")
    fine = [i for i, size in enumerate(image.sizes) if min(size) >= PIXELS_FOR_TISSUE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not by brightness (LazySlide's default), which mistakes a stained background, such as her2st's, for tissue.
        lazyslide.pp.find_tissues(wsi, level=max(fine, default=0), method="entropy")
        has_tissue = "tissues" in wsi.shapes and len(wsi.shapes["tissues"]) > 0
        if has_tissue:
            lazyslide.pp.tile_tissues(
                wsi, side, edge=True, background_fraction=1 - min_tissue, ops_level=None, key_added=tile_key
            )
    if tile_key not in wsi.shapes:
        reason = (
            "the tissue is smaller than a tile, or fills less of each than min_tissue" if has_tissue else "no tissue"
        )
        raise ValueError(f"slide: no tiles in {str(wsi.reader.file)!r}: {reason}")


def _table(wsi: Any, image: SlideImage, name: str, tile_key: str) -> AnnData:
    """Make an AnnData of the tiles whose centres lie on the slide, with their features."""
    tiles = wsi.shapes[tile_key]
    bounds = tiles.bounds
    centers = np.stack([(bounds["minx"] + bounds["maxx"]) / 2, (bounds["miny"] + bounds["maxy"]) / 2], 1)
    on_slide = ((centers >= 0) & (centers <= (image.width, image.height))).all(1)
    numbers = tiles["tile_id"].to_numpy() if "tile_id" in tiles else np.arange(len(tiles))
    obs = pd.DataFrame(
        {
            "section": pd.Categorical([name] * len(tiles)),
            "tissue": tiles["tissue_id"].to_numpy(np.int64) if "tissue_id" in tiles else 0,
            "tile_id": numbers,
        },
        index=pd.Index([f"{name}_{number}" for number in numbers]),
    )
    features = {f"X_{key}": values for key, values in _features(wsi, tile_key).items()}
    adata = AnnData(obs=obs, obsm={"spatial": centers, **features})
    return adata[on_slide].copy()


def _features(wsi: Any, tile_key: str) -> dict[str, NDArray[np.float32]]:
    """Read the features that LazySlide has computed for the tiles, in their order."""
    from spatialdata.models import TableModel

    suffix = f"_{tile_key}"
    keys = []
    for key, table in wsi.tables.items():
        attributes = table.uns.get(TableModel.ATTRS_KEY, {})
        # A table of other tiles, such as "big_tiles", may end with the same suffix, but annotates another region.
        if key.endswith(suffix) and tile_key in np.atleast_1d(attributes.get("region", tile_key)).tolist():
            keys.append(key)
    tables = {key.removesuffix(suffix): wsi.fetch.features_anndata(key, tile_key, tile_graph=False) for key in keys}
    return {name: np.asarray(table.X, np.float32) for name, table in tables.items()}
