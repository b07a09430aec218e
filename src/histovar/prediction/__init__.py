"""Prediction, at once or chunk by chunk; imports nothing that workers of a cluster do not need."""

from .chunks import predict_lazily
from .device import Device, on_device
from .predictor import Predictor

__all__ = ["Device", "Predictor", "on_device", "predict_lazily"]
