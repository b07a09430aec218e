"""Data sets: simulated, and readers of published layouts."""

from .her2st import her2st
from .hest import hest
from .simulate import simulate

__all__ = ["her2st", "hest", "simulate"]
