"""Memory that is freed and asked for again, or given back."""

import ctypes
import sys

import torch


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor.

    glibc gives memory back to the system as soon as more than twice the largest block that was ever freed is unused,
    and on CPUs fresh memory costs more than what a layer computes in it. Freeing one block of 31 MB, which nothing has
    touched, has it keep 62 MB. Elsewhere, and where ``MALLOC_TRIM_THRESHOLD_`` is set, this does nothing.
    """
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
