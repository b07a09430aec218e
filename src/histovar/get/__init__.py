"""Results in the shapes that other packages take."""

from .genes import genes
from .prediction import prediction
from .spatialdata import spatialdata

__all__ = ["genes", "prediction", "spatialdata"]
