"""How far apart spots lie, in microns, so that neighbourhoods reach as far on any grid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from .images import stored_fact

logger = logging.getLogger(__name__)

# Entry of uns[key] with the microns per pixel that pp.embed was given or has read, by section.
SCALE = "scale"
# The circle around a spot that holds so many others, at most a quarter of the section, tells how densely they lie, of
# square and hexagonal grids and of cells alike; it is taken around so many spots.
COUNTED, SAMPLED = 48, 2000
# So many of the smallest circles lie within the section; others reach beyond its outline.
WITHIN = 0.125
# Densities that differ by a smaller factor are one: spacings by 12 %.
SAME_DENSITY = 1.25


def microns_per_pixel(adata: AnnData, section: str | None, library_key: str | None) -> float | None:
    """Microns per pixel of the full-resolution image of a section; None if the object does not say.

    What :func:`histovar.pp.embed` recorded, as it was given or read; else
    ``uns["spatial"][section]["scalefactors"]["microns_per_pixel"]``.

    Parameters
    ----------
    adata
        The object.
    section
        Its name; None of an object that is one section.
    library_key
        Column of ``obs`` with the section.
    """
    for entry in adata.uns.values():
        known = entry.get(SCALE) if isinstance(entry, Mapping) and "version" in entry else None
        if isinstance(known, Mapping) and {"section", "mpp"} <= known.keys():
            by_name = dict(zip(map(str, known["section"]), map(float, known["mpp"]), strict=True))
            if (section or "") in by_name:
                return by_name[section or ""]
    column = None if library_key is None else adata.obs[library_key]
    stored = stored_fact(adata.uns.get("spatial"), section, column, "scalefactors", "microns_per_pixel")
    return stored if isinstance(stored, float) and stored > 0 else None


def scale_entry(mpp: Mapping[str | None, float]) -> dict[str, Any]:
    """Microns per pixel by section, as :func:`microns_per_pixel` reads them back."""
    return {"section": np.array([name or "" for name in mpp], dtype=str), "mpp": np.array(list(mpp.values()))}


def spacing(place: NDArray[np.floating]) -> float:
    """Side of the square that there is for each spot of a section, in units of the coordinates.

    That of a square grid is its spacing; that of a hexagonal one is 0.93 times the distance between neighbours.

    Parameters
    ----------
    place
        (n_spots, 2).

    Returns
    -------
    float
        NaN of a single spot, or of spots in one place.
    """
    n_counted = min(COUNTED, max(len(place) // 4, 1), len(place) - 1)
    if not n_counted:
        return float("nan")
    some = place[:: max(1, len(place) // SAMPLED)]
    distance = cKDTree(place).query(some, k=n_counted + 1)[0][:, -1]
    radius = float(np.quantile(distance, WITHIN))
    return radius * float(np.sqrt(np.pi / n_counted)) if radius else float("nan")


def _by_section(
    adata: AnnData, place: NDArray[np.floating], names: NDArray[np.str_] | None, library_key: str | None
) -> dict[str | None, tuple[NDArray[np.int64], float]]:
    """Rows of each section, and its spacing in microns, NaN if it is not known."""
    found: dict[str | None, tuple[NDArray[np.int64], float]] = {}
    for name in [None] if names is None else np.unique(names).tolist():
        rows = np.arange(len(place)) if names is None else np.flatnonzero(names == name)
        mpp = microns_per_pixel(adata, name, None if names is None else library_key)
        found[name] = rows, float("nan") if mpp is None else mpp * spacing(place[rows])
    return found


def of_training(
    adata: AnnData, place: NDArray[np.floating], names: NDArray[np.str_] | None, library_key: str | None
) -> float | None:
    """Spacing of training spots in microns, median over sections; None if microns per pixel of one are not known.

    Parameters
    ----------
    adata
        The object.
    place
        (n_obs, 2).
    names
        (n_obs,) sections, or None.
    library_key
        Column of ``obs`` with the section.
    """
    spacings = [um for _, um in _by_section(adata, place, names, library_key).values()]
    return None if np.isnan(spacings).any() else float(np.median(spacings))


def density(
    adata: AnnData,
    place: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    library_key: str | None,
    trained: float | None,
) -> NDArray[np.float64] | None:
    """How many times as densely as those of training the spots of each one's section lie, (n_obs,).

    Parameters
    ----------
    adata, place, names, library_key
        As of :func:`of_training`.
    trained
        What it gave in training.

    Returns
    -------
    ndarray or None
        None where all lie as densely, or it is not known. A section of which it is not known is warned of where that of
        training is.
    """
    if trained is None:
        return None
    found = np.ones(len(place))
    unknown, others = [], {}
    for name, (rows, um) in _by_section(adata, place, names, library_key).items():
        ratio = (trained / um) ** 2
        if np.isnan(ratio):
            unknown.append(name)
        elif not 1 / SAME_DENSITY <= ratio <= SAME_DENSITY:
            found[rows], others[name] = ratio, um
    if unknown:
        logger.warning(
            "microns per pixel of %s are not known: neighbourhoods are as for spots %.0f um apart, as in training; if "
            "they are not, set uns['spatial'][section]['scalefactors']['microns_per_pixel']",
            "the object" if unknown == [None] else f"sections {unknown[:4]}",
            trained,
        )
    for name, um in others.items():
        logger.info(
            "%s: spots lie %.0f um apart, in training %.0f: neighbourhoods hold %.2g times as many, and reach as far",
            "spacing" if name is None else f"section {name!r}",
            um,
            trained,
            (trained / um) ** 2,
        )
    return found if others else None
