"""Exchange with programs in which slides are looked at and annotated."""

from .annotations import read_geojson
from .geojson import write_geojson

__all__ = ["read_geojson", "write_geojson"]
