"""Plot codebook usage per scale."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from histovar._arguments import check_arguments
from histovar.model import TwoStageVARST
from histovar.model.quantizer import perplexity

from ._figure import FigureFile, figure_of, finish, new_axes, open_frame


@check_arguments
def codebook(
    model: TwoStageVARST, *, ax: Axes | None = None, show: bool = False, save: FigureFile | None = None
) -> Axes:
    """Plot codebook usage: the share of each code, ranked, in each scale's tokens, on logarithmic axes.

    If the codebook has collapsed, lines end after a few codes.

    Parameters
    ----------
    model
        A model with a trained stage 1.
    ax
        Axes to draw on.
    show
        Call ``plt.show()``.
    save
        File to write.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If stage 1 has not been trained.
    """
    counts = model.stage1.code_counts.cpu().double()
    if not counts.any():
        raise ValueError("model: stage 1 has not been trained; train it first")
    ax = new_axes(ax, (6, 4))
    for n_groups, row in zip(model.config.scales, counts, strict=True):
        used = row[row > 0].sort(descending=True).values
        label = f"{n_groups} groups: {len(used)} codes, perplexity {float(perplexity(row)):.0f}"
        ax.plot(np.arange(1, len(used) + 1), used / used.sum(), label=label)
    in_use = int((counts.sum(0) > 0).sum())
    title = f"{in_use} of {model.config.codebook_size} codes in use"
    ax.set(xscale="log", yscale="log", xlabel="code, by rank", ylabel="share of the scale's tokens", title=title)
    ax.legend(frameon=False)
    open_frame(ax)
    finish(figure_of(ax), show, save)
    return ax
