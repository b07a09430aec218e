"""Run a case in a forked process, and tell its outcome."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

MOST_SECONDS = 60
# Address space that a case may take beyond that of its process at the start: a damaged size must not fill the memory.
MOST_MEMORY = 4 * 2**30


def outcome(case: Callable[[], str]) -> str:
    """Run a case in a forked process, as a damaged file may end it, and tell its outcome.

    Parameters
    ----------
    case
        The case; what it returns is its outcome.

    Returns
    -------
    What the case returns; "refused" if it raises an error of one line that a user may cause; else what went wrong.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(_run_limited(case))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


def _run_limited(case: Callable[[], str]) -> str:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, -1))
    signal.alarm(MOST_SECONDS)
    try:
        return case()
    except (ValueError, FileNotFoundError) as error:
        lines = str(error).splitlines()
        return "refused" if len(lines) == 1 else f"refused in {len(lines)} lines: {lines[:3]}"
    except MemoryError:
        return "refused"
    except BaseException as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"


def compare(prediction: np.ndarray, expected: np.ndarray) -> str:
    """Outcome of a prediction: "whole" if as expected, "unseen" if other numbers but finite, else what is wrong."""
    if not np.isfinite(prediction).all():
        return "not finite"
    return "whole" if prediction.shape == expected.shape and np.allclose(prediction, expected, atol=1e-4) else "unseen"


def run_and_kill(run: Callable[[], object], moment: float | Callable[[], bool]) -> bool:
    """Run in a forked process and kill it, after some seconds or at a moment; return whether it was killed in time."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    start = time.monotonic()
    while not (moment() if callable(moment) else time.monotonic() - start > moment):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def damage(content: bytes, rng: np.random.Generator, kind: str) -> bytes:
    """Flip one bit of a file's content, or cut it short."""
    if kind == "cut":
        return content[: rng.integers(len(content))]
    flipped = bytearray(content)
    flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    return bytes(flipped)
