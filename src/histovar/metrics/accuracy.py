"""Accuracy of predicted expression: correlations, R2, errors, variances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from histovar._arguments import KeyList, check_arguments

from ._arrays import Matrix, OtherSpots, Spots

# A column whose standard deviation is at most this share of its largest magnitude is constant up to rounding.
CONSTANT = 1e-6
# Numbers of best genes over which the correlation is averaged.
BEST = (10, 50, 200)
# Means in a summary that need a column not in every table.
OPTIONAL = {"R2": "r2", "PCC-partial": "partial_pearson"}


@check_arguments
def pearson(predicted: Matrix, measured: Matrix) -> NDArray[np.float64]:
    """Pearson correlation of every gene over the spots.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).

    Returns
    -------
    ndarray
        (n_genes,); NaN where it is undefined: the measurement is constant, there are fewer than 2 spots, or a value is
        NaN or infinite. 0 where only the prediction is constant.
    """
    return _by_convention(_correlate(predicted, measured), predicted, measured)


@check_arguments
def is_constant(values: Matrix) -> NDArray[np.bool_]:
    """Mask of the columns of (n_spots, n_genes) that are constant up to rounding; False for columns with NaN."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        return np.ones(x.shape[1:], dtype=bool)
    with np.errstate(invalid="ignore"):  # infinite values: NaN
        result: NDArray[np.bool_] = x.std(0) <= CONSTANT * np.abs(x).max(0)
    return result


@check_arguments
def spearman(predicted: Matrix, measured: Matrix) -> NDArray[np.float64]:
    """Spearman correlation of every gene over the spots.

    Arguments, NaN and 0 are as in :func:`pearson`.
    """
    ranks = _correlate(rankdata(predicted, axis=0), rankdata(measured, axis=0))
    return _by_convention(ranks, predicted, measured)


@check_arguments
def partial_pearson(predicted: Matrix, measured: Matrix, total_counts: Spots) -> NDArray[np.float64]:
    """Partial Pearson correlation of every gene, given sequencing depth.

    A spot's total count alone correlates with most log-normalised genes. Here its logarithm, linear and squared, is
    regressed out of prediction and measurement before they are correlated.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).
    total_counts
        (n_spots,) total count of each spot, over all genes measured.

    Returns
    -------
    ndarray
        (n_genes,); NaN where it is undefined: depth explains the measurement completely, there are fewer than 5 spots,
        or :func:`pearson` is undefined. 0 where depth explains the prediction completely, or it is constant.
    """
    depth = np.log1p(np.asarray(total_counts, dtype=np.float64))
    if len(depth) <= 4 or not np.isfinite(depth).all():
        return np.full(np.shape(measured)[1], np.nan)
    return pearson(without_depth(predicted, depth), without_depth(measured, depth))


def _correlate(predicted: NDArray[Any], measured: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson correlation of the columns; values for constant columns are meaningless."""
    p, m = (np.asarray(x, dtype=np.float64) for x in (predicted, measured))
    if len(p) < 2:
        return np.full(p.shape[1], np.nan)
    with np.errstate(invalid="ignore"):  # infinite values: NaN
        p, m = p - p.mean(0), m - m.mean(0)
        norm = np.sqrt((p**2).sum(0)) * np.sqrt((m**2).sum(0))
        correlation: NDArray[np.float64] = (p * m).sum(0) / np.where(norm > 0, norm, 1)
    return correlation


def _by_convention(scores: NDArray[np.float64], predicted: NDArray[Any], measured: NDArray[Any]) -> NDArray[np.float64]:
    """Set correlations to NaN where they are undefined, and to 0 where only the prediction is constant."""
    finite = np.isfinite(predicted).all(0) & np.isfinite(measured).all(0)
    undefined = ~finite | is_constant(measured)
    return np.where(undefined, np.nan, np.where(is_constant(predicted), 0.0, scores))


def without_depth(values: NDArray[Any], depth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Residuals of a regression on depth: 0 for genes that depth explains up to rounding, NaN for genes with NaN."""
    design = np.stack([np.ones_like(depth), depth, depth**2], 1)
    x = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(x).all(0)
    x = np.where(finite, x, 0.0)  # one NaN would make all genes NaN
    residuals = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    explained = residuals.std(0) <= CONSTANT * np.abs(x).max(0)
    return np.where(finite, np.where(explained, 0.0, residuals), np.nan)


@check_arguments
def r2(predicted: Matrix, measured: Matrix) -> NDArray[np.float64]:
    """Coefficient of determination (R2) of every gene: the share of its variance over the spots that is predicted.

    ``1 - sum((predicted - measured)**2) / sum((measured - mean(measured))**2)`` (Wright 1921). Unlike a correlation it
    depends on level and scale: predicting the gene's mean gives 0, and a worse prediction a negative value.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).

    Returns
    -------
    ndarray
        (n_genes,); NaN where :func:`pearson` is.
    """
    p, m = (np.asarray(x, dtype=np.float64) for x in (predicted, measured))
    undefined = np.isnan(pearson(p, m))
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values: NaN
        total = ((m - m.mean(0)) ** 2).sum(0) if len(m) else np.zeros(m.shape[1])
        share: NDArray[np.float64] = 1 - ((p - m) ** 2).sum(0) / np.where(undefined, 1, total)
    return np.where(undefined, np.nan, share)


@check_arguments
def relative_variance_distance(predicted: Matrix, measured: OtherSpots) -> float:
    """Relative variance distance (RVD) of predicted and measured variances of the genes over the spots.

    The mean over genes of ``((var(predicted) - var(measured)) / var(measured))**2``, the RVD of Zhu et al. 2025 (Stem).
    Genes measured as constant are left out; NaN if no gene is left. 0 is perfect; a constant prediction scores 1, and
    the conditional mean of noisy genes scores nearly 1.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes), of the same genes; spots may differ.
    """
    varies = ~is_constant(measured)
    if not varies.any():
        return float("nan")
    with np.errstate(invalid="ignore"):  # infinite values: NaN
        p, m = (np.asarray(x, dtype=np.float64)[:, varies].var(0) for x in (predicted, measured))
    return float((((p - m) / m) ** 2).mean())


@check_arguments
def mean_pearson(predicted: Matrix, measured: Matrix) -> float:
    """Mean Pearson correlation over the genes for which it is defined; NaN if there are none."""
    scores = pearson(predicted, measured)
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else float("nan")


@check_arguments
def per_gene(
    predicted: Matrix,
    measured: Matrix,
    genes: KeyList,
    total_counts: Spots | None = None,
) -> pd.DataFrame:
    """Score every gene by all metrics that are defined for a gene, as a table.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    genes
        Names of the genes.
    total_counts
        (n_spots,) total count of each spot; None where unknown.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``r2``, ``mse``, ``mae`` and ``constant``, True where the prediction
        is constant and the correlation therefore 0; with `total_counts` also ``partial_pearson``. Correlations and
        ``r2`` are NaN where they are undefined (:func:`pearson`).
    """
    if len(genes) != predicted.shape[1]:
        raise ValueError(f"genes: expected {predicted.shape[1]} names, as in predicted, got {len(genes)}")
    correlation = pearson(predicted, measured)
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(measured, dtype=np.float64)
    columns = {
        "pearson": correlation,
        "spearman": spearman(predicted, measured),
        "r2": r2(predicted, measured),
        "mse": (error**2).mean(0),
        "mae": np.abs(error).mean(0),
        "constant": is_constant(predicted) & ~np.isnan(correlation),
    }
    if total_counts is not None:
        columns["partial_pearson"] = partial_pearson(predicted, measured, total_counts)
    return pd.DataFrame(columns, index=pd.Index(list(genes), name="gene"))


@check_arguments
def summary(scores: pd.DataFrame) -> dict[str, float]:
    """Summarise the scores of genes (:func:`~histovar.metrics.per_gene`) as one number for each score.

    Parameters
    ----------
    scores
        The table that :func:`per_gene` returns.

    Returns
    -------
    dict
        ``PCC-10``, ``PCC-50`` and ``PCC-200``: mean Pearson correlation of the best 10, 50 and 200 genes (of all genes
        with a defined correlation, if these are fewer); left out if the panel has fewer genes. Means over the genes for
        which a score is defined: ``PCC-all``, ``Spearman``, ``MSE``, ``MAE``, and ``R2`` and ``PCC-partial`` if the
        table has ``r2`` and ``partial_pearson``. Numbers of genes: ``n_genes`` in all; ``n_constant`` with a constant
        prediction, whose correlation counts as 0; ``n_undefined`` with an undefined correlation, which are left out.

    Raises
    ------
    KeyError
        If a column is missing.
    """
    missing = [name for name in ("pearson", "spearman", "mse", "mae", "constant") if name not in scores]
    if missing:
        raise KeyError(f"scores: no columns {missing}; expected the table that histovar.metrics.per_gene returns")
    ranked = scores["pearson"].dropna().sort_values(ascending=False)
    result = {f"PCC-{n}": float(ranked.head(n).mean()) for n in BEST if n <= len(scores)}
    result |= {
        "PCC-all": float(ranked.mean()),
        "Spearman": float(scores["spearman"].mean()),
        "MSE": float(scores["mse"].mean()),
        "MAE": float(scores["mae"].mean()),
        **{name: float(scores[column].mean()) for name, column in OPTIONAL.items() if column in scores},
        "n_genes": len(scores),
        "n_constant": int(scores["constant"].sum()),
        "n_undefined": len(scores) - len(ranked),
    }
    return result
