"""Plot the expected accuracy of each gene of a model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pydantic import InstanceOf

from histovar._arguments import Key, Number, check_arguments
from histovar.anndata_io import gate
from histovar.anndata_io.gate import Data
from histovar.anndata_io.gene_symbols import gene_labels
from histovar.metrics.gene_trust import FALSE_DISCOVERY_RATE, gene_table
from histovar.model import TwoStageVARST

from ._figure import FigureFile, figure_of, finish, frame_ranking, new_axes


@check_arguments
def trust(
    model: InstanceOf[TwoStageVARST],
    data: Data | None = None,
    *,
    n_labels: Number = 8,
    ax: Axes | None = None,
    show: bool = False,
    save: FigureFile | None = None,
    gene_symbols: Key | None = None,
    table_name: Key | None = None,
) -> Axes:
    """Plot the expected accuracy of every gene, ranked, with interval and noise ceiling, and list the best genes.

    Colours distinguish genes that are predicted at a false discovery rate of 10 % from the others.

    Parameters
    ----------
    model
        A calibrated model; see :func:`histovar.get.genes`.
    data
        AnnData or SpatialData with the genes' symbols, where `gene_symbols` is given: a model has the names alone.
    n_labels
        Number of best genes to list.
    ax
        Axes to draw on.
    show
        Call ``plt.show()``.
    save
        File to write.
    gene_symbols
        Column of ``var`` of `data` with the genes' symbols, by which they are named where their names are identifiers
        such as Ensembl's.
    table_name
        Table of a SpatialData.

    Returns
    -------
    Axes

    Raises
    ------
    KeyError
        If there is no column `gene_symbols`.
    ValueError
        If the model was not calibrated, or by an earlier version; if only one of `data` and `gene_symbols` is given.
    """
    if (data is None) != (gene_symbols is None):
        raise ValueError(
            "data, gene_symbols: give both or neither; symbols are those of a column of data.var, which models lack"
        )
    table = gene_table(model.registry)
    if data is not None:
        adata = gate.table(data, table_name, writes=False)
        table.index = pd.Index(gene_labels(adata, table.index, gene_symbols), name="gene")
    n_genes = len(table)
    table = table.dropna(subset="expected_pearson").sort_values("expected_pearson", ascending=False, kind="stable")
    ax = new_axes(ax, (8, 4.5))
    rank = np.arange(1, len(table) + 1)
    predicted = (table["q_value"] < FALSE_DISCOVERY_RATE).to_numpy()
    mean, low, high = (table[name].to_numpy() for name in ("expected_pearson", "lower", "upper"))
    if table["ceiling"].notna().any():
        ax.plot(rank, table["ceiling"], linestyle="none", marker="_", markersize=4, color="0.45", label="noise ceiling")
    for mask, color, sign in ((predicted, "C0", "<"), (~predicted, "C1", "≥")):
        label = f"q {sign} {FALSE_DISCOVERY_RATE:g}: {int(mask.sum())} genes"
        ax.vlines(rank[mask], low[mask], high[mask], color=color, alpha=0.3, linewidth=1.2)
        ax.plot(rank[mask], mean[mask], linestyle="none", marker="o", markersize=2.5, color=color, label=label)
    ax.axhline(0, color="0.7", linewidth=0.8)
    expected_on, _, caveat = table.attrs["expected on"].partition("; ")
    frame_ranking(
        ax,
        table["expected_pearson"],
        n_genes=n_genes,
        n_labels=n_labels,
        ylabel="expected Pearson, 90 % interval",
        subtitle=f", on {expected_on}" + f"\n{caveat}" * bool(caveat),
    )
    ax.legend(frameon=False, loc="lower left", fontsize=8)
    finish(figure_of(ax), show, save)
    return ax
