"""What the command line says when something is wrong: one line on stderr, and an exit code. Never a traceback.

Exit codes: 0 done, 1 it did not work, 2 the command was not understood, 130 interrupted by Ctrl-C.

A command raises `CommandError` for what it knows can go wrong, or wraps what others raise with `reporting`. Any other
exception is a fault of this program, and its traceback is shown.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import typer

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# typer brings click's exceptions under a path that depends on its version
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


class CommandError(Exception):
    """Ends a command with `error: …` on stderr.

    Args:
        message: What is wrong, in one line.
        exit_code: `EXIT_FAILURE` or `EXIT_USAGE`.
    """

    def __init__(self, message: str, exit_code: int = EXIT_FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def reporting(*expected: type[Exception], exit_code: int = EXIT_FAILURE) -> Generator[None, None, None]:
    """Turn exceptions of the `expected` types into a `CommandError` with their message."""
    try:
        yield
    except expected as error:
        raise CommandError(_message(error), exit_code) from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror  # without the number that str() puts before it
    return str(error) or type(error).__name__


def run_reporting(command: Callable[[], Any]) -> int:
    """Call `command`, report what goes wrong, and return the exit code."""
    try:
        outcome = command()
    except CommandError as error:
        return _report(str(error), error.exit_code)
    except _UsageError as error:
        place = error.ctx.command_path if error.ctx is not None else "lightning"
        message = error.format_message().rstrip(".")
        return _report(f"{message} (see {place} --help)", EXIT_USAGE)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return outcome if isinstance(outcome, int) else 0


def _report(message: str, exit_code: int) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"error: {line}\n")
    return exit_code
