"""Exchange predictions and annotations with QuPath, and run models in LazySlide."""

from .annotations import read_geojson
from .geojson import write_geojson
from .lazyslide import LazySlideModel

__all__ = ["LazySlideModel", "read_geojson", "write_geojson"]
