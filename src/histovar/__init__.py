"""Predict spatial gene expression from histology, with uncertainty, inside AnnData."""

import logging

from . import datasets, get, metrics, pl, pp, tl
from ._version import __version__
from .model import ModelConfig, TwoStageVARST

__all__ = ["ModelConfig", "TwoStageVARST", "__version__", "datasets", "get", "metrics", "pl", "pp", "tl"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
