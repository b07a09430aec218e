"""Recognise how expression was normalised, and check that it is in the units of training."""

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

# Log-normalised values are below this; larger values are counts, whose exponentials are meaningless.
LARGEST_LOG = 30.0
# Sums of spots that differ by a smaller share count as equal.
SAME_SUM = 0.01
# Fewest spots whose equal sums are no chance.
LEAST_SUMS = 20
# The panel's median total may lie outside the range of 90 % of the training spots by this factor before a warning, or
# an error. For panels chosen on one patient of her2st and the sections of all others it is 1.54 at most
# (benchmarks/units.py).
WARNED_FACTOR, REFUSED_FACTOR = 1.6, 4.0


@dataclass(frozen=True)
class Normalization:
    """Normalisation of a layer, as recognised from its values.

    Parameters
    ----------
    kind
        ``"log1p"`` of normalised counts, ``"counts"``, or other ``"values"``.
    target_sum
        Total count to which every spot was normalised, over all genes of the object; 0 if totals differ.
    n_genes
        Number of genes of the object.
    panel_low, panel_median, panel_high
        5 %, 50 % and 95 % quantiles, over the spots that are not empty, of the panel's total in a spot: in normalised
        counts if values are logarithms, otherwise in their own units.
    panel_only
        True if the object has no genes other than the panel.
    logarithms
        True if values are small enough to be logarithms; the panel's total is then the sum of expm1(values).
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
        """Name of the units."""
        if self.kind == "log1p":
            return f"log1p(counts per {self.target_sum:,.0f})" if self.target_sum else "log1p(normalised counts)"
        return self.kind

    def plain(self) -> dict[str, Any]:
        """Convert to a dictionary of plain types."""
        return asdict(self)

    @classmethod
    def stored(cls, values: Mapping[str, Any] | None) -> Normalization | None:
        """Convert back from :meth:`plain`; None if an earlier version did not store it.

        When predictions of several models are concatenated, entries that differ are lost: the panel's totals are then
        not compared.
        """
        if not values or "kind" not in values:
            return None
        defaults = {"target_sum": 0.0, "n_genes": 0, "panel_low": 0.0, "panel_median": 0.0, "panel_high": np.inf}
        defaults |= {"panel_only": True, "logarithms": values["kind"] == "log1p"}
        return cls(kind=str(values["kind"]), **{k: np.asarray(values.get(k, v)).item() for k, v in defaults.items()})

    def check(self, trained: Normalization | None, what: str) -> None:
        """Refuse expression in other units than the model was trained on; warn if the units are doubtful.

        Parameters
        ----------
        trained
            Normalisation of the training data; None (models of earlier versions) is not checked.
        what
            Slot of the expression, for the message.

        Raises
        ------
        ValueError
            If the kinds or the target sums differ; if training had logarithms and these are none; if the object has
            only the panel's genes and was normalised over them, but training had more; or if the panel's total is
            several times larger or smaller than in training.
        """
        if trained is None:
            return
        mend = (
            "normalise as in training, over all measured genes, before genes are dropped "
            "(adata.layers['lognorm'] is used as it is), or pass layer="
        )
        if "counts" in (self.kind, trained.kind) and self.kind != trained.kind:
            raise ValueError(f"{what} holds {self.units}, but the model was trained on {trained.units}; {mend}")
        if (
            self.target_sum
            and trained.target_sum
            and abs(self.target_sum - trained.target_sum) > 5 * SAME_SUM * trained.target_sum
        ):
            raise ValueError(
                f"{what} is normalised to {self.target_sum:,.0f} counts per spot, but was to "
                f"{trained.target_sum:,.0f} in training; {mend}"
            )
        if trained.kind == "log1p" and not self.logarithms:
            raise ValueError(f"{what} holds no logarithms, but the model was trained on {trained.units}; {mend}")
        if self.kind == "counts" or self.logarithms != trained.logarithms or not self.panel_median > 0:
            return  # totals of counts differ between sections anyway
        if self.target_sum and self.panel_only and not trained.panel_only:
            raise ValueError(
                f"{what} is normalised over the panel's {self.n_genes} genes only, but was over {trained.n_genes} in "
                f"training: the values cannot be compared; {mend}"
            )
        median = self.panel_median
        factor = max(median / max(trained.panel_high, 1e-12), trained.panel_low / median)
        finding = (
            f"{what}: the panel's median total in a spot is {median:.3g} (object of {self.n_genes} genes), but was "
            f"{trained.panel_low:.3g} to {trained.panel_high:.3g} in 90 % of the training spots ({trained.n_genes} "
            "genes)"
        )
        if factor > REFUSED_FACTOR:
            raise ValueError(f"{finding}: these are other units; {mend}")
        if factor > WARNED_FACTOR:
            warn_once(logger, "%s: these may be other units, or values normalised over other genes", finding)


class SpotTotals(NamedTuple):
    """Totals of spots from which their normalisation is recognised.

    Parameters
    ----------
    integers
        True if all values are integers.
    largest
        Largest value.
    linear, panel_linear
        (n_spots,) sums of expm1(values) over all genes, and over the panel.
    panel
        (n_spots,) sums of the panel's values.
    plain
        (n_spots,) sums of the values over all genes.
    """

    integers: bool
    largest: float
    linear: NDArray[np.float64]
    panel_linear: NDArray[np.float64]
    panel: NDArray[np.float64]
    plain: NDArray[np.float64]

    @classmethod
    def of(cls, block: Any, panel: NDArray[np.float32]) -> SpotTotals:
        """Compute the totals of a block of rows with all genes, and its panel's columns."""
        stored = stored_values(block)
        largest = float(stored.max(initial=0))
        integers = bool((stored == np.round(stored)).all())
        values = panel.astype(np.float64)
        plain = np.asarray(block.sum(1, dtype=np.float64)).ravel()
        if not largest <= LARGEST_LOG:
            undefined = np.full(len(panel), np.nan)
            return cls(integers, largest, undefined, undefined, values.sum(1), plain)
        linear = block.astype(np.float64).expm1() if sparse.issparse(block) else np.expm1(block, dtype=np.float64)
        totals = np.asarray(linear.sum(1)).ravel()
        return cls(integers, largest, totals, np.expm1(values).sum(1), values.sum(1), plain)

    @classmethod
    def concat(cls, totals: Sequence[SpotTotals]) -> SpotTotals:
        """Concatenate the totals of several blocks or sections."""
        arrays = (np.concatenate([getattr(t, name) for t in totals]) for name in cls._fields[2:])
        return cls(all(t.integers for t in totals), max(t.largest for t in totals), *arrays)

    def normalization(self, layer: str, n_genes: int, n_panel: int) -> Normalization:
        """Recognise the normalisation of the values.

        Parameters
        ----------
        layer
            Name of the layer: ``"lognorm"`` holds logarithms.
        n_genes, n_panel
            Number of genes of the object, and of the panel.

        Raises
        ------
        ValueError
            If ``"lognorm"`` holds counts, or values that are normalised but no logarithms.
        """
        logarithms = self.largest <= LARGEST_LOG
        kind, target = "values", 0.0
        if self.integers and self.largest > 0:
            kind, logarithms = "counts", False
        elif logarithms:
            median_total = _common_sum(self.linear)
            if median_total is not None:
                kind, target = "log1p", float(f"{median_total:.4g}")
            elif layer == LOGNORM:
                kind = "log1p"
        if layer == LOGNORM and kind == "counts":
            raise ValueError(
                f"layer: layers[{LOGNORM!r}] holds counts, not their logarithms; put them in X and delete the layer "
                f"(del adata.layers[{LOGNORM!r}])"
            )
        normalised = len(self.plain) >= LEAST_SUMS and _common_sum(self.plain) is not None
        if layer == LOGNORM and (not logarithms or (normalised and not target)):
            raise ValueError(
                f"layer: layers[{LOGNORM!r}] holds no logarithms: its values reach {self.largest:,.4g}"
                f"{' and have the same sum in every spot' if normalised else ''}; take logarithms after normalising "
                f"(scanpy.pp.log1p), or put counts in X and delete the layer (del adata.layers[{LOGNORM!r}])"
            )
        totals = self.panel_linear if logarithms else self.panel
        filled = totals[totals > 0]
        low, median, high = (float(q) for q in np.quantile(filled if len(filled) else np.zeros(1), (0.05, 0.5, 0.95)))
        return Normalization(kind, target, n_genes, low, median, high, n_genes == n_panel, logarithms)


def _common_sum(sums: NDArray[np.float64]) -> float | None:
    """Sum that all spots have but empty ones; None if they differ."""
    filled = sums[sums > 0]
    if not len(filled):
        return None
    median = float(np.median(filled))
    return median if np.abs(filled - median).max() <= SAME_SUM * median else None


def common_normalization(totals: Mapping[str, SpotTotals], layer: str, n_genes: int, n_panel: int) -> Normalization:
    """Recognise the normalisation of expression to train on, which must be the same in all sections.

    Raises
    ------
    ValueError
        If two sections differ; the message names them.
    """
    by_section = {
        section: section_totals.normalization(layer, n_genes, n_panel) for section, section_totals in totals.items()
    }
    first_section, first = next(iter(by_section.items()))
    for section, other in by_section.items():
        targets = (first.target_sum, other.target_sum)
        differ = all(targets) and abs(targets[0] - targets[1]) > 5 * SAME_SUM * min(targets)
        if differ or (first.kind != other.kind and "counts" in (first.kind, other.kind)):
            raise ValueError(
                f"layers[{layer!r}] is not normalised in the same way in all sections: section {first_section!r} holds "
                f"{first.units}, section {section!r} {other.units}; normalise all sections to the same total count"
            )
    return SpotTotals.concat(list(totals.values())).normalization(layer, n_genes, n_panel)
