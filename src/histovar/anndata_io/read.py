"""From AnnData to arrays: expression, histology, niches, covariates."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from histovar._keys import LOGNORM, LOGNORM_UNITS, TARGET_SUM, Keys
from histovar.model import Histology, ModelConfig
from histovar.model.config import N_OUTLINE

from . import validate
from .neighbors import Neighborhoods, section_coordinates
from .table import writing

logger = logging.getLogger(__name__)

# Rows of a backed or sparse matrix that are dense in memory at once.
ROWS_AT_ONCE = 4096


def stored_layer(adata: AnnData, layer: str | None) -> Any:
    """The matrix of a layer; None and ``"X"`` are X.

    Raises
    ------
    KeyError
        If there is no such layer.
    """
    if layer is None or layer == "X":
        return adata.X
    if layer not in adata.layers:
        raise KeyError(f"layer: no {layer!r} in layers, which has {sorted(adata.layers)}; 'X' is adata.X")
    return adata.layers[layer]


def is_stored(adata: AnnData, layer: str = LOGNORM, obsm: Sequence[str] = ()) -> bool:
    """Whether X, the layer, or what ``obsm`` has under these keys is on disk."""
    matrices = (adata.X, adata.layers.get(layer), *(adata.obsm.get(key) for key in obsm))
    return adata.isbacked or any(on_disk(matrix) for matrix in matrices)


def on_disk(values: Any) -> bool:
    """Whether these are dask, zarr or HDF5 arrays."""
    return library(values) in ("dask", "zarr", "h5py")


def library(values: Any) -> str:
    """Name of the package whose type this is."""
    return type(values).__module__.split(".")[0]


def _blocks(matrix: Any, n_rows: int) -> Iterator[Any]:
    for start in range(0, n_rows, ROWS_AT_ONCE):
        block = matrix[start : start + ROWS_AT_ONCE]
        yield block.compute() if hasattr(block, "compute") else block


def lognorm_blocks(adata: AnnData) -> Iterator[Any]:
    """``layers["lognorm"]`` by blocks of rows, or log1p(counts per 10,000) of the counts in X; the object is untouched.

    Raises
    ------
    ValueError
        If it is needed and X is missing or does not hold counts.
    """
    if LOGNORM in adata.layers:
        yield from _blocks(adata.layers[LOGNORM], adata.n_obs)
        return
    if adata.X is None:
        raise ValueError(
            "adata: X is empty; counts are needed to log-normalise, or pass layer= with log-normalised values"
        )
    import scanpy as sc

    for block in _blocks(adata.X, adata.n_obs):
        counts = sparse.csr_matrix(block, dtype=np.float32)
        validate.check_counts(counts.data, "X")
        light = AnnData(counts)
        sc.pp.normalize_total(light, target_sum=TARGET_SUM)
        sc.pp.log1p(light)
        yield light.X


def lognorm(adata: AnnData) -> sparse.csr_matrix:
    """All of :func:`lognorm_blocks`, sparse."""
    return sparse.vstack([sparse.csr_matrix(block) for block in lognorm_blocks(adata)], format="csr")


def check_layer(adata: AnnData, layer: str | None) -> None:
    """Refuse a layer with NaN, infinite or negative values; None is not looked at.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If it has such values.
    """
    matrix = stored_layer(adata, layer)
    if layer is not None:
        for block in _blocks(matrix, adata.n_obs):
            validate.check_nonnegative(block.data if sparse.issparse(block) else np.asarray(block), f"layer: {layer!r}")


def add_lognorm(adata: AnnData) -> None:
    """Add ``layers["lognorm"]`` from the counts in X where it is absent, and say so; not to an object on disk."""
    if LOGNORM not in adata.layers and not is_stored(adata):
        values = lognorm(adata)
        with writing():
            adata.layers[LOGNORM] = values
        logger.info("layers[%r] added: %s of X", LOGNORM, LOGNORM_UNITS)


def units(layer: str) -> str:
    """What is known of a layer's units."""
    return LOGNORM_UNITS if layer == LOGNORM else f"those of {layer!r}"


def expression(
    adata: AnnData, layer: str, columns: NDArray[np.integer], rows: NDArray[np.integer] | None = None
) -> NDArray[np.float32]:
    """Expression of some genes, dense, (n_obs, n_columns), or of some spots, increasing.

    Raises
    ------
    KeyError
        If the layer is missing.
    ValueError
        If it holds NaN, infinite or negative values.
    """
    blocks = lognorm_blocks(adata) if layer == LOGNORM else _blocks(stored_layer(adata, layer), adata.n_obs)
    parts, start = [], 0
    for block in blocks:
        stop = start + block.shape[0]
        some = block[:, columns]
        if rows is not None:
            some = some[rows[(rows >= start) & (rows < stop)] - start]
        parts.append(np.asarray(some.toarray() if sparse.issparse(some) else some, dtype=np.float32))
        start = stop
    values = np.concatenate(parts)
    validate.check_nonnegative(values, f"layer: {layer!r}")
    return values


def embedding_width(adata: AnnData, key: str) -> int:
    """Width of an embedding, which is checked; of one on disk, all but its values.

    Raises
    ------
    KeyError, ValueError
        As :func:`validate.embedding`.
    """
    values = validate.stored_embedding(adata, key)
    if not on_disk(values):
        return validate.embedding(adata, key).shape[1]
    validate.check_embedding(key, values.shape, values.dtype, adata.n_obs, None)
    return int(values.shape[1])


def learn_covariates(adata: AnnData, names: Sequence[str]) -> dict[str, Any]:
    """How to encode ``obs`` columns: categories, or mean and standard deviation.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If it has missing values.
    """
    encoders: dict[str, Any] = {}
    for name in names:
        column = _covariate(adata, name)
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            encoders[name] = {"mean": float(column.mean()), "std": float(column.std(ddof=0)) or 1.0}
        else:
            encoders[name] = {"categories": sorted(column.astype(str).unique().tolist())}
    return encoders


def _covariate(adata: AnnData, name: str) -> pd.Series:
    if name not in adata.obs:
        raise KeyError(f"covariates: no {name!r} in obs, which has {list(adata.obs.columns)}")
    column = adata.obs[name]
    if column.isna().any():
        raise ValueError(f"covariates: {int(column.isna().sum())} spots have no value in obs[{name!r}]")
    return column


def covariate_width(encoders: dict[str, Any]) -> int:
    """Number of encoded covariates."""
    return sum(len(e["categories"]) if "categories" in e else 1 for e in encoders.values())


def covariates(adata: AnnData, encoders: dict[str, Any]) -> NDArray[np.float32]:
    """Encoded covariates, (n_obs, n_covariates): one-hot categories, standardised numbers.

    Raises
    ------
    KeyError
        If a column is missing.
    ValueError
        If it has missing values, or categories that training did not see.
    """
    parts = [np.empty((adata.n_obs, 0), np.float32)]
    for name, encoder in encoders.items():
        column = _covariate(adata, name)
        if "categories" in encoder:
            known = encoder["categories"]
            unknown = sorted(set(column.astype(str)) - set(known))
            if unknown:
                raise ValueError(
                    f"covariates: obs[{name!r}] has categories {unknown}, the model was trained on {known}"
                )
            parts.append((column.astype(str).to_numpy()[:, None] == np.array(known)).astype(np.float32))
        else:
            if not pd.api.types.is_numeric_dtype(column):
                raise ValueError(f"covariates: obs[{name!r}] must be numeric as in training, got {column.dtype}")
            parts.append(((column.to_numpy(np.float32) - encoder["mean"]) / encoder["std"])[:, None])
    return np.concatenate(parts, 1)


def check_number_of_embeddings(use_rep: Sequence[str], config: ModelConfig) -> None:
    """Refuse more or fewer embeddings than the model was trained on.

    Raises
    ------
    ValueError
        If so.
    """
    if len(use_rep) != len(config.embedding_dims):
        raise ValueError(
            f"use_rep: {list(use_rep)} given, the model was trained on {len(config.embedding_dims)} embeddings"
        )


def histology(
    adata: AnnData,
    config: ModelConfig,
    *,
    use_rep: Sequence[str],
    spatial_key: str,
    library_key: str | None,
    encoders: dict[str, Any],
    key: str,
) -> Histology:
    """Inputs of stage 2 for all spots of an object.

    Parameters
    ----------
    adata
        The object.
    config
        Of the model: widths, neighbourhoods, whether coordinates are used.
    use_rep, spatial_key, library_key
        Where embeddings, coordinates and sections are.
    encoders
        How covariates are encoded.
    key
        Prefix of the slots, for niche features computed before.

    Raises
    ------
    KeyError, ValueError
        If any of it is missing or not as the model needs it.
    """
    check_number_of_embeddings(use_rep, config)
    embeddings = [validate.embedding(adata, k, w) for k, w in zip(use_rep, config.embedding_dims, strict=True)]
    names = validate.sections(adata, library_key)
    extra = covariates(adata, encoders)
    place = np.empty((adata.n_obs, 0), np.float32)
    if config.coordinates or config.n_neighbors:
        place = validate.coordinates(adata, spatial_key)
    keys = Keys(key)
    sources: list[NDArray[np.float32]] = []
    if config.n_neighbors and has_niche(adata, keys, use_rep, config, spatial_key, library_key):
        ends = np.cumsum([width for width in config.embedding_dims for _ in config.n_neighbors])
        *around, outline = np.split(np.asarray(adata.obsm[keys.niche], np.float32), ends, axis=1)
    else:
        around, outline = niche(embeddings, place, names, config.n_neighbors)
    step = len(config.n_neighbors)
    for i, embedding in enumerate(embeddings):
        sources += [embedding, *around[i * step : (i + 1) * step]]
    if config.has_outline:
        sources.append(outline)
    where = section_coordinates(place, names) if config.coordinates else np.empty((adata.n_obs, 0), np.float32)
    tensors = tuple(torch.from_numpy(source) for source in sources)
    return Histology(tensors, torch.from_numpy(where), torch.from_numpy(extra), torch.zeros(adata.n_obs))


def niche(
    embeddings: Sequence[NDArray[np.float32]],
    place: NDArray[np.floating],
    names: NDArray[np.str_] | None,
    n_neighbors: Sequence[int],
) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
    """Mean of every embedding over every neighbourhood, and the outline.

    Parameters
    ----------
    embeddings
        (n_obs, dim) each.
    place, names, n_neighbors
        As in :meth:`Neighborhoods.of`.

    Returns
    -------
    means
        For each embedding, and of it for each neighbourhood, (n_obs, dim).
    outline
        As in :class:`Neighborhoods`.

    Raises
    ------
    ValueError
        If a section has too few spots.
    """
    validate.check_neighbors(names, len(place), n_neighbors)
    around = Neighborhoods.of(place, names, n_neighbors)
    return [np.asarray(g @ values, np.float32) for values in embeddings for g in around.graphs], around.outline


def total_counts(adata: AnnData) -> NDArray[np.float64] | None:
    """Total count of every spot where X holds counts, else None."""
    if adata.X is None:
        return None
    totals = []
    for block in _blocks(adata.X, adata.n_obs):
        try:
            validate.check_counts(block.data if sparse.issparse(block) else np.asarray(block), "X")
        except ValueError:
            return None
        totals.append(np.asarray(block.sum(1), dtype=np.float64).ravel())
    return np.concatenate(totals)


def has_niche(
    adata: AnnData,
    keys: Keys,
    use_rep: Sequence[str],
    config: ModelConfig,
    spatial_key: str,
    library_key: str | None,
) -> bool:
    """Whether ``pp.niche`` left niche features in the object that were made with these parameters."""
    made = adata.uns.get(keys.uns, {}).get("niche")
    if made is None or keys.niche not in adata.obsm:
        return False
    n_neighbors = config.n_neighbors
    width = len(n_neighbors) * sum(adata.obsm[key].shape[1] for key in use_rep) + N_OUTLINE * len(n_neighbors)
    if adata.obsm[keys.niche].shape[1] != width:  # of a version that knew no outline
        return False
    wanted = niche_parameters(use_rep, n_neighbors, spatial_key, library_key)
    return all(np.array_equal(made.get(k), v) for k, v in wanted.items())


def niche_parameters(
    use_rep: Sequence[str], n_neighbors: Sequence[int], spatial_key: str, library_key: str | None
) -> dict[str, Any]:
    """What identifies niche features, in plain types."""
    return {
        "use_rep": np.array(list(use_rep)),
        "n_neighbors": np.array(list(n_neighbors)),
        "spatial_key": spatial_key,
        "library_key": library_key or "",
    }
