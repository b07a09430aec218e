"""Libraries that only some functions need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import a library of an extra.

    Parameters
    ----------
    module
        Its name.
    extra
        The extra of this package that installs it.
    what
        What needs it.

    Raises
    ------
    ImportError
        In one line with the ``pip install`` that mends it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise ImportError(f"{what} needs {module}: pip install 'histovar[{extra}]'") from None
