"""Read one or several .h5ad or .zarr files as one object with distinct names of sections, spots and images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from histovar._keys import Keys

from . import spacing, zarr_store
from .zarr_check import StoreError, open_store

logger = logging.getLogger(__name__)

SECTION = "section"
# Embeddings of expression that scanpy computes within a file: those of different files cannot be compared.
OF_ONE_FILE = ("X_pca", "X_tsne", "X_umap")


def read_files(paths: Sequence[str | Path], library_key: str = SECTION) -> AnnData:
    """Read one or several .h5ad or .zarr files as one object.

    Parameters
    ----------
    paths
        The files.
    library_key
        Column of ``obs`` with the tissue section. It is added to files that lack it, with the file's name without
        suffix as the section; files of the same name in several directories get the directory's name as prefix.

    Returns
    -------
    AnnData
        In memory, with the spots of all files. Several files are joined as follows:

        - genes: those that all files have;
        - ``obs``, ``obsm`` and ``layers``: what all files have; ``uns``: what does not differ; ``var`` and ``varm``:
          what is the same in all files; ``obsp``, ``varp`` and ``raw`` are left out;
        - sections of the same name in several files get the file's name as prefix;
        - spots of the same name in several files get the section's name as prefix, or the file's name if the file has
          several sections;
        - ``uns["spatial"]`` holds the images of all files.

        The image of a file with one section and one image is stored under the section's name. Anything left out or
        renamed is logged.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    KeyError
        If `library_key` is not ``"section"`` and no file has it.
    ValueError
        If a file is not AnnData, is truncated or given twice, arrays of ``obsm`` differ in width between files, genes
        have duplicated names, or files with genes share none.
    """
    paths = check_paths(paths)
    return combine_files([read_file(path) for path in paths], paths, library_key)


def read_store(path: str | Path, library_key: str = SECTION, genes: list[str] | None = None) -> AnnData:
    """Read a .zarr store lazily: expression and embeddings stay on disk, as dask arrays.

    Parameters
    ----------
    path
        The store.
    library_key
        As in :func:`read_files`.
    genes
        Names of genes that the object gets in place of the store's; expression is then not read.

    Returns
    -------
    AnnData
        With section and image named as by :func:`read_files`.

    Raises
    ------
    FileNotFoundError, KeyError, ValueError
        As :func:`read_files`.
    """
    (path,) = check_paths([path])
    try:
        adata = zarr_store.read_zarr(path, genes)
    except (MemoryError, StoreError):
        raise
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error
    return combine_files([adata], [path], library_key)


def check_paths(paths: Sequence[str | Path]) -> list[Path]:
    """Refuse files that are missing or given twice.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If there are none, or one is given twice.
    """
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("no file given")
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"no file {str(file)!r}")
    repeated = [str(file) for file, n in Counter(file.resolve() for file in files).items() if n > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} is given twice")
    return files


def read_file(path: Path) -> AnnData:
    """Read a .h5ad file or a .zarr store into memory.

    Raises
    ------
    ValueError
        If it is not AnnData, is truncated, damaged, pickled or lacks chunk files, or has no spots.
    """
    try:
        adata = ad.read_zarr(open_store(path)) if path.is_dir() else ad.read_h5ad(path)
    except (MemoryError, StoreError):
        raise
    except Exception as error:  # HDF5, zarr and anndata raise different errors for damaged files
        raise ValueError(_unreadable(path, error)) from error
    if adata.n_obs == 0:
        raise ValueError(f"{str(path)!r} has no spots")
    return adata


def _unreadable(path: Path, error: Exception) -> str:
    """Say in one line which file cannot be read and why, with the slot if anndata names it."""
    reason = " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())
    if path.is_dir():
        tables = sorted(table.name for table in (path / "tables").glob("*") if table.is_dir())
        if tables:
            return f"{str(path)!r} is SpatialData; give its table, {str(path / 'tables' / tables[0])!r}"
        return f"{str(path)!r} is not AnnData in zarr, or is damaged ({reason})"
    if "truncated" in reason:
        return f"{str(path)!r} is truncated; copy or write it again ({reason})"
    return f"{str(path)!r} is not AnnData in .h5ad, or is damaged ({reason})"


def combine_files(adatas: Sequence[AnnData], paths: Sequence[Path], library_key: str = SECTION) -> AnnData:
    """Join objects read from files, as :func:`read_files` says; the objects are changed in place.

    Parameters
    ----------
    adatas
        The objects.
    paths
        The files they were read from.
    library_key
        Column of ``obs`` with the section.

    Raises
    ------
    KeyError, ValueError
        As :func:`read_files`.
    """
    names = distinct_names(paths)
    with_column = [library_key in adata.obs for adata in adatas]
    if library_key != SECTION and not any(with_column):
        raise KeyError(
            f"library_key: no {library_key!r} in obs of {_listed(map(str, paths))}, which has "
            f"{list(adatas[0].obs.columns)}"
        )
    for adata, path, name in zip(adatas, paths, names, strict=True):
        if library_key not in adata.obs:
            adata.obs[library_key] = pd.Categorical([name] * adata.n_obs)
            logger.info("%r has no obs[%r]: its spots are section %r", str(path), library_key, name)
    sections = _make_sections_distinct(adatas, paths, names, library_key)
    for adata, mapping in zip(adatas, sections, strict=True):
        spacing.rename_sections(adata, mapping)
    images = _images_by_section(adatas, names, sections)
    if len(adatas) == 1:
        combined = adatas[0]
    else:
        _make_spots_distinct(adatas, names, sections)
        _share_genes(adatas, paths)
        _share_arrays(adatas, paths)
        _share_columns(adatas)
        combined = _concat(adatas)
    if images:
        combined.uns["spatial"] = images
    return combined


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Names of files without suffix; equal ones are prefixed with as many directories as make them distinct."""
    parts = [(*path.resolve().parent.parts[1:], path.stem) for path in paths]
    parts = [
        (*path_parts[:-1], path.name) if parts.count(path_parts) > 1 else path_parts  # s.h5ad beside s.zarr
        for path_parts, path in zip(parts, paths, strict=True)
    ]
    names = [path_parts[-1] for path_parts in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        counts = Counter(names)
        names = [
            "_".join(path_parts[-depth:]) if counts[name] > 1 else name
            for name, path_parts in zip(names, parts, strict=True)
        ]
    if len(set(names)) < len(names):
        raise ValueError(f"the names of {_listed(map(str, paths))} cannot be told apart; rename a file")
    return names


def _make_sections_distinct(
    adatas: Sequence[AnnData], paths: Sequence[Path], names: Sequence[str], library_key: str
) -> list[dict[str, str]]:
    """Rename sections whose name several files have; return each file's mapping from old to new names."""
    file_sections = [[str(s) for s in adata.obs[library_key].dropna().unique()] for adata in adatas]
    counts = Counter(section for sections in file_sections for section in sections)
    renamed = [
        {s: s if counts[s] == 1 else name if s == path.stem else f"{name}_{s}" for s in sections}
        for path, name, sections in zip(paths, names, file_sections, strict=True)
    ]
    if all(n == 1 for n in counts.values()):
        return renamed
    new_names = [section for sections in renamed for section in sections.values()]
    if len(set(new_names)) < len(new_names):
        raise ValueError(f"library_key: sections of several files cannot be told apart: {sorted(new_names)}")
    for adata, mapping in zip(adatas, renamed, strict=True):
        column = adata.obs[library_key]
        labels = [mapping[str(s)] if known else None for s, known in zip(column, column.notna(), strict=True)]
        adata.obs[library_key] = pd.Categorical(labels)
    logger.info(
        "sections %s are in several files and are renamed after their files: %s",
        sorted(s for s, n in counts.items() if n > 1),
        [new for mapping in renamed for old, new in mapping.items() if old != new],
    )
    return renamed


def _make_spots_distinct(
    adatas: Sequence[AnnData], names: Sequence[str], sections: Sequence[Mapping[str, str]]
) -> None:
    """Prefix the names of spots with section or file, in files that share names of spots with another."""
    spots = pd.Index(np.concatenate([adata.obs_names.unique() for adata in adatas]))
    shared = spots[spots.duplicated()]
    if shared.empty:
        return
    for adata, name, mapping in zip(adatas, names, sections, strict=True):
        if adata.obs_names.isin(shared).any():
            prefix = next(iter(mapping.values())) if len(mapping) == 1 else name
            adata.obs_names = f"{prefix}_" + adata.obs_names
    logger.info("names of spots such as %r are in several files: they get section or file as prefix", shared[0])


def _images_by_section(
    adatas: Sequence[AnnData], names: Sequence[str], sections: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Collect ``uns["spatial"]`` of all files, images renamed with their sections; it is removed from the objects.

    An image whose name is not a section of its file is kept if a section of the file has no image, and never under the
    name of another file's section or image.
    """
    taken = {section for mapping in sections for section in mapping.values()}
    images: dict[str, Any] = {}
    for adata, name, mapping in zip(adatas, names, sections, strict=True):
        file_images = adata.uns.get("spatial")
        if not isinstance(file_images, Mapping):
            continue
        file_images = dict(adata.uns.pop("spatial"))
        if len(file_images) == 1 and len(mapping) == 1:
            images[next(iter(mapping.values()))] = next(iter(file_images.values()))
            continue
        images |= {mapping[library]: image for library, image in file_images.items() if library in mapping}
        others = {library: image for library, image in file_images.items() if library not in mapping}
        if others and len(adatas) > 1 and set(mapping) <= set(file_images):  # such as a section cut out of several
            logger.info("images %s of %r belong to none of its sections and are left out", sorted(others), name)
            continue
        for library, image in others.items():
            key = str(library)
            while key in images or key in taken:
                key = f"{name}_{key}"
            images[key] = image
    return images


def _share_genes(adatas: Sequence[AnnData], paths: Sequence[Path]) -> None:
    """Check that genes can be joined and log how many are shared; drop X if some files have none."""
    first = adatas[0].var_names
    shared = first
    for adata, path in zip(adatas, paths, strict=True):
        if not adata.var_names.is_unique:
            repeated = adata.var_names[adata.var_names.duplicated()].unique()[:3].tolist()
            raise ValueError(
                f"{str(path)!r} has duplicated names of genes such as {repeated}; call adata.var_names_make_unique()"
            )
        shared = shared[shared.isin(adata.var_names)]
    if not len(shared) and all(adata.n_vars for adata in adatas):
        examples = ", ".join(f"{str(p)!r} {a.var_names[:2].tolist()}" for a, p in zip(adatas[:3], paths, strict=False))
        raise ValueError(
            f"the files share no genes: {examples}; names must match (symbols or identifiers, upper or lower case)"
        )
    if any(len(shared) < adata.n_vars for adata in adatas):
        logger.info(
            "%d genes are shared by all files, which have %s", len(shared), _listed(str(a.n_vars) for a in adatas)
        )
    without = [str(path) for adata, path in zip(adatas, paths, strict=True) if adata.X is None]
    if without:
        for adata in adatas:
            adata.X = None
        if len(without) < len(adatas):
            logger.info("X is left out, since these files have none: %s", _listed(without))


def _share_arrays(adatas: Sequence[AnnData], paths: Sequence[Path]) -> None:
    """Drop arrays of ``obsm`` and ``layers`` that some files lack; refuse embeddings of different widths."""
    for slot in ("layers", "obsm"):
        stores = [getattr(adata, slot) for adata in adatas]
        for key in sorted({key for store in stores for key in store}):
            lacking = [str(path) for store, path in zip(stores, paths, strict=True) if key not in store]
            if lacking:
                _drop(stores, key)
                logger.info("%s[%r] is left out, since these files lack it: %s", slot, key, _listed(lacking))
            elif slot == "obsm":
                _check_widths(stores, key, paths)


def _check_widths(stores: Sequence[Any], key: str, paths: Sequence[Path]) -> None:
    """Refuse an array of ``obsm`` whose width differs between files; drop embeddings computed within a file."""
    widths = [store[key].shape[1:] for store in stores]
    if len(set(widths)) > 1:
        listed = ", ".join(f"{_width(w)} in {str(path)!r}" for w, path in zip(widths, paths, strict=True))
        if key not in OF_ONE_FILE:
            raise ValueError(
                f"obsm[{key!r}] differs in width: {listed}; embed the sections of all files with the same encoder"
            )
        _drop(stores, key)
        logger.info("obsm[%r] is left out: its width is %s", key, listed)
        return
    columns = [list(store[key].columns) if isinstance(store[key], pd.DataFrame) else None for store in stores]
    for other, path in zip(columns[1:], paths[1:], strict=True):
        if other is not None and columns[0] is not None and set(other) != set(columns[0]):
            raise ValueError(f"obsm[{key!r}] has different columns in {str(path)!r} and {str(paths[0])!r}")
    if any(c is None for c in columns) and any(c is not None for c in columns):
        for store in stores:
            store[key] = np.asarray(store[key])


def _width(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _share_columns(adatas: Sequence[AnnData]) -> None:
    """Log which columns of ``obs`` are not shared; convert those to text that are numbers in some files only."""
    columns = [list(adata.obs.columns) for adata in adatas]
    lost = sorted({str(c) for own in columns for c in own if not all(c in other for other in columns)})
    if lost:
        logger.info("columns of obs that some files lack are left out: %s", lost)
    for name in set(columns[0]).intersection(*columns[1:]):
        kinds = {_kind(adata.obs[name]) for adata in adatas}
        if len(kinds) > 1:
            for adata in adatas:
                column = adata.obs[name]
                adata.obs[name] = column.astype(object).where(column.isna(), column.astype(str))
            logger.info("obs[%r] is %s, depending on the file, and is read as text", name, " or ".join(sorted(kinds)))


def _kind(column: pd.Series) -> str:
    """Kind of a column's values, in which files must agree."""
    if pd.api.types.is_bool_dtype(column):
        return "true or false"
    return "a number" if pd.api.types.is_numeric_dtype(column) else "text"


def _drop(stores: Sequence[Any], key: str) -> None:
    for store in stores:
        if key in store:
            del store[key]


def _concat(adatas: Sequence[AnnData]) -> AnnData:
    """Concatenate the objects; a gene panel that differs between files is left out with its scales."""
    keys = Keys()
    entries = {entry for adata in adatas for entry in _entries(adata.uns)}
    panels = [int(adata.var[keys.panel].sum()) if keys.panel in adata.var else 0 for adata in adatas]
    for adata in adatas:
        if adata.raw is not None:
            adata.raw = None
    combined = ad.concat(adatas, join="inner", merge="same", uns_merge="unique")
    if not combined.obs_names.is_unique:
        repeated = combined.obs_names[combined.obs_names.duplicated()][:3].tolist()
        raise ValueError(f"obs_names: duplicated names such as {repeated}; call adata.obs_names_make_unique()")
    if any(panels) and (keys.panel not in combined.var or int(combined.var[keys.panel].sum()) < max(panels)):
        for store, key in ((combined.var, keys.panel), (combined.varm, keys.scales)):
            if key in store:
                del store[key]
        logger.warning("var[%r] is left out: the gene panel differs between the files", keys.panel)
    lost = sorted(entries - _entries(combined.uns))
    if lost:
        logger.info("entries of uns that differ between the files are left out: %s", lost)
    return combined


def _entries(uns: Mapping[str, Any]) -> set[str]:
    """Keys of ``uns``, and of the mappings in it."""
    return {
        entry
        for key, value in uns.items()
        for entry in ([f"{key}/{inner}" for inner in value] if isinstance(value, Mapping) else [str(key)])
    }


def _listed(names: Collection[str] | Any) -> str:
    """List the first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
