"""Maps on the tissue."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from histovar._keys import DEFAULT_KEY, Keys
from histovar._squidpy import sq
from histovar.anndata_io import gate, slots
from histovar.anndata_io.comparison import read_measured
from histovar.anndata_io.gate import Data
from histovar.anndata_io.prediction import predicted_genes, predicted_sections, read_prediction
from histovar.metrics import pearson

from ._figure import figure_of, finish

logger = logging.getLogger(__name__)

# Colours end at this percentile, and begin at its complement, so that a single spot does not decide them.
TOP_PERCENTILE = 99


def spatial(
    data: Data,
    genes: str | Sequence[str],
    *,
    key: str = DEFAULT_KEY,
    section: str | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    cmap: str = "viridis",
    std_cmap: str = "magma",
    size: float = 1.4,
    img_alpha: float = 0.6,
    ax: Sequence[Axes] | NDArray[Any] | None = None,
    show: bool = False,
    save: str | Path | None = None,
    table_name: str | None = None,
) -> NDArray[Any]:
    """Measured, predicted and standard deviation on the H&E, one row a gene.

    Measured and predicted expression share one colour scale. Where a gene was not measured, its row has no measured
    panel; where nothing was, the column is left out.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    genes
        Genes of the panel.
    key
        Prefix of the slots.
    section
        Section to draw; needed where there are several.
    library_key
        Column of ``obs`` with the section; that of the prediction by default. Images are looked up in
        ``uns["spatial"]`` under the section's name.
    layer
        Layer with measured expression; the layer trained on by default.
    cmap, std_cmap
        Colour maps of expression and of its standard deviation.
    size
        Spot size, relative to the spot's diameter.
    img_alpha
        Opacity of the image.
    ax
        Axes to draw on, as many as genes times panels.
    show
        Call ``plt.show()``.
    save
        File to write.
    table_name
        Table of a SpatialData.

    Returns
    -------
    ndarray of Axes
        (n_genes, n_panels).

    Raises
    ------
    KeyError
        If there is no prediction, or a gene is not in the panel.
    ValueError
        If there are several sections and none is named.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = slots.keys(key, "key")
    panel = predicted_genes(adata, keys)
    wanted = gate.key_list(genes, "genes")
    unknown = [g for g in wanted if g not in panel]
    if unknown:
        raise KeyError(f"genes: {unknown} are not in the predicted panel ({panel[:3]}, ...)")
    stored = slots.record(adata, keys)
    names = predicted_sections(adata, keys, library_key)
    rows, label = _rows_of(names, adata.n_obs, section)
    columns = np.array([panel.index(g) for g in wanted])
    mean, std = (values[np.ix_(rows, columns)] for values in read_prediction(adata, keys, panel))
    measured = _measured(adata, keys, panel, layer)
    measured = None if measured is None else measured[np.ix_(rows, columns)]

    titles = (
        ["measured", "predicted", "standard deviation"] if measured is not None else ["predicted", "standard deviation"]
    )
    axes = _axes(ax, len(wanted), len(titles))
    canvas = _canvas(adata, rows, label, str(stored["params"]["spatial_key"]))
    for i, gene in enumerate(wanted):
        shown: list[NDArray[Any]] = [mean[:, i]] if measured is None else [measured[:, i], mean[:, i]]
        low = float(min(np.percentile(values, 100 - TOP_PERCENTILE) for values in shown))
        top = float(max(np.percentile(values, TOP_PERCENTILE) for values in shown))
        norm = Normalize(low, max(top, low + 1e-6))
        ends = np.percentile(std[:, i], [100 - TOP_PERCENTILE, TOP_PERCENTILE])
        spread = Normalize(ends[0], max(ends[1], ends[0] + 1e-6))
        for j, values in enumerate([*shown, std[:, i]]):
            title = f"{gene}\n{titles[j]}"
            if titles[j] == "predicted" and measured is not None:
                correlation = float(pearson(mean[:, [i]], measured[:, [i]])[0])
                title += " (r undefined)" if np.isnan(correlation) else f" (r = {correlation:.2f})"
            last = j == len(titles) - 1
            _draw(
                canvas, values, axes[i, j], std_cmap if last else cmap, spread if last else norm, title, size, img_alpha
            )
    finish(figure_of(axes[0, 0]), show, save)
    return axes


def _rows_of(names: NDArray[np.str_] | None, n_obs: int, section: str | None) -> tuple[NDArray[np.int64], str | None]:
    if names is None:
        return np.arange(n_obs), section
    there = np.unique(names).tolist()
    if section is None and len(there) > 1:
        raise ValueError(f"section: the object has sections {there}; name the one to draw")
    section = section or there[0]
    if section not in there:
        raise ValueError(f"section: no section {section!r}; the object has {there}")
    return np.flatnonzero(names == section), section


def _measured(adata: AnnData, keys: Keys, panel: list[str], layer: str | None) -> NDArray[np.float32] | None:
    """Measured expression of the panel; None where it was not measured, or is in other units than the prediction."""
    wanted = str(slots.record(adata, keys)["layer"]) if layer is None else layer
    try:
        return read_measured(adata, keys, panel, wanted)
    except (KeyError, ValueError) as error:
        if adata.n_vars and not (isinstance(error, KeyError) and layer is None):
            logger.warning("no measured panel: %s", error.args[0])
        return None


def _axes(ax: Any, n_rows: int, n_columns: int) -> NDArray[Any]:
    if ax is None:
        figsize = (4.4 * n_columns, 3.9 * n_rows)
        return plt.subplots(n_rows, n_columns, figsize=figsize, squeeze=False, layout="constrained")[1]
    axes = np.asarray(ax, dtype=object).ravel()
    if len(axes) != n_rows * n_columns:
        raise ValueError(f"ax: {len(axes)} axes given, {n_rows} x {n_columns} are needed")
    return axes.reshape(n_rows, n_columns)


def _canvas(adata: AnnData, rows: NDArray[np.int64], label: str | None, spatial_key: str) -> AnnData:
    """A light object for squidpy, which changes what it is given: coordinates and at most one image."""
    canvas = AnnData(obs=pd.DataFrame(index=adata.obs_names[rows]))
    canvas.obsm["spatial"] = np.asarray(adata.obsm[spatial_key])[rows][:, :2]
    images = adata.uns.get("spatial", {})
    if label not in images and len(images) == 1:
        label = next(iter(images))
    if label in images:
        canvas.uns["spatial"] = {label: images[label]}
    return canvas


def _draw(
    canvas: AnnData,
    values: NDArray[Any],
    ax: Axes,
    cmap: str,
    norm: Normalize,
    title: str,
    size: float,
    img_alpha: float,
) -> None:
    canvas.obs["value"] = np.asarray(values, dtype=float)
    with_image = "spatial" in canvas.uns
    options: dict[str, Any] = {"img_alpha": img_alpha} if with_image else {"shape": None}
    spot_size = size if with_image else size * 20
    sq.pl.spatial_scatter(
        canvas, color="value", ax=ax, fig=figure_of(ax), cmap=cmap, norm=norm, size=spot_size, frameon=False, **options
    )
    ax.set_aspect("equal")
    _crop(canvas, ax)
    ax.set_title(title, fontsize=11)


def _crop(canvas: AnnData, ax: Axes) -> None:
    """Show the spots and a margin, not the whole slide."""
    scale = 1.0
    for image in canvas.uns.get("spatial", {}).values():
        scale = float(image["scalefactors"]["tissue_hires_scalef"])
    place = np.asarray(canvas.obsm["spatial"], dtype=float) * scale
    low, high = place.min(0), place.max(0)
    margin = 0.06 * max(float((high - low).max()), 1e-9)
    ax.set_xlim(low[0] - margin, high[0] + margin)
    ax.set_ylim(high[1] + margin, low[1] - margin)
