"""Check the ``device`` argument, and move a model to a device for the time of a computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch

from histovar._arguments import Converted, refuse_type, refuse_value
from histovar.model import TwoStageVARST


def _device(value: Any) -> str:
    """Check ``device``: ``"auto"`` or a device of torch."""
    if isinstance(value, torch.device):
        value = str(value)
    if not isinstance(value, str):
        refuse_type("'auto' or a device of torch, such as 'cpu'")
    try:
        exists = value == "auto" or torch.device(value).type != "meta"  # meta tensors have no values
    except RuntimeError:
        exists = False
    return value if exists else refuse_value("'auto' or a device of torch, such as 'cpu'")


Device = Annotated[str, Converted(_device)]


@contextmanager
def on_device(model: TwoStageVARST, device: str) -> Iterator[torch.device]:
    """Move a model to a device for a ``with`` block, in evaluation mode, and back.

    Raises
    ------
    ValueError
        If the device does not exist.
    """
    with moved(model, device, model.device) as target:
        model.eval()
        yield target


@contextmanager
def moved(module: torch.nn.Module, device: str, home: torch.device) -> Iterator[torch.device]:
    """Move a module to a device for a ``with`` block, and then to the device `home`.

    Raises
    ------
    ValueError
        If the device does not exist.
    """
    try:
        if device == "auto":  # never MPS: it has given NaN where other devices do not
            device = "cuda" if torch.cuda.is_available() else "cpu"
        target = torch.device(device)
        module.to(target)
    except (RuntimeError, AssertionError) as error:
        module.to(home)
        raise ValueError(f"device: {device!r} is not available ({str(error).splitlines()[0]}); use 'cpu'") from None
    try:
        yield target
    finally:
        module.to(home)
