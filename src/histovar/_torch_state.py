"""Threads and data types that belong to the user, kept as they were set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def keep_threads() -> Iterator[None]:
    """Restore torch's number of threads afterwards: numba, in scanpy and squidpy, sets OpenMP's to all cores."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with 32-bit floats as torch's default, whatever the user has set with ``set_default_dtype``."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(dtype)

    return run
