"""Check everything that is read from the user's object, whether in memory, backed, dask or zarr.

Messages name the argument, what was found and how to mend it. Everything is checked before any work; only values of
matrices on disk are checked when they are read, by the same functions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from histovar._arguments import nearest
from histovar._keys import DEFAULT_KEY, Keys
from histovar._limits import MOST_DEPTH
from histovar._warn_once import filter_new_warnings, warn_once

from .matrix import dense, dense_float32

if TYPE_CHECKING:
    from spatialdata import SpatialData
else:
    SpatialData = Any  # its import takes seconds; see table()

logger = logging.getLogger(__name__)

Data: TypeAlias = AnnData | SpatialData

# Column names of x and y, by which coordinates in a DataFrame are put in order; Visium's files have y first.
XY_COLUMNS = (("x", "y"), ("X", "Y"), ("pxl_col_in_fullres", "pxl_row_in_fullres"), ("array_col", "array_row"))
# Largest absolute value in an embedding. A section's variance is computed in 32-bit floats, where the squares of larger
# values, summed over 100 million spots, would be infinite. Values of encoders are of the order of ten.
LARGEST_EMBEDDING = 1e15
# Share of the spots that lie exactly where another does, above which there may be several slides.
COINCIDING = 0.01


def table(data: Data, table_name: str | None = None, *, genes: bool = False, writes: bool = True) -> AnnData:
    """Get the AnnData to work on, of AnnData or SpatialData; checked, and not a copy.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    table_name
        Name of the table of a SpatialData; not needed if there is only one.
    genes
        Require genes.
    writes
        Require an object that can be written to.

    Raises
    ------
    TypeError
        If `data` is neither.
    KeyError
        If there is no such table.
    ValueError
        If `table_name` is given for AnnData; if the object is empty, its ``obs`` or ``var`` is not in memory, names are
        duplicated, or it must be written to and is a view of a backed file.
    """
    if isinstance(data, AnnData) and table_name is not None:
        raise ValueError(f"table_name: is for SpatialData, but data is AnnData; leave it out, got {table_name!r}")
    adata = data if isinstance(data, AnnData) else _table_of(data, table_name)
    for name, frame in (("obs", adata.obs), ("var", adata.var)):
        if not isinstance(frame, pd.DataFrame):
            raise ValueError(
                f"adata: {name} is not in memory; read it with adata.{name} = adata.{name}.to_memory(). Expression and "
                "embeddings may stay on disk"
            )
    if adata.n_obs == 0:
        raise ValueError("adata: the object has no spots; check the filter that made it")
    if genes and adata.n_vars == 0:
        raise ValueError("adata: the object has no genes; expression is needed here")
    for name, index, mend in (
        ("var_names", adata.var_names, "adata.var_names_make_unique()"),
        ("obs_names", adata.obs_names, "adata.obs_names_make_unique()"),
    ):
        if not index.is_unique:
            repeated = index[index.duplicated()].unique()[:3].tolist()
            raise ValueError(f"{name}: duplicated names such as {repeated}; call {mend}")
    if writes and adata.isbacked and adata.is_view:
        raise ValueError(
            "adata: a view of a backed file cannot be written to; take it into memory with adata = adata.to_memory()"
        )
    return adata


def _table_of(data: Any, table_name: str | None) -> AnnData:
    tables = getattr(data, "tables", None)
    if tables is None:
        raise TypeError(f"data: expected AnnData or SpatialData, got {type(data).__name__}")
    names = list(tables)
    if table_name is None:
        if len(names) != 1:
            raise KeyError(f"table_name: the SpatialData has tables {names}; name one of them")
        table_name = names[0]
    if table_name not in names:
        raise KeyError(f"table_name: no table {table_name!r} in the SpatialData; it has {names}")
    adata: AnnData = tables[table_name]
    return adata


def copied(adata: AnnData) -> AnnData:
    """Copy an object into memory, also a backed one."""
    return adata.to_memory() if adata.isbacked else adata.copy()


def embedding_matrix(adata: AnnData, key: str, width: int | None = None) -> Any:
    """Get an embedding from ``obsm`` as it is stored; shape and data type are checked, values are not read.

    Parameters
    ----------
    adata
        The object.
    key
        Key of ``obsm``.
    width
        Width that the model was trained with; None accepts any.

    Raises
    ------
    KeyError
        If the key is missing.
    ValueError
        If it has the wrong shape, width or data type.
    """
    if key not in adata.obsm:
        matches = nearest([key], map(str, adata.obsm))
        advice = f"did you mean {matches[0]!r}? Otherwise," if matches else "name one of them, or"
        raise KeyError(
            f"use_rep: no {key!r} in obsm, which has {sorted(adata.obsm)}; {advice} make embeddings of the H&E around "
            "each spot with histovar.pp.embed"
        )
    values = adata.obsm[key]
    if not hasattr(values, "shape"):
        raise ValueError(f"use_rep: obsm[{key!r}] is of type {type(values).__name__}, expected a matrix")
    if len(values.shape) != 2 or values.shape[0] != adata.n_obs:
        raise ValueError(f"use_rep: obsm[{key!r}] has shape {tuple(values.shape)}, expected ({adata.n_obs}, width)")
    if values.shape[1] == 0:
        raise ValueError(f"use_rep: obsm[{key!r}] has no columns, expected an embedding of each spot")
    types = values.dtypes if isinstance(values, pd.DataFrame) else [values.dtype]
    for dtype in types:
        if not pd.api.types.is_numeric_dtype(dtype) or getattr(dtype, "kind", "O") not in "fiu":
            raise ValueError(f"use_rep: obsm[{key!r}] has data type {dtype}, expected numbers")
    if width is not None and values.shape[1] != width:
        raise ValueError(
            f"use_rep: obsm[{key!r}] has width {values.shape[1]}, but the model was trained on width {width}; "
            "use embeddings of the same encoder"
        )
    return values


def embedding_values(values: Any, key: str, first_row: int | None = None) -> NDArray[np.float32]:
    """Read rows of an embedding as contiguous float32, which must be finite.

    Parameters
    ----------
    values
        The rows, as ``obsm`` stores them.
    key
        Their key in ``obsm``.
    first_row
        Number of their first row in the object, if `values` are not all rows.

    Raises
    ------
    ValueError
        If there are NaN or infinite values, or values so large that they or their squares are infinite in float32.
    """
    array = dense_float32(values)
    location = "" if first_row is None else f" near row {first_row}"
    check_embedding(array, f"use_rep: obsm[{key!r}]{location}", "drop those spots or embed them again")
    return array


def check_embedding(values: NDArray[np.float32], what: str, mend: str) -> None:
    """Refuse embeddings with NaN, infinite or huge values.

    Raises
    ------
    ValueError
        If there are any.
    """
    check_finite(values, what, mend)
    sizes = np.abs(values).max(1, initial=0)
    rows = np.flatnonzero(sizes > LARGEST_EMBEDDING)
    if len(rows):
        raise ValueError(
            f"{what} has values of up to {sizes.max():.3g} in {len(rows)} rows, first at row {rows[0]}; {mend}"
        )


def embedding(adata: AnnData, key: str, width: int | None = None) -> NDArray[np.float32]:
    """Read an embedding as (n_obs, width) float32; raises as :func:`embedding_matrix` and :func:`embedding_values`."""
    return embedding_values(embedding_matrix(adata, key, width), key)


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
    """Read coordinates as (n_obs, 2), x and y.

    Raises
    ------
    KeyError
        If the key is missing.
    ValueError
        If there are not two columns of finite numbers, or all spots lie in one place.
    """
    if spatial_key not in adata.obsm:
        raise KeyError(f"spatial_key: no {spatial_key!r} in obsm, which has {sorted(adata.obsm)}; store x and y there")
    values = adata.obsm[spatial_key]
    what = f"spatial_key: obsm[{spatial_key!r}]"
    if hasattr(values, "compute"):
        values = values.compute()
    if isinstance(values, pd.DataFrame):
        named = next((pair for pair in XY_COLUMNS if set(pair) == set(map(str, values.columns))), None)
        values = values if named is None else values[list(named)]
    try:
        numbers = values.to_numpy(np.float64, na_value=np.nan) if isinstance(values, pd.DataFrame) else dense(values)
        if _has_text(np.asarray(values) if isinstance(values, pd.DataFrame) else numbers):
            raise TypeError
        xy = np.ascontiguousarray(numbers, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} does not hold numbers; store x and y there") from None
    if xy.shape != (adata.n_obs, 2):
        raise ValueError(
            f"{what} has shape {xy.shape}, expected ({adata.n_obs}, 2): x and y in the plane of the section, no more"
        )
    with np.errstate(over="ignore"):
        check_finite(xy.astype(np.float32), what, "drop those spots")
    if len(xy) > 1 and (xy == xy[0]).all():
        raise ValueError(f"{what} has all {len(xy)} spots in one place; store their x and y there")
    return xy


def _has_text(array: NDArray[Any]) -> bool:
    """True for text, which NumPy would parse as numbers, and complex numbers, of which it would drop a part."""
    if array.dtype.kind == "O":
        return any(isinstance(value, str | bytes | complex) for value in array.ravel())
    return array.dtype.kind not in "fiub"


def sections(adata: AnnData, library_key: str | None, spatial_key: str | None = None) -> NDArray[np.str_] | None:
    """Read the section of each spot, (n_obs,) strings; None without `library_key`.

    Parameters
    ----------
    adata
        The object.
    library_key
        Column of ``obs``.
    spatial_key
        Key of ``obsm`` with coordinates: check by them and the images that the object is one section, if `library_key`
        is None.

    Raises
    ------
    KeyError
        If the column is missing.
    ValueError
        If some spots have no section; or if `library_key` is None although a column names several sections that have
        images in ``uns["spatial"]``.
    """
    if library_key is None:
        if spatial_key is not None:
            _check_single_slide(adata, spatial_key)
        return None
    if library_key not in adata.obs:
        raise KeyError(f"library_key: no {library_key!r} in obs, which has {list(adata.obs.columns)}")
    return _labels(adata, library_key, "library_key")


def _labels(adata: AnnData, key: str, name: str) -> NDArray[np.str_]:
    """Read a column of ``obs`` as text, without missing values."""
    column = adata.obs[key]
    if column.isna().any():
        raise ValueError(f"{name}: {int(column.isna().sum())} spots have no value in obs[{key!r}]")
    if pd.api.types.is_float_dtype(column) and (column == column.round()).all():
        column = column.astype(np.int64)  # joining tables turns integers into floats such as 1.0
    groups = column.astype("category").cat
    return groups.categories.astype(str).to_numpy().astype(str)[groups.codes]


def groups(adata: AnnData, group_key: str | None, sections: NDArray[np.str_] | None) -> NDArray[np.str_] | None:
    """Read the individual (patient, animal) of each spot, (n_obs,) strings; None without `group_key`.

    Parameters
    ----------
    adata
        The object.
    group_key
        Column of ``obs``.
    sections
        (n_obs,) section of each spot; a section must belong to one individual.

    Raises
    ------
    KeyError
        If the column is missing.
    ValueError
        If some spots have no individual, or a section has several.
    """
    if group_key is None:
        return None
    if group_key not in adata.obs:
        raise KeyError(f"group_key: no {group_key!r} in obs, which has {list(adata.obs.columns)}")
    names = _labels(adata, group_key, "group_key")
    if sections is not None:
        pairs = pd.DataFrame({"section": sections, "group": names}).drop_duplicates()
        ambiguous = pairs["section"][pairs["section"].duplicated()].tolist()
        if ambiguous:
            raise ValueError(
                f"group_key: section {ambiguous[0]!r} has several values of obs[{group_key!r}]; name another column"
            )
    return names


def _check_single_slide(adata: AnnData, spatial_key: str) -> None:
    """Refuse an object with several slides, or warn of it, where all spots would count as one section."""
    images = adata.uns.get("spatial")
    names = set(map(str, images)) if isinstance(images, Mapping) else set()
    for column in adata.obs.columns if len(names) > 1 else ():
        if not pd.api.types.is_float_dtype(adata.obs[column]):
            with_image = names & set(adata.obs[column].dropna().astype(str).unique())
            if len(with_image) > 1:
                raise ValueError(
                    f"library_key: obs[{column!r}] names {len(with_image)} sections that have their own images in "
                    f"uns['spatial']; pass library_key={column!r}, so that they are not treated as one section"
                )
    if spatial_key in adata.obsm:
        xy = coordinates(adata, spatial_key)
        n_coinciding = len(xy) - len(np.unique(xy, axis=0))
        if n_coinciding > COINCIDING * len(xy):
            warn_once(
                logger,
                "library_key: not given, but %d of %d spots have the same coordinates as another spot in obsm[%r], as "
                "if there were several slides; name the column of obs with the section, so that neighbours are not "
                "sought across slides",
                n_coinciding,
                len(xy),
                spatial_key,
            )


def check_neighbors(names: NDArray[np.str_] | None, n_obs: int, n_neighbors: Sequence[int]) -> None:
    """Refuse sections too small for the smallest neighbourhood; warn of those where larger ones are cut.

    Raises
    ------
    ValueError
        If a section has no more spots than the smallest neighbourhood; the message names it.
    """
    if not n_neighbors:
        return
    least, most = min(n_neighbors), max(n_neighbors)
    labels, counts = np.unique(names, return_counts=True) if names is not None else (["all"], [n_obs])
    cut = []
    for label, count in zip(labels, counts, strict=True):
        if count <= least:
            raise ValueError(
                f"n_neighbors: section {str(label)!r} has {count} spots, too few for {least} neighbours of each spot; "
                "drop the section, or train with smaller n_neighbors"
            )
        if count // 4 < most:
            cut.append(f"{max(count // 4, 1)} in section {str(label)!r} of {count} spots")
    if cut := filter_new_warnings(cut):
        more = f" and in {len(cut) - 3} further sections" if len(cut) > 3 else ""
        logger.warning("neighbourhoods of %d are cut to %s%s", most, ", ".join(cut[:3]), more)


def check_enough_spots(adata: AnnData, least: int, what: str) -> None:
    """Refuse an object with too few spots.

    Raises
    ------
    ValueError
        If it has fewer than `least`.
    """
    if adata.n_obs < least:
        raise ValueError(f"adata: {adata.n_obs} spots are too few to {what}; at least {least} are needed")


def covariate(adata: AnnData, name: str) -> pd.Series:
    """Get a covariate: a column of ``obs`` without missing values.

    Raises
    ------
    KeyError
        If it is missing.
    ValueError
        If it has missing values, or numbers that are not finite.
    """
    if name not in adata.obs:
        raise KeyError(f"covariates: no {name!r} in obs, which has {list(adata.obs.columns)}")
    column = adata.obs[name]
    if column.isna().any():
        raise ValueError(f"covariates: {int(column.isna().sum())} spots have no value in obs[{name!r}]")
    if pd.api.types.is_float_dtype(column):
        check_finite(column.to_numpy(np.float32), f"covariates: obs[{name!r}]", "replace them")
    return column


def depth(adata: AnnData, value: str | float) -> NDArray[np.float32]:
    """Read the total count of every spot, (n_obs,), from a column of ``obs``; or one number for all.

    Raises
    ------
    KeyError
        If the column is missing.
    ValueError
        If it is not numeric, or holds values that are missing, negative or too large.
    """
    if not isinstance(value, str):
        return np.full(adata.n_obs, value, np.float32)
    if value not in adata.obs:
        raise KeyError(
            f"depth: no {value!r} in obs, which has {list(adata.obs.columns)}; scanpy.pp.calculate_qc_metrics adds "
            "total counts as 'total_counts'; give a number without quotes"
        )
    column = adata.obs[value]
    if column.dtype.kind not in "fiu":
        raise ValueError(f"depth: obs[{value!r}] must hold total counts, got {column.dtype}")
    values = column.to_numpy(np.float64, na_value=np.nan)
    wrong = int((~((values >= 0) & (values <= MOST_DEPTH))).sum())
    if wrong:
        raise ValueError(
            f"depth: obs[{value!r}] is missing, negative or more than {MOST_DEPTH:.0e} in {wrong} of {adata.n_obs} "
            "spots; it must hold total counts"
        )
    return values.astype(np.float32)


def check_counts(values: NDArray[Any], what: str, mend: str) -> None:
    """Refuse values that are not counts.

    Parameters
    ----------
    values
        The stored values, with or without zeros.
    what, mend
        For the message: the slot, and how to mend it.

    Raises
    ------
    ValueError
        If any is negative, not finite or not an integer.
    """
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{what} has data type {values.dtype}, expected counts; {mend}")
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
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{what} has data type {values.dtype}, expected numbers")
    check_finite(values, what, "repair the layer")
    if values.size and values.min() < 0:
        raise ValueError(
            f"{what} has negative values (least {values.min():.3g}); pass log-normalised expression, "
            "not scaled or centred"
        )


def panel(adata: AnnData, keys: Keys) -> NDArray[np.bool_]:
    """Read the mask of the panel's genes, (n_vars,).

    Raises
    ------
    KeyError
        If there is no panel.
    ValueError
        If its column is not boolean, or no gene is in it.
    """
    if keys.panel not in adata.var:
        other = "" if keys.prefix == DEFAULT_KEY else f", key_added={keys.prefix!r}"
        raise KeyError(f"adata: no {keys.panel!r} in var; choose genes first with histovar.pp.gene_panel(adata{other})")
    column = adata.var[keys.panel]
    if not pd.api.types.is_bool_dtype(column) or column.isna().any():
        raise ValueError(
            f"adata: var[{keys.panel!r}] has data type {column.dtype}, expected True or False for every gene; call "
            "histovar.pp.gene_panel(adata), or convert it with .astype(bool)"
        )
    mask = column.to_numpy(dtype=bool)
    if not mask.any():
        raise ValueError(f"adata: var[{keys.panel!r}] is True for no gene; call histovar.pp.gene_panel(adata)")
    return mask


def gene_columns(adata: AnnData, genes: Sequence[str], argument: str = "adata") -> NDArray[np.int64]:
    """Find the columns of genes.

    Raises
    ------
    KeyError
        If genes are missing; the message names some.
    """
    index = adata.var_names.get_indexer(pd.Index(genes))
    missing = [g for g, i in zip(genes, index, strict=True) if i < 0]
    if missing:
        raise KeyError(
            f"{argument}: {len(missing)} of the {len(genes)} panel genes are missing from var_names, "
            f"such as {missing[:3]}; names must match those the model was trained on "
            "(symbols or identifiers, upper or lower case)"
        )
    return index.astype(np.int64)
