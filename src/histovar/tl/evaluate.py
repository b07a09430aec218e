"""Score predicted against measured expression."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from histovar import metrics
from histovar._arguments import Key, Seed, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, TARGET_SUM, Keys, Prefix
from histovar.anndata_io import gate, slots
from histovar.anndata_io.comparison import (
    Distribution,
    given_depth,
    read_comparison,
    read_distribution,
    read_individuals,
    read_neighbors,
)
from histovar.anndata_io.expression import add_lognorm, spot_totals
from histovar.anndata_io.gate import Data
from histovar.anndata_io.prediction import EVALUATION, read_composed, read_draws, score_slots
from histovar.metrics.registry import DRAWS, GIVEN_DEPTH

logger = logging.getLogger(__name__)

# Sections that a warning names; of more it gives the number.
SECTIONS_NAMED = 3


@check_arguments
def evaluate(
    data: Data,
    *,
    key: Prefix = DEFAULT_KEY,
    layer: Key | None = None,
    library_key: Key | None = None,
    group_key: Key | None = None,
    random_state: Seed = 0,
    table_name: Key | None = None,
) -> pd.DataFrame:
    """Score a prediction against measured expression, by section, with intervals.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`predict` has written to, with the panel's genes.
    key
        Prefix of the slots, the `key_added` of :func:`predict`.
    layer
        Layer with measured expression; the layer trained on by default.
    library_key
        Column of ``obs`` with the section; that of :func:`predict` by default. Scores are taken within sections and
        averaged over them.
    group_key
        Column of ``obs`` with the individual (patient, animal) of each section; that of training by default, where the
        object has it.
    random_state
        Seed of the bootstrap, and of the levels drawn where several are as likely (:func:`histovar.metrics.pit`).
    table_name
        Table of a SpatialData.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``r2``, ``mse``, ``mae``, ``crps``, ``coverage`` of 90 % intervals,
        over all spots and (``coverage_top_tenth``) over the tenth with the gene's highest predictions, means over the
        sections; and ``constant``, whether the prediction is constant in any section (its correlation then counts as
        0). Where X holds counts also ``partial_pearson``, with depth taken out of both sides. Also written to
        ``var[f"{key}_pearson"]`` and so on.

        ``uns[key]["evaluation"]`` gets a DataFrame with a row for each section and their ``mean``;
        ``uns[key]["evaluation_interval"]`` one with rows ``low`` and ``high``, between which the mean over all such
        sections lies with a confidence of 95 %: a bootstrap of individuals, or of sections where no individuals are
        known (:func:`histovar.metrics.bootstrap_interval`), NaN where there is but one;
        ``uns[key]["evaluation_groups"]``, where individuals are known, means over the sections of each. Their columns
        are described by :func:`histovar.metrics.describe`.

        Scores of the distribution are taken of the predicted counts (negative binomial) where the model learnt from
        counts, else of the draws where there are any, else of the quantiles where they reach from 0.025 to 0.975, else
        of normal distributions; ``uns[key]["evaluated_distribution"]`` says of which. Columns that end in ``of draws``
        are there where there are draws. Where the model learnt from counts and X holds counts, those that end in
        ``given depth`` are of what it predicts once every spot's total count is known: the predictive check, in which
        only the composition is judged. Moran's I needs coordinates; neighbours are the 6 nearest spots of the section.

        Scores that are undefined are NaN, left out of all means, and warned of: correlations in a section of one spot
        (``partial_pearson``: of up to 4), and of genes whose measurement does not vary in the section.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer or column, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite, or in other units than the prediction; if a section is of
        several individuals.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key)
    slots.check_free(adata, keys, score_slots(keys))
    genes, layer, predicted, std, measured, names = read_comparison(adata, keys, layer, library_key)
    individuals = read_individuals(adata, keys, group_key, names)
    stored = slots.record(adata, keys)
    sum_of_training = float(stored.get("normalization", {}).get("target_sum", 0) or TARGET_SUM)
    counts = spot_totals(adata, gate.gene_columns(adata, genes), sum_of_training)
    if float(stored["params"].get("depth", 0)):
        logger.warning(
            "the prediction is of spots that are all sequenced to %s counts, what was measured is not: scores of level "
            "and intervals say little; predict with depth=None or the spots' own",
            f"{float(stored['params']['depth']):,.0f}",
        )
    composed = read_composed(adata, keys)
    distribution = read_distribution(adata, keys, predicted, std, composed)
    samples = read_draws(adata, keys, len(genes))
    given = given_depth(composed, counts)
    neighbors = read_neighbors(adata, keys, names)
    labels = np.full(adata.n_obs, "all") if names is None else names
    tables, rows, n_spots, individual_of = {}, {}, {}, {}
    for label in np.unique(labels).tolist():
        spots = labels == label
        truth, mean = measured[spots], predicted[spots]
        graph = None if neighbors is None else neighbors[spots][:, spots]
        totals = None if counts is None else counts[spots]
        table = metrics.per_gene(mean, truth, genes, totals)
        of_genes, of_distribution = _distribution(mean, distribution, spots, truth, random_state)
        uncertainty = metrics.pearson(std[spots], np.abs(mean - truth))
        rows[label] = {
            **metrics.summary(table),
            **_structure(mean, truth, graph),
            **({} if samples is None else _named(_structure(samples[spots], truth, graph), DRAWS)),
            **of_distribution,
            "uncertainty PCC": float(pd.Series(uncertainty).mean()),
            **({} if given is None else _named(_given_depth(*given, spots, truth, totals, random_state), GIVEN_DEPTH)),
        }
        tables[label] = table.assign(**of_genes)
        n_spots[label] = len(truth)
        individual_of[label] = label if individuals is None else str(individuals[spots][0])
    sections = pd.DataFrame(rows).T
    sections = sections[sorted(sections, key=metrics.describe().index.get_loc)]
    sections.index.name = "section"
    clusters = [individual_of[label] for label in sections.index]
    summary = sections.copy()
    summary.loc["mean"] = sections.mean()
    entries = {
        "evaluation": summary,
        "evaluation_interval": metrics.bootstrap_interval(sections, clusters, random_state=random_state),
        "evaluated_distribution": distribution.kind,
    }
    if individuals is not None:
        entries["evaluation_groups"] = sections.groupby(pd.Index(clusters, name="group")).mean()
    if stored.get("n_adapted_spots", 0) and str(stored.get("adapted_to", "")) in ("", *labels):
        logger.warning(
            "the model is adapted to %d measured spots of this section: scores of those are not of unseen spots; leave "
            "them out",
            int(stored["n_adapted_spots"]),
        )
    trained_on = _warn_of_training(stored, sections.index, [] if individuals is None else clusters)
    _warn_of_undefined(tables, sections, n_spots)
    if len(set(clusters)) == 1:
        what = "section" if individuals is None else "individual"
        logger.info("scores have no intervals: all spots are of one %s, %r", what, clusters[0])
    everything = pd.concat(tables)
    scores = everything.drop(columns="constant").groupby(level=1).mean().loc[genes]
    scores["constant"] = everything["constant"].groupby(level=1).any().loc[genes]
    columns: dict[slots.Slot, Any] = {}
    for name in map(str, scores):
        columns["var", keys.score(name)] = scores[name].reindex(adata.var_names)
        if scores[name].dtype == bool:
            columns["var", keys.score(name)] = scores[name].reindex(adata.var_names, fill_value=False).astype(bool)
    with slots.writing(adata):
        if layer == LOGNORM:
            add_lognorm(adata)
        slots.drop(adata, keys, score_slots(keys), EVALUATION)
        slots.write(adata, keys, columns, entries)
    average = summary.loc["mean"]
    best = [f"{c} {average[c]:.3f}" for c in ("PCC-10", "PCC-50", "PCC-200", "PCC-all") if pd.notna(average.get(c))]
    logger.info(
        "evaluated on %s, trained on %s: %s, MSE %.3f, 90 %% intervals cover %.0f %%, %d constant predictions",
        sorted(tables),
        trained_on,
        ", ".join(best) or "no correlation is defined",
        average["MSE"],
        100 * average["coverage 90"],
        int(sections["n_constant"].sum()),
    )
    return scores


def _warn_of_training(stored: Mapping[str, Any], sections: Iterable[str], individuals: Iterable[str]) -> list[str]:
    """Warn of sections and individuals that were trained on; returns the sections of training."""
    trained_on, trained_on_groups = (
        {str(name) for name in np.asarray(stored.get(entry, [])).ravel()}
        for entry in ("trained_on", "trained_on_groups")
    )
    seen, seen_groups = sorted(set(sections) & trained_on), sorted(set(individuals) & trained_on_groups)
    if seen:
        logger.warning("sections %s were among those trained on: their scores are not those of unseen tissue", seen)
    if seen_groups:
        logger.warning(
            "individuals %s were among those trained on: their scores are not those of unseen individuals", seen_groups
        )
    return sorted(trained_on)


def _given_depth(
    predicted: NDArray[Any],
    distribution: Distribution,
    spots: NDArray[np.bool_],
    measured: NDArray[Any],
    totals: NDArray[Any] | None,
    random_state: int,
) -> dict[str, float]:
    """Scores of what is predicted of a section when its spots' total counts are known: the predictive check."""
    mean = predicted[spots]
    genes = [str(i) for i in range(mean.shape[1])]
    accuracy = metrics.summary(metrics.per_gene(mean, measured, genes, totals))
    _, spread = _distribution(mean, distribution, spots, measured, random_state)
    scored = {metric.name for metric in metrics.METRICS if GIVEN_DEPTH in metric.variants}
    return {name: value for name, value in {**accuracy, **spread}.items() if name in scored}


def _named(scores: dict[str, float], suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": value for name, value in scores.items()}


def _warn_of_undefined(tables: dict[str, pd.DataFrame], sections: pd.DataFrame, n_spots: dict[str, int]) -> None:
    """Log one warning that says which correlations of which sections are undefined, and why."""
    reasons = []
    single = [s for s in tables if n_spots[s] == 1]
    if single:
        reasons.append(f"correlations in sections {_names(single)}, of a single spot")
    others = {s: table for s, table in tables.items() if n_spots[s] > 1}
    constant, not_finite, explained = {}, {}, {}
    for s, table in others.items():
        undefined, finite = table["pearson"].isna(), np.isfinite(table["mse"])
        constant[s], not_finite[s] = int((undefined & finite).sum()), int((~finite).sum())
        if "partial_pearson" in table and n_spots[s] > 4:
            explained[s] = int((table["partial_pearson"].isna() & ~undefined).sum())
    if any(constant.values()):
        reasons.append(f"correlations of genes whose measurement does not vary ({_counts(constant)})")
    if any(not_finite.values()):
        reasons.append(f"scores of genes whose prediction is NaN or infinite ({_counts(not_finite)})")
    few = [s for s, table in others.items() if n_spots[s] <= 4 and "partial_pearson" in table]
    if few:
        reasons.append(f"PCC-partial in {_names(few)}, of fewer than 5 spots")
    for name in ("gene-structure correlation", "Moran correlation"):
        undefined = [s for s in others if name in sections and np.isnan(sections.loc[s, name])]
        if undefined:
            reasons.append(f"{name} in {_names(undefined)}, of too few genes that vary or too few spots")
    if any(explained.values()):
        reasons.append(f"PCC-partial of genes that depth alone explains ({_counts(explained)})")
    if reasons:
        logger.warning("undefined, and left out of the means: %s", "; ".join(reasons))


def _structure(
    predicted: NDArray[Any], measured: NDArray[Any], neighbors: sparse.csr_matrix | None
) -> dict[str, float]:
    """How variances, co-expression and patterns of genes compare, of one value a spot or of draws."""
    draws = np.moveaxis(predicted, 2, 0) if predicted.ndim == 3 else predicted[None]
    scores = {
        "RVD": float(np.mean([metrics.relative_variance_distance(draw, measured) for draw in draws])),
        "correlation error": metrics.gene_correlation_error(predicted, measured),
        "gene-structure correlation": metrics.gene_structure_correlation(predicted, measured),
    }
    if neighbors is not None:
        correlation, error = metrics.moran_agreement(predicted, measured, neighbors)
        scores |= {"Moran correlation": correlation, "Moran error": error}
    return scores


def _names(names: list[str]) -> str:
    """The first few sections, and how many more there are."""
    more = f" and {len(names) - SECTIONS_NAMED} more" if len(names) > SECTIONS_NAMED else ""
    return f"{names[:SECTIONS_NAMED]}{more}"


def _counts(counts: dict[str, int]) -> str:
    """Numbers of genes by section, the most first."""
    some = sorted(((n, name) for name, n in counts.items() if n), key=lambda pair: -pair[0])
    more = f", and some in {len(some) - SECTIONS_NAMED} more" if len(some) > SECTIONS_NAMED else ""
    return ", ".join(f"{n} in {name!r}" for n, name in some[:SECTIONS_NAMED]) + more


def _distribution(
    predicted: NDArray[Any],
    distribution: Distribution,
    spots: NDArray[np.bool_],
    measured: NDArray[Any],
    random_state: int,
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Scores of the predicted distribution of some spots: those of each gene, and means over the genes.

    The PIT of a single spot has no distribution: its deviation is NaN.
    """
    levels = distribution.levels
    quantiles, intervals = distribution.of(spots, metrics.INTERVALS)
    of_genes = {"crps": metrics.crps_quantiles(quantiles, levels, measured).mean(0)}
    scores = {"CRPS": of_genes["crps"]}
    for share, (low, high) in zip(metrics.INTERVALS, intervals, strict=True):
        name = f"{100 * share:.0f}"
        scores[f"coverage {name}"] = metrics.coverage(low, high, measured)
        scores[f"width {name}"] = (high - low).mean(0)
        if share == 0.9:
            scores["coverage 90 top tenth"] = metrics.top_coverage(low, high, measured, predicted, 0.1)
    of_genes |= {"coverage": scores["coverage 90"], "coverage_top_tenth": scores["coverage 90 top tenth"]}
    place = np.sort(metrics.pit(quantiles, levels, measured, random_state), axis=0)
    even = (np.arange(len(place)) + 0.5) / len(place)
    deviation = float(np.abs(place - even[:, None]).mean()) if len(place) > 1 else float("nan")
    return of_genes, {**{name: float(pd.Series(v).mean()) for name, v in scores.items()}, "PIT deviation": deviation}
