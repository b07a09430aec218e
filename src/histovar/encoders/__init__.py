"""Image encoders that :func:`histovar.pp.embed` knows by name, and how to bring one of your own."""

from .encoder import Encoder
from .registry import ENCODERS, describe, get

__all__ = ["ENCODERS", "Encoder", "describe", "get"]
