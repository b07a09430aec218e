"""The surroundings of a spot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from histovar._keys import DEFAULT_KEY
from histovar.anndata_io import gate, histology, lazy, slots
from histovar.anndata_io.gate import Data

logger = logging.getLogger(__name__)


def niche(
    data: Data,
    *,
    use_rep: str | Sequence[str],
    n_neighbors: Sequence[int] = (8, 48),
    library_key: str | None = None,
    spatial_key: str = "spatial",
    key_added: str = DEFAULT_KEY,
    table_name: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Mean embeddings of each spot's nearest neighbours, in nested neighbourhoods within its section, and its outline.

    Training and prediction do this by themselves; call it to use the features elsewhere, or to fix
    them before spots are filtered out.

    Parameters
    ----------
    data
        AnnData or SpatialData. Where embeddings are dask (or zarr) arrays, so are the features, of the same chunks.
    use_rep
        Key of ``obsm``, or several, with embeddings.
    n_neighbors
        Neighbourhood sizes, increasing; the spot itself is not counted. A section needs more spots than the smallest;
        one is at most a quarter of its section.
    library_key
        Column of ``obs`` with the section; neighbours are sought within it.
    spatial_key
        Key of ``obsm`` with coordinates.
    key_added
        Prefix of the slots.
    table_name
        Table of a SpatialData.
    copy
        Return a copy of the table instead of writing in place.

    Returns
    -------
    AnnData or None
        Writes ``obsm[f"{key_added}_niche"]``, for each embedding and then each neighbourhood the mean embedding, side
        by side; then, for each neighbourhood, two numbers that tell how near the section's outline the spot lies: the
        log of the neighbours' mean distance over the section's median, and how far their centroid lies from the spot
        in units of that mean distance. Also ``obsm[f"{key_added}_niche_source"]``, a fingerprint of each spot's
        embeddings, coordinates and section, by which it is known when the features are no longer true, and
        ``uns[key_added]["niche"]``, the parameters.

    Raises
    ------
    KeyError
        If a key is missing.
    ValueError
        If a section has too few spots, embeddings are not finite, several sections have images and `library_key` is not
        given, or a slot holds what histovar did not write.
    """
    adata = gate.table(data, table_name, writes=not copy)
    keys = slots.keys(key_added)
    slots.check_free(adata, keys, [("obsm", keys.niche), ("obsm", keys.niche_source)])
    reps = gate.key_list(use_rep)
    sizes = [int(n) for n in n_neighbors]
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"n_neighbors must be positive and increase, got {tuple(n_neighbors)}")
    found: dict[slots.Slot, Any] = {}
    if lazy.is_lazy(adata, reps):
        features, source = lazy.niche(adata, reps, sizes, spatial_key, library_key)
        found |= {("obsm", keys.niche): features, ("obsm", keys.niche_source): source}
    else:
        embeddings = [gate.embedding(adata, key) for key in reps]
        place = gate.coordinates(adata, spatial_key)
        names = gate.sections(adata, library_key, spatial_key)
        means, outline = histology.niche(embeddings, place, names, sizes)
        found["obsm", keys.niche] = np.concatenate([*means, outline], axis=1)
        found["obsm", keys.niche_source] = histology.source_fingerprint(adata, reps, spatial_key, library_key)
    if copy:
        adata = gate.copied(adata)
    slots.drop(adata, keys, [("obsm", keys.niche), ("obsm", keys.niche_source)])
    parameters = histology.niche_parameters(reps, sizes, spatial_key, library_key)
    slots.write(adata, keys, found, {"niche": {**parameters, "n_obs": adata.n_obs}})
    logger.info("niche: means over %s neighbours of %s, in obsm[%r]", sizes, reps, keys.niche)
    return adata if copy else None
