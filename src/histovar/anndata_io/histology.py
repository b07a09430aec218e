"""Read the inputs of stage 2 from AnnData: embeddings, niches, coordinates, covariates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import Keys
from histovar._warn_once import warn_once
from histovar.model import Histology, ModelConfig
from histovar.model.config import N_OUTLINE

from . import fingerprint, gate, slots, spacing
from .embeddings import record_of
from .matrix import dense_float32, on_disk
from .neighbors import Neighborhoods, section_coordinates

logger = logging.getLogger(__name__)

# A covariate further from the mean of training gives a warning; in standard deviations.
FAR_COVARIATE = 10.0


def check_embeddings(adata: AnnData, use_rep: Sequence[str]) -> tuple[int, ...]:
    """Check embeddings and return their widths; values of those on disk are not read.

    Raises
    ------
    KeyError, ValueError
        As :func:`gate.embedding_matrix`, :func:`record_of` and, for embeddings in memory,
        :func:`gate.embedding_values`.
    """
    matrices = {key: gate.embedding_matrix(adata, key) for key in use_rep}
    for key, values in matrices.items():
        record_of(adata, key)
        if not on_disk(values):
            gate.embedding_values(values, key)
    return tuple(int(values.shape[1]) for values in matrices.values())


def learn_covariates(adata: AnnData, names: Sequence[str]) -> dict[str, Any]:
    """Learn how to encode covariates: categories, or mean and standard deviation, of each column of ``obs``.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If it has missing values.
    """
    encoders: dict[str, Any] = {}
    for name in names:
        column = gate.covariate(adata, name)
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            encoders[name] = {"mean": float(column.mean()), "std": float(column.std(ddof=0)) or 1.0}
        else:
            encoders[name] = {"categories": sorted(column.astype(str).unique().tolist())}
    return encoders


def covariate_width(encoders: dict[str, Any]) -> int:
    """Number of columns of the encoded covariates."""
    return sum(len(e["categories"]) if "categories" in e else 1 for e in encoders.values())


def covariates(adata: AnnData, encoders: dict[str, Any]) -> NDArray[np.float32]:
    """Encode covariates, (n_obs, n_covariates): one-hot categories, standardised numbers.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If it has missing values, or categories that training did not see.
    """
    encoded = [np.empty((adata.n_obs, 0), np.float32)]
    for name, encoder in encoders.items():
        column = gate.covariate(adata, name)
        if "categories" in encoder:
            categories = encoder["categories"]
            unknown = sorted(set(column.astype(str)) - set(categories))
            if unknown:
                raise ValueError(
                    f"covariates: obs[{name!r}] has categories {unknown}, but the model was trained on {categories}"
                )
            encoded.append((column.astype(str).to_numpy()[:, None] == np.array(categories)).astype(np.float32))
        else:
            if not pd.api.types.is_numeric_dtype(column):
                raise ValueError(f"covariates: obs[{name!r}] must be numeric as in training, got {column.dtype}")
            scores = (column.to_numpy(np.float32) - encoder["mean"]) / encoder["std"]
            if (farthest := float(np.abs(scores).max(initial=0))) > FAR_COVARIATE:
                warn_once(
                    logger,
                    "covariates: obs[%r] lies up to %.3g standard deviations from the mean of training",
                    name,
                    farthest,
                )
            encoded.append(scores[:, None])
    return np.concatenate(encoded, 1)


def check_number_of_embeddings(use_rep: Sequence[str], config: ModelConfig) -> None:
    """Refuse more or fewer embeddings than the model was trained on.

    Raises
    ------
    ValueError
        If their numbers differ.
    """
    if len(use_rep) != len(config.embedding_dims):
        raise ValueError(
            f"use_rep: got {list(use_rep)}, but the model was trained on {len(config.embedding_dims)} embeddings"
        )


def histology(
    adata: AnnData,
    config: ModelConfig,
    *,
    use_rep: Sequence[str],
    spatial_key: str,
    library_key: str | None,
    encoders: dict[str, Any],
    spacing_um: float | None,
    key: str,
) -> Histology:
    """Read the inputs of stage 2 for all spots of an object.

    Parameters
    ----------
    adata
        The object.
    config
        The model's configuration: widths, neighbourhoods, use of coordinates.
    use_rep, spatial_key, library_key
        Slots of embeddings, coordinates and sections.
    encoders
        Encoders of covariates, from :func:`learn_covariates`.
    spacing_um
        Distance between spots in training, in microns, so that neighbourhoods span the same distance on another grid;
        None if unknown.
    key
        Prefix of the slots, for niche features computed before.

    Raises
    ------
    KeyError, ValueError
        If an input is missing or not as the model needs it.
    """
    check_number_of_embeddings(use_rep, config)
    embeddings = [gate.embedding(adata, k, w) for k, w in zip(use_rep, config.embedding_dims, strict=True)]
    names = gate.sections(adata, library_key, spatial_key if config.n_neighbors else None)
    encoded_covariates = covariates(adata, encoders)
    xy = np.empty((adata.n_obs, 0), np.float64)
    if config.coordinates or config.n_neighbors:
        xy = gate.coordinates(adata, spatial_key)
    sources: list[NDArray[np.float32]] = []
    density = spacing.density(adata, xy, names, library_key, spacing_um) if config.n_neighbors else None
    stored = None
    if density is None:
        stored = stored_niche(adata, Keys(key), use_rep, config.n_neighbors, spatial_key, library_key)
    if stored is not None:
        ends = np.cumsum([width for width in config.embedding_dims for _ in config.n_neighbors])
        *around, outline = np.split(stored, ends, axis=1)
    else:
        around, outline = niche(embeddings, xy, names, config.n_neighbors, density)
    step = len(config.n_neighbors)
    for i, embedding in enumerate(embeddings):
        sources += [embedding, *around[i * step : (i + 1) * step]]
    if config.has_outline:
        sources.append(outline)
    coordinates = section_coordinates(xy, names) if config.coordinates else np.empty((adata.n_obs, 0), np.float32)
    tensors = tuple(torch.from_numpy(source) for source in sources)
    return Histology(
        tensors, torch.from_numpy(coordinates), torch.from_numpy(encoded_covariates), torch.zeros(adata.n_obs)
    )


def niche(
    embeddings: Sequence[NDArray[np.float32]],
    coordinates: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    n_neighbors: Sequence[int],
    density: NDArray[np.floating] | None = None,
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Mean of every embedding over every neighbourhood, and features of the tissue's outline.

    Parameters
    ----------
    embeddings
        (n_obs, dim) each.
    coordinates, names, n_neighbors, density
        As in :meth:`Neighborhoods.of`.

    Returns
    -------
    means
        (n_obs, dim) for each embedding and each neighbourhood: all neighbourhoods of the first embedding, then of the
        next.
    outline
        As in :class:`Neighborhoods`.

    Raises
    ------
    ValueError
        If a section has too few spots.
    """
    gate.check_neighbors(names, len(coordinates), n_neighbors)
    neighborhoods = Neighborhoods.of(coordinates, names, n_neighbors, density)
    return [
        np.asarray(g @ values, np.float32) for values in embeddings for g in neighborhoods.graphs
    ], neighborhoods.outline


def source_fingerprint(
    adata: AnnData, use_rep: Sequence[str], spatial_key: str, library_key: str | None, covariates: Sequence[str] = ()
) -> NDArray[np.uint64]:
    """Fingerprint of each spot's embeddings, coordinates (where there are any), section and covariates, (n_obs, 1)."""
    columns: list[NDArray[Any]] = [gate.embedding(adata, key) for key in use_rep]
    if spatial_key in adata.obsm:
        columns.append(gate.coordinates(adata, spatial_key))
    names = None if library_key is None else gate.sections(adata, library_key)
    columns += [] if names is None else [names]
    return fingerprint.of_rows(*columns, *(gate.covariate(adata, name).to_numpy() for name in covariates))


def stored_niche(
    adata: AnnData,
    keys: Keys,
    use_rep: Sequence[str],
    n_neighbors: Sequence[int],
    spatial_key: str,
    library_key: str | None,
) -> NDArray[np.float32] | None:
    """Read niche features that ``pp.niche`` stored; None unless they are up to date and of these parameters.

    Raises
    ------
    ValueError
        If they are not finite, or too large.
    """
    record = slots.record(adata, keys).get("niche")
    if not len(n_neighbors) or record is None or keys.niche not in adata.obsm or keys.niche_source not in adata.obsm:
        return None
    parameters = niche_parameters(use_rep, n_neighbors, spatial_key, library_key)
    # Recorded with fewer spots than there are now: for instance, halves of a section were concatenated.
    if not all(np.array_equal(record.get(k), v) for k, v in parameters.items()) or record.get("n_obs", 0) < adata.n_obs:
        return None
    width = len(n_neighbors) * sum(adata.obsm[key].shape[1] for key in use_rep) + N_OUTLINE * len(n_neighbors)
    source = source_fingerprint(adata, use_rep, spatial_key, library_key)
    if adata.obsm[keys.niche].shape[1] != width or not np.array_equal(adata.obsm[keys.niche_source], source):
        logger.info(
            "obsm[%r] is out of date, since embeddings, coordinates or sections have changed: computed again",
            keys.niche,
        )
        return None
    values = dense_float32(adata.obsm[keys.niche])
    gate.check_embedding(values, f"obsm[{keys.niche!r}]", "call histovar.pp.niche again")
    return values


def niche_parameters(
    use_rep: Sequence[str], n_neighbors: Sequence[int], spatial_key: str, library_key: str | None
) -> dict[str, Any]:
    """Parameters that identify niche features, in plain types."""
    return {
        "use_rep": np.array(list(use_rep)),
        "n_neighbors": np.array(list(n_neighbors)),
        "spatial_key": spatial_key,
        "library_key": library_key or "",
    }


def warn_of_novelty(novelty: NDArray[np.floating], labels: NDArray[np.str_]) -> None:
    """Warn of sections whose histology differs from that of training.

    Parameters
    ----------
    novelty
        (n_spots,) novelty of each spot's section.
    labels
        (n_spots,) name of the section.
    """
    by_section = {str(label): float(novelty[labels == label].max()) for label in np.unique(labels)}
    novel = {label: round(value, 2) for label, value in by_section.items() if value > 0}
    if novel:
        logger.warning(
            "histology unlike that of the training sections (novelty, 0 to 1): %s; predictions may be less accurate, "
            "and intervals are wider",
            novel,
        )
