"""Which image is of which section, where its spots lie in it, and how large its pixels are."""

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

HOW_TO_GIVE_MPP = "pass mpp=, such as 0.5 of a scan at 20x, 0.25 at 40x"
# Share by which microns per pixel may differ from what the file says without a warning.
MPP_TOLERANCE = 0.05


@dataclass(frozen=True)
class SectionSlide:
    """A section's spots in its image.

    Parameters
    ----------
    name
        The section; None if there is but one, without a name.
    rows
        Rows of the object.
    centers
        (n_rows, 2), x and y in pixels of the image's finest resolution.
    image
        The image.
    mpp
        Microns per pixel of that resolution.
    """

    name: str | None
    rows: NDArray[np.int64]
    centers: NDArray[np.float64]
    image: TissueImage
    mpp: float

    @property
    def words(self) -> str:
        """For messages."""
        return "the spots" if self.name is None else f"section {self.name!r}"


class SectionSlides:
    """The sections of an object, each with where its image is; images are opened one at a time.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    adata
        Its table.
    image
        A file, or a file by section; of a SpatialData the name of an image, or a name by section. None for what
        ``uns["spatial"]`` names or holds, or a SpatialData's only image.
    mpp
        Microns per pixel of the full-resolution image, or those by section; None if the image or the object says.
    library_key, spatial_key
        Where sections and coordinates are.

    Raises
    ------
    KeyError
        If a section has no image or no microns per pixel, or a key is missing.
    ValueError
        If several sections are given one image.
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
                f"image: one file for the {len(self.names)} sections {self.names[:4]}; give a file of each, "
                "image={'A1': 'A1.svs', ...}"
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
            raise KeyError(f"{argument}: nothing for sections {missing}; given for {sorted(given)}")
        return {name: given[str(name)] for name in self.names}

    def open(self, i: int) -> SectionSlide:
        """Open the image of a section; to be closed by the caller.

        Parameters
        ----------
        i
            Which of :attr:`names`.

        Raises
        ------
        FileNotFoundError, KeyError, ValueError
            If there is none, it cannot be read, its microns per pixel are not known, or spots lie outside of it.
        """
        name, rows = self.names[i], self._rows[i]
        image, centers, mpp = self._find(name, rows)
        slide = SectionSlide(name, rows, centers, image, mpp)
        try:
            n_outside = int(((centers < 0) | (centers > (image.width, image.height))).any(1).sum())
            if n_outside:
                raise ValueError(
                    f"image: {n_outside} of {len(rows)} spots lie outside the {image.width} x {image.height} pixels of "
                    f"the image of {slide.words}; give the image in whose pixels the coordinates are, and drop spots "
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
            of_sdata, centers = spatialdata_image(self.sdata, self.adata, element, rows)
            return of_sdata, centers, self._scale(name, of_sdata, f"the image {element!r}")
        centers = gate.coordinates(self.adata, self.spatial_key)[rows]
        stored = self.adata.uns.get("spatial")
        if given is None:
            source = stored_fact(stored, name, self.column, "metadata", "source_image_path")
            given = Path(source) if isinstance(source, str) and Path(source).is_file() else None
        if given is not None:
            image = open_image(Path(given))
            return image, centers, self._scale(name, image, repr(str(given)))
        try:
            found = finest_image(stored, name, self.column)
        except (ValueError, StopIteration) as error:
            of = "" if name is None else f" of section {name!r}"
            raise ValueError(
                f"image: no image{of} in uns['spatial'] ({error}); pass image=, the file of the slide"
            ) from None
        small = ArrayImage([found.pixels])
        full = self._scale(name, small, "the image in uns['spatial']")
        return small, centers * found.scale, full / found.scale

    def _element(self, given: Any) -> str | None:
        """Name of the SpatialData's image that is meant."""
        if self.sdata is None:
            return None
        names = list(self.sdata.images)
        if given is None and len(names) == 1:
            return str(names[0])
        if given is None and names:
            raise KeyError(f"image: the SpatialData has images {names}; name one of them")
        return str(given) if str(given) in names else None

    def _scale(self, name: str | None, image: TissueImage, words: str) -> float:
        """Microns per pixel of the full-resolution image: as given, as the file says, or as ``uns["spatial"]`` does."""
        given, own = self._mpp[name], image.mpp
        if given is not None:
            if own is not None and abs(given - own) > MPP_TOLERANCE * own:
                logger.warning("mpp: %g is given, but %s says %g um per pixel; what is given counts", given, words, own)
            return float(given)
        stored = stored_fact(self.adata.uns.get("spatial"), name, self.column, "scalefactors", "microns_per_pixel")
        known = own if own is not None else stored
        if known is None:
            image.close()
            raise ValueError(f"mpp: microns per pixel of {words} are not known; {HOW_TO_GIVE_MPP}")
        return float(known)


def spatialdata_image(
    sdata: SpatialData, adata: AnnData, name: str, rows: NDArray[np.int64]
) -> tuple[ArrayImage, NDArray[np.float64]]:
    """An image of a SpatialData, and in its pixels the centres of what rows of a table annotate.

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
            f"image: the table annotates no element of the SpatialData, so that it is not known where its spots lie in "
            f"the image {name!r}; set it with spatialdata.models.TableModel.parse(..., region=)"
        ) from None
    element = sdata.images[name]
    levels = [scale["image"] for scale in element.values()] if hasattr(element, "children") else [element]
    arrays = [level.transpose("c", "y", "x").data for level in levels]
    try:
        image = ArrayImage(arrays, channels_first=True)
    except ValueError as error:
        raise ValueError(f"image: {name!r} of the SpatialData is {error}") from None
    of_image = get_transformation(element, get_all=True)
    centers = np.empty((len(rows), 2))
    regions = adata.obs[region_key].to_numpy()[rows]
    instances = adata.obs[instance_key].to_numpy()[rows]
    for region in pd.unique(regions):
        shared = [s for s in get_transformation(sdata[region], get_all=True) if s in of_image]
        if not shared:
            raise ValueError(f"image: {name!r} and {region!r} of the SpatialData share no coordinate system")
        system = "global" if "global" in shared else shared[0]
        frame = get_centroids(sdata[region], coordinate_system=system).compute()
        place = frame[["x", "y"]].loc[instances[regions == region]].to_numpy(np.float64)
        matrix = np.linalg.inv(of_image[system].to_affine_matrix(("x", "y"), ("x", "y")))
        centers[regions == region] = place @ matrix[:2, :2].T + matrix[:2, 2]
    return image, centers
