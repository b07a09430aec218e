"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def progress(batches: Sequence[T], step: str, *, show: bool) -> Iterable[T]:
    """Go through batches with a progress bar on standard error, if it is to be shown, that names the step."""
    return track(batches, step, console=Console(stderr=True), disable=not show)
