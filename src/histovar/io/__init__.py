"""Exchange predictions and annotations with QuPath, as GeoJSON."""

from .annotations import read_geojson
from .geojson import write_geojson

__all__ = ["read_geojson", "write_geojson"]
