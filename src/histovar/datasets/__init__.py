"""Simulate data sets, and read published ones (HEST-1k, HER2-positive breast cancer)."""

from .her2st import her2st
from .hest import hest
from .simulate import simulate

__all__ = ["her2st", "hest", "simulate"]
