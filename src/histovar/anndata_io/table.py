"""The AnnData of whatever the user passes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Union

from anndata import AnnData, ImplicitModificationWarning

if TYPE_CHECKING:
    from spatialdata import SpatialData

Data = Union[AnnData, "SpatialData"]


def as_table(data: Data, table_name: str | None = None) -> AnnData:
    """The table to work on.

    Parameters
    ----------
    data
        AnnData or SpatialData.
    table_name
        Which table of a SpatialData; may be left out where there is but one.

    Returns
    -------
    AnnData
        The object itself, not a copy.

    Raises
    ------
    TypeError
        If `data` is neither.
    KeyError
        If there is no such table.
    """
    if isinstance(data, AnnData):
        return data
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
    table: AnnData = tables[table_name]
    return table


def copied(adata: AnnData) -> AnnData:
    """A copy in memory, also of a backed object."""
    return adata.to_memory() if adata.isbacked else adata.copy()


@contextmanager
def writing() -> Iterator[None]:
    """Let views become actual objects when written to, as users expect of in-place functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        yield
