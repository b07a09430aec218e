"""Plot maps of expression on the tissue."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from pydantic import Field

from histovar._arguments import Key, KeyOrKeys, Positive, Probability, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar._squidpy import sq
from histovar.anndata_io import gate
from histovar.anndata_io.comparison import try_read_measured
from histovar.anndata_io.gate import Data
from histovar.anndata_io.gene_symbols import find_genes
from histovar.anndata_io.predicted_slides import Slide, read_slide
from histovar.anndata_io.prediction import predicted_genes, predicted_sections, read_prediction
from histovar.metrics import pearson

from ._figure import AxesList, Colormap, FigureFile, axes_grid, figure_of, finish

logger = logging.getLogger(__name__)

# Colour scales span this percentile and its complement, so that a single spot does not decide them.
TOP_PERCENTILE = 99
# Largest `size`: such spots cover any section.
MOST_SIZE = 1000
# In inches.
MAP_WIDTH = 3.6
# Name of the section in the object that is passed to squidpy.
LIBRARY_ID = "section"


@check_arguments
def spatial(
    data: Data,
    genes: KeyOrKeys,
    *,
    key: Prefix = DEFAULT_KEY,
    section: Key | int | None = None,
    library_key: Key | None = None,
    layer: Key | None = None,
    cmap: Colormap = "viridis",
    std_cmap: Colormap = "magma",
    size: Annotated[Positive, Field(le=MOST_SIZE)] = 1.4,
    img_alpha: Probability = 0.6,
    ax: AxesList | None = None,
    show: bool = False,
    save: FigureFile | None = None,
    gene_symbols: Key | None = None,
    table_name: Key | None = None,
) -> NDArray[Any]:
    """Plot maps of measured and predicted expression and its standard deviation over the H&E, one row for each gene.

    Measured and predicted expression share one colour scale. The measured column is left out unless all `genes` were
    measured.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to.
    genes
        Genes of the panel, by name, or by symbol if `gene_symbols` is given.
    key
        Prefix of the slots.
    section
        Section to plot, compared as a string; needed if there are several.
    library_key
        Column of ``obs`` with the section; that of the prediction by default. Images are looked up in
        ``uns["spatial"]`` under the section's name; if the object has one section and one image, its name does not
        matter unless it is that of another section. Without a usable image, a warning says why and spots are plotted
        without one.
    layer
        Layer with measured expression; the layer trained on by default.
    cmap, std_cmap
        Colour maps of expression and of its standard deviation.
    size
        Spot size relative to the spot's diameter: ``spot_diameter_fullres`` in ``uns["spatial"]``, or else 0.55 times
        the median distance between nearest spots.
    img_alpha
        Opacity of the image.
    ax
        Axes to draw on, as many as genes times panels.
    show
        Call ``plt.show()``.
    save
        File to write.
    gene_symbols
        Column of ``var`` with gene symbols, if names are identifiers such as Ensembl ids: `genes` are then symbols,
        which are also used in titles.
    table_name
        Table of a SpatialData.

    Returns
    -------
    ndarray of Axes
        (n_genes, n_panels).

    Raises
    ------
    KeyError
        If there is no prediction, a gene is not in the panel, or coordinates or the column `gene_symbols` are missing.
    ValueError
        If there are several sections and `section` is None, coordinates are not finite, or several genes of the panel
        have the same symbol.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    panel = predicted_genes(adata, keys)
    labels = list(genes)  # a single gene has become a list
    names_of_genes = find_genes(adata, panel, labels, gene_symbols)
    sections = predicted_sections(adata, keys, library_key)
    slide = read_slide(adata, keys, sections, library_key, section)
    columns = np.array([panel.index(g) for g in names_of_genes])
    mean, std = (values[np.ix_(slide.rows, columns)] for values in read_prediction(adata, keys, panel))
    measured, reason = try_read_measured(adata, keys, names_of_genes, layer, sections)
    if reason:
        logger.warning("measured expression is not plotted: %s", reason)
    measured = None if measured is None or np.isnan(measured).any() else measured[slide.rows]
    canvas = _canvas(slide)

    titles = (
        ["measured", "predicted", "standard deviation"] if measured is not None else ["predicted", "standard deviation"]
    )
    x_min, x_max, y_min, y_max = _extent(canvas, size)
    map_height = MAP_WIDTH * min(max((y_max - y_min) / (x_max - x_min), 0.4), 2.5)
    axes = axes_grid(
        ax,
        len(names_of_genes),
        len(titles),
        ((MAP_WIDTH + 0.8) * len(titles), (map_height + 0.5) * len(names_of_genes)),
    )
    for i, gene in enumerate(labels):
        maps: list[NDArray[Any]] = [mean[:, i]] if measured is None else [measured[:, i], mean[:, i]]
        low = float(min(np.percentile(values, 100 - TOP_PERCENTILE) for values in maps))
        high = float(max(np.percentile(values, TOP_PERCENTILE) for values in maps))
        norm = Normalize(low, max(high, low + 1e-6))
        ends = np.percentile(std[:, i], [100 - TOP_PERCENTILE, TOP_PERCENTILE])
        spread = Normalize(ends[0], max(ends[1], ends[0] + 1e-6))
        for j, values in enumerate([*maps, std[:, i]]):
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


def _canvas(slide: Slide) -> AnnData:
    """Make a small object for squidpy, which modifies its input: coordinates, spot diameter and at most one image."""
    canvas = AnnData(obs=pd.DataFrame(index=pd.RangeIndex(len(slide.rows)).astype(str)))
    canvas.obsm["spatial"] = slide.coordinates
    image = slide.image
    if image is None:
        image = {"scalefactors": {"tissue_hires_scalef": 1.0, "spot_diameter_fullres": slide.diameter}}
    canvas.uns["spatial"] = {LIBRARY_ID: image}
    return canvas


def _draw(
    canvas: AnnData,
    values: NDArray[Any],
    ax: Axes,
    cmap: Any,
    norm: Normalize,
    title: str,
    size: float,
    img_alpha: float,
) -> None:
    canvas.obs["value"] = np.asarray(values, dtype=float)
    sq.pl.spatial_scatter(
        canvas,
        color="value",
        ax=ax,
        fig=figure_of(ax),
        cmap=cmap,
        norm=norm,
        size=size,
        img="images" in canvas.uns["spatial"][LIBRARY_ID],
        img_alpha=img_alpha,
        frameon=False,
        colorbar=False,
    )
    left, right, top, bottom = _extent(canvas, size)
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    ax.set_title(title, fontsize=11)
    # In inset axes, so that the colour bar is as high as the map.
    figure_of(ax).colorbar(ax.collections[-1], cax=ax.inset_axes((1.02, 0, 0.03, 1)))


def _extent(canvas: AnnData, size: float) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the plotted region: the spots and a margin, not the whole slide."""
    factors = canvas.uns["spatial"][LIBRARY_ID]["scalefactors"]
    xy = np.asarray(canvas.obsm["spatial"]) * factors["tissue_hires_scalef"]
    low, high = xy.min(0), xy.max(0)
    spot = size * factors["spot_diameter_fullres"] * factors["tissue_hires_scalef"]
    margin = max(0.06 * float((high - low).max()), spot, 1e-9)
    return low[0] - margin, high[0] + margin, low[1] - margin, high[1] + margin
