"""Measure the spacing of spots in microns, so that neighbourhoods span the same distance on any grid."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histovar._warn_once import warn_once

from .embeddings import embed_entries
from .images import stored_fact

logger = logging.getLogger(__name__)

# Entry of uns[key] with the microns per pixel that pp.embed was given or read, by section, so that
# anndata.concat(..., uns_merge="unique") joins the entries of files that were embedded one by one.
SCALE = "scale"
# Stands for the section in that entry if the object is one section without a name.
UNNAMED = "*"
# Names of embeddings by pp.embed end with their field.
FIELD_IN_NAME = re.compile(r"_\d+(\.\d+)?um$")
# Density is measured, on square and hexagonal grids and for cells alike, by the radii of circles around a spot that
# contain half of N_COUNTED to N_COUNTED other spots: at most a quarter of the section, but at least FEWEST_COUNTED.
# The circles are drawn around N_SAMPLED spots at most.
N_COUNTED, FEWEST_COUNTED, N_SAMPLED = 48, 4, 2000
# This quantile of the radii is used: the smallest circles lie within the section, larger ones cross its outline.
RADIUS_QUANTILE = 0.25
# Densities that differ by a smaller factor count as equal; that is, spacings that differ by less than 12 %.
SAME_DENSITY = 1.25


def microns_per_pixel(adata: AnnData, section: str | None, library_key: str | None) -> float | None:
    """Microns per pixel of a section's full-resolution image; None if the object does not say.

    Taken from the record of :func:`histovar.pp.embed` for the section; else from
    ``uns["spatial"][section]["scalefactors"]["microns_per_pixel"]``; else from the record for a section without a name.

    Parameters
    ----------
    adata
        The object.
    section
        Name of the section; None for an object that is one section.
    library_key
        Column of ``obs`` with the section.
    """
    recorded = [entry[SCALE] for _, entry in embed_entries(adata) if isinstance(entry.get(SCALE), Mapping)]
    column = None if library_key is None else adata.obs[library_key]
    stored = stored_fact(adata.uns.get("spatial"), section, column, "scalefactors", "microns_per_pixel")
    in_uns = stored if isinstance(stored, float) and stored > 0 else None
    for_section, for_object = (
        next((float(scale[name]) for scale in recorded if name in scale), None) for name in (_entry(section), UNNAMED)
    )
    return next((mpp for mpp in (for_section, in_uns, for_object) if mpp is not None), None)


def scale_entry(mpp: Mapping[str | None, float]) -> dict[str, float]:
    """Make the entry of ``uns`` with microns per pixel by section, which :func:`microns_per_pixel` reads."""
    return {_entry(name): float(value) for name, value in mpp.items()}


def rename_sections(adata: AnnData, names: Mapping[str, str]) -> None:
    """Rename sections in the recorded microns per pixel.

    Parameters
    ----------
    adata
        The object; its ``uns`` is changed.
    names
        New name of each section.
    """
    for key, entry in list(embed_entries(adata)):
        recorded = entry.get(SCALE)
        if isinstance(recorded, Mapping):
            renamed = {new: recorded.get(_entry(old), recorded.get(UNNAMED)) for old, new in names.items()}
            adata.uns[key] = {**entry, SCALE: scale_entry({n: mpp for n, mpp in renamed.items() if mpp is not None})}


def _entry(section: str | None) -> str:
    """Name of a section as a key of ``uns``; slashes are escaped, since files read them as paths."""
    return section.replace("/", "%2F") if section else UNNAMED


def spacing(coordinates: NDArray[np.floating]) -> float:
    """Spacing of a section's spots: the square root of the area per spot, in units of the coordinates.

    For a square grid it is the distance between neighbours; for a hexagonal grid 0.93 times that distance. The error is
    at most 8 % for grids of 9 spots or more; for scattered cells at most 20 % from 50 cells on, 10 % from 100 on.

    Parameters
    ----------
    coordinates
        (n_spots, 2).

    Returns
    -------
    float
        NaN for a single spot, or if all spots lie in one place.
    """
    n_spots = len(coordinates)
    n_counted = min(N_COUNTED, max(n_spots // 4, FEWEST_COUNTED), n_spots - 1)
    if not n_counted:
        return float("nan")
    centers = coordinates[:: max(1, n_spots // N_SAMPLED)]
    count = np.arange(max(n_counted // 2, 1), n_counted + 1)
    radius = np.quantile(cKDTree(coordinates).query(centers, k=count + 1)[0], RADIUS_QUANTILE, axis=0)
    if not radius.all():
        return float("nan")
    # On a grid many neighbours are equally far away: on average, half of them and the spot itself count as inside.
    return float(np.exp(np.log(radius * np.sqrt(np.pi / (count + 0.5))).mean()))


def _by_section(
    adata: AnnData, coordinates: NDArray[np.floating], names: NDArray[np.str_] | None, library_key: str | None
) -> dict[str | None, tuple[NDArray[np.int64], float | None]]:
    """Rows and spacing in microns of each section; spacing is None if microns per pixel are unknown."""
    sections: dict[str | None, tuple[NDArray[np.int64], float | None]] = {}
    for name in [None] if names is None else np.unique(names).tolist():
        rows = np.arange(len(coordinates)) if names is None else np.flatnonzero(names == name)
        mpp = microns_per_pixel(adata, name, None if names is None else library_key)
        sections[name] = rows, None if mpp is None else mpp * spacing(coordinates[rows])
    return sections


def of_training(
    adata: AnnData,
    coordinates: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    library_key: str | None,
    use_rep: Sequence[str],
) -> float | None:
    """Spacing of training spots in microns, median over sections; None if it is unknown for a section.

    It is unknown without microns per pixel; then there is a warning if an embedding's field is known in microns.
    Sections with a single spot, or with all spots in one place, have no spacing and are left out of the median.

    Parameters
    ----------
    adata
        The object.
    coordinates
        (n_obs, 2).
    names
        (n_obs,) sections; None for a single section.
    library_key
        Column of ``obs`` with the section.
    use_rep
        Keys of ``obsm`` with the embeddings.
    """
    spacing_by_section = {name: um for name, (_, um) in _by_section(adata, coordinates, names, library_key).items()}
    unknown = [name for name, um in spacing_by_section.items() if um is None]
    if not unknown:
        spacings = [um for um in spacing_by_section.values() if um is not None and not np.isnan(um)]
        _warn_of_no_spacing([name for name, um in spacing_by_section.items() if um is not None and np.isnan(um)])
        return float(np.median(spacings)) if spacings else None
    in_microns = next((rep for rep in use_rep if FIELD_IN_NAME.search(rep)), None)
    if in_microns is not None:
        warn_once(
            logger,
            "microns per pixel of %s are unknown, although obsm[%r] has a field in microns: the model will not know "
            "the spacing of its spots, nor adapt neighbourhoods to another grid. If objects were concatenated, "
            "anndata.concat(..., uns_merge='unique') keeps what pp.embed recorded; otherwise set "
            "uns['spatial'][section]['scalefactors']['microns_per_pixel']",
            "the object"
            if unknown == [None]
            else f"{len(unknown)} of {len(spacing_by_section)} sections ({unknown[:4]})",
            in_microns,
        )
    return None


def density(
    adata: AnnData,
    coordinates: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    library_key: str | None,
    trained: float | None,
) -> NDArray[np.float64] | None:
    """Density of spots in each spot's section relative to training, (n_obs,).

    Parameters
    ----------
    adata, coordinates, names, library_key
        As in :func:`of_training`.
    trained
        Spacing in training, in microns, from :func:`of_training`.

    Returns
    -------
    ndarray or None
        None if all sections are as dense as in training, or the spacing of training is unknown. Sections of unknown
        spacing give a warning, and count as dense as in training.
    """
    if trained is None:
        return None
    ratios = np.ones(len(coordinates))
    unknown, undefined, others = [], [], {}
    for name, (rows, um) in _by_section(adata, coordinates, names, library_key).items():
        if um is None:
            unknown.append(name)
        elif np.isnan(um):
            undefined.append(name)
        elif not 1 / SAME_DENSITY <= (ratio := (trained / um) ** 2) <= SAME_DENSITY:
            ratios[rows], others[name] = ratio, um
    if unknown:
        warn_once(
            logger,
            "microns per pixel of %s are unknown: spots are assumed to be %.0f um apart, as in training; if they are "
            "not, set uns['spatial'][section]['scalefactors']['microns_per_pixel']",
            "the object" if unknown == [None] else f"sections {unknown[:4]}",
            trained,
        )
    _warn_of_no_spacing(undefined)
    for name, um in others.items():
        logger.info(
            "%s: spots are %.0f um apart, %.0f in training: neighbourhoods have %.2g times as many spots, to span the "
            "same distance",
            "spacing" if name is None else f"section {name!r}",
            um,
            trained,
            (trained / um) ** 2,
        )
    return ratios if others else None


def _warn_of_no_spacing(sections: Sequence[str | None]) -> None:
    if sections:
        warn_once(
            logger,
            "spatial: %s a single spot or all spots in one place, so the spacing is undefined: it is assumed to be as "
            "in training",
            "the object has" if sections == [None] else f"sections {sections[:4]} have",
        )
