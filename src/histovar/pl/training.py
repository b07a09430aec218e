"""Plot the history of a training."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from histovar._arguments import check_arguments
from histovar.model import TwoStageVARST

from ._figure import AxesList, FigureFile, axes_grid, figure_of, finish, open_frame

PANELS = {
    "stage1": [("loss", "loss"), ("pcc", "reconstruction PCC"), ("usage", "codes in use")],
    "stage2": [("loss", "loss"), ("pcc", "PCC of expected decoding"), ("top5_accuracy", "top-5 accuracy")],
}


@check_arguments
def training(
    model: TwoStageVARST,
    *,
    ax: AxesList | None = None,
    show: bool = False,
    save: FigureFile | None = None,
) -> NDArray[Any]:
    """Plot losses and validation scores over the epochs, one row for each stage.

    Parameters
    ----------
    model
        A trained model.
    ax
        Axes to draw on, three for each trained stage.
    show
        Call ``plt.show()``.
    save
        File to write.

    Returns
    -------
    ndarray of Axes
        (n_stages, 3).

    Raises
    ------
    ValueError
        If the model has no training history, or the number of `ax` is not that of panels.
    """
    stages = [s for s in PANELS if s in model.history and len(model.history[s])]
    if not stages:
        raise ValueError("model: it has no training history; train it first")
    axes = axes_grid(ax, len(stages), 3, (11, 3 * len(stages)))
    for row, stage in zip(axes, stages, strict=True):
        history = model.history[stage]
        for axis, (name, label) in zip(row, PANELS[stage], strict=True):
            _lines(axis, history, name)
            axis.set(title=f"{stage[:-1]} {stage[-1]}: {label}", xlabel="epoch", ylabel=label)
    finish(figure_of(axes[0, 0]), show, save)
    return axes


def _lines(axis: Axes, history: Any, name: str) -> None:
    for split, label in (("train", "training"), ("val", "inner held-out")):
        column = f"{split}_{name}"
        if column in history:
            axis.plot(history.index, history[column], label=label, marker=".", markersize=4)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False)
    open_frame(axis)
