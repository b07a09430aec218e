"""Memory that is freed and asked for again, or given back."""

import ctypes
import os
import sys


def check_fits(n_bytes: int, what: str, mend: str) -> None:
    """Refuse what needs more memory than the machine has; where that is not known, nothing is refused.

    Parameters
    ----------
    n_bytes
        Memory that it needs.
    what, mend
        The argument and what it asks for, and what to do, for the message.

    Raises
    ------
    ValueError
        If it is more than there is.
    """
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return
    if n_bytes > there:
        raise ValueError(f"{what} need {n_bytes / 1e9:,.0f} GB of memory, this machine has {there / 1e9:,.0f}; {mend}")


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor.

    glibc gives memory back to the system as soon as more than twice the largest block that was ever freed is unused,
    and on CPUs fresh memory costs more than what a layer computes in it. Freeing one block of 31 MB, which nothing has
    touched, has it keep 62 MB. Elsewhere, and where ``MALLOC_TRIM_THRESHOLD_`` is set, this does nothing.
    """
    import torch

    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system, for work that goes through much data part by part.

    Small arrays that are kept of each part lie among the large ones that are freed, and glibc gives back what lies
    behind the last of them alone, so that memory would grow with the number of parts. Without glibc this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
