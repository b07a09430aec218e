"""Plot the calibration of predicted intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from histovar import metrics
from histovar._arguments import Key, check_arguments
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate, slots
from histovar.anndata_io.comparison import coverage_by_share, read_comparison, read_distribution
from histovar.anndata_io.gate import Data
from histovar.anndata_io.prediction import read_composed

from ._figure import AxesList, FigureFile, axes_grid, figure_of, finish, open_frame


@check_arguments
def calibration(
    data: Data,
    *,
    key: Prefix = DEFAULT_KEY,
    layer: Key | None = None,
    ax: AxesList | None = None,
    show: bool = False,
    save: FigureFile | None = None,
    table_name: Key | None = None,
) -> NDArray[Any]:
    """Plot the coverage of central intervals against their nominal level, and the PIT histogram.

    Left: share of measured values inside intervals of 5 to 95 %, as mean and middle 80 % of the genes; intervals are
    right on the diagonal, too wide above it, too narrow below. Right: histogram of the levels of the predicted
    distributions at which measured values lie (PIT); distributions are right if it is flat, too wide if it has a hump,
    too narrow if it is U-shaped, biased if it slopes.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.predict` has written to, with measured expression. The
        distribution is negative binomial if the model learnt from counts, otherwise that of draws, else of quantiles,
        whichever were predicted, else normal.
    key
        Prefix of the slots.
    layer
        Layer with measured expression; that of training by default.
    ax
        Two axes to draw on.
    show
        Call ``plt.show()``.
    save
        File to write.
    table_name
        Table of a SpatialData.

    Returns
    -------
    ndarray of Axes
        (2,).

    Raises
    ------
    KeyError
        If there is no prediction or no measured expression.
    ValueError
        If `ax` are not two axes.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key)
    comparison = read_comparison(adata, keys, layer)
    distribution = read_distribution(adata, keys, comparison.mean, comparison.std, read_composed(adata, keys))
    shares, covered, quantiles = coverage_by_share(distribution, np.ones(adata.n_obs, bool), comparison.measured)
    pit = metrics.pit(quantiles, distribution.levels, comparison.measured)
    axes = axes_grid(ax, 1, 2, (9, 4))[0]
    left, right = axes
    _coverage(left, shares, covered)
    right.hist(pit.ravel(), bins=20, range=(0, 1), density=True, alpha=0.6)
    right.axhline(1, color="0.4", linestyle="--", linewidth=1)
    right.set(xlabel="level of the measured value (PIT)", ylabel="density", title=f"{pit.shape[1]} genes", xlim=(0, 1))
    calibrated = "calibrated" if slots.record(adata, keys).get("calibrated", False) else "not calibrated"
    left.set_title(f"intervals from {distribution.kind}, {calibrated}")
    open_frame(*axes)
    finish(figure_of(left), show, save)
    return axes


def _coverage(ax: Axes, shares: NDArray[Any], covered: NDArray[Any]) -> None:
    low, high = np.quantile(covered, [0.1, 0.9], axis=1)
    ax.plot([0, 1], [0, 1], color="0.4", linestyle="--", linewidth=1)
    ax.fill_between(shares, low, high, alpha=0.25, label="middle 80 % of genes")
    ax.plot(shares, covered.mean(1), "o-", markersize=3, label="mean over genes")
    ax.set(xlabel="nominal level of the interval", ylabel="share of spots inside", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False, loc="upper left")
