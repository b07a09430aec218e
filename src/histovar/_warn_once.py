"""Warnings that a public function logs once, however often it meets what they warn of."""

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
    """Log each :func:`warn_once` once while a function, and those that it calls, run."""

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


def not_warned_of(findings: Iterable[str]) -> list[str]:
    """Those findings that a running function of :func:`warns_once` has not warned of; from now on it has."""
    logged = _logged.get()
    if logged is None:
        return list(findings)
    new = [finding for finding in findings if finding not in logged]
    logged.update(new)
    return new


def warn_once(logger: logging.Logger, message: str, *values: object) -> None:
    """Log a warning, unless a function of :func:`warns_once` that is running has logged it already."""
    if not_warned_of([message % values if values else message]):
        logger.warning(message, *values)
