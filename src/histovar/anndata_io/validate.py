"""Checks of the user's input, all made before any work; messages name argument, finding and remedy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

logger = logging.getLogger(__name__)


def check_object(adata: AnnData, *, needs_genes: bool = False) -> None:
    """Refuse an empty object, tables that are not in memory, and duplicated names.

    Raises
    ------
    ValueError
        If so.
    """
    for name, table in (("obs", adata.obs), ("var", adata.var)):
        if not isinstance(table, pd.DataFrame):
            raise ValueError(
                f"adata: {name} is not in memory; read it with adata.{name} = adata.{name}.to_memory(). Expression and "
                "embeddings may stay on disk"
            )
    if adata.n_obs == 0:
        raise ValueError("adata: the object has no spots; check the filter that made it")
    if needs_genes and adata.n_vars == 0:
        raise ValueError("adata: the object has no genes; expression is needed here")
    for name, index, mend in (
        ("var_names", adata.var_names, "adata.var_names_make_unique()"),
        ("obs_names", adata.obs_names, "adata.obs_names_make_unique()"),
    ):
        if not index.is_unique:
            repeated = index[index.duplicated()].unique()[:3].tolist()
            raise ValueError(f"{name}: duplicated names such as {repeated}; mend with {mend}")


def check_keys(value: str | Sequence[str], name: str = "use_rep") -> list[str]:
    """One key or several as a list.

    Raises
    ------
    TypeError
        If it is neither a string nor a sequence of strings.
    ValueError
        If there is none, or one twice.
    """
    keys = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(k, str) for k in keys):
        raise TypeError(f"{name}: expected a key or a list of keys, got {value!r}")
    if not keys or len(set(keys)) != len(keys):
        raise ValueError(f"{name}: expected at least one key, each once, got {keys}")
    return keys


def embedding(adata: AnnData, key: str, width: int | None = None) -> NDArray[np.float32]:
    """An embedding as (n_obs, width) float32.

    Parameters
    ----------
    adata
        Object that holds it.
    key
        Key of ``obsm``.
    width
        Width that the model was trained with.

    Raises
    ------
    KeyError
        If the key is missing.
    ValueError
        If shape, width or values are not as they should be.
    """
    values = stored_embedding(adata, key)
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy()
    if sparse.issparse(values):
        values = values.toarray()
    if hasattr(values, "compute"):
        values = values.compute()
    array = np.asarray(values)
    check_embedding(key, array.shape, array.dtype, adata.n_obs, width)
    check_finite(array, f"use_rep: obsm[{key!r}]", "drop those spots or embed them again")
    return array.astype(np.float32, copy=False)


def stored_embedding(adata: AnnData, key: str) -> Any:
    """What ``obsm`` has under a key.

    Raises
    ------
    KeyError
        If the key is missing.
    """
    if key not in adata.obsm:
        raise KeyError(
            f"use_rep: no {key!r} in obsm, which has {sorted(adata.obsm)}; compute embeddings of the H&E around each "
            "spot (for instance with LazySlide) and store them there"
        )
    return adata.obsm[key]


def check_embedding(key: str, shape: tuple[int, ...], dtype: np.dtype, n_obs: int, width: int | None) -> None:
    """Refuse shapes and data types that no embedding has, and another width than that of training.

    Raises
    ------
    ValueError
        If so.
    """
    if len(shape) != 2 or shape[0] != n_obs:
        raise ValueError(f"use_rep: obsm[{key!r}] has shape {shape}, expected ({n_obs}, width)")
    if dtype.kind not in "fiu":
        raise ValueError(f"use_rep: obsm[{key!r}] has data type {dtype}, expected numbers")
    if width is not None and shape[1] != width:
        raise ValueError(
            f"use_rep: obsm[{key!r}] has width {shape[1]}, the model was trained on width {width}; "
            "use the embedding of the same encoder"
        )


def check_finite(values: NDArray[Any], what: str, mend: str) -> None:
    """Refuse NaN and infinite values.

    Raises
    ------
    ValueError
        If there are any.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        rows = np.flatnonzero(bad.any(1) if bad.ndim > 1 else bad)
        raise ValueError(f"{what} has NaN or infinite values in {len(rows)} rows, first at row {rows[0]}; {mend}")


def coordinates(adata: AnnData, spatial_key: str) -> NDArray[np.float64]:
    """Coordinates as (n_obs, 2).

    Raises
    ------
    KeyError
        If the key is missing.
    ValueError
        If they are not two finite columns.
    """
    if spatial_key not in adata.obsm:
        raise KeyError(f"spatial_key: no {spatial_key!r} in obsm, which has {sorted(adata.obsm)}; store x and y there")
    place = np.asarray(adata.obsm[spatial_key], dtype=np.float64)
    if place.ndim != 2 or place.shape[1] < 2:
        raise ValueError(f"spatial_key: obsm[{spatial_key!r}] has shape {place.shape}, expected ({adata.n_obs}, 2)")
    check_finite(place[:, :2], f"spatial_key: obsm[{spatial_key!r}]", "drop those spots")
    return place[:, :2]


def sections(adata: AnnData, library_key: str | None) -> NDArray[np.str_] | None:
    """Section of each spot, (n_obs,) strings; None without `library_key`.

    Raises
    ------
    KeyError
        If the column is missing.
    ValueError
        If some spots have no section.
    """
    if library_key is None:
        return None
    if library_key not in adata.obs:
        raise KeyError(f"library_key: no {library_key!r} in obs, which has {list(adata.obs.columns)}")
    column = adata.obs[library_key]
    if column.isna().any():
        raise ValueError(f"library_key: {int(column.isna().sum())} spots have no value in obs[{library_key!r}]")
    groups = column.astype("category").cat
    return groups.categories.astype(str).to_numpy().astype(str)[groups.codes]


def check_neighbors(names: NDArray[np.str_] | None, n_obs: int, n_neighbors: Sequence[int]) -> None:
    """Refuse sections too small for their smallest neighbourhood; larger ones are cut to a quarter of the section.

    Raises
    ------
    ValueError
        Naming the section.
    """
    if not n_neighbors:
        return
    least, most = min(n_neighbors), max(n_neighbors)
    labels, counts = np.unique(names, return_counts=True) if names is not None else (["all"], [n_obs])
    cut = []
    for label, count in zip(labels, counts, strict=True):
        if count <= least:
            raise ValueError(
                f"n_neighbors: section {str(label)!r} has {count} spots, too few for {least} neighbours of each; "
                "drop the section, or train with smaller n_neighbors"
            )
        if count // 4 < most:
            cut.append(f"{max(count // 4, 1)} in section {str(label)!r} of {count} spots")
    if cut:
        more = f" and in {len(cut) - 3} further sections" if len(cut) > 3 else ""
        logger.warning("neighbourhoods of %d are cut to %s%s", most, ", ".join(cut[:3]), more)


def check_counts(values: NDArray[Any], what: str) -> None:
    """Refuse values that are not counts.

    Parameters
    ----------
    values
        The stored values, zeros left out or not.
    what
        Name for the message.

    Raises
    ------
    ValueError
        If any is negative, not finite or not an integer.
    """
    mend = "put raw counts there; if it is log-normalised already, say adata.layers['lognorm'] = adata.X"
    check_finite(values, what, mend)
    if values.size and values.min() < 0:
        raise ValueError(f"{what} has negative values (least {values.min():.3g}), counts are needed; {mend}")
    if not np.array_equal(values, np.round(values)):
        raise ValueError(f"{what} does not hold counts: it has values that are not integers; {mend}")


def check_nonnegative(values: NDArray[Any], what: str) -> None:
    """Refuse NaN, infinite and negative expression.

    Raises
    ------
    ValueError
        If there is any.
    """
    check_finite(values, what, "repair the layer")
    if values.size and values.min() < 0:
        raise ValueError(
            f"{what} has negative values (least {values.min():.3g}); pass log-normalised expression, "
            "not scaled or centred"
        )


def check_genes(adata: AnnData, genes: Sequence[str], argument: str = "adata") -> NDArray[np.int64]:
    """Columns of the genes.

    Raises
    ------
    KeyError
        Naming the missing ones.
    """
    index = adata.var_names.get_indexer(pd.Index(genes))
    missing = [g for g, i in zip(genes, index, strict=True) if i < 0]
    if missing:
        raise KeyError(
            f"{argument}: {len(missing)} of the {len(genes)} panel genes are missing from var_names, "
            f"such as {missing[:3]}; names must match those the model was trained on "
            "(symbols or identifiers, upper and lower case)"
        )
    return index.astype(np.int64)
