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

# Warnings name this many sections, and give the number of further ones.
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
    """Score a prediction against measured expression, by section, with confidence intervals.

    Parameters
    ----------
    data
        AnnData or SpatialData that :func:`predict` has written to, with the panel's genes.
    key
        Prefix of the slots, the `key_added` of :func:`predict`.
    layer
        Layer with measured expression; the layer trained on by default.
    library_key
        Column of ``obs`` with the section; that of :func:`predict` by default. Scores are computed within sections and
        averaged over them.
    group_key
        Column of ``obs`` with the individual (patient, animal) of each section; that of training by default, if the
        object has it.
    random_state
        Seed of the bootstrap, and of the random levels in :func:`histovar.metrics.pit`.
    table_name
        Table of a SpatialData.

    Returns
    -------
    DataFrame
        Indexed by gene, means over the sections: ``pearson``, ``spearman``, ``r2``, ``mse``, ``mae``, ``crps``,
        ``coverage`` of 90 % intervals over all spots, and ``coverage_top_tenth`` over the tenth of the spots with the
        gene's highest predictions; and ``constant``, True if the prediction is constant in any section (its correlation
        there counts as 0). If X holds counts also ``partial_pearson``, given depth. They are also written to
        ``var[f"{key}_pearson"]`` and so on.

        Three tables of scores are written, whose columns :func:`histovar.metrics.describe` describes:
        ``uns[key]["evaluation"]`` has a row for each section and their ``mean``; ``uns[key]["evaluation_interval"]``
        the rows ``low`` and ``high``, a 95 % confidence interval of that mean by a bootstrap of individuals, or of
        sections if individuals are unknown (:func:`histovar.metrics.bootstrap_interval`), NaN if there is only one;
        ``uns[key]["evaluation_groups"]``, if individuals are known, means over the sections of each.

        The predicted distribution is negative binomial if the model learnt from counts, else that of the draws if there
        are any, else of the quantiles if they reach from 0.025 to 0.975, else normal;
        ``uns[key]["evaluated_distribution"]`` names it. Columns that end in ``of draws`` exist if there are draws.
        Columns that end in ``given depth`` exist if the model learnt from counts and X holds counts: they score the
        prediction given every spot's total count, a predictive check that judges only the composition. Moran's I needs
        coordinates; neighbours are the 6 nearest spots of the section.

        Undefined scores are NaN, left out of all means, and give a warning: correlations in a section of one spot
        (``partial_pearson``: of up to 4 spots), and of genes whose measurement is constant in the section.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer or column, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite, or in other units than the prediction; if a section belongs to
        several individuals.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key)
    slots.check_free(adata, keys, score_slots(keys))
    genes, layer, predicted, std, measured, names = read_comparison(adata, keys, layer, library_key)
    individuals = read_individuals(adata, keys, group_key, names)
    stored = slots.record(adata, keys)
    target_sum = float(stored.get("normalization", {}).get("target_sum", 0) or TARGET_SUM)
    counts = spot_totals(adata, gate.gene_columns(adata, genes), target_sum)
    if float(stored["params"].get("depth", 0)):
        logger.warning(
            "the prediction is for a depth of %s counts in every spot, unlike the measurement: scores of level and "
            "intervals mean little; predict with depth=None or the spots' own depth",
            f"{float(stored['params']['depth']):,.0f}",
        )
    composed = read_composed(adata, keys)
    distribution = read_distribution(adata, keys, predicted, std, composed)
    samples = read_draws(adata, keys, len(genes))
    at_depth = given_depth(composed, counts)
    neighbors = read_neighbors(adata, keys, names)
    labels = np.full(adata.n_obs, "all") if names is None else names
    tables, rows, n_spots, individual_of = {}, {}, {}, {}
    for label in np.unique(labels).tolist():
        spots = labels == label
        truth, mean = measured[spots], predicted[spots]
        graph = None if neighbors is None else neighbors[spots][:, spots]
        totals = None if counts is None else counts[spots]
        table = metrics.per_gene(mean, truth, genes, totals)
        gene_scores, distribution_scores = _distribution(mean, distribution, spots, truth, random_state)
        uncertainty = metrics.pearson(std[spots], np.abs(mean - truth))
        rows[label] = {
            **metrics.summary(table),
            **_structure(mean, truth, graph),
            **({} if samples is None else _add_suffix(_structure(samples[spots], truth, graph), DRAWS)),
            **distribution_scores,
            "uncertainty PCC": float(pd.Series(uncertainty).mean()),
            **(
                {}
                if at_depth is None
                else _add_suffix(_given_depth(*at_depth, spots, truth, totals, random_state), GIVEN_DEPTH)
            ),
        }
        tables[label] = table.assign(**gene_scores)
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
            "the model is adapted to %d measured spots of this section: if they are among these spots, scores are not "
            "those of unseen spots; evaluate the others alone",
            int(stored["n_adapted_spots"]),
        )
    trained_on = _warn_of_training(stored, sections.index, [] if individuals is None else clusters)
    _warn_of_undefined(tables, sections, n_spots)
    if len(set(clusters)) == 1:
        unit = "section" if individuals is None else "individual"
        logger.info("scores have no intervals: all spots belong to one %s, %r", unit, clusters[0])
    all_tables = pd.concat(tables)
    scores = all_tables.drop(columns="constant").groupby(level=1).mean().loc[genes]
    scores["constant"] = all_tables["constant"].groupby(level=1).any().loc[genes]
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
    """Warn of sections and individuals that were trained on; return the training sections."""
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
    """Score a section's prediction given its spots' total counts: the predictive check."""
    mean = predicted[spots]
    genes = [str(i) for i in range(mean.shape[1])]
    accuracy = metrics.summary(metrics.per_gene(mean, measured, genes, totals))
    _, distribution_scores = _distribution(mean, distribution, spots, measured, random_state)
    names = {metric.name for metric in metrics.METRICS if GIVEN_DEPTH in metric.variants}
    return {name: value for name, value in {**accuracy, **distribution_scores}.items() if name in names}


def _add_suffix(scores: dict[str, float], suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": value for name, value in scores.items()}


def _warn_of_undefined(tables: dict[str, pd.DataFrame], sections: pd.DataFrame, n_spots: dict[str, int]) -> None:
    """Log one warning that lists undefined scores with their sections and reasons."""
    reasons = []
    single = [s for s in tables if n_spots[s] == 1]
    if single:
        reasons.append(f"correlations in sections {_names(single)}, which have a single spot")
    others = {s: table for s, table in tables.items() if n_spots[s] > 1}
    constant, not_finite, explained = {}, {}, {}
    for s, table in others.items():
        undefined, finite = table["pearson"].isna(), np.isfinite(table["mse"])
        constant[s], not_finite[s] = int((undefined & finite).sum()), int((~finite).sum())
        if "partial_pearson" in table and n_spots[s] > 4:
            explained[s] = int((table["partial_pearson"].isna() & ~undefined).sum())
    if any(constant.values()):
        reasons.append(f"correlations of genes whose measurement is constant ({_counts(constant)})")
    if any(not_finite.values()):
        reasons.append(f"scores of genes whose prediction is NaN or infinite ({_counts(not_finite)})")
    few = [s for s, table in others.items() if n_spots[s] <= 4 and "partial_pearson" in table]
    if few:
        reasons.append(f"PCC-partial in {_names(few)}, which have fewer than 5 spots")
    for name in ("gene-structure correlation", "Moran correlation"):
        undefined = [s for s in others if name in sections and np.isnan(sections.loc[s, name])]
        if undefined:
            reasons.append(f"{name} in {_names(undefined)}, with too few spots or too few genes that vary")
    if any(explained.values()):
        reasons.append(f"PCC-partial of genes that depth explains completely ({_counts(explained)})")
    if reasons:
        logger.warning("undefined, and left out of the means: %s", "; ".join(reasons))


def _structure(
    predicted: NDArray[Any], measured: NDArray[Any], neighbors: sparse.csr_matrix | None
) -> dict[str, float]:
    """Scores of variances, co-expression and spatial patterns; `predicted` is one value per spot, or draws."""
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
    """List the first few sections, and how many more there are."""
    more = f" and {len(names) - SECTIONS_NAMED} more" if len(names) > SECTIONS_NAMED else ""
    return f"{names[:SECTIONS_NAMED]}{more}"


def _counts(counts: dict[str, int]) -> str:
    """List numbers of genes by section, the largest first."""
    ranked = sorted(((n, name) for name, n in counts.items() if n), key=lambda pair: -pair[0])
    more = f", and some in {len(ranked) - SECTIONS_NAMED} more" if len(ranked) > SECTIONS_NAMED else ""
    return ", ".join(f"{n} in {name!r}" for n, name in ranked[:SECTIONS_NAMED]) + more


def _distribution(
    predicted: NDArray[Any],
    distribution: Distribution,
    spots: NDArray[np.bool_],
    measured: NDArray[Any],
    random_state: int,
) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
    """Score the predicted distribution of a section's spots: for each gene, and as means over the genes.

    The PIT deviation of a single spot is NaN.
    """
    levels = distribution.levels
    quantiles, intervals = distribution.of(spots, metrics.INTERVALS)
    gene_scores = {"crps": metrics.crps_quantiles(quantiles, levels, measured).mean(0)}
    scores = {"CRPS": gene_scores["crps"]}
    for share, (low, high) in zip(metrics.INTERVALS, intervals, strict=True):
        name = f"{100 * share:.0f}"
        scores[f"coverage {name}"] = metrics.coverage(low, high, measured)
        scores[f"width {name}"] = (high - low).mean(0)
        if share == 0.9:
            scores["coverage 90 top tenth"] = metrics.top_coverage(low, high, measured, predicted, 0.1)
    gene_scores |= {"coverage": scores["coverage 90"], "coverage_top_tenth": scores["coverage 90 top tenth"]}
    pit = np.sort(metrics.pit(quantiles, levels, measured, random_state), axis=0)
    uniform = (np.arange(len(pit)) + 0.5) / len(pit)
    deviation = float(np.abs(pit - uniform[:, None]).mean()) if len(pit) > 1 else float("nan")
    return gene_scores, {**{name: float(pd.Series(v).mean()) for name, v in scores.items()}, "PIT deviation": deviation}
