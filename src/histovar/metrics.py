"""Scores of predicted against measured expression."""

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


def mean_pearson(predicted: NDArray[Any], measured: NDArray[Any]) -> float:
    """Mean of :func:`pearson` over the genes."""
    return float(pearson(predicted, measured).mean())


def per_gene(predicted: NDArray[Any], measured: NDArray[Any], genes: Sequence[str]) -> pd.DataFrame:
    """Scores of every gene.

    Parameters
    ----------
    predicted, measured
        (n_spots, n_genes) in the same units.
    genes
        Their names.

    Returns
    -------
    DataFrame
        Indexed by gene: ``pearson``, ``spearman``, ``mse``, ``mae`` and ``constant``, whether the prediction is
        constant.
    """
    error = np.asarray(predicted, dtype=np.float64) - np.asarray(measured, dtype=np.float64)
    columns = {
        "pearson": pearson(predicted, measured),
        "spearman": spearman(predicted, measured),
        "mse": (error**2).mean(0),
        "mae": np.abs(error).mean(0),
        "constant": is_constant(predicted),
    }
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
        genes enough for), ``PCC-all``, mean ``Spearman``, ``MSE``, ``MAE``, and the numbers of genes and of
        constant predictions.
    """
    ranked = scores["pearson"].sort_values(ascending=False)
    result = {f"PCC-{n}": float(ranked.head(n).mean()) for n in (10, 50, 200) if n <= len(ranked)}
    result |= {
        "PCC-all": float(ranked.mean()),
        "Spearman": float(scores["spearman"].mean()),
        "MSE": float(scores["mse"].mean()),
        "MAE": float(scores["mae"].mean()),
        "n_genes": len(scores),
        "n_constant": int(scores["constant"].sum()),
    }
    return result
