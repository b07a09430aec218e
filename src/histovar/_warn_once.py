"""Log a warning only once in a call of a public function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_logged: ContextVar[set[str] | None] = ContextVar("logged", default=None)


def warns_once(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that :func:`warn_once` logs each message once while it runs."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _logged.get() is not None:
            return function(*args, **kwargs)
        token = _logged.set(set())
        try:
            return function(*args, **kwargs)
        finally:
            _logged.reset(token)

    return run


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless the running function decorated by :func:`warns_once` has logged it already."""
    logged = _logged.get()
    if logged is None or message not in logged:
        logger.warning("%s", message)
    if logged is not None:
        logged.add(message)
