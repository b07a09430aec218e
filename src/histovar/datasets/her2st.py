"""Read the HER2-positive breast cancer data set in its published layout."""

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

# Columns of the spot selection: position in the array, and in the image.
SPOT_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
# A spot is 100 um wide; the spots of the array are 200 um apart.
DIAMETER_OVER_PITCH = 0.5
# Most pixels of an image. The published ones have some 9,270 x 9,936; Pillow's own limit, meant for photographs, is 179
# million. Reading a progressive JPEG takes 6 bytes per pixel: 2.4 GB at this limit.
MOST_PIXELS = 400_000_000


@check_arguments
def her2st(path: PathLike, *, sections: KeyList | None = None, image_width: Number = 1000) -> AnnData:
    """Read the HER2-positive breast cancer data set (Andersson et al. 2021, doi:10.1038/s41467-021-26271-2).

    Parameters
    ----------
    path
        Directory with ``data/ST-cnts`` (``C2.tsv.gz``), ``data/ST-spotfiles`` (``C2_selection.tsv``) and optionally
        ``data/ST-imgs`` (``C/C2/*.jpg``); or its ``data`` directory itself.
    sections
        Sections to read, such as ``["C2", "C3"]``; all by default.
    image_width
        Width in pixels to which images are scaled down; 0 reads none.

    Returns
    -------
    AnnData
        Counts in ``X`` (CSR float32; genes that a section lacks are 0), ``obs["section"]``, ``obs["patient"]``,
        ``obs["array_row"]``, ``obs["array_col"]``, ``obsm["spatial"]`` in pixels of the full image,
        ``uns["spatial"][section]``. Spots that are only in the counts or only in the selection are left out.

    Raises
    ------
    FileNotFoundError
        If a directory or a section is missing.
    ValueError
        If count rows or spots of a section have duplicate names; if a file is damaged, or an image has more than 400
        million pixels.
    """
    root = Path(path)
    root = root / "data" if (root / "data").is_dir() else root
    folder = root / "ST-cnts"
    if not folder.is_dir():
        raise FileNotFoundError(f"path: no ST-cnts in {str(root)!r}; expected the layout of github almaan/her2st")
    available = sorted(f.name.split(".")[0] for f in folder.glob("*.tsv*"))
    names = available if sections is None else list(sections)
    missing = sorted(set(names) - set(available))
    if missing:
        raise FileNotFoundError(f"sections: {missing} not found in {str(folder)!r}, which has {available}")
    if sections is not None and not names:
        raise ValueError("sections: expected at least one, got []")
    if not names:
        raise FileNotFoundError(f"path: no sections (*.tsv or *.tsv.gz) in {str(folder)!r}")
    adatas = [_read_section(root, name) for name in names]
    adata = ad.concat(adatas, join="outer", fill_value=0)
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    for column in ("section", "patient"):
        adata.obs[column] = pd.Categorical(adata.obs[column])
    if image_width:
        images = {
            name: _read_image(root, name, section, image_width) for name, section in zip(names, adatas, strict=True)
        }
        adata.uns["spatial"] = {name: image for name, image in images.items() if image is not None}
    logger.info("her2st: %d spots x %d genes in sections %s", adata.n_obs, adata.n_vars, names)
    return adata


def _read_section(root: Path, name: str) -> AnnData:
    counts = _read_table(next((root / "ST-cnts").glob(f"{name}.tsv*")), index_col=0)
    file = root / "ST-spotfiles" / f"{name}_selection.tsv"
    if not file.is_file():
        raise FileNotFoundError(f"path: no {file.name} in {str(file.parent)!r}")
    spots = _read_table(file)
    spots = spots.reindex(columns=list(SPOT_COLUMNS)).apply(pd.to_numeric, errors="coerce").astype(float)
    with np.errstate(over="ignore"):
        lacking = spots.columns[~np.isfinite(spots.astype(np.float32)).all()].tolist()
    if lacking:
        raise ValueError(f"path: {str(file)!r} lacks numbers in columns {lacking}")
    # Names of count rows are the rounded array positions of the selection.
    column, row = spots["x"].round().astype(int), spots["y"].round().astype(int)
    spots.index = pd.Index(column.astype(str) + "x" + row.astype(str))
    for table, rows, directory in ((counts.index, "count rows", "ST-cnts"), (spots.index, "spots", "ST-spotfiles")):
        if not table.is_unique:
            repeated = table[table.duplicated()][:3].tolist()
            raise ValueError(f"path: {rows} of section {name} in {directory} have duplicate names such as {repeated}")
    shared = counts.index[counts.index.isin(spots.index)]
    if shared.empty:
        raise ValueError(f"path: no count row of section {name} in ST-cnts has the name of a spot in {str(file)!r}")
    if len(shared) < len(counts):
        logger.info("her2st: %d count rows of %s have no spot in the selection", len(counts) - len(shared), name)
    spots = spots.loc[shared]
    positions = [tuple(map(int, spot.split("x"))) for spot in shared]
    obs = pd.DataFrame(
        {
            "section": name,
            "patient": name[0],
            "array_row": [row for _, row in positions],
            "array_col": [column for column, _ in positions],
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


def _read_table(file: Path, **options: Any) -> pd.DataFrame:
    try:
        return pd.read_csv(file, sep="\t", **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {str(file)!r} is damaged or not a tab-separated table ({reason})") from error


def _read_image(root: Path, name: str, section: AnnData, width: int) -> dict[str, Any] | None:
    files = sorted((root / "ST-imgs").glob(f"*/{name}/*.jpg"))
    if not files:
        logger.info("her2st: no image of section %s", name)
        return None
    try:
        # Not Image.open, which accepts other formats, too, and has a limit meant for photographs.
        with JpegImageFile(files[0]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise ValueError(
                    f"its {picture.width} x {picture.height} pixels are more than {MOST_PIXELS:,}; scale it down"
                )
            scale = width / picture.width
            size = (width, round(picture.height * scale))
            picture.draft("RGB", size)
            small = np.asarray(picture.convert("RGB").resize(size))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"path: image {str(files[0])!r} cannot be read ({error}); image_width=0 reads none") from error
    factors = {"tissue_hires_scalef": scale, "spot_diameter_fullres": _pitch(section) * DIAMETER_OVER_PITCH}
    return {"images": {"hires": small}, "scalefactors": factors}


def _pitch(section: AnnData) -> float:
    """Pixels between neighbouring columns of the array."""
    column, x = section.obs["array_col"].to_numpy(float), section.obsm["spatial"][:, 0]
    return float(abs(np.polyfit(column, x, 1)[0]))
