"""Where to compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from histovar.model import TwoStageVARST


@contextmanager
def on_device(model: TwoStageVARST, device: str) -> Iterator[torch.device]:
    """Move the model to a device for a while, in evaluation mode.

    Raises
    ------
    ValueError
        If the device does not exist.
    """
    home = model.device
    try:
        if device == "auto":  # never MPS by itself: it has given NaN where others do not
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(device)
        model.to(where)
    except (RuntimeError, AssertionError) as error:
        model.to(home)
        raise ValueError(f"device: {device!r} is not available ({str(error).splitlines()[0]}); use 'cpu'") from None
    model.eval()
    try:
        yield where
    finally:
        model.to(home)
