"""Libraries that come with an extra, and the `pip install` that brings them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module of an extra.

    Parameters
    ----------
    module
        Name of the module.
    extra
        Extra of histovar that installs it.
    purpose
        What it is needed for.

    Raises
    ------
    ModuleNotFoundError
        If it is not installed; one line that says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing_extra(error, extra, purpose) from None


def missing_extra(error: ModuleNotFoundError, extra: str, purpose: str) -> ModuleNotFoundError:
    """The error to raise where a module of an extra is missing."""
    return ModuleNotFoundError(
        f"{purpose} needs {error.name}, which is not installed: pip install 'histovar[{extra}]'", name=error.name
    )
