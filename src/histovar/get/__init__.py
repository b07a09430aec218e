"""Get predictions as AnnData or SpatialData, and tables of a model's genes."""

from .genes import genes
from .prediction import prediction
from .spatialdata import spatialdata

__all__ = ["genes", "prediction", "spatialdata"]
