"""Baselines: other methods for the same task, behind one interface; see :func:`histovar.tl.baseline`."""

from .linear import HestRidge, TunedRidge, pls
from .mfbp import MFBP
from .mlp import MLP
from .model import METHODS, Baseline
from .neighbors import kernel_ridge, knn
from .var_st import VARST

__all__ = ["METHODS", "MFBP", "MLP", "VARST", "Baseline", "HestRidge", "TunedRidge", "kernel_ridge", "knn", "pls"]
