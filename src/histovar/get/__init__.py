"""Get results as AnnData, SpatialData and tables."""

from .genes import genes
from .prediction import prediction
from .spatialdata import spatialdata

__all__ = ["genes", "prediction", "spatialdata"]
