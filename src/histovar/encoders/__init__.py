"""Image encoders for :func:`histovar.pp.embed`: those known by name, and the class to describe your own."""

from .encoder import Encoder
from .registry import ENCODERS, describe, get

__all__ = ["ENCODERS", "Encoder", "describe", "get"]
