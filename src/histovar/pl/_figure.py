"""Axes, frames, saving and showing of figures, and their arguments, shared by all plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import AfterValidator

from histovar._arguments import Converted, PathLike, refuse_type, refuse_value


def _axes_list(value: Any) -> list[Axes]:
    axes = list(np.asarray(value, dtype=object).ravel())
    if not axes or not all(isinstance(ax, Axes) for ax in axes):
        refuse_type("Axes of matplotlib")
    return axes


def _colormap(value: str | matplotlib.colors.Colormap) -> str | matplotlib.colors.Colormap:
    if isinstance(value, str) and value not in mpl.colormaps:
        refuse_value("the name of a matplotlib colour map")
    return value


def _figure_file(value: str | Path) -> str | Path:
    path = Path(value)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        refuse_value(f"a file that ends in one of {', '.join(f'.{name}' for name in formats)}")
    if path.is_dir() or not path.parent.is_dir():
        refuse_value("a file in a directory that exists")
    return value


AxesList = Annotated[Any, Converted(_axes_list)]
Colormap = Annotated[str | matplotlib.colors.Colormap, AfterValidator(_colormap)]
FigureFile = Annotated[PathLike, AfterValidator(_figure_file)]


def figure_of(ax: Axes) -> Figure:
    """Get the figure of an axes."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def new_axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return the given axes, or those of a new figure."""
    if ax is not None:
        return ax
    _, new = plt.subplots(figsize=figsize, layout="constrained")
    return new


def axes_grid(ax: list[Axes] | None, n_rows: int, n_columns: int, figsize: tuple[float, float]) -> NDArray[Any]:
    """Return the given axes, or those of a new figure, (n_rows, n_columns).

    Raises
    ------
    ValueError
        If another number of axes is given.
    """
    if ax is None:
        return plt.subplots(n_rows, n_columns, figsize=figsize, squeeze=False, layout="constrained")[1]
    if len(ax) != n_rows * n_columns:
        raise ValueError(f"ax: expected {n_rows} x {n_columns} axes, got {len(ax)}")
    return np.array(ax, dtype=object).reshape(n_rows, n_columns)


def open_frame(*axes: Axes) -> None:
    """Hide the top and right spines."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def frame_ranking(ax: Axes, scores: pd.Series, *, n_genes: int, n_labels: int, ylabel: str, subtitle: str = "") -> None:
    """Label a plot of ranked genes, and list the best genes to its right.

    Parameters
    ----------
    ax
        Axes with a value at 1, 2, ... for every gene with a defined score.
    scores
        These scores by gene, the best first.
    n_genes
        Number of all genes.
    n_labels
        Number of genes to list.
    ylabel
        Name of the score.
    subtitle
        Text after the number of genes in the title.
    """
    named = "\n".join(f"{value:.2f}  {gene}" for gene, value in scores.head(n_labels).items())
    ax.annotate(
        named,
        (1.01, 1),
        xycoords="axes fraction",
        ha="left",
        va="top",
        fontsize=8,
        family="monospace",
        annotation_clip=False,
    )
    undefined = f", {n_genes - len(scores)} undefined" if len(scores) < n_genes else ""
    ax.set(
        xlabel="gene, by rank",
        ylabel=ylabel,
        title=f"{len(scores)} genes{undefined}{subtitle}",
        xlim=(0, max(2, len(scores) + 1)),
    )
    open_frame(ax)


def finish(figure: Figure, show: bool, save: str | Path | None) -> None:
    """Save and show a figure, as requested."""
    if save is not None:
        figure.savefig(save, dpi=150, bbox_inches="tight")
    if show:
        plt.show()
