"""Plot measured and predicted gene-gene correlations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from histovar import metrics
from histovar._arguments import Key, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate
from histovar.anndata_io.comparison import read_comparison
from histovar.anndata_io.gate import Data
from histovar.anndata_io.prediction import read_draws

from ._figure import AxesList, FigureFile, axes_grid, figure_of, finish


@check_arguments
def gene_correlation(
    data: Data,
    *,
    key: Prefix = DEFAULT_KEY,
    layer: Key | None = None,
    ax: AxesList | None = None,
    show: bool = False,
    save: FigureFile | None = None,
    table_name: Key | None = None,
) -> NDArray[Any]:
    """Plot gene-gene correlations over the spots: measured, of the expected expression and of joint draws.

    Expected expression lacks the variation that histology does not explain, so its genes correlate too much; draws
    include it. Genes are ordered by clustering the measured correlation (average linkage).

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to, with measured expression of at least 2
        genes; with `n_samples` there is a third panel for the draws.
    key
        Prefix of the slots.
    layer
        Layer with measured expression; that of training by default.
    ax
        Axes to draw on, one for each panel.
    show
        Call ``plt.show()``.
    save
        File to write.
    table_name
        Table of a SpatialData.

    Returns
    -------
    ndarray of Axes
        (2,), or (3,) with draws.

    Raises
    ------
    KeyError
        If there is no prediction or no measured expression.
    ValueError
        If there are fewer than 2 genes, or the number of `ax` is not that of panels.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key)
    comparison = read_comparison(adata, keys, layer)
    if len(comparison.genes) < 2:
        raise ValueError(f"key: the prediction has {len(comparison.genes)} gene; correlations need 2")
    panels = {"measured": comparison.measured, "expected": comparison.mean}
    draws = read_draws(adata, keys, len(comparison.genes))
    if draws is not None:
        panels["draws"] = draws
    matrices = {name: metrics.gene_correlation(values) for name, values in panels.items()}
    distance = squareform(1 - matrices["measured"], checks=False)
    order = leaves_list(linkage(distance, "average"))
    axes = axes_grid(ax, 1, len(panels), (3.6 * len(panels) + 0.8, 3.8))[0]
    for panel, (name, matrix) in zip(axes, matrices.items(), strict=True):
        image = panel.imshow(matrix[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        error = metrics.gene_correlation_error(panels[name], comparison.measured)
        error_text = "undefined" if np.isnan(error) else f"{error:.2f}"
        panel.set(xticks=[], yticks=[], title=name if name == "measured" else f"{name}, error {error_text}")
    axes[0].set_ylabel(f"{len(comparison.genes)} genes")
    figure_of(axes[0]).colorbar(image, ax=list(axes), label="Pearson correlation", shrink=0.8)
    finish(figure_of(axes[0]), show, save)
    return axes
