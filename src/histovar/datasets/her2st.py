"""HER2-positive breast cancer, in the layout in which it was published."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from PIL.JpegImagePlugin import JpegImageFile
from scipy import sparse

from histovar._arguments import KeyList, Number, PathLike, check_arguments

logger = logging.getLogger(__name__)

# Of the selection: position in the array and in the image.
SPOT_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
# A spot is 100 um wide; the spots of the array are 200 um apart.
DIAMETER_OVER_PITCH = 0.5
# Most pixels of an image: the published ones have some 9,270 x 9,936, and Pillow's own limit, meant for photographs, is
# 179 million. A progressive JPEG takes 6 bytes a pixel to read, of so many 2.4 GB.
MOST_PIXELS = 400_000_000


@check_arguments
def her2st(path: PathLike, *, sections: KeyList | None = None, image_width: Number = 1000) -> AnnData:
    """Read the data set of Andersson et al. (2021, doi:10.1038/s41467-021-26271-2) from its published layout.

    Parameters
    ----------
    path
        Directory with ``data/ST-cnts`` (``C2.tsv.gz``), ``data/ST-spotfiles`` (``C2_selection.tsv``) and, if wanted,
        ``data/ST-imgs`` (``C/C2/*.jpg``); or its ``data`` directory itself.
    sections
        Sections to read, such as ``["C2", "C3"]``; all that are there by default.
    image_width
        Width in pixels to which images are scaled down; 0 reads none.

    Returns
    -------
    AnnData
        Counts in ``X`` (CSR float32; genes that a section lacks are 0), ``obs["section"]``, ``obs["patient"]``,
        ``obs["array_row"]``, ``obs["array_col"]``, ``obsm["spatial"]`` in pixels of the full image,
        ``uns["spatial"][section]``. Spots of the counts without a partner in the selection, and the reverse, are left
        out.

    Raises
    ------
    FileNotFoundError
        If a directory or a section is missing.
    ValueError
        If count rows or spots of a section cannot be told apart; if a file is damaged, or an image has more than 400
        million pixels.
    """
    root = Path(path)
    root = root / "data" if (root / "data").is_dir() else root
    folder = root / "ST-cnts"
    if not folder.is_dir():
        raise FileNotFoundError(f"path: no ST-cnts in {str(root)!r}; expected the layout of github almaan/her2st")
    there = sorted(f.name.split(".")[0] for f in folder.glob("*.tsv*"))
    wanted = there if sections is None else list(sections)
    missing = sorted(set(wanted) - set(there))
    if missing:
        raise FileNotFoundError(f"sections: {missing} not found in {str(folder)!r}, which has {there}")
    if sections is not None and not wanted:
        raise ValueError("sections: expected at least one, got []")
    if not wanted:
        raise FileNotFoundError(f"path: no sections (*.tsv or *.tsv.gz) in {str(folder)!r}")
    parts = [_section(root, name) for name in wanted]
    adata = ad.concat(parts, join="outer", fill_value=0)
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    for column in ("section", "patient"):
        adata.obs[column] = pd.Categorical(adata.obs[column])
    if image_width:
        images = {name: _image(root, name, part, image_width) for name, part in zip(wanted, parts, strict=True)}
        adata.uns["spatial"] = {name: image for name, image in images.items() if image is not None}
    logger.info("her2st: %d spots x %d genes in sections %s", adata.n_obs, adata.n_vars, wanted)
    return adata


def _section(root: Path, name: str) -> AnnData:
    counts = _table(next((root / "ST-cnts").glob(f"{name}.tsv*")), index_col=0)
    file = root / "ST-spotfiles" / f"{name}_selection.tsv"
    if not file.is_file():
        raise FileNotFoundError(f"path: no {file.name} in {str(file.parent)!r}")
    spots = _table(file)
    spots = spots.reindex(columns=list(SPOT_COLUMNS)).apply(pd.to_numeric, errors="coerce").astype(float)
    with np.errstate(over="ignore"):
        lacking = spots.columns[~np.isfinite(spots.astype(np.float32)).all()].tolist()
    if lacking:
        raise ValueError(f"path: {str(file)!r} lacks numbers in columns {lacking}")
    # Count rows are named by the rounded array position of the selection.
    column, row = spots["x"].round().astype(int), spots["y"].round().astype(int)
    spots.index = pd.Index(column.astype(str) + "x" + row.astype(str))
    for table, of_what, where in ((counts.index, "count rows", "ST-cnts"), (spots.index, "spots", "ST-spotfiles")):
        if not table.is_unique:
            repeated = table[table.duplicated()][:3].tolist()
            raise ValueError(f"path: {of_what} of section {name} in {where} share names such as {repeated}")
    shared = counts.index[counts.index.isin(spots.index)]
    if shared.empty:
        raise ValueError(f"path: no count row of section {name} in ST-cnts is named as a spot of {str(file)!r}")
    if len(shared) < len(counts):
        logger.info("her2st: %d count rows of %s have no spot in the selection", len(counts) - len(shared), name)
    spots = spots.loc[shared]
    place = [tuple(map(int, spot.split("x"))) for spot in shared]
    obs = pd.DataFrame(
        {
            "section": name,
            "patient": name[0],
            "array_row": [row for _, row in place],
            "array_col": [column for column, _ in place],
        },
        index=[f"{name}_{spot}" for spot in shared],
    )
    try:
        matrix = sparse.csr_matrix(counts.loc[shared].to_numpy(np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: counts of section {name} in ST-cnts are not all numbers ({error})") from error
    adata = AnnData(matrix, obs=obs, var=pd.DataFrame(index=counts.columns.astype(str)))
    adata.obsm["spatial"] = spots[["pixel_x", "pixel_y"]].to_numpy(np.float32)
    return adata


def _table(file: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(file, sep="\t", **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {str(file)!r} is damaged or not a table separated by tabs ({reason})") from error


def _image(root: Path, name: str, part: AnnData, width: int) -> dict[str, Any] | None:
    found = sorted((root / "ST-imgs").glob(f"*/{name}/*.jpg"))
    if not found:
        logger.info("her2st: no image of section %s", name)
        return None
    try:
        # Not Image.open, which takes other formats, too, and has the limit of photographs.
        with JpegImageFile(found[0]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(
                    f"its {picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}; scale it down"
                )
            scale = width / picture.width
            size = (width, round(picture.height * scale))
            picture.draft("RGB", size)
            small = np.asarray(picture.convert("RGB").resize(size))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"path: image {str(found[0])!r} cannot be read ({error}); image_width=0 reads none") from error
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": _pitch(part) * DIAMETER_OVER_PITCH}
    return {"images": {"hires": small}, "scalefactors": factors}


def _pitch(part: AnnData) -> float:
    """Pixels between neighbouring columns of the array."""
    column, x = part.obs["array_col"].to_numpy(float), part.obsm["spatial"][:, 0]
    return float(abs(np.polyfit(column, x, 1)[0]))
