"""Predict spatial gene expression from histology, with uncertainty, inside AnnData."""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", SyntaxWarning)  # of docrep, at every import of squidpy
    import squidpy  # noqa: F401

from . import datasets, get, metrics, pl, pp, tl
from ._version import __version__
from .model import ModelConfig, TwoStageVARST

__all__ = ["ModelConfig", "TwoStageVARST", "__version__", "datasets", "get", "metrics", "pl", "pp", "tl"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
