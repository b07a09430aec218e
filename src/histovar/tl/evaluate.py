"""Predicted against measured expression."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from histovar import metrics
from histovar._arguments import Key, check_arguments
from histovar._keys import DEFAULT_KEY, LOGNORM, Keys, Prefix
from histovar.anndata_io import gate, slots
from histovar.anndata_io.comparison import GivenDepth, read_comparison, read_distribution, read_given_depth
from histovar.anndata_io.expression import add_lognorm, total_counts
from histovar.anndata_io.gate import Data
from histovar.anndata_io.prediction import EVALUATION, read_draws, score_slots

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
    table_name: Key | None = None,
) -> pd.DataFrame:
    """Score a prediction where expression was measured.

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
    table_name
        Table of a SpatialData.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``mse``, ``mae``, ``crps`` and ``coverage`` of 90 % intervals, means
        over the sections, and ``constant``, whether the prediction is constant in any section (its correlation then
        counts as 0). Where X holds counts also ``partial_pearson``, with depth taken out of both sides. Also written to
        ``var[f"{key}_pearson"]`` and so on.

        Scores that are undefined are NaN, left out of all means, and warned of: correlations in a section of one spot
        (``partial_pearson``: of up to 4), and of genes whose measurement does not vary in the section.

        ``uns[key]["evaluation"]`` gets a DataFrame with a row for each section and their ``mean``. Of accuracy:
        ``PCC-10``, ``PCC-50``, ``PCC-200``, ``PCC-all``, ``Spearman``, ``MSE``, ``MAE``, ``PCC-partial``, ``n_genes``,
        ``n_constant``, ``n_undefined`` (:func:`histovar.metrics.summary`). Of variation and co-expression: ``RVD`` and
        ``correlation error`` of the expected expression, and of the draws, where there are any. Of uncertainty:
        ``CRPS``; ``coverage`` and ``width`` of 50, 80, 90 and 95 % intervals; ``PIT deviation``, the mean distance of
        the PIT's distribution from uniform; ``uncertainty PCC``, the correlation of standard deviation with absolute
        error over the spots, mean over the genes. They are taken of the predicted counts (negative binomial) where the
        model learnt from counts, else of the draws where there are any, else of the quantiles where they reach from
        0.025 to 0.975, else of normal distributions; ``uns[key]["evaluated_distribution"]`` says of which.

        Where the model learnt from counts and X holds counts, scores that end in ``given depth`` are of what it
        predicts once every spot's total count is known: the predictive check, in which only the composition is judged.

    Raises
    ------
    KeyError
        If there is no prediction, no such layer, or genes of the panel are missing.
    ValueError
        If measured expression is negative or not finite, or in other units than the prediction.
    """
    adata = gate.table(data, table_name, genes=True)
    keys = Keys(key)
    slots.check_free(adata, keys, score_slots(keys))
    genes, layer, predicted, std, measured, names = read_comparison(adata, keys, layer, library_key)
    stored = slots.record(adata, keys)
    counts = total_counts(adata)
    kind, quantiles, levels = read_distribution(adata, keys, predicted, std)
    samples = read_draws(adata, keys, len(genes))
    given = read_given_depth(adata, keys, counts)
    labels = np.full(adata.n_obs, "all") if names is None else names
    tables, rows, n_spots = {}, {}, {}
    for label in np.unique(labels):
        spots = labels == label
        truth = measured[spots]
        table = metrics.per_gene(predicted[spots], truth, genes, None if counts is None else counts[spots])
        spread = _distribution(quantiles[spots], levels, truth)
        table["crps"], table["coverage"] = spread.pop("crps"), spread.pop("coverage")
        table["uncertainty"] = metrics.pearson(std[spots], np.abs(predicted[spots] - truth))
        rows[str(label)] = {
            **metrics.summary(table),
            **_variation(predicted[spots], truth, ""),
            **({} if samples is None else _variation(samples[spots], truth, " of draws")),
            "CRPS": float(table["crps"].mean()),
            **spread,
            "uncertainty PCC": float(table.pop("uncertainty").mean()),
            **({} if given is None else _given_depth(given, spots, truth, genes)),
        }
        tables[str(label)] = table
        n_spots[str(label)] = len(truth)
    trained_on = {str(s) for s in np.asarray(stored.get("trained_on", [])).ravel()}
    seen = sorted(set(tables) & trained_on)
    if seen:
        logger.warning("sections %s were among those trained on: their scores are not those of unseen tissue", seen)
    _warn_of_undefined(tables, n_spots)
    summary = pd.DataFrame(rows).T
    summary.loc["mean"] = summary.mean()
    summary.index.name = "section"
    everything = pd.concat(tables)
    scores = everything.drop(columns="constant").groupby(level=1).mean().loc[genes]
    scores["constant"] = everything["constant"].groupby(level=1).any().loc[genes]
    if layer == LOGNORM:
        add_lognorm(adata)
    slots.drop(adata, keys, score_slots(keys), EVALUATION)
    columns: dict[slots.Slot, Any] = {}
    for name in map(str, scores):
        columns["var", keys.score(name)] = scores[name].reindex(adata.var_names)
        if scores[name].dtype == bool:
            columns["var", keys.score(name)] = scores[name].reindex(adata.var_names, fill_value=False).astype(bool)
    slots.write(adata, keys, columns, {"evaluation": summary, "evaluated_distribution": kind})
    mean = summary.loc["mean"]
    best = [f"{c} {mean[c]:.3f}" for c in ("PCC-10", "PCC-50", "PCC-200", "PCC-all") if pd.notna(mean.get(c))]
    logger.info(
        "evaluated on %s, trained on %s: %s, MSE %.3f, 90 %% intervals cover %.0f %%, %d constant predictions",
        sorted(tables),
        sorted(trained_on),
        ", ".join(best) or "no correlation is defined",
        mean["MSE"],
        100 * mean["coverage 90"],
        int(summary.drop(index="mean")["n_constant"].sum()),
    )
    return scores


def _given_depth(
    given: GivenDepth, spots: NDArray[np.bool_], measured: NDArray[Any], genes: list[str]
) -> dict[str, float]:
    """Scores of what is predicted of a section when its spots' total counts are known: the predictive check."""
    accuracy = metrics.summary(metrics.per_gene(given.mean[spots], measured, genes))
    spread = _distribution(given.quantiles[spots], given.levels, measured)
    spread.pop("coverage")
    found = {"CRPS": float(spread.pop("crps").mean()), **spread}
    found |= {name: accuracy[name] for name in ("PCC-200", "PCC-all", "MSE") if name in accuracy}
    return {f"{name} given depth": value for name, value in found.items() if not name.startswith("width")}


def _warn_of_undefined(tables: dict[str, pd.DataFrame], n_spots: dict[str, int]) -> None:
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
    if any(explained.values()):
        reasons.append(f"PCC-partial of genes that depth alone explains ({_counts(explained)})")
    if reasons:
        logger.warning("undefined, and left out of the means: %s", "; ".join(reasons))


def _variation(predicted: NDArray[Any], measured: NDArray[Any], what: str) -> dict[str, float]:
    """How variances and correlations of genes compare, of one value a spot or of draws."""
    draws = np.moveaxis(predicted, 2, 0) if predicted.ndim == 3 else predicted[None]
    distances = [metrics.relative_variance_distance(draw, measured) for draw in draws]
    return {
        f"RVD{what}": float(np.mean(distances)),
        f"correlation error{what}": metrics.gene_correlation_error(predicted, measured),
    }


def _names(names: list[str]) -> str:
    """The first few sections, and how many more there are."""
    more = f" and {len(names) - SECTIONS_NAMED} more" if len(names) > SECTIONS_NAMED else ""
    return f"{names[:SECTIONS_NAMED]}{more}"


def _counts(counts: dict[str, int]) -> str:
    """Numbers of genes by section, the most first."""
    some = sorted(((n, name) for name, n in counts.items() if n), key=lambda pair: -pair[0])
    more = f", and some in {len(some) - SECTIONS_NAMED} more" if len(some) > SECTIONS_NAMED else ""
    return ", ".join(f"{n} in {name!r}" for n, name in some[:SECTIONS_NAMED]) + more


def _distribution(quantiles: NDArray[Any], levels: NDArray[Any], measured: NDArray[Any]) -> dict[str, Any]:
    """Scores of the predicted distribution: ``crps`` and ``coverage`` of each gene, the rest means over genes.

    The PIT of a single spot has no distribution: its deviation is NaN.
    """
    scores: dict[str, Any] = {"crps": metrics.crps_quantiles(quantiles, levels, measured).mean(0)}
    for share in metrics.INTERVALS:
        low, high = metrics.interval(quantiles, levels, share)
        covered = metrics.coverage(low, high, measured)
        scores[f"coverage {100 * share:.0f}"] = float(pd.Series(covered).mean())
        scores[f"width {100 * share:.0f}"] = float(pd.Series((high - low).mean(0)).mean())
        if share == 0.9:
            scores["coverage"] = covered
    place = np.sort(metrics.pit(quantiles, levels, measured), axis=0)
    even = (np.arange(len(place)) + 0.5) / len(place)
    scores["PIT deviation"] = float(np.abs(place - even[:, None]).mean()) if len(place) > 1 else float("nan")
    return scores
