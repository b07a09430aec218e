"""Scores of predicted against measured expression: accuracy, co-expression, uncertainty, and the noise ceiling."""

from .accuracy import (
    is_constant,
    mean_pearson,
    partial_pearson,
    pearson,
    per_gene,
    relative_variance_distance,
    spearman,
    summary,
)
from .ceiling import noise_ceiling
from .coexpression import gene_correlation, gene_correlation_error
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
)

__all__ = [
    "INTERVALS",
    "coverage",
    "crps_normal",
    "crps_quantiles",
    "crps_samples",
    "gene_correlation",
    "gene_correlation_error",
    "interval",
    "is_constant",
    "mean_pearson",
    "noise_ceiling",
    "normal_quantiles",
    "partial_pearson",
    "pearson",
    "per_gene",
    "pit",
    "relative_variance_distance",
    "sample_quantiles",
    "spearman",
    "summary",
]
