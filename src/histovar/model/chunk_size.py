"""Chunk sizes for large products: small enough for a CPU's caches, large enough to keep a GPU busy."""

from __future__ import annotations

import torch

# How many times as large as on a CPU: few, large kernels, as every launch costs microseconds.
GPU_FACTOR = 64


def chunk_size(cpu_size: int, device: torch.device) -> int:
    """Number of items to compute together on a device, at least one.

    Parameters
    ----------
    cpu_size
        Number of items on a CPU.
    device
        The device that computes them.
    """
    return max(1, cpu_size if device.type == "cpu" else GPU_FACTOR * cpu_size)
