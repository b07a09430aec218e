"""All that a report shows, read from the object and the model; nothing is drawn here."""

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
    read_measured_if_there,
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

# Quantities of each spot and gene, in the order in which they are offered.
MEAN, STD, LOWER, UPPER, MEASURED = "mean", "std", "lower", "upper", "measured"
# Genes times spots of one page: some 20 bytes each, which browsers still open in a few seconds.
MOST_VALUES = 8_000_000
# Spots drawn at random by which calibration is told, to one or two hundredths for a single gene.
SPOTS_OF_COVERAGE = 1000
# Around the spots, as a share of how far they reach.
MARGIN = 0.04


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Parameters
    ----------
    label
        Its name.
    spots
        (n_spots,) names.
    coordinates
        (n_spots, 2), in pixels of the full-resolution slide.
    diameter
        Of a spot, in the same pixels.
    values
        (n_genes, n_spots) of every quantity.
    image
        (height, width, 3) uint8, cropped to the spots; None where there is none.
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
    """How often intervals hold what was measured.

    Parameters
    ----------
    kind
        What the distribution is taken from.
    calibrated
        Whether the model was calibrated.
    n_spots
        Spots that were looked at.
    shares
        (n_shares,) promised.
    covered
        (n_shares, n_genes) found.
    """

    kind: str
    calibrated: bool
    n_spots: int
    shares: NDArray[np.float64]
    covered: NDArray[np.float64]


@dataclass(frozen=True)
class Content:
    """A report.

    Parameters
    ----------
    title
        Heading.
    units
        Of the prediction.
    confidence_level
        Of the intervals.
    genes
        Names or symbols, (n_genes,).
    sections
        At least one.
    table
        A row a gene: mean, standard deviation, Pearson correlation where measured, and what the model expects of it;
        the best first, as far as known.
    coverage
        None where nothing was measured.
    scores
        What :func:`histovar.tl.evaluate` left, a row a section; None where it did not.
    facts
        What was predicted, and by what.
    cautions
        What to be careful about.
    """

    title: str
    units: str
    confidence_level: float
    genes: list[str]
    sections: list[Section]
    table: pd.DataFrame
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
    """Read what a report shows.

    Parameters
    ----------
    adata
        With a prediction.
    keys
        Its slots.
    model
        That predicted; None if it is not at hand.
    trust
        How well genes are predicted by cross-validation within training, a row a gene: columns ``"expected_pearson"``,
        ``"lower"``, ``"upper"``, ``"share_of_ceiling"`` and ``"q_value"``, each where it is known; or None.
    genes
        Of the panel; all by default.
    title, library_key, layer, confidence_level, gene_symbols
        As of :func:`histovar.pl.report`.

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
            f"genes: {len(chosen):,} genes of {adata.n_obs:,} spots are too many for a page that browsers open; name "
            f"{MOST_VALUES // adata.n_obs:,} genes at most, or take fewer sections"
        )
    names = predicted_sections(adata, keys, library_key)
    slides = read_slides(adata, keys, names, library_key)
    mean, std = read_prediction(adata, keys, panel)
    lower, upper = read_interval(adata, keys, mean, std, confidence_level)
    measured, reason = read_measured_if_there(adata, keys, panel, layer, names)
    columns = np.array([panel.index(gene) for gene in chosen])
    quantities = {MEAN: mean, STD: std, LOWER: lower, UPPER: upper}
    if measured is not None:
        quantities[MEASURED] = measured
    shown = {name: np.asarray(values, np.float32)[:, columns].T for name, values in quantities.items()}
    stored = slots.record(adata, keys)
    return Content(
        title=title,
        units=str(stored["units"]),
        confidence_level=confidence_level,
        genes=[labels[gene] for gene in chosen],
        sections=[_section(adata, slide, shown) for slide in slides],
        table=_table(chosen, shown, slides, trust).rename(labels),
        coverage=None if measured is None else _coverage(adata, keys, mean, std, measured),
        scores=stored.get("evaluation"),
        facts=_facts(adata, stored, slides, len(panel))
        | ({} if model is None else summarize({**model.registry, "genes": [*labels.values()]}, model.config)),
        cautions=cautions(adata, keys, slides, measured_reason=reason, config=None if model is None else model.config),
    )


def _check_predicted_by(model: TwoStageVARST, panel: Sequence[str], stored: Mapping[str, Any]) -> None:
    """Refuse a model of other genes, or that learnt from other sections, than that which predicted."""
    registry = model.registry
    if registry["genes"] != list(panel):
        found = f"it has {len(registry['genes'])} genes, and these {len(panel)} were predicted by another"
    elif "trained_on" in stored and set(registry.get("sections_stage2", [])) != _named(stored, "trained_on"):
        found = f"it learnt from sections {registry.get('sections_stage2')}, and the one that predicted did not"
    else:
        return
    raise ValueError(f"model: {found}; give the one that predicted, or leave it out")


def _named(stored: Mapping[str, Any], entry: str) -> set[str]:
    return set(map(str, np.asarray(stored[entry]).ravel()))


def _section(adata: AnnData, slide: Slide, shown: Mapping[str, NDArray[np.float32]]) -> Section:
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
        values={name: values[:, slide.rows] for name, values in shown.items()},
        image=image,
        corners=tuple(map(float, corners)),  # type: ignore[arg-type]
    )


def _table(
    genes: list[str], shown: Mapping[str, NDArray[np.float32]], slides: list[Slide], trust: pd.DataFrame | None
) -> pd.DataFrame:
    """What is known of each gene."""
    table = pd.DataFrame({"mean": shown[MEAN].mean(1), "std": shown[STD].mean(1)}, index=pd.Index(genes, name="gene"))
    if MEASURED in shown:
        of_sections = [
            metrics.pearson(shown[MEAN][:, slide.rows].T, shown[MEASURED][:, slide.rows].T) for slide in slides
        ]
        table["pearson"] = pd.DataFrame(of_sections).mean().to_numpy()
    if trust is not None:
        table = table.join(trust)
    best = next((name for name in ("expected_pearson", "pearson") if name in table), None)
    return table if best is None else table.sort_values(best, ascending=False, kind="stable")


def _coverage(
    adata: AnnData, keys: Keys, mean: NDArray[Any], std: NDArray[Any], measured: NDArray[np.float32]
) -> Coverage:
    """Coverage over some of the spots, as a distribution takes a hundred times the room and the time of a mean."""
    known = ~np.isnan(measured).any(0)
    spots = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:SPOTS_OF_COVERAGE])
    some = adata[spots]
    distribution = read_distribution(some, keys, mean[spots], std[spots], read_composed(some, keys))
    shares, covered, _ = coverage_by_share(distribution, np.ones(len(spots), bool), measured[spots])
    return Coverage(
        distribution.kind,
        bool(slots.record(adata, keys).get("calibrated", False)),
        len(spots),
        shares,
        covered[:, known],
    )


def _facts(adata: AnnData, stored: Mapping[str, Any], slides: list[Slide], n_genes: int) -> dict[str, str]:
    """What was predicted, as ``uns`` has it."""
    params = stored["params"]
    depth = float(params.get("depth", 0))
    of_depth = f"{depth:,.0f} counts in every spot" if depth else "predicted from histology"
    if params.get("depth_key"):
        of_depth = f"obs[{params['depth_key']!r}]"
    facts = {
        "Predicted": f"{n_genes:,} genes in {adata.n_obs:,} spots of {len(slides)} section{'s' * (len(slides) > 1)}",
        "Units": str(stored["units"]),
        "Depth": of_depth if "depth" in params else "",
        "Embeddings": ", ".join(map(str, np.asarray(params["use_rep"]).ravel())),
        "Trained on sections": ", ".join(map(str, np.asarray(stored.get("trained_on", [])).ravel())),
        "Trained on individuals": ", ".join(map(str, np.asarray(stored.get("trained_on_groups", [])).ravel())),
        "Adapted to": f"{stored['n_adapted_spots']} measured spots of {stored.get('adapted_to', '') or 'the section'}"
        if stored.get("n_adapted_spots", 0)
        else "",
        "Method": str(params.get("method", "")),
    }
    return {name: text for name, text in facts.items() if text}
