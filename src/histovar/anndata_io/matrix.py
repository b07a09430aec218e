"""Read matrices however they are stored: in memory, backed, dask or zarr; dense, sparse or a DataFrame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from anndata.abc import CSCDataset, CSRDataset
from numpy.typing import NDArray
from scipy import sparse

# Rows in a block when a matrix is read block by block.
ROWS_AT_ONCE = 4096


def library(values: Any) -> str:
    """Name of the package that defines the type of a matrix, seen through anndata's views."""
    packages = (base.__module__.split(".")[0] for base in type(values).__mro__)
    return next(package for package in packages if package != "anndata")


def on_disk(values: Any) -> bool:
    """True for dask, zarr and HDF5 arrays, and sparse matrices of a backed object."""
    return library(values) in ("dask", "zarr", "h5py") or isinstance(values, CSRDataset | CSCDataset)


def is_lazy(values: Any) -> bool:
    """True for dask and zarr arrays."""
    return library(values) in ("dask", "zarr")


def take_rows(matrix: Any, rows: NDArray[np.int64]) -> Any:
    """Read rows of a matrix, given in increasing order, into memory."""
    if hasattr(matrix, "iloc"):
        return matrix.iloc[rows]
    consecutive = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1
    taken = matrix[int(rows[0]) : int(rows[-1]) + 1] if consecutive else matrix[rows]
    return taken.compute() if hasattr(taken, "compute") else taken


def row_blocks(matrix: Any, n_rows: int) -> Iterator[Any]:
    """Yield blocks of rows, each a NumPy array or a CSR matrix without duplicate entries; the matrix is not changed."""
    for start in range(0, n_rows, ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, n_rows))
        block = matrix.iloc[rows] if hasattr(matrix, "iloc") else matrix[rows]
        yield canonical(block.compute() if hasattr(block, "compute") else block)


def rows_of_blocks(blocks: Iterable[Any], rows: NDArray[np.integer]) -> Iterator[tuple[NDArray[np.integer], Any]]:
    """Yield, for each block of rows, which of `rows` (increasing) it holds, and their values."""
    start = 0
    for block in blocks:
        stop = start + block.shape[0]
        here = rows[(rows >= start) & (rows < stop)]
        yield here, block[here - start]
        start = stop


def canonical(block: Any) -> Any:
    """Convert to a NumPy array or a CSR matrix; duplicate entries of a sparse matrix are summed in a copy."""
    if not sparse.issparse(block):
        return block.to_numpy() if isinstance(block, pd.DataFrame) else dense(block)
    rows = sparse.csr_matrix(block)
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def stored_values(block: Any) -> NDArray[Any]:
    """Get the values of a block; of a sparse one only the stored values."""
    return block.data if sparse.issparse(block) else np.asarray(block)


def dense(block: Any) -> NDArray[Any]:
    """Convert a block in memory to a NumPy array; masked values become NaN."""
    if isinstance(block, np.ma.MaskedArray):
        return np.where(np.ma.getmaskarray(block), np.nan, np.ma.getdata(block))
    return block.toarray() if sparse.issparse(block) else np.asarray(block)


def dense_float32(values: Any) -> NDArray[np.float32]:
    """Convert a matrix to contiguous float32; missing values become NaN, values too large for float32 infinite."""
    if hasattr(values, "compute"):
        values = values.compute()
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy(dtype=np.float64, na_value=np.nan)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(dense(values), dtype=np.float32)
