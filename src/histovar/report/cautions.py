"""Warnings for the readers of a report, in sentences."""

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

# Factor between measured and predicted depth that gives a warning: about one standard deviation of depth between
# her2st's patients (e^0.66, by benchmarks/units.py).
DEPTH_RATIO = 2.0


def cautions(
    adata: AnnData, keys: Keys, slides: list[Slide], *, measured_reason: str, config: ModelConfig | None
) -> list[str]:
    """List warnings about a prediction and its sections; empty if there is nothing to warn of.

    Parameters
    ----------
    adata, keys
        Object and slots of the prediction.
    slides
        Its sections.
    measured_reason
        Why existing measured expression is not shown; empty otherwise.
    config
        Configuration of the model, to know how few spots are too few; None without the model.
    """
    stored = slots.record(adata, keys)
    sentences: list[str] = []
    if measured_reason:
        sentences.append(f"Measured expression is not shown: {measured_reason}.")
    if not stored.get("calibrated", False):
        sentences.append("Intervals are not calibrated: their coverage is unknown.")
    trained_on = set(map(str, np.asarray(stored.get("trained_on", [])).ravel()))
    columns = _spot_columns(adata, keys)
    totals = _measured_totals(adata, keys, stored)
    for slide in slides:
        name = "The section" if slide.label is None else f"Section {slide.label}"
        if slide.label in trained_on:
            sentences.append(f"{name} was used in training: how well it fits says little about new tissue.")
        sentences += _warn_of_spots(name, slide, columns, totals, adapted=bool(stored.get("n_adapted_spots", 0)))
        if config is not None and config.n_neighbors and len(slide.rows) < 4 * max(config.n_neighbors):
            sentences.append(
                f"{name} has few spots, {len(slide.rows)}: neighbourhoods, of up to {max(config.n_neighbors)} spots in "
                "training, are cut to a quarter of the section."
            )
        if slide.image is None:
            sentences.append(f"{name} has no H&E image to show.")
    return sentences


def _warn_of_spots(
    name: str,
    slide: Slide,
    columns: Mapping[str, NDArray[Any]],
    totals: NDArray[np.float64] | None,
    *,
    adapted: bool,
) -> list[str]:
    """Warnings about a section's novelty and depth, for models that learnt from counts."""
    if not columns:
        return []
    sentences = []
    novelty = float(columns["novelty"][slide.rows].max())
    if novelty > 0:
        sentences.append(
            f"{name} looks unlike the training sections (novelty {novelty:.2f} on a scale from 0 to 1): predictions "
            f"may be less accurate{'' if adapted else ', and intervals are wider'}."
        )
    depth = columns["total_count"][slide.rows]
    expected = columns["rates"][slide.rows] * depth[:, None] / RATE_TOTAL
    rare_share = float((expected.mean(0) < 1).mean())
    if rare_share > 0.5:
        sentences.append(
            f"{name} is shallow: at about {np.median(depth):,.0f} counts in a spot, {100 * rare_share:.0f} % of the "
            "genes have less than one count in an average spot, so that single measured values are mostly noise."
        )
    if totals is not None:
        ratio = float(np.median(totals[slide.rows]) / max(float(np.median(depth)), 1.0))
        if not 1 / DEPTH_RATIO <= ratio <= DEPTH_RATIO:
            sentences.append(
                f"{name} was sequenced to a median of {np.median(totals[slide.rows]):,.0f} counts in a spot, but "
                f"{np.median(depth):,.0f} are predicted: measured and predicted levels differ accordingly."
            )
    return sentences


def _spot_columns(adata: AnnData, keys: Keys) -> dict[str, NDArray[Any]]:
    """Read predicted rates and properties of spots; empty for models that did not learn from counts."""
    rates = read_rates(adata, keys, len(predicted_genes(adata, keys)))
    if rates is None:
        return {}
    return {"rates": rates[0], **{name: rates[1][:, i] for i, name in enumerate(SPOT_COLUMNS)}}


def _measured_totals(adata: AnnData, keys: Keys, stored: Mapping[str, Any]) -> NDArray[np.float64] | None:
    """Read measured total counts of spots; None if there are none, or the prediction was made at a given depth."""
    params, genes = stored["params"], predicted_genes(adata, keys)
    if params.get("depth_key") or float(params.get("depth", 0)) or not set(genes) <= set(adata.var_names):
        return None
    target = float(stored.get("normalization", {}).get("target_sum", 0) or TARGET_SUM)
    try:
        return spot_totals(adata, gate.gene_columns(adata, genes), target)
    except (KeyError, ValueError):
        return None
