"""Plots."""

from .codebook import codebook
from .metrics import metrics
from .spatial import spatial
from .training import training

__all__ = ["codebook", "metrics", "spatial", "training"]
