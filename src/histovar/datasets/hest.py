"""Read slides in the layout of HEST-1k and HEST-Benchmark."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from histovar._arguments import Key, KeyOrKeys, PathLike, check_arguments
from histovar.anndata_io.files import read_file

from ._embedding_files import find_embedding_file, read_embedding_file
from ._spot_matching import match_spots

logger = logging.getLogger(__name__)


@check_arguments
def hest(
    path: PathLike,
    dataset: Key | None = None,
    *,
    embedding: Key | None = "uni",
    slides: KeyOrKeys | None = None,
) -> AnnData:
    """Read slides and embeddings in the layout of HEST-1k and HEST-Benchmark.

    Parameters
    ----------
    path
        Directory that holds `dataset`; without `dataset`, the directory of the slides: ``st/*.h5ad`` (HEST-1k) or
        ``adata/*.h5ad`` (HEST-Benchmark).
    dataset
        Name of a directory in `path`, such as ``"PRAD"`` or ``"her2st"``.
    embedding
        Name of the encoder; None reads no embeddings, which stage 1 does not need. Embeddings are sought below the data
        set in files named after the slide, ``{slide}.pt``, ``{slide}.h5`` or ``{slide}_*.pt`` and so on. The encoder's
        name must be a whole word of the path (``"conch_v1"`` does not find ``features_conch_v15/{slide}.h5``); a
        slide's only file need not name the encoder, but is refused if it names another. See Notes for the content of
        the files.
    slides
        Slides to read, or the name of one; all by default.

    Returns
    -------
    AnnData
        The genes that all slides share and the spots that have an embedding; ``X`` as stored, ``obs["section"]``,
        ``obsm[f"X_{embedding}"]``, ``obsm["spatial"]``, ``uns["spatial"][slide]``.

    Raises
    ------
    FileNotFoundError
        If slides or embeddings are missing.
    ValueError
        If embeddings cannot be read or matched to spots, if their widths differ, or if slides lack positions, have
        duplicate spot names or share no gene.

    Notes
    -----
    A ``.h5`` file, or a ``.pt`` file with a dictionary, holds ``embeddings`` (or ``features``, as written by TRIDENT,
    ``embedding`` or ``feats``), (n_spots, width) or (1, n_spots, width), and

    - ids of the spots: ``barcodes``, ``spot_ids``, ``names`` and so on, or any array of the slide's spot names. They
      match rows to spots, in any order; spots without an embedding are left out.
    - ``coords``, (n_spots, 2), in pixels, of the spots' centres or the corners of their patches. They must agree with
      ``obsm["spatial"]``, up to a scale and shift of each axis, to less than half the spacing of the spots. Without
      ids, they must show that the file is in the slide's order.

    Without either, as in a ``.pt`` file with only a tensor, the file must be in the slide's order.
    """
    root = Path(path) if dataset is None else Path(path) / dataset
    if not root.is_dir():
        directories = sorted(p.name for p in Path(path).iterdir() if p.is_dir()) if Path(path).is_dir() else []
        name = "path" if dataset is None else "dataset"
        raise FileNotFoundError(f"{name}: no directory {str(root)!r}; {str(path)!r} has {directories}")
    files = {f.stem: f for f in sorted(f for folder in ("st", "adata") for f in (root / folder).glob("*.h5ad"))}
    if not files:
        raise FileNotFoundError(f"path: no st/*.h5ad or adata/*.h5ad in {str(root)!r}")
    chosen = _choose_slides(slides, files, root)
    sections, embedding_files, images = [], [], {}
    for slide in chosen:
        stored = _read_slide(files[slide], slide)
        section = AnnData(stored.X, obs=stored.obs, var=stored.var[[]], obsm={"spatial": stored.obsm["spatial"]})
        if embedding is not None:
            file = read_embedding_file(find_embedding_file(root, slide, embedding, files), root)
            rows, values = match_spots(file, section.obs_names, section.obsm["spatial"], slide)
            section = section[rows].copy()
            section.obsm[f"X_{embedding}"] = values
            embedding_files.append(file.name)
        section.obs["section"] = slide
        section.obs_names = slide + "_" + section.obs_names
        sections.append(section)
        images[slide] = _hires_image(stored, slide)
    _check_shared_genes(sections, chosen)
    if embedding is not None:
        _check_widths(sections, f"X_{embedding}", embedding_files)
    adata = ad.concat(sections, join="inner")
    adata.obs["section"] = pd.Categorical(adata.obs["section"])
    adata.uns["spatial"] = {slide: image for slide, image in images.items() if image}
    logger.info("hest: %d spots x %d genes in slides %s", adata.n_obs, adata.n_vars, chosen)
    return adata


def _choose_slides(slides: Sequence[str] | str | None, files: dict[str, Path], root: Path) -> list[str]:
    if slides is None:
        return list(files)
    chosen = list(slides)  # a single key has become a list
    missing = sorted(set(chosen) - set(files))
    if missing:
        raise FileNotFoundError(f"slides: {missing} not in {str(root)!r}, which has {sorted(files)}")
    return chosen


def _read_slide(file: Path, slide: str) -> AnnData:
    """Read expression and positions of a slide; refuse duplicate spot names."""
    adata = read_file(file)
    adata.var_names_make_unique()
    adata.obs_names = adata.obs_names.astype(str)
    if not adata.obs_names.is_unique:
        duplicates = list(adata.obs_names[adata.obs_names.duplicated()].unique()[:3])
        raise ValueError(f"path: slide {slide!r} has several spots named {duplicates}; make its obs_names unique")
    if "spatial" not in adata.obsm:
        raise ValueError(
            f"path: slide {slide!r} has no obsm['spatial'], only {sorted(adata.obsm)}; "
            "store the pixel positions of its spots there"
        )
    spatial = np.asarray(adata.obsm["spatial"])
    if spatial.ndim != 2 or spatial.shape[1] != 2 or spatial.dtype.kind not in "fiu":
        raise ValueError(
            f"path: obsm['spatial'] of slide {slide!r} is {spatial.dtype} {spatial.shape}; "
            "it must hold two numbers, x and y in pixels, for each spot"
        )
    adata.obsm["spatial"] = spatial
    return adata


def _check_widths(sections: list[AnnData], key: str, files: list[str]) -> None:
    widths = {file: section.obsm[key].shape[1] for file, section in zip(files, sections, strict=True)}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{file} ({width})" for file, width in widths.items())
        raise ValueError(
            f"embedding: files have embeddings of different widths: {listed}; "
            "name one encoder, or read those slides separately"
        )


def _check_shared_genes(sections: list[AnnData], slides: list[str]) -> None:
    shared = sections[0].var_names
    for section, slide in zip(sections[1:], slides[1:], strict=True):
        remaining = shared.intersection(section.var_names)
        if not len(remaining):
            raise ValueError(
                f"slides: {slide!r} (genes {list(section.var_names[:3])}, ...) has none of the genes shared by "
                f"{slides[: slides.index(slide)]} ({list(shared[:3])}, ...); read slides with the same gene names"
            )
        shared = remaining


def _hires_image(adata: AnnData, slide: str) -> dict[str, Any]:
    """Get HEST's downscaled image under the name that squidpy expects; empty if none has a scale factor."""
    for library in _as_mapping(adata.uns.get("spatial")).values():
        images = _as_mapping(_as_mapping(library).get("images"))
        factors = dict(_as_mapping(_as_mapping(library).get("scalefactors")))
        for name in ("hires", "downscaled_fullres"):
            factor = factors.get(f"tissue_{name}_scalef")
            if images.get(name) is not None and factor is not None:
                factors["tissue_hires_scalef"] = float(factor)
                return {"images": {"hires": np.asarray(images[name])}, "scalefactors": factors}
    logger.info("hest: slide %s has no image with a scale factor; read without image", slide)
    return {}


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
