"""In which units expression is: how values came from counts, and whether they are those of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histovar._keys import LOGNORM
from histovar._warn_once import warn_once

from .matrix import stored_values

logger = logging.getLogger(__name__)

# Log-normalised values are below this; larger ones are counts, whose exponentials say nothing.
LARGEST_LOG = 30.0
# Sums of a spot that differ by less are the same.
SAME_SUM = 0.01
# The panel's total in the middle spot of an object may lie outside that of 90 % of the training spots by this factor.
# For panels chosen on one patient of her2st and the sections of all others it is 1.54 at most (benchmarks/units.py).
WARNED_FACTOR, REFUSED_FACTOR = 1.6, 4.0


@dataclass(frozen=True)
class Normalization:
    """How a layer's values came from counts, and how much of them is the panel's.

    Parameters
    ----------
    kind
        ``"log1p"`` of normalised counts, ``"counts"``, or other ``"values"``.
    target_sum
        Counts that every spot was normalised to, over all genes of the object; 0 where that is not so.
    n_genes
        Genes of the object.
    panel_low, panel_median, panel_high
        The panel's total a spot, in normalised counts (values, where they are not logarithms): 5 %, 50 % and 95 %
        quantiles over the spots that are not empty.
    panel_only
        Whether the object has no other genes.
    logarithms
        Whether values are small enough to be logarithms, so that the panel's total is of their exponentials less one.
    """

    kind: str
    target_sum: float
    n_genes: int
    panel_low: float
    panel_median: float
    panel_high: float
    panel_only: bool
    logarithms: bool

    @property
    def units(self) -> str:
        """The units in words."""
        if self.kind == "log1p":
            return f"log1p(counts per {self.target_sum:,.0f})" if self.target_sum else "log1p(normalised counts)"
        return self.kind

    def plain(self) -> dict[str, Any]:
        """As a dictionary of plain types."""
        return asdict(self)

    @classmethod
    def stored(cls, values: Mapping[str, Any] | None) -> Normalization | None:
        """What :meth:`plain` gave, read back; None where an earlier version did not store it.

        Where predictions of models of several trainings were joined, what differs between them is gone: then the
        panel's totals are not compared.
        """
        if not values or "kind" not in values:
            return None
        unknown = {"target_sum": 0.0, "n_genes": 0, "panel_low": 0.0, "panel_median": 0.0, "panel_high": np.inf}
        unknown |= {"panel_only": True, "logarithms": values["kind"] == "log1p"}
        return cls(kind=str(values["kind"]), **{k: np.asarray(values.get(k, v)).item() for k, v in unknown.items()})

    def check(self, trained: Normalization | None, what: str) -> None:
        """Refuse expression in other units than the model was trained on; warn where that is likely.

        Parameters
        ----------
        trained
            Of the training data; None (models of earlier versions) is not checked.
        what
            Where the expression is, for the message.

        Raises
        ------
        ValueError
            If the kinds, or the counts a spot is normalised to, differ; if training had logarithms and these are none;
            if the object has the panel's genes alone and was normalised over them, where training had more; or if the
            panel's total is several times as large or small as in training.
        """
        if trained is None:
            return
        mend = (
            "normalise as in training, over all genes that were measured, before genes are dropped "
            "(adata.layers['lognorm'] is taken as it is), or pass layer="
        )
        if "counts" in (self.kind, trained.kind) and self.kind != trained.kind:
            raise ValueError(f"{what} holds {self.units}, the model was trained on {trained.units}; {mend}")
        if (
            self.target_sum
            and trained.target_sum
            and abs(self.target_sum - trained.target_sum) > 5 * SAME_SUM * trained.target_sum
        ):
            raise ValueError(
                f"{what} is normalised to {self.target_sum:,.0f} counts a spot, that of training to "
                f"{trained.target_sum:,.0f}; {mend}"
            )
        if trained.kind == "log1p" and not self.logarithms:
            raise ValueError(f"{what} holds no logarithms, the model was trained on {trained.units}; {mend}")
        if self.kind == "counts" or self.logarithms != trained.logarithms or not self.panel_median > 0:
            return  # the depth of counts differs between sections
        if self.target_sum and self.panel_only and not trained.panel_only:
            raise ValueError(
                f"{what} is normalised over the panel's {self.n_genes} genes alone, that of training over "
                f"{trained.n_genes}: the values cannot be compared; {mend}"
            )
        middle = self.panel_median
        away = max(middle / max(trained.panel_high, 1e-12), trained.panel_low / middle)
        finding = (
            f"{what}: the panel's total in the middle spot is {middle:.3g} (of {self.n_genes} genes), in 90 % of the "
            f"training spots it was {trained.panel_low:.3g} to {trained.panel_high:.3g} (of {trained.n_genes})"
        )
        if away > REFUSED_FACTOR:
            raise ValueError(f"{finding}: other units; {mend}")
        if away > WARNED_FACTOR:
            warn_once(logger, "%s: these may be other units, or values normalised over other genes", finding)


class SpotTotals(NamedTuple):
    """Of some spots: whether all values are integers, the largest, and totals of each spot.

    Totals are over all genes and over the panel, of values and of their exponentials less one.
    """

    integers: bool
    largest: float
    linear: NDArray[np.float64]
    panel_linear: NDArray[np.float64]
    panel: NDArray[np.float64]

    @classmethod
    def of(cls, block: Any, panel: NDArray[np.float32]) -> SpotTotals:
        """Of a block of rows with all genes, and the panel's columns of it."""
        stored = stored_values(block)
        largest = float(stored.max(initial=0))
        integers = bool((stored == np.round(stored)).all())
        values = panel.astype(np.float64)
        if not largest <= LARGEST_LOG:
            nothing = np.full(len(panel), np.nan)
            return cls(integers, largest, nothing, nothing, values.sum(1))
        linear = block.astype(np.float64).expm1() if sparse.issparse(block) else np.expm1(block, dtype=np.float64)
        every = np.asarray(linear.sum(1)).ravel()
        return cls(integers, largest, every, np.expm1(values).sum(1), values.sum(1))

    @classmethod
    def concat(cls, totals: Sequence[SpotTotals]) -> SpotTotals:
        """Of the spots of several blocks or sections."""
        arrays = (np.concatenate([getattr(t, name) for t in totals]) for name in cls._fields[2:])
        return cls(all(t.integers for t in totals), max(t.largest for t in totals), *arrays)

    def normalization(self, layer: str, n_genes: int, n_panel: int) -> Normalization:
        """How the values came from counts, as far as they tell.

        Parameters
        ----------
        layer
            Name of the layer: ``"lognorm"`` holds logarithms.
        n_genes, n_panel
            Genes of the object, and of the panel.

        Raises
        ------
        ValueError
            If ``"lognorm"`` holds counts.
        """
        logarithms = self.largest <= LARGEST_LOG
        kind, target = "values", 0.0
        if self.integers and self.largest > 0:
            kind, logarithms = "counts", False
        elif logarithms:
            filled = self.linear[self.linear > 0]
            middle = float(np.median(filled)) if len(filled) else 0.0
            if len(filled) and np.abs(filled - middle).max() <= SAME_SUM * middle:
                kind, target = "log1p", float(f"{middle:.4g}")
            elif layer == LOGNORM:
                kind = "log1p"
        if layer == LOGNORM and kind == "counts":
            raise ValueError(
                f"layer: layers[{LOGNORM!r}] holds counts, not their logarithms; put them in X and delete the layer "
                f"(del adata.layers[{LOGNORM!r}])"
            )
        totals = self.panel_linear if logarithms else self.panel
        filled = totals[totals > 0]
        low, median, high = (float(q) for q in np.quantile(filled if len(filled) else np.zeros(1), (0.05, 0.5, 0.95)))
        return Normalization(kind, target, n_genes, low, median, high, n_genes == n_panel, logarithms)


def common_normalization(totals: Mapping[str, SpotTotals], layer: str, n_genes: int, n_panel: int) -> Normalization:
    """How expression to train on is normalised, which must be the same in all sections.

    Raises
    ------
    ValueError
        Naming two sections that differ.
    """
    each = {section: of.normalization(layer, n_genes, n_panel) for section, of in totals.items()}
    first, one = next(iter(each.items()))
    for section, other in each.items():
        targets = (one.target_sum, other.target_sum)
        differ = all(targets) and abs(targets[0] - targets[1]) > 5 * SAME_SUM * min(targets)
        if differ or (one.kind != other.kind and "counts" in (one.kind, other.kind)):
            raise ValueError(
                f"layers[{layer!r}] is not normalised alike: section {first!r} holds {one.units}, section {section!r} "
                f"{other.units}; normalise all sections to the same counts a spot"
            )
    return SpotTotals.concat(list(totals.values())).normalization(layer, n_genes, n_panel)
