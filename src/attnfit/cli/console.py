"""Where output goes: results to stdout, everything said about them to stderr; data are shown literally."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from typing import IO, Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A pipe has no width: wide enough for every table here, and never cropped by a default of 80.
PIPE_WIDTH = 120
TABLE_BOX = box.SIMPLE_HEAD
# Characters that turn the direction of what follows: a name could show as another one.
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Literal(Console):
    """A console that takes text as it is, and whose reader may leave before the end."""

    def __init__(self, stream: TextIO) -> None:
        # A pipe that is given a width by its user has one.
        self.has_width = stream.isatty() or "COLUMNS" in os.environ
        super().__init__(
            file=stream,
            width=None if self.has_width else PIPE_WIDTH,
            highlight=False,
            emoji=False,
            markup=False,
        )

    def on_broken_pipe(self) -> None:
        """Go on in silence: the exit code is still to be told."""
        self.quiet = True
        silence(self.file)

    def say(self, sentence: str, style: str | None = None) -> None:
        """Print a sentence, broken at spaces where the width is known; in a pipe it is one line."""
        self.print(Text(self._wrapped(literal(sentence)), style=style or ""), soft_wrap=True)

    def gap(self) -> None:
        """Print an empty line."""
        self.print()

    def _wrapped(self, line: str) -> str:
        if not self.has_width:
            return line
        # A number or a path that is cut is a wrong one: what is longer than the line stays whole.
        return "\n".join(
            textwrap.wrap(
                line,
                max(self.width, 20),
                break_long_words=False,
                break_on_hyphens=False,
                replace_whitespace=False,
                drop_whitespace=True,
            )
        )


class Grid(Table):
    """A table whose cells and heads are text, whatever stands in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(box=TABLE_BOX, show_edge=False, pad_edge=False, **options)

    def add_column(self, header: Any = "", *args: Any, **options: Any) -> None:
        """Add a column."""
        super().add_column(as_text(header), *args, **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row."""
        super().add_row(*(as_text(cell) for cell in cells), **options)


def as_text(cell: Any) -> Text:
    """Return a cell as text without markup."""
    return cell if isinstance(cell, Text) else Text(literal(str(cell)))


def literal(value: str) -> str:
    """Return text with control characters, and others that show as nothing or as something else, escaped."""
    if value.isascii() and value.isprintable():
        return value
    return "".join(_shown(c) for c in value)


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in TURNING
    return character.encode("unicode_escape").decode("ascii") if hidden else character


def stdout() -> Literal:
    """Return the console of the results."""
    return Literal(sys.stdout)


def stderr() -> Literal:
    """Return the console of notes, errors and progress."""
    return Literal(sys.stderr)


def note(sentence: str) -> None:
    """Say something that does not stop the command."""
    stderr().say(f"Note: {sentence}", "yellow")


def problem(sentence: str) -> None:
    """Say what went wrong."""
    stderr().say(f"Error: {sentence}", "bold red")


def silence(stream: IO[str]) -> None:
    """Send what is still to be written nowhere: at its end Python flushes what nobody reads any more."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass
