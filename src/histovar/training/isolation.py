"""Keep training from changing the state of the process: random state, loggers, signals; one training run at a time.

Training runs in several threads wait for each other: torch's global random state, from which dropout and k-means draw,
belongs to the process, and each run must give the same model as it would alone.
"""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

_process_lock = threading.RLock()


@contextmanager
def exclusive_training() -> Iterator[None]:
    """Hold the lock that lets only one thread of the process train at a time."""
    if not _process_lock.acquire(blocking=False):
        logger.info("waiting for another thread that is training, as both would draw from torch's random state")
        _process_lock.acquire()
    try:
        yield
    finally:
        _process_lock.release()


def one_training_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run only while no other thread of the process trains."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with exclusive_training():
            return function(*args, **kwargs)

    return run


@contextmanager
def seeded(random_state: int) -> Iterator[None]:
    """Seed torch for a block of code, then restore its global random state; other training threads wait meanwhile."""
    with exclusive_training(), torch.random.fork_rng():
        torch.manual_seed(random_state)
        yield


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banners and advice for a block of code."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities")]
    with exclusive_training(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|isinstance.treespec).*")
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt; Lightning turns it into SystemExit, and ignores further ones.

    In other threads than the main one, where signals cannot be set, Lightning turns it into a ValueError.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        yield
    except (SystemExit, ValueError) as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
