"""Make text from files safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Escape control characters, which a terminal would act on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
