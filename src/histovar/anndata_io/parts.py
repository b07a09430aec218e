"""Objects whose matrices are on disk, read section by section."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import LOGNORM
from histovar._memory import return_freed_memory
from histovar._spots import section_numbers

from . import read, validate

T = TypeVar("T")


class Part(NamedTuple):
    """Spots in memory, and which of the object's rows they are."""

    adata: AnnData
    rows: NDArray[np.int64]


class Parts:
    """The spots of an object: all as one part, or a part a section where expression or embeddings are on disk.

    Parameters
    ----------
    adata
        The object, in memory, backed, or of dask or zarr arrays.
    library_key
        Column of ``obs`` with the section.
    layer
        Layer that is needed.
    obsm
        Keys of ``obsm`` that are needed, where they are there.

    Attributes
    ----------
    stored : bool
        Whether it is on disk.
    names : ndarray or None
        (n_obs,) section of each spot.
    numbers : ndarray
        (n_obs,) the same, numbered from 0.
    """

    def __init__(self, adata: AnnData, library_key: str | None, layer: str, obsm: Sequence[str] = ()) -> None:
        self.adata, self.layer, self.obsm = adata, layer, [key for key in obsm if key in adata.obsm]
        self.names = validate.sections(adata, library_key)
        self.numbers = section_numbers(self.names, adata.n_obs)
        self.stored = read.is_stored(adata, layer, self.obsm)

    @property
    def order(self) -> NDArray[np.int64]:
        """Rows of the object in the order of the parts."""
        return np.argsort(self.numbers, kind="stable") if self.stored else np.arange(self.adata.n_obs)

    def __iter__(self) -> Iterator[Part]:
        if not self.stored:
            yield Part(self.adata, np.arange(self.adata.n_obs))
            return
        for rows in np.split(self.order, np.cumsum(np.bincount(self.numbers))[:-1]):
            yield Part(self._in_memory(rows), rows)
            return_freed_memory()

    def each(self, function: Callable[[Part], T]) -> Iterable[T]:
        """What a function makes of every part; of parts on disk anew whenever it is gone through."""
        return _Each(self, function) if self.stored else [function(part) for part in self]

    @contextmanager
    def scratch(self) -> Iterator[Path | None]:
        """A temporary directory for what is made of parts on disk; None for an object in memory."""
        if not self.stored:
            yield None
            return
        with TemporaryDirectory(prefix="histovar_") as directory:
            yield Path(directory)

    def _in_memory(self, rows: NDArray[np.int64]) -> AnnData:
        """Some spots, with what is needed of them."""
        adata = self.adata
        part = AnnData(
            X=rows_of(adata.X, rows) if adata.X is not None and self.layer in ("X", LOGNORM) else None,
            obs=adata.obs.iloc[rows],
            var=adata.var[[]],
            uns=dict(adata.uns),
            obsm={key: rows_of(adata.obsm[key], rows) for key in self.obsm},
        )
        if self.layer in adata.layers:
            part.layers[self.layer] = rows_of(adata.layers[self.layer], rows)
        elif self.layer == LOGNORM:
            part.layers[LOGNORM] = read.lognorm(part)
        return part


class _Each(Generic[T]):
    """See :meth:`Parts.each`."""

    def __init__(self, parts: Parts, function: Callable[[Part], T]) -> None:
        self.parts, self.function = parts, function

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            try:
                made = self.function(part)
            except ValueError as error:
                names = self.parts.names
                where = "" if names is None else f" (rows of section {str(names[part.rows[0]])!r})"
                raise ValueError(f"{error}{where}") from None
            del part
            yield made


def rows_of(matrix: Any, rows: NDArray[np.int64]) -> Any:
    """Some rows, increasing, of a matrix of any kind, in memory."""
    if hasattr(matrix, "iloc"):
        return matrix.iloc[rows]
    consecutive = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1
    some = matrix[int(rows[0]) : int(rows[-1]) + 1] if consecutive else matrix[rows]
    return some.compute() if hasattr(some, "compute") else some
