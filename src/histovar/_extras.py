"""Import optional dependencies, or say which `pip install` brings them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Parameters
    ----------
    module
        Name of the module.
    extra
        Extra of histovar that installs it.
    purpose
        The feature that needs it, for the message.

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
    """Make the error for a missing optional dependency, naming the `pip install` that brings it."""
    return ModuleNotFoundError(
        f"{purpose} needs {error.name}, which is not installed: pip install 'histovar[{extra}]'", name=error.name
    )
