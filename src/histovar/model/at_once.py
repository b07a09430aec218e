"""How much is computed at once: on CPUs what stays in caches and reused memory, elsewhere what keeps a device busy."""

from __future__ import annotations

import torch

# How many times as much as on a CPU: few, large kernels, as every launch costs microseconds.
ON_DEVICES = 64


def at_once(on_cpu: int, device: torch.device) -> int:
    """Number of items to compute at once on a device, at least one.

    Parameters
    ----------
    on_cpu
        Number of items on a CPU.
    device
        Where they are computed.
    """
    return max(1, on_cpu if device.type == "cpu" else ON_DEVICES * on_cpu)
