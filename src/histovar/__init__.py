"""Predict spatial gene expression from histology, with uncertainty, inside AnnData."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._collection import no_garbage_collection
from ._version import __version__

if TYPE_CHECKING:
    from . import datasets, encoders, get, io, metrics, pl, pp, tl
    from .model import ModelConfig, TwoStageVARST

__all__ = [
    "ModelConfig",
    "TwoStageVARST",
    "__version__",
    "datasets",
    "encoders",
    "get",
    "io",
    "metrics",
    "pl",
    "pp",
    "tl",
]


def __getattr__(name: str) -> Any:
    """Import a subpackage when it is first used: some take seconds and half a gigabyte of memory."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with no_garbage_collection():
        if name in ("ModelConfig", "TwoStageVARST"):
            return getattr(import_module(f"{__name__}.model"), name)
        return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
