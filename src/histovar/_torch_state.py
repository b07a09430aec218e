"""Leave torch's number of threads and default dtype as the user has set them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def keep_threads() -> Iterator[None]:
    """Restore torch's number of threads afterwards: numba, used by scanpy and squidpy, sets OpenMP's to all cores."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


class _Float32:
    """Make float32 torch's default dtype while any thread needs it; the last thread restores the user's dtype."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_running = 0
        self.users_dtype = torch.float32

    def __enter__(self) -> None:
        with self.lock:
            if self.n_running == 0:
                self.users_dtype = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self.n_running += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.n_running -= 1
            if self.n_running == 0:
                torch.set_default_dtype(self.users_dtype)


_float32 = _Float32()


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run with float32 as torch's default dtype, whatever the user has set."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _float32:
            return function(*args, **kwargs)

    return run
