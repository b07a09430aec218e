"""Read expression and embeddings on disk section by section; those in memory all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import LOGNORM
from histovar._memory import return_freed_memory
from histovar._spots import section_numbers

from . import expression, gate
from .matrix import take_rows

T = TypeVar("T")


class Section(NamedTuple):
    """Spots in memory, with their rows in the object."""

    adata: AnnData
    rows: NDArray[np.int64]


class Sections:
    """Iterate over the spots of an object: section by section if data are on disk, otherwise all at once.

    Parameters
    ----------
    adata
        The object, in memory, backed, or of dask or zarr arrays.
    library_key
        Column of ``obs`` with the section.
    layer
        Layer to read.
    obsm
        Keys of ``obsm`` to read; absent ones are skipped.
    spatial_key
        Key of ``obsm`` with coordinates, if neighbours are needed.

    Attributes
    ----------
    stored : bool
        True if expression or embeddings are on disk.
    names : ndarray or None
        (n_obs,) section of each spot.
    numbers : ndarray
        (n_obs,) number of each spot's section, from 0.
    """

    def __init__(
        self,
        adata: AnnData,
        library_key: str | None,
        layer: str,
        obsm: Sequence[str] = (),
        spatial_key: str | None = None,
    ) -> None:
        self.adata, self.layer, self.obsm = adata, layer, [key for key in obsm if key in adata.obsm]
        self.names = gate.sections(adata, library_key, spatial_key)
        self.numbers = section_numbers(self.names, adata.n_obs)
        self.stored = expression.is_stored(adata, layer, self.obsm)

    @property
    def order(self) -> NDArray[np.int64]:
        """Rows of the object in the order in which they are read."""
        return np.argsort(self.numbers, kind="stable") if self.stored else np.arange(self.adata.n_obs)

    def __iter__(self) -> Iterator[Section]:
        if not self.stored:
            yield Section(self.adata, np.arange(self.adata.n_obs))
            return
        for rows in np.split(self.order, np.cumsum(np.bincount(self.numbers))[:-1]):
            yield Section(self._in_memory(rows), rows)
            return_freed_memory()

    def map(self, function: Callable[[Section], T]) -> Iterable[T]:
        """Map a function over the sections; lazily, once per iteration, if the data are on disk."""
        return _Mapped(self, function) if self.stored else [function(section) for section in self]

    @contextmanager
    def scratch(self) -> Iterator[Path | None]:
        """Make a temporary directory for results of sections on disk; None for an object in memory."""
        if not self.stored:
            yield None
            return
        with TemporaryDirectory(prefix="histovar_") as directory:
            yield Path(directory)

    def _in_memory(self, rows: NDArray[np.int64]) -> AnnData:
        """Read the needed slots of some spots into memory."""
        adata = self.adata
        section = AnnData(
            X=take_rows(adata.X, rows) if adata.X is not None and self.layer in ("X", LOGNORM) else None,
            obs=adata.obs.iloc[rows],
            var=adata.var[[]],
            uns=dict(adata.uns),
            obsm={key: take_rows(adata.obsm[key], rows) for key in self.obsm},
        )
        if self.layer in adata.layers:
            section.layers[self.layer] = take_rows(adata.layers[self.layer], rows)
        elif self.layer == LOGNORM:
            section.layers[LOGNORM] = expression.lognorm(section)
        return section


class _Mapped(Generic[T]):
    """Lazy result of :meth:`Sections.map`."""

    def __init__(self, sections: Sections, function: Callable[[Section], T]) -> None:
        self.sections, self.function = sections, function

    def __iter__(self) -> Iterator[T]:
        for section in self.sections:
            try:
                result = self.function(section)
            except ValueError as error:
                names = self.sections.names
                where = "" if names is None else f" (rows of section {str(names[section.rows[0]])!r})"
                raise ValueError(f"{error}{where}") from None
            del section
            yield result
