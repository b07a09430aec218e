"""Collect the content of a report from the object and the model, without drawing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from histovar import metrics
from histovar._keys import Keys
from histovar.anndata_io import slots
from histovar.anndata_io.comparison import (
    coverage_by_share,
    read_distribution,
    read_interval,
    try_read_measured,
)
from histovar.anndata_io.gene_symbols import find_genes, gene_labels
from histovar.anndata_io.images import crop_to
from histovar.anndata_io.predicted_slides import Slide, read_slides
from histovar.anndata_io.prediction import (
    predicted_genes,
    predicted_sections,
    read_composed,
    read_prediction,
)
from histovar.model import TwoStageVARST
from histovar.model.summary import summarize

from .cautions import cautions

# Quantities of each spot and gene, in the order of the menu.
MEAN, STD, LOWER, UPPER, MEASURED = "mean", "std", "lower", "upper", "measured"
# Most genes times spots of one page, some 20 bytes each: browsers open that in a few seconds.
MOST_VALUES = 8_000_000
# Number of random spots on which coverage is measured: exact to one or two hundredths for a single gene.
SPOTS_OF_COVERAGE = 1000
# Margin around the spots, as a share of their extent.
MARGIN = 0.04


@dataclass(frozen=True)
class Section:
    """One section in a report.

    Parameters
    ----------
    label
        Name of the section.
    spots
        (n_spots,) names of the spots.
    coordinates
        (n_spots, 2), in pixels of the full-resolution slide.
    diameter
        Diameter of a spot, in the same pixels.
    values
        (n_genes, n_spots) values of every quantity.
    image
        (height, width, 3) uint8, cropped to the spots; None if there is none.
    corners
        Left, top, right and bottom of the image, in the same pixels.
    """

    label: str
    spots: list[str]
    coordinates: NDArray[np.float64]
    diameter: float
    values: Mapping[str, NDArray[np.float32]]
    image: NDArray[np.uint8] | None
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Coverage:
    """Coverage of central intervals at several nominal levels.

    Parameters
    ----------
    kind
        Kind of the predicted distribution.
    calibrated
        True if the model was calibrated.
    n_spots
        Number of spots on which coverage was measured.
    shares
        (n_shares,) nominal levels.
    covered
        (n_shares, n_genes) share of the spots inside the interval.
    """

    kind: str
    calibrated: bool
    n_spots: int
    shares: NDArray[np.float64]
    covered: NDArray[np.float64]


@dataclass(frozen=True)
class Content:
    """Content of a report.

    Parameters
    ----------
    title
        Heading.
    units
        Units of the prediction.
    confidence_level
        Nominal level of the intervals.
    genes
        (n_genes,) names or symbols.
    sections
        One or more sections.
    table
        One row per gene: mean, standard deviation, Pearson correlation if measured, and expected accuracy if the model
        has it; the best first, if known.
    expected_on
        What the expected accuracy was measured on, such as an unseen section; empty without expected accuracy.
    coverage
        Coverage of intervals; None if nothing was measured.
    scores
        Table that :func:`histovar.tl.evaluate` wrote, one row per section; None if it was not called.
    facts
        Description of the prediction and the model, by name.
    cautions
        Warnings, in sentences.
    """

    title: str
    units: str
    confidence_level: float
    genes: list[str]
    sections: list[Section]
    table: pd.DataFrame
    expected_on: str
    coverage: Coverage | None
    scores: pd.DataFrame | None
    facts: Mapping[str, str]
    cautions: Sequence[str]


def collect(
    adata: AnnData,
    keys: Keys,
    *,
    model: TwoStageVARST | None,
    trust: pd.DataFrame | None,
    genes: Sequence[str] | None,
    title: str,
    library_key: str | None,
    layer: str | None,
    confidence_level: float,
    gene_symbols: str | None,
) -> Content:
    """Collect the content of a report.

    Parameters
    ----------
    adata
        Object with a prediction.
    keys
        Slots of the prediction.
    model
        The model that made the prediction; None if it is not available.
    trust
        Expected accuracy of genes, one row per gene, from :func:`histovar.get.genes`: columns ``"expected_pearson"``,
        ``"lower"``, ``"upper"``, ``"share_of_ceiling"`` and ``"q_value"``; or None.
    genes
        Genes of the panel; all by default.
    title, library_key, layer, confidence_level, gene_symbols
        As in :func:`histovar.pl.report`.

    Raises
    ------
    KeyError, ValueError
        As :func:`histovar.pl.report`.
    """
    panel = predicted_genes(adata, keys)
    labels = dict(zip(panel, gene_labels(adata, panel, gene_symbols), strict=True))
    chosen = sorted(panel, key=labels.__getitem__) if genes is None else find_genes(adata, panel, genes, gene_symbols)
    if model is not None:
        _check_predicted_by(model, panel, slots.record(adata, keys))
    if len(chosen) * adata.n_obs > MOST_VALUES:
        raise ValueError(
            f"genes: {len(chosen):,} genes in {adata.n_obs:,} spots are too many for a browser; name at most "
            f"{MOST_VALUES // adata.n_obs:,} genes, or take fewer sections"
        )
    names = predicted_sections(adata, keys, library_key)
    slides = read_slides(adata, keys, names, library_key)
    mean, std = read_prediction(adata, keys, panel)
    lower, upper = read_interval(adata, keys, mean, std, confidence_level)
    measured, reason = try_read_measured(adata, keys, panel, layer, names)
    columns = np.array([panel.index(gene) for gene in chosen])
    quantities = {MEAN: mean, STD: std, LOWER: lower, UPPER: upper}
    if measured is not None:
        quantities[MEASURED] = measured
    values_by_quantity = {name: np.asarray(values, np.float32)[:, columns].T for name, values in quantities.items()}
    stored = slots.record(adata, keys)
    return Content(
        title=title,
        units=str(stored["units"]),
        confidence_level=confidence_level,
        genes=[labels[gene] for gene in chosen],
        sections=[_section(adata, slide, values_by_quantity) for slide in slides],
        table=_table(chosen, values_by_quantity, slides, trust).rename(labels),
        expected_on="" if trust is None else str(trust.attrs["expected on"]),
        coverage=None if measured is None else _coverage(adata, keys, mean, std, measured),
        scores=stored.get("evaluation"),
        facts=_facts(adata, stored, slides, len(panel))
        | ({} if model is None else summarize({**model.registry, "genes": [*labels.values()]}, model.config)),
        cautions=cautions(adata, keys, slides, measured_reason=reason, config=None if model is None else model.config),
    )


def _check_predicted_by(model: TwoStageVARST, panel: Sequence[str], stored: Mapping[str, Any]) -> None:
    """Refuse a model with other genes or other training sections than the one that made the prediction."""
    registry = model.registry
    if registry["genes"] != list(panel):
        difference = f"it has {len(registry['genes'])} genes, other than the {len(panel)} that were predicted"
    elif "trained_on" in stored and set(registry.get("sections_stage2", [])) != _names_in(stored, "trained_on"):
        difference = f"it was trained on sections {registry.get('sections_stage2')}, unlike the prediction's model"
    else:
        return
    raise ValueError(f"model: {difference}; give the model that made the prediction, or leave model out")


def _names_in(stored: Mapping[str, Any], entry: str) -> set[str]:
    return set(map(str, np.asarray(stored[entry]).ravel()))


def _section(adata: AnnData, slide: Slide, values_by_quantity: Mapping[str, NDArray[np.float32]]) -> Section:
    low, high = slide.coordinates.min(0), slide.coordinates.max(0)
    margin = MARGIN * float((high - low).max()) + slide.diameter
    image, corners = None, (*(low - margin), *(high + margin))
    if slide.image is not None:
        pixels, factor = slide.image["images"]["hires"], slide.image["scalefactors"]["tissue_hires_scalef"]
        image, corners = crop_to(pixels, factor, low - margin, high + margin)
    return Section(
        label="all spots" if slide.label is None else slide.label,
        spots=adata.obs_names[slide.rows].astype(str).tolist(),
        coordinates=slide.coordinates,
        diameter=slide.diameter,
        values={name: values[:, slide.rows] for name, values in values_by_quantity.items()},
        image=image,
        corners=tuple(map(float, corners)),  # type: ignore[arg-type]
    )


def _table(
    genes: list[str], values: Mapping[str, NDArray[np.float32]], slides: list[Slide], trust: pd.DataFrame | None
) -> pd.DataFrame:
    """Make the table of genes: mean, standard deviation, correlation, expected accuracy."""
    table = pd.DataFrame({"mean": values[MEAN].mean(1), "std": values[STD].mean(1)}, index=pd.Index(genes, name="gene"))
    if MEASURED in values:
        by_section = [
            metrics.pearson(values[MEAN][:, slide.rows].T, values[MEASURED][:, slide.rows].T) for slide in slides
        ]
        table["pearson"] = pd.DataFrame(by_section).mean().to_numpy()
    if trust is not None:
        table = table.join(trust)
    sort_by = next((name for name in ("expected_pearson", "pearson") if name in table), None)
    return table if sort_by is None else table.sort_values(sort_by, ascending=False, kind="stable")


def _coverage(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any], measured: NDArray[np.float32]
) -> Coverage:
    """Measure coverage on a sample of the spots, since a distribution takes 100 times the memory and time of a mean."""
    is_measured = ~np.isnan(measured).any(0)
    spots = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:SPOTS_OF_COVERAGE])
    sample = adata[spots]
    distribution = read_distribution(sample, keys, mean[spots], std[spots], read_composed(sample, keys))
    shares, covered, _ = coverage_by_share(distribution, np.ones(len(spots), bool), measured[spots])
    return Coverage(
        distribution.kind,
        bool(slots.record(adata, keys).get("calibrated", False)),
        len(spots),
        shares,
        covered[:, is_measured],
    )


def _facts(adata: AnnData, stored: Mapping[str, Any], slides: list[Slide], n_genes: int) -> dict[str, str]:
    """Describe the prediction from its entry of ``uns``."""
    params = stored["params"]
    depth = float(params.get("depth", 0))
    depth_text = f"{depth:,.0f} counts in every spot" if depth else "predicted from histology"
    if params.get("depth_key"):
        depth_text = f"obs[{params['depth_key']!r}]"
    facts = {
        "Predicted": f"{n_genes:,} genes in {adata.n_obs:,} spots of {len(slides)} section{'s' * (len(slides) > 1)}",
        "Units": str(stored["units"]),
        "Depth": depth_text if "depth" in params else "",
        "Embeddings": ", ".join(map(str, np.asarray(params["use_rep"]).ravel())),
        "Trained on sections": ", ".join(map(str, np.asarray(stored.get("trained_on", [])).ravel())),
        "Trained on individuals": ", ".join(map(str, np.asarray(stored.get("trained_on_groups", [])).ravel())),
        "Adapted to": f"{stored['n_adapted_spots']} measured spots of {stored.get('adapted_to', '') or 'the section'}"
        if stored.get("n_adapted_spots", 0)
        else "",
        "Method": str(params.get("method", "")),
    }
    return {name: text for name, text in facts.items() if text}
