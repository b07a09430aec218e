"""How far apart spots lie, in microns, so that neighbourhoods reach as far on any grid."""

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

# Entry of uns[key] with the microns per pixel that pp.embed was given or has read, by section, so that
# anndata.concat(..., uns_merge="unique") joins those of files that were embedded one by one.
SCALE = "scale"
# Name of a section in it where the object is one section that has no name.
UNNAMED = "*"
# pp.embed names embeddings by their field.
FIELD_IN_NAME = re.compile(r"_\d+(\.\d+)?um$")
# The circles around a spot that hold so many others, at most a quarter of the section, but not fewer, and half as many,
# tell how densely they lie, of square and hexagonal grids and of cells alike; they are taken around so many spots.
COUNTED, FEWEST_COUNTED, SAMPLED = 48, 4, 2000
# So many of the smallest circles lie within the section; others reach beyond its outline.
WITHIN = 0.25
# Densities that differ by a smaller factor are one: spacings by 12 %.
SAME_DENSITY = 1.25


def microns_per_pixel(adata: AnnData, section: str | None, library_key: str | None) -> float | None:
    """Microns per pixel of the full-resolution image of a section; None if the object does not say.

    What :func:`histovar.pp.embed` recorded of the section, as it was given or read; else
    ``uns["spatial"][section]["scalefactors"]["microns_per_pixel"]``; else what it recorded of a section without a name.

    Parameters
    ----------
    adata
        The object.
    section
        Its name; None of an object that is one section.
    library_key
        Column of ``obs`` with the section.
    """
    recorded = [entry[SCALE] for _, entry in embed_entries(adata) if isinstance(entry.get(SCALE), Mapping)]
    column = None if library_key is None else adata.obs[library_key]
    stored = stored_fact(adata.uns.get("spatial"), section, column, "scalefactors", "microns_per_pixel")
    in_uns = stored if isinstance(stored, float) and stored > 0 else None
    of_section, of_object = (
        next((float(scale[name]) for scale in recorded if name in scale), None) for name in (_entry(section), UNNAMED)
    )
    return next((mpp for mpp in (of_section, in_uns, of_object) if mpp is not None), None)


def scale_entry(mpp: Mapping[str | None, float]) -> dict[str, float]:
    """Microns per pixel by section, as :func:`microns_per_pixel` reads them back."""
    return {_entry(name): float(value) for name, value in mpp.items()}


def rename_sections(adata: AnnData, names: Mapping[str, str]) -> None:
    """Rename the sections of which microns per pixel are recorded.

    Parameters
    ----------
    adata
        The object, of which ``uns`` is changed.
    names
        The new name of each section.
    """
    for key, entry in list(embed_entries(adata)):
        recorded = entry.get(SCALE)
        if isinstance(recorded, Mapping):
            found = {new: recorded.get(_entry(old), recorded.get(UNNAMED)) for old, new in names.items()}
            adata.uns[key] = {**entry, SCALE: scale_entry({n: mpp for n, mpp in found.items() if mpp is not None})}


def _entry(section: str | None) -> str:
    """Name of a section as a key of ``uns``, in which files take a slash for a path."""
    return section.replace("/", "%2F") if section else UNNAMED


def spacing(place: NDArray[np.floating]) -> float:
    """Side of the square that there is for each spot of a section, in units of the coordinates.

    That of a square grid is its spacing; that of a hexagonal one is 0.93 times the distance between neighbours. Of
    grids of 9 spots or more it is right within 8 %; of scattered cells within 20 % from 50 on, within 10 % from 100 on.

    Parameters
    ----------
    place
        (n_spots, 2).

    Returns
    -------
    float
        NaN of a single spot, or of spots in one place.
    """
    n_counted = min(COUNTED, max(len(place) // 4, FEWEST_COUNTED), len(place) - 1)
    if not n_counted:
        return float("nan")
    some = place[:: max(1, len(place) // SAMPLED)]
    count = np.arange(max(n_counted // 2, 1), n_counted + 1)
    radius = np.quantile(cKDTree(place).query(some, k=count + 1)[0], WITHIN, axis=0)
    if not radius.all():
        return float("nan")
    # On a grid many neighbours lie equally far away: half of them, and the spot itself, count as within, on average.
    return float(np.exp(np.log(radius * np.sqrt(np.pi / (count + 0.5))).mean()))


def _by_section(
    adata: AnnData, place: NDArray[np.floating], names: NDArray[np.str_] | None, library_key: str | None
) -> dict[str | None, tuple[NDArray[np.int64], float | None]]:
    """Rows of each section and its spacing in microns: None if microns per pixel are not known, NaN as of `spacing`."""
    found: dict[str | None, tuple[NDArray[np.int64], float | None]] = {}
    for name in [None] if names is None else np.unique(names).tolist():
        rows = np.arange(len(place)) if names is None else np.flatnonzero(names == name)
        mpp = microns_per_pixel(adata, name, None if names is None else library_key)
        found[name] = rows, None if mpp is None else mpp * spacing(place[rows])
    return found


def of_training(
    adata: AnnData,
    place: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    library_key: str | None,
    use_rep: Sequence[str],
) -> float | None:
    """Spacing of training spots in microns, median over sections; None if microns per pixel of one are not known.

    The latter is warned of where the embeddings' fields are known in microns. Sections of a single spot, or of spots in
    one place, have no spacing: the median is of the others, and None if there are none.

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
    use_rep
        Keys of ``obsm`` with the embeddings.
    """
    found = {name: um for name, (_, um) in _by_section(adata, place, names, library_key).items()}
    unknown = [name for name, um in found.items() if um is None]
    if not unknown:
        spacings = [um for um in found.values() if um is not None and not np.isnan(um)]
        _warn_of_no_spacing([name for name, um in found.items() if um is not None and np.isnan(um)])
        return float(np.median(spacings)) if spacings else None
    in_microns = next((rep for rep in use_rep if FIELD_IN_NAME.search(rep)), None)
    if in_microns is not None:
        warn_once(
            logger,
            "microns per pixel of %s are not known, though obsm[%r] is of a field in microns: the model will not know "
            "how far apart its spots lie, nor fit neighbourhoods to another grid. Where objects were joined, "
            "anndata.concat(..., uns_merge='unique') keeps what pp.embed recorded; else set "
            "uns['spatial'][section]['scalefactors']['microns_per_pixel']",
            "the object" if unknown == [None] else f"{len(unknown)} of {len(found)} sections ({unknown[:4]})",
            in_microns,
        )
    return None


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
    unknown, undefined, others = [], [], {}
    for name, (rows, um) in _by_section(adata, place, names, library_key).items():
        if um is None:
            unknown.append(name)
        elif np.isnan(um):
            undefined.append(name)
        elif not 1 / SAME_DENSITY <= (ratio := (trained / um) ** 2) <= SAME_DENSITY:
            found[rows], others[name] = ratio, um
    if unknown:
        warn_once(
            logger,
            "microns per pixel of %s are not known: neighbourhoods are as for spots %.0f um apart, as in training; if "
            "they are not, set uns['spatial'][section]['scalefactors']['microns_per_pixel']",
            "the object" if unknown == [None] else f"sections {unknown[:4]}",
            trained,
        )
    _warn_of_no_spacing(undefined)
    for name, um in others.items():
        logger.info(
            "%s: spots lie %.0f um apart, in training %.0f: neighbourhoods hold %.2g times as many, and reach as far",
            "spacing" if name is None else f"section {name!r}",
            um,
            trained,
            (trained / um) ** 2,
        )
    return found if others else None


def _warn_of_no_spacing(sections: Sequence[str | None]) -> None:
    if sections:
        warn_once(
            logger,
            "spatial: %s one spot or spots in one place, which lie no distance apart: neighbourhoods there are as for "
            "spots as far apart as in training",
            "the object has" if sections == [None] else f"sections {sections[:4]} have",
        )
