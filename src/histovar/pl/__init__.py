"""Plots: maps, training, codebook, scores, calibration, co-expression, genes one can trust."""

from .calibration import calibration
from .codebook import codebook
from .gene_correlation import gene_correlation
from .metrics import metrics
from .spatial import spatial
from .training import training
from .trust import trust

__all__ = ["calibration", "codebook", "gene_correlation", "metrics", "spatial", "training", "trust"]
