"""Scores that compare predicted with measured expression; :func:`describe` lists them with formulas and sources."""

from .accuracy import (
    is_constant,
    mean_pearson,
    partial_pearson,
    pearson,
    per_gene,
    r2,
    relative_variance_distance,
    spearman,
    summary,
)
from .bootstrap import bootstrap_interval
from .ceiling import noise_ceiling
from .coexpression import gene_correlation, gene_correlation_error, gene_structure_correlation
from .registry import METRICS, describe
from .spatial import moran_agreement, morans_i
from .uncertainty import (
    INTERVALS,
    coverage,
    crps_normal,
    crps_quantiles,
    crps_samples,
    interval,
    normal_quantiles,
    pit,
    sample_quantiles,
    top_coverage,
)

__all__ = [
    "INTERVALS",
    "METRICS",
    "bootstrap_interval",
    "coverage",
    "crps_normal",
    "crps_quantiles",
    "crps_samples",
    "describe",
    "gene_correlation",
    "gene_correlation_error",
    "gene_structure_correlation",
    "interval",
    "is_constant",
    "mean_pearson",
    "moran_agreement",
    "morans_i",
    "noise_ceiling",
    "normal_quantiles",
    "partial_pearson",
    "pearson",
    "per_gene",
    "pit",
    "r2",
    "relative_variance_distance",
    "sample_quantiles",
    "spearman",
    "summary",
    "top_coverage",
]
