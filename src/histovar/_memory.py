"""Check that work fits into memory; have the C library keep or return freed memory."""

import ctypes
import os
import sys


def check_fits(n_bytes: int, what: str, mend: str) -> None:
    """Raise an error if work needs more memory than the machine has; does nothing where its memory is unknown.

    Parameters
    ----------
    n_bytes
        Memory needed, in bytes.
    what, mend
        For the message: the argument and what needs the memory, and how to need less.

    Raises
    ------
    ValueError
        If more is needed than the machine has.
    """
    try:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return
    if n_bytes > available:
        raise ValueError(
            f"{what} need {n_bytes / 1e9:,.0f} GB of memory, this machine has {available / 1e9:,.0f}; {mend}"
        )


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor.

    glibc returns memory to the system as soon as the unused memory exceeds twice the largest block ever freed, and on
    CPUs getting fresh memory takes longer than computing a layer in it. Freeing one untouched block of 31 MB makes
    glibc keep 62 MB. Without glibc, and where ``MALLOC_TRIM_THRESHOLD_`` is set, this does nothing.
    """
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def return_freed_memory() -> None:
    """Have the C library return freed memory to the system; for work that goes through much data chunk by chunk.

    The small results kept of each chunk lie among its large arrays, which are freed, and by itself glibc returns only
    the memory behind the last small array: memory would grow with the number of chunks. Without glibc this does
    nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
