"""The command line: one file per command, each a thin layer over the Python function of the same name."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

import typer

from histovar._printable import printable
from histovar._version import __version__

from .adapt import adapt
from .calibrate import calibrate
from .demo import demo
from .describe import describe
from .embed import embed
from .evaluate import evaluate
from .export import export
from .info import info
from .option_names import Option, OptionNameFormatter, options_of, with_options
from .predict import predict
from .report import report
from .tile import tile
from .train import train

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="histovar",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (tile, embed, train, predict, calibrate, adapt, evaluate, report, export, describe, demo, info):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Predict spatial gene expression from H&E histology, with uncertainty, in AnnData files."""


def main() -> None:
    """Run the command line; a user's error prints one line and exits with code 2, Ctrl-C with code 130.

    Results go to standard output, progress and logs to standard error. Messages of functions about their arguments name
    the command's options instead.
    """
    command_options: dict[str, Option] = {}
    try:
        program: Any = typer.main.get_command(app)
        command_options = _options_of_command(program)
        _prepare(command_options)
        # Not program.main(), which treats KeyboardInterrupt as success and EOFError as KeyboardInterrupt.
        with program.make_context("histovar", sys.argv[1:]) as context:
            program.invoke(context)
    except KeyboardInterrupt:
        typer.echo("histovar: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except MemoryError as error:
        _refuse(f"not enough memory ({error})")
    except EOFError as error:
        _refuse(f"the input ends unexpectedly ({error})")
    except (ValueError, KeyError, TypeError, ImportError, OSError, FloatingPointError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        _refuse(with_options(str(text), command_options))
    except Exception as error:  # usage errors of click, whose class typer does not export
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        message = show().replace("Value error, ", "")  # pydantic's, before the validator's own words
        sys.exit(2) if not message.strip() else _refuse(message)


def _options_of_command(program: Any) -> dict[str, Option]:
    """Options of the command that was called."""
    name = next((text for text in sys.argv[1:] if text in program.commands), None)
    return {} if name is None else options_of(program.commands[name].params)


def _prepare(options: Mapping[str, Option]) -> None:
    """Let idle threads sleep, send logs to standard error, hide warnings meant for programmers, and exit quickly.

    Parameters
    ----------
    options
        Options of the command, for log lines.
    """
    # Otherwise Python would search everything that was imported for garbage once more before it exits: a second.
    atexit.register(gc.freeze)
    # Must be set before torch is imported. Otherwise its idle threads spin, which slows other programs on these cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    handler.setFormatter(OptionNameFormatter(options))
    package = logging.getLogger("histovar")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    # anndata repeats these warnings for every array that is written to a store.
    warnings.filterwarnings("ignore", message="zarr v3 autosharding")
    warnings.filterwarnings("ignore", message="Writing zarr v2 data")


def _refuse(message: str) -> NoReturn:
    typer.echo(f"histovar: {printable(' '.join(message.split()))}", err=True)
    sys.exit(2)
