"""Plots: maps, training, codebook, scores, calibration, co-expression, expected accuracy; and an HTML report."""

from .calibration import calibration
from .codebook import codebook
from .gene_correlation import gene_correlation
from .metrics import metrics
from .report import report
from .spatial import spatial
from .training import training
from .trust import trust

__all__ = ["calibration", "codebook", "gene_correlation", "metrics", "report", "spatial", "training", "trust"]
