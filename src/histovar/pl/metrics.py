"""Plot the scores of genes."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pydantic import AfterValidator

from histovar._arguments import Key, Number, check_arguments, refuse_value
from histovar._keys import DEFAULT_KEY, Keys, Prefix
from histovar.anndata_io import gate
from histovar.anndata_io.gate import Data
from histovar.anndata_io.gene_symbols import gene_labels
from histovar.metrics import METRICS

from ._figure import FigureFile, figure_of, finish, frame_ranking, new_axes

SCORES = {metric.gene_score: metric for metric in METRICS if metric.gene_score and metric.gene_score != "constant"}


def _score(value: str) -> str:
    return value if value in SCORES else refuse_value(f"one of {', '.join(map(repr, SCORES))}")


Score = Annotated[str, AfterValidator(_score)]


@check_arguments
def metrics(
    data: Data,
    *,
    key: Prefix = DEFAULT_KEY,
    score: Score = "pearson",
    n_labels: Number = 8,
    ax: Axes | None = None,
    show: bool = False,
    save: FigureFile | None = None,
    gene_symbols: Key | None = None,
    table_name: Key | None = None,
) -> Axes:
    """Plot a score of every gene, ranked, and list the best genes.

    Genes for which the score is undefined are left out and counted in the title.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`histovar.tl.evaluate` has written to.
    key
        Prefix of the slots.
    score
        Name of a score of genes, a column of the table that :func:`histovar.tl.evaluate` returns. Genes are ranked by
        their distance from its best value (:func:`histovar.metrics.describe`).
    n_labels
        Number of best genes to list.
    ax
        Axes to draw on.
    show
        Call ``plt.show()``.
    save
        File to write.
    gene_symbols
        Column of ``var`` with the genes' symbols, by which they are named where their names are identifiers such as
        Ensembl's.
    table_name
        Table of a SpatialData.

    Returns
    -------
    Axes

    Raises
    ------
    KeyError
        If the object has not been evaluated, or there is no column `gene_symbols`.
    ValueError
        If its scores were changed.
    """
    adata = gate.table(data, table_name, writes=False)
    keys = Keys(key)
    metric = SCORES[score]
    column = keys.score(score)
    if column not in adata.var:
        raise KeyError(f"key: no {column!r} in var; call histovar.tl.evaluate(adata, key={key!r}) first")
    errors = keys.score("mse")
    if errors not in adata.var or not pd.api.types.is_numeric_dtype(adata.var[column]):
        raise ValueError(
            f"key: var has no {errors!r}, or {column!r} is not numeric; call histovar.tl.evaluate(adata, key={key!r})"
        )
    scores = adata.var[column].dropna()
    scores = scores.loc[(scores - metric.best).abs().sort_values(kind="stable").index]
    scores.index = pd.Index(gene_labels(adata, scores.index, gene_symbols))
    ax = new_axes(ax, (8, 4.5))
    rank = np.arange(1, len(scores) + 1)
    ax.fill_between(rank, scores, step="mid", alpha=0.25)
    ax.plot(rank, scores, drawstyle="steps-mid")
    if len(scores):
        mean = float(scores.mean())
        ax.axhline(mean, color="0.4", linestyle="--", linewidth=1)
        # At the left below the line: inside the curve, and away from the list of genes.
        ax.annotate(f" mean {mean:.3f}", (1, mean), ha="left", va="top", color="0.3")
    frame_ranking(
        ax,
        scores,
        n_genes=int(adata.var[errors].notna().sum()),
        n_labels=n_labels,
        ylabel=f"{score}, {metric.direction}",
    )
    finish(figure_of(ax), show, save)
    return ax
