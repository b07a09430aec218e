"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(batches: Sequence[T], step: str, *, show: bool) -> Iterable[T]:
    """Iterate over batches with a progress bar on standard error that names the step; without one unless ``show``."""
    return track(batches, step, console=Console(stderr=True), disable=not show)
