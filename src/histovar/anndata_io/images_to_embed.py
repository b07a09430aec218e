"""Find each section's image, the positions of its spots in the image, and the image's microns per pixel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from histovar.slides import ArrayImage, TissueImage, open_image

from . import gate
from .images import finest_image, stored_fact

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = logging.getLogger(__name__)

HOW_TO_GIVE_MPP = "pass mpp=, such as 0.5 for a scan at 20x, 0.25 at 40x"
# Given microns per pixel that differ from the file's by more than this share give a warning.
MPP_TOLERANCE = 0.05


@dataclass(frozen=True)
class SectionSlide:
    """A section's image with the positions of its spots.

    Parameters
    ----------
    name
        The section; None for a single section without a name.
    rows
        Rows of its spots in the object.
    centers
        (n_rows, 2), x and y in pixels of the image at full resolution.
    image
        The image.
    mpp
        Microns per pixel at full resolution.
    """

    name: str | None
    rows: NDArray[np.int64]
    centers: NDArray[np.float64]
    image: TissueImage
    mpp: float

    @property
    def words(self) -> str:
        """Description of the section for messages."""
        return "the spots" if self.name is None else f"section {self.name!r}"


class SectionSlides:
    """The sections of an object with the sources of their images, which are opened one at a time.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    adata
        Its table.
    image
        A file, or a file by section; for SpatialData the name of an image, or a name by section. None for the image
        that ``uns["spatial"]`` names or holds, or a SpatialData's only image.
    mpp
        Microns per pixel of the full-resolution image, or by section; None to read it from the image or the object.
    library_key, spatial_key
        Slots of sections and coordinates.

    Raises
    ------
    KeyError
        If a section has no image or no microns per pixel, or a key is missing.
    ValueError
        If one image is given for several sections.
    """

    def __init__(
        self,
        data: Any,
        adata: AnnData,
        image: str | Path | Mapping[str, str | Path] | None,
        mpp: float | Mapping[str, float] | None,
        library_key: str | None,
        spatial_key: str,
    ) -> None:
        self.sdata: SpatialData | None = None if isinstance(data, AnnData) else data
        self.adata = adata
        names = gate.sections(adata, library_key, spatial_key)
        self.column = None if library_key is None else adata.obs[library_key]
        self.names: list[str | None] = [None] if names is None else [str(name) for name in np.unique(names)]
        self._rows = [np.arange(adata.n_obs) if n is None else np.flatnonzero(names == n) for n in self.names]
        self.spatial_key = spatial_key
        self._images = self._by_section(image, "image")
        self._mpp = self._by_section(mpp, "mpp")
        if len(self.names) > 1 and isinstance(image, str | Path) and self._element(image) is None:
            raise ValueError(
                f"image: one file for the {len(self.names)} sections {self.names[:4]}; give a file for each: "
                "{'A1': 'A1.svs', ...}, in the shell A1=A1.svs"
            )

    def _by_section(self, given: Any, argument: str) -> dict[str | None, Any]:
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.names, given)
        if self.names == [None]:
            if len(given) != 1:
                raise ValueError(
                    f"{argument}: given for {sorted(given)}, but library_key= names no column with the section"
                )
            return {None: next(iter(given.values()))}
        missing = [name for name in self.names if name not in given]
        if missing:
            raise KeyError(f"{argument}: missing for sections {missing}; given for {sorted(given)}")
        return {name: given[str(name)] for name in self.names}

    def open(self, i: int) -> SectionSlide:
        """Open the image of a section; the caller closes it.

        Parameters
        ----------
        i
            Index of the section in :attr:`names`.

        Raises
        ------
        FileNotFoundError, KeyError, ValueError
            If there is no image, it cannot be read, its microns per pixel are unknown, or spots lie outside it.
        """
        name, rows = self.names[i], self._rows[i]
        image, centers, mpp = self._find(name, rows)
        slide = SectionSlide(name, rows, centers, image, mpp)
        try:
            n_outside = int(((centers < 0) | (centers > (image.width, image.height))).any(1).sum())
            if n_outside:
                raise ValueError(
                    f"image: {n_outside} of {len(rows)} spots lie outside the {image.width} x {image.height} pixels of "
                    f"the image of {slide.words}; give the image to whose pixels the coordinates refer, and drop spots "
                    "that are not on it"
                )
        except BaseException:
            image.close()
            raise
        return slide

    def _find(self, name: str | None, rows: NDArray[np.int64]) -> tuple[TissueImage, NDArray[np.float64], float]:
        given = self._images[name]
        element = self._element(given)
        if self.sdata is not None and element is not None:
            sdata_image, centers = spatialdata_image(self.sdata, self.adata, element, rows)
            return sdata_image, centers, self._scale(name, sdata_image, f"the image {element!r}")
        centers = gate.coordinates(self.adata, self.spatial_key)[rows]
        stored = self.adata.uns.get("spatial")
        if given is None:
            source = stored_fact(stored, name, self.column, "metadata", "source_image_path")
            given = Path(source) if isinstance(source, str) and Path(source).is_file() else None
        if given is not None:
            image = open_image(Path(given))
            return image, centers, self._scale(name, image, repr(str(given)))
        try:
            finest = finest_image(stored, name, self.column)
        except (ValueError, StopIteration) as error:
            of_section = "" if name is None else f" of section {name!r}"
            raise ValueError(
                f"image: no image{of_section} in uns['spatial'] ({error}); pass image=, the file of the slide"
            ) from None
        downscaled = ArrayImage([finest.pixels])
        mpp = self._scale(name, downscaled, "the image in uns['spatial']")
        return downscaled, centers * finest.scale, mpp / finest.scale

    def _element(self, given: Any) -> str | None:
        """Name of the SpatialData's image that was given, or its only one; None for a file."""
        if self.sdata is None:
            return None
        names = list(self.sdata.images)
        if given is None and len(names) == 1:
            return str(names[0])
        if given is None and names:
            raise KeyError(f"image: the SpatialData has images {names}; name one of them")
        return str(given) if str(given) in names else None

    def _scale(self, name: str | None, image: TissueImage, words: str) -> float:
        """Microns per pixel of the full-resolution image: as given, or from the file, or from ``uns["spatial"]``."""
        given, from_file = self._mpp[name], image.mpp
        if given is not None:
            if from_file is not None and abs(given - from_file) > MPP_TOLERANCE * from_file:
                logger.warning(
                    "mpp: %g is given, but %s says %g um per pixel; the given value is used", given, words, from_file
                )
            return float(given)
        stored = stored_fact(self.adata.uns.get("spatial"), name, self.column, "scalefactors", "microns_per_pixel")
        mpp = from_file if from_file is not None else stored
        if mpp is None:
            image.close()
            raise ValueError(f"mpp: microns per pixel of {words} are unknown; {HOW_TO_GIVE_MPP}")
        return float(mpp)


def spatialdata_image(
    sdata: SpatialData, adata: AnnData, name: str, rows: NDArray[np.int64]
) -> tuple[ArrayImage, NDArray[np.float64]]:
    """Get an image of a SpatialData and, in its pixels, the centres of the spots that rows of a table annotate.

    Parameters
    ----------
    sdata
        The object.
    adata
        Its table, which annotates shapes, points or labels.
    name
        The image.
    rows
        Rows of the table.

    Raises
    ------
    ValueError
        If the table annotates nothing, or the image shares no coordinate system with what it annotates.
    """
    from spatialdata import get_centroids
    from spatialdata.models import get_table_keys
    from spatialdata.transformations import get_transformation

    try:
        _, region_key, instance_key = get_table_keys(adata)
    except ValueError:
        raise ValueError(
            f"image: the table annotates no element of the SpatialData, so the positions of its spots in the image "
            f"{name!r} are unknown; set it with spatialdata.models.TableModel.parse(..., region=)"
        ) from None
    element = sdata.images[name]
    levels = [scale["image"] for scale in element.values()] if hasattr(element, "children") else [element]
    arrays = [level.transpose("c", "y", "x").data for level in levels]
    try:
        image = ArrayImage(arrays, channels_first=True)
    except ValueError as error:
        raise ValueError(f"image: {name!r} of the SpatialData is {error}") from None
    image_transformations = get_transformation(element, get_all=True)
    centers = np.empty((len(rows), 2))
    regions = adata.obs[region_key].to_numpy()[rows]
    instances = adata.obs[instance_key].to_numpy()[rows]
    for region in pd.unique(regions):
        shared = [s for s in get_transformation(sdata[region], get_all=True) if s in image_transformations]
        if not shared:
            raise ValueError(f"image: {name!r} and {region!r} of the SpatialData share no coordinate system")
        system = "global" if "global" in shared else shared[0]
        frame = get_centroids(sdata[region], coordinate_system=system).compute()
        xy = frame[["x", "y"]].loc[instances[regions == region]].to_numpy(np.float64)
        matrix = np.linalg.inv(image_transformations[system].to_affine_matrix(("x", "y"), ("x", "y")))
        centers[regions == region] = xy @ matrix[:2, :2].T + matrix[:2, 2]
    return image, centers
