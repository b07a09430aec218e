"""Prediction in memory or chunk by chunk with dask; imports only what workers of a cluster need."""

from .chunks import predict_lazily
from .device import Device, on_device
from .predictor import Predictor

__all__ = ["Device", "Predictor", "on_device", "predict_lazily"]
