"""Where output goes: results to stdout, everything said about them to stderr."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

# A pipe has no width: wide enough for every table here, and never cropped by a default of 80.
PIPE_WIDTH = 120


def stdout() -> Console:
    """Return the console of the results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return the console of notes, errors and progress."""
    return _console(sys.stderr)


def note(sentence: str) -> None:
    """Say something that does not stop the command."""
    stderr().print(f"Note: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def problem(sentence: str) -> None:
    """Say what went wrong."""
    stderr().print(f"Error: {sentence}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _console(stream: TextIO) -> Console:
    # Made at each use: tests and shells replace sys.stdout after this module is imported.
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False)
