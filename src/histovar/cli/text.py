"""Text from files, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with control characters, which a terminal would act on, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
