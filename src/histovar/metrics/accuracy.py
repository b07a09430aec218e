"""How near predicted expression is to measured expression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

# A column whose standard deviation is below this share of its mean magnitude is constant up to rounding.
CONSTANT = 1e-6


def pearson(predicted: NDArray[Any], measured: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson correlation of every gene over the spots.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).

    Returns
    -------
    ndarray
        (n_genes,); 0 where either is constant, for which a correlation is not defined.
    """
    p = np.asarray(predicted, dtype=np.float64)
    m = np.asarray(measured, dtype=np.float64)
    constant = is_constant(p) | is_constant(m)
    p, m = p - p.mean(0), m - m.mean(0)
    norm = np.sqrt((p**2).sum(0) * (m**2).sum(0))
    return np.where(constant, 0.0, (p * m).sum(0) / np.where(norm > 0, norm, 1))


def is_constant(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each column of (n_spots, n_genes) is the same for all spots, up to rounding."""
    spread = np.asarray(values, dtype=np.float64).std(0)
    result: NDArray[np.bool_] = spread <= CONSTANT * np.abs(values).max(0, initial=0)
    return result


def spearman(predicted: NDArray[Any], measured: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman correlation of every gene over the spots; arguments and constants as in :func:`pearson`."""
    constant = is_constant(predicted) | is_constant(measured)
    ranks = pearson(rankdata(predicted, axis=0), rankdata(measured, axis=0))
    return np.where(constant, 0.0, ranks)


def partial_pearson(predicted: NDArray[Any], measured: NDArray[Any], total_counts: NDArray[Any]) -> NDArray[np.float64]:
    """Pearson correlation of every gene with sequencing depth taken out of both sides.

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
        (n_genes,); 0 where either is constant, and where there are too few spots for the regression.
    """
    p, m = (np.asarray(x, dtype=np.float64) for x in (predicted, measured))
    constant = is_constant(p) | is_constant(m)
    if len(p) <= 4:
        return np.zeros(p.shape[1])
    p, m = (_without_depth(x, total_counts) for x in (p, m))
    return np.where(constant, 0.0, pearson(p, m))


def _without_depth(values: NDArray[np.float64], total_counts: NDArray[Any]) -> NDArray[np.float64]:
    depth = np.log1p(np.asarray(total_counts, dtype=np.float64))
    design = np.stack([np.ones_like(depth), depth, depth**2], 1)
    fitted: NDArray[np.float64] = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return values - fitted


def relative_variance_distance(predicted: NDArray[Any], measured: NDArray[Any]) -> float:
    """How far the genes' variances over the spots are from the measured ones.

    The mean over genes of ``((var(predicted) - var(measured)) / var(measured))**2``, the RVD of Zhu et al. 2025 (Stem).
    Genes measured as constant are left out. 0 is perfect; a constant prediction scores 1, and so, nearly, does any
    conditional mean of noisy genes.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes).
    """
    p, m = (np.asarray(x, dtype=np.float64).var(0) for x in (predicted, measured))
    usable = ~is_constant(measured)
    return float((((p - m)[usable] / m[usable]) ** 2).mean()) if usable.any() else 0.0


def mean_pearson(predicted: NDArray[Any], measured: NDArray[Any]) -> float:
    """Mean of :func:`pearson` over the genes."""
    return float(pearson(predicted, measured).mean())


def per_gene(
    predicted: NDArray[Any],
    measured: NDArray[Any],
    genes: Sequence[str],
    total_counts: NDArray[Any] | None = None,
) -> pd.DataFrame:
    """Scores of every gene.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    genes
        Their names.
    total_counts
        (n_spots,), where known.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``mse``, ``mae`` and ``constant``, whether the prediction is
        constant; with `total_counts` also ``partial_pearson``.
    """
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(measured, dtype=np.float64)
    columns = {
        "pearson": pearson(predicted, measured),
        "spearman": spearman(predicted, measured),
        "mse": (error**2).mean(0),
        "mae": np.abs(error).mean(0),
        "constant": is_constant(predicted),
    }
    if total_counts is not None:
        columns["partial_pearson"] = partial_pearson(predicted, measured, total_counts)
    return pd.DataFrame(columns, index=pd.Index(list(genes), name="gene"))


def summary(scores: pd.DataFrame) -> dict[str, float]:
    """Summary of the scores of :func:`per_gene`.

    Parameters
    ----------
    scores
        What :func:`per_gene` returned.

    Returns
    -------
    dict
        ``PCC-10``, ``PCC-50`` and ``PCC-200``: mean Pearson of the best 10, 50, 200 genes (those that there are
        genes enough for), ``PCC-all``, mean ``Spearman``, ``MSE``, ``MAE``, ``PCC-partial`` where there is
        ``partial_pearson``, and the numbers of genes and of constant predictions.
    """
    ranked = scores["pearson"].sort_values(ascending=False)
    result = {f"PCC-{n}": float(ranked.head(n).mean()) for n in (10, 50, 200) if n <= len(ranked)}
    result |= {
        "PCC-all": float(ranked.mean()),
        "Spearman": float(scores["spearman"].mean()),
        "MSE": float(scores["mse"].mean()),
        "MAE": float(scores["mae"].mean()),
        **({"PCC-partial": float(scores["partial_pearson"].mean())} if "partial_pearson" in scores else {}),
        "n_genes": len(scores),
        "n_constant": int(scores["constant"].sum()),
    }
    return result
