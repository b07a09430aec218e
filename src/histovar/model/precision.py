"""Full precision inside mixed-precision training, for sums in which large numbers cancel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Switch autocast off on a device, so that products keep the precision of their tensors."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
