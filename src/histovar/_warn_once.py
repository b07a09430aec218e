"""Log a warning only once in a call of a public function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
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


def filter_new_warnings(findings: Iterable[str]) -> list[str]:
    """Findings that the running function of :func:`warns_once` has not warned of yet; marks them as warned of."""
    logged = _logged.get()
    if logged is None:
        return list(findings)
    new = [finding for finding in findings if finding not in logged]
    logged.update(new)
    return new


def warn_once(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning, unless a function of :func:`warns_once` that is running has logged it already."""
    if filter_new_warnings([message % values if values else message]):
        logger.warning(message, *values)
