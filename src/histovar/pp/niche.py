"""Compute niche features: mean embeddings of neighbours, and nearness to the section's outline."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import numpy as np
from anndata import AnnData
from pydantic import Field

from histovar._arguments import Increasing, Key, KeyOrKeys, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate, histology, lazy, slots
from histovar.anndata_io.gate import Data

logger = logging.getLogger(__name__)


@check_arguments
def niche(
    data: Data,
    *,
    use_rep: KeyOrKeys,
    n_neighbors: Annotated[Increasing, Field(min_length=1)] = (8, 24, 48),
    library_key: Key | None = None,
    spatial_key: Key = "spatial",
    key_added: Prefix = DEFAULT_KEY,
    table_name: Key | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Average the embeddings of each spot's nearest neighbours, in nested neighbourhoods within its section.

    Training and prediction compute this by themselves; call it to use the features elsewhere, or to compute them before
    spots are filtered out.

    Parameters
    ----------
    data
        AnnData or SpatialData. If embeddings are dask (or zarr) arrays, the features are dask arrays in the same
        chunks.
    use_rep
        Key of ``obsm``, or several, with embeddings.
    n_neighbors
        Neighbourhood sizes, increasing, not counting the spot itself. A section needs more spots than the smallest
        size; larger sizes are cut to a quarter of the section.
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
        Writes ``obsm[f"{key_added}_niche"]``: for each embedding the mean over each neighbourhood, then for each
        neighbourhood two features of how near the section's outline the spot lies: the log of the neighbours' mean
        distance over the section's median, and the distance of their centroid from the spot, over that mean distance.
        Also writes ``obsm[f"{key_added}_niche_source"]``, a fingerprint of each spot's embeddings, coordinates and
        section, by which outdated features are recognised, and the parameters to ``uns[key_added]["niche"]``.

    Raises
    ------
    KeyError
        If a key is missing.
    ValueError
        If a section has too few spots, embeddings are not finite, several sections have images and `library_key` is not
        given, or a slot holds data that histovar did not write.
    """
    adata = gate.table(data, table_name, writes=not copy)
    keys = Keys(key_added)
    slots.check_free(adata, keys, [("obsm", keys.niche), ("obsm", keys.niche_source)])
    reps, sizes = list(use_rep), list(n_neighbors)  # a single key has become a list
    contents: dict[slots.Slot, Any] = {}
    if lazy.is_lazy(adata, reps):
        features, source = lazy.niche(adata, reps, sizes, spatial_key, library_key)
        contents |= {("obsm", keys.niche): features, ("obsm", keys.niche_source): source}
    else:
        embeddings = [gate.embedding(adata, key) for key in reps]
        coordinates = gate.coordinates(adata, spatial_key)
        names = gate.sections(adata, library_key, spatial_key)
        means, outline = histology.niche(embeddings, coordinates, names, sizes)
        contents["obsm", keys.niche] = np.concatenate([*means, outline], axis=1)
        contents["obsm", keys.niche_source] = histology.source_fingerprint(adata, reps, spatial_key, library_key)
    if copy:
        adata = gate.copied(adata)
    parameters = histology.niche_parameters(reps, sizes, spatial_key, library_key)
    with slots.writing(adata):
        slots.drop(adata, keys, contents)
        slots.write(adata, keys, contents, {"niche": {**parameters, "n_obs": adata.n_obs}})
    logger.info("niche: means over %s neighbours of %s, in obsm[%r]", sizes, reps, keys.niche)
    return adata if copy else None
