"""What whoever looks at a prediction is to be careful about, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from histovar._keys import TARGET_SUM, Keys
from histovar.anndata_io import gate, slots
from histovar.anndata_io.expression import spot_totals
from histovar.anndata_io.predicted_slides import Slide
from histovar.anndata_io.prediction import SPOT_COLUMNS, predicted_genes, read_rates
from histovar.model import ModelConfig
from histovar.model.observation import RATE_TOTAL

# Measured depth over predicted depth, or its inverse, that is worth a word: about what depths of her2st's patients
# differ by (e^0.66, one standard deviation, of benchmarks/units.py).
DEPTH_RATIO = 2.0


def cautions(
    adata: AnnData, keys: Keys, slides: list[Slide], *, measured_reason: str, config: ModelConfig | None
) -> list[str]:
    """Sentences on each section that is not as it should be; none where all is well.

    Parameters
    ----------
    adata, keys
        The prediction.
    slides
        Its sections.
    measured_reason
        Why measured expression is not shown, though there is some; or empty.
    config
        Of the model, where that is at hand, by which it is known how many spots are few.
    """
    stored = slots.record(adata, keys)
    found: list[str] = []
    if measured_reason:
        found.append(f"Measured expression is not shown: {measured_reason}.")
    if not stored.get("calibrated", False):
        found.append("Intervals are not calibrated: how often they hold what is measured is not known.")
    trained_on = set(map(str, np.asarray(stored.get("trained_on", [])).ravel()))
    columns = _spot_columns(adata, keys)
    totals = _measured_totals(adata, keys, stored)
    for slide in slides:
        name = "The section" if slide.label is None else f"Section {slide.label}"
        if slide.label in trained_on:
            found.append(f"{name} was among those trained on: how well it fits says little of new tissue.")
        found += _of_spots(name, slide, columns, totals, adapted=bool(stored.get("n_adapted_spots", 0)))
        if config is not None and config.n_neighbors and len(slide.rows) < 4 * max(config.n_neighbors):
            found.append(
                f"{name} has few spots, {len(slide.rows)}: neighbourhoods, of up to {max(config.n_neighbors)} spots in "
                "training, are cut to a quarter of the section."
            )
        if slide.image is None:
            found.append(f"{name} has no H&E image that could be shown.")
    return found


def _of_spots(
    name: str,
    slide: Slide,
    columns: Mapping[str, NDArray[Any]],
    totals: NDArray[np.float64] | None,
    *,
    adapted: bool,
) -> list[str]:
    """Novelty and depth of a section, of a model that learnt from counts."""
    if not columns:
        return []
    found = []
    novelty = float(columns["novelty"][slide.rows].max())
    if novelty > 0:
        found.append(
            f"{name} looks unlike the sections trained on (novelty {novelty:.2f} on a scale from 0 to 1): predictions "
            f"may be further off{'' if adapted else ', and intervals are wider'}."
        )
    depth = columns["total_count"][slide.rows]
    expected = columns["rates"][slide.rows] * depth[:, None] / RATE_TOTAL
    rare = float((expected.mean(0) < 1).mean())
    if rare > 0.5:
        found.append(
            f"{name} is shallow: at about {np.median(depth):,.0f} counts in a spot, {100 * rare:.0f} % of the genes "
            "have less than one count in an average spot, so that single measured values are mostly noise."
        )
    if totals is not None:
        ratio = float(np.median(totals[slide.rows]) / max(float(np.median(depth)), 1.0))
        if not 1 / DEPTH_RATIO <= ratio <= DEPTH_RATIO:
            found.append(
                f"{name} was sequenced to a median of {np.median(totals[slide.rows]):,.0f} counts in a spot, and "
                f"{np.median(depth):,.0f} are predicted: measured and predicted levels differ by that."
            )
    return found


def _spot_columns(adata: AnnData, keys: Keys) -> dict[str, NDArray[Any]]:
    """What is predicted of each spot, and its rates; empty of models that did not learn from counts."""
    rates = read_rates(adata, keys, len(predicted_genes(adata, keys)))
    if rates is None:
        return {}
    return {"rates": rates[0], **{name: rates[1][:, i] for i, name in enumerate(SPOT_COLUMNS)}}


def _measured_totals(adata: AnnData, keys: Keys, stored: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Total count of each spot, where it was measured and the prediction was not made at a given depth."""
    params, genes = stored["params"], predicted_genes(adata, keys)
    if params.get("depth_key") or float(params.get("depth", 0)) or not set(genes) <= set(adata.var_names):
        return None
    target = float(stored.get("normalization", {}).get("target_sum", 0) or TARGET_SUM)
    try:
        return spot_totals(adata, gate.gene_columns(adata, genes), target)
    except (KeyError, ValueError):
        return None
