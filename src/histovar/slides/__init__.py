"""Open slides and images of tissue (slide formats, image files, arrays) and read patches from them."""

from .files import open_image
from .image import ArrayImage, TissueImage
from .patches import Patches

__all__ = ["ArrayImage", "Patches", "TissueImage", "open_image"]
