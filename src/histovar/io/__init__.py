"""Exchange with programs in which slides are looked at, analysed and annotated."""

from .annotations import read_geojson
from .geojson import write_geojson
from .lazyslide import LazySlideModel

__all__ = ["LazySlideModel", "read_geojson", "write_geojson"]
