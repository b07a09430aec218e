"""Name options of the command line in messages and log lines about arguments of Python functions."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Arguments of functions whose options have other names.
OTHER_NAMES = {
    "covariates": "covariate",
    "genes": "gene",
    "max_epochs": "epochs",
    "path": "model",
    "quantiles": "quantile",
    "random_state": "seed",
}
# "name: ..." or "name, name: ..." at the start of a message.
LEADING = re.compile(r"^(\w+(?:, \w+)*)(?=: )")
# What is in quotes, or else "name=" and the beginning of its value.
QUOTED_OR_ASSIGNED = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)|(?<![\w./-])(\w+)=(True\b|False\b)?(?=(.?))""")


class Option(NamedTuple):
    """How an option is given, and how a flag is turned off."""

    on: str
    off: str


def options_of(parameters: Iterable[Any]) -> dict[str, Option]:
    """Options of a command, by the names of the Python arguments that they give; what has no option in capitals."""
    options = {}
    for parameter in parameters:
        if parameter.name == "model" and parameter.metavar != "PATH" and parameter.opts[0].startswith("--"):
            continue  # the kind of model to train, where functions mean a trained one
        on = parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.name.upper()
        options[parameter.name] = Option(on, (parameter.secondary_opts or [on])[0])
    return options | {name: options[other] for name, other in OTHER_NAMES.items() if other in options}


def with_options(message: str, options: Mapping[str, Option]) -> str:
    """Name options in a message about arguments: ``mpp: ...`` as ``--mpp: ...``, ``pass layer=`` as ``pass --layer``.

    What is in quotes, or looks like a call of a Python function, is left as it is.
    """

    def leading(match: re.Match[str]) -> str:
        names = match[1].split(", ")
        return ", ".join(options[name].on for name in names) if options.keys() >= set(names) else match[1]

    def assigned(match: re.Match[str]) -> str:
        name, flag, following = match.groups()
        if name not in options or following == "{" or _is_in_call(message, match.start()):
            return match[0]
        given = options[name].off if flag == "False" else options[name].on
        return given if flag or not re.match(r"[\w'\"]", following) else f"{given} "

    return LEADING.sub(leading, QUOTED_OR_ASSIGNED.sub(assigned, message))


class OptionNameFormatter(logging.Formatter):
    """Formats log lines with the names of options.

    Parameters
    ----------
    options
        As of :func:`options_of`.
    """

    def __init__(self, options: Mapping[str, Option]) -> None:
        super().__init__()
        self.options = options

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return with_options(super().format(record), self.options)


def _is_in_call(text: str, position: int) -> bool:
    """True inside parentheses that follow a name."""
    calls: list[bool] = []
    for i, character in enumerate(text[:position]):
        if character == "(":
            calls.append(i > 0 and (text[i - 1].isalnum() or text[i - 1] == "_"))
        elif character == ")" and calls:
            calls.pop()
    return any(calls)
