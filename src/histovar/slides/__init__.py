"""Images of tissue, from slide scanners, image files, SpatialData or memory, read patch by patch."""

from .files import open_image
from .image import ArrayImage, TissueImage
from .patches import Patches

__all__ = ["ArrayImage", "Patches", "TissueImage", "open_image"]
