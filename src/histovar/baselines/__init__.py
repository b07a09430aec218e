"""Methods to compare with."""

from .ridge import ridge

__all__ = ["ridge"]
