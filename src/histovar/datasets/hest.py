"""The layout of HEST-1k and HEST-Benchmark."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def hest(
    path: str | Path,
    dataset: str | None = None,
    *,
    embedding: str | None = "uni",
    slides: Sequence[str] | None = None,
) -> AnnData:
    """Read slides in HEST's layout, with embeddings.

    Parameters
    ----------
    path
        Directory that holds `dataset`, or, without `dataset`, the slides themselves: ``st/*.h5ad`` (HEST-1k) or
        ``adata/*.h5ad`` (HEST-Benchmark).
    dataset
        Name of a directory in `path`, such as ``"PRAD"`` or ``"her2st"``.
    embedding
        Name of the encoder; None reads no embeddings, which stage 1 does not need. Embeddings are sought below the data
        set in files named after the slide, ``{slide}.pt``, ``{slide}.h5`` or ``{slide}_*.pt`` and so on, with the
        encoder's name in the path where there are several. A ``.pt`` file holds a tensor (n_spots, width), in the order
        of the slide, or a dictionary with ``embeddings`` and ``barcodes``; a ``.h5`` file ``embeddings``, ``coords``
        and ``barcodes`` as in HEST-Benchmark.
    slides
        Slides to read; all by default.

    Returns
    -------
    AnnData
        Genes that all slides share, spots that have an embedding; ``X`` as stored, ``obs["section"]``,
        ``obsm[f"X_{embedding}"]``, ``obsm["spatial"]``, ``uns["spatial"][slide]``.

    Raises
    ------
    FileNotFoundError
        If slides or embeddings are missing.
    ValueError
        If embeddings cannot be matched to spots, by barcode or, without barcodes, by number.
    """
    root = Path(path) if dataset is None else Path(path) / dataset
    if not root.is_dir():
        known = sorted(p.name for p in Path(path).iterdir() if p.is_dir()) if Path(path).is_dir() else []
        raise FileNotFoundError(f"dataset: no directory {str(root)!r}; {str(path)!r} has {known}")
    files = sorted(f for folder in ("st", "adata") for f in (root / folder).glob("*.h5ad"))
    found = {f.stem: f for f in files}
    if not found:
        raise FileNotFoundError(f"path: no st/*.h5ad or adata/*.h5ad in {str(root)!r}")
    wanted = list(found) if slides is None else list(slides)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise FileNotFoundError(f"slides: {missing} not in {str(root)!r}, which has {sorted(found)}")
    parts, images = [], {}
    for slide in wanted:
        part = ad.read_h5ad(found[slide])
        part.var_names_make_unique()
        rows, values = np.arange(part.n_obs), None
        if embedding is not None:
            rows, values = _match(part, *_read(_embedding_file(root, slide, embedding)), slide)
        images[slide] = _image(part)
        part = AnnData(part.X, obs=part.obs, var=part.var[[]], obsm={"spatial": np.asarray(part.obsm["spatial"])})[
            rows
        ].copy()
        if values is not None:
            part.obsm[f"X_{embedding}"] = values
        part.obs["section"] = slide
        part.obs_names = slide + "_" + part.obs_names.astype(str)
        parts.append(part)
    adata = ad.concat(parts, join="inner")
    adata.obs["section"] = pd.Categorical(adata.obs["section"])
    adata.uns["spatial"] = {slide: image for slide, image in images.items() if image}
    logger.info("hest: %d spots x %d genes in slides %s", adata.n_obs, adata.n_vars, wanted)
    return adata


def _embedding_file(root: Path, slide: str, embedding: str) -> Path:
    found = [
        f
        for kind in ("pt", "h5")
        for f in sorted(root.rglob(f"{slide}*.{kind}"))
        if f.stem == slide or f.stem.startswith(f"{slide}_")
    ]
    found = [f for f in found if "patches" not in f.relative_to(root).parts]
    named = [f for f in found if embedding.lower() in str(f.relative_to(root)).lower()]
    if not named and len(found) == 1:
        named = found
    if not named:
        raise FileNotFoundError(
            f"embedding: no file of {embedding!r} embeddings of slide {slide!r} below {str(root)!r}; "
            f"there are {[str(f.relative_to(root)) for f in found]}"
        )
    if len(named) > 1:
        raise ValueError(
            f"embedding: several files fit slide {slide!r}: {[str(f.relative_to(root)) for f in named]}; be more exact"
        )
    return named[0]


def _read(file: Path) -> tuple[NDArray[np.float32], list[str] | None, str]:
    """Embeddings, barcodes if there are any, and the file's name for messages."""
    if file.suffix == ".h5":
        with h5py.File(file) as store:
            values = np.asarray(store["embeddings"], dtype=np.float32)
            codes = [_text(b) for b in np.asarray(store["barcodes"]).ravel()] if "barcodes" in store else None
        return values, codes, file.name
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    codes = None
    if isinstance(content, dict):
        codes = [str(b) for b in content["barcodes"]] if "barcodes" in content else None
        content = content["embeddings"]
    return content.float().numpy(), codes, file.name


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _match(
    part: AnnData, values: NDArray[np.float32], barcodes: list[str] | None, file: str, slide: str
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the slide that have an embedding, and the embeddings in their order."""
    if barcodes is None:
        if len(values) != part.n_obs:
            raise ValueError(
                f"embedding: {file} has {len(values)} rows and no barcodes, slide {slide!r} has {part.n_obs} spots; "
                "they cannot be matched, store barcodes with the embeddings"
            )
        return np.arange(part.n_obs), values
    index = pd.Index(barcodes)
    if len(index) != len(values) or not index.is_unique:
        raise ValueError(f"embedding: {file} has {len(values)} rows for {index.nunique()} different barcodes")
    order = index.get_indexer(part.obs_names.astype(str))
    rows = np.flatnonzero(order >= 0)
    if not len(rows):
        raise ValueError(
            f"embedding: no barcode of {file} ({barcodes[:2]}, ...) is a spot of slide {slide!r} "
            f"({list(part.obs_names[:2])}, ...)"
        )
    if len(rows) < part.n_obs:
        logger.info("hest: %d spots of slide %s have no embedding and are left out", part.n_obs - len(rows), slide)
    return rows, values[order[rows]]


def _image(part: AnnData) -> dict[str, Any]:
    """HEST's downscaled image under the name that squidpy looks for."""
    for stored in part.uns.get("spatial", {}).values():
        images, factors = stored.get("images", {}), dict(stored.get("scalefactors", {}))
        for name in ("hires", "downscaled_fullres"):
            if name in images and f"tissue_{name}_scalef" in factors:
                factors["tissue_hires_scalef"] = float(factors[f"tissue_{name}_scalef"])
                return {"images": {"hires": np.asarray(images[name])}, "scalefactors": factors}
    return {}
