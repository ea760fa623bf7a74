"""How commands end: the exit codes of all of them, and one sentence where something is wrong."""

from __future__ import annotations

import dis
import linecache
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import IntEnum
from functools import wraps
from types import TracebackType
from typing import Annotated, Any

import typer

from attnfit.cli.console import note, problem, silence
from attnfit.version import __version__

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Exit(IntEnum):
    """What the exit code of every command means."""

    GOOD = 0
    BAD_NEWS = 1
    BAD_INPUT = 2
    OPEN = 3
    UNEXPECTED = 70
    STOPPED = 130


MEANINGS = {
    Exit.GOOD: "done, and nothing bad was found",
    Exit.BAD_NEWS: "bad news: a leak over the limit, not converged, separable, not equal",
    Exit.BAD_INPUT: "bad input: options, data, files that cannot be read or written",
    Exit.OPEN: "nothing bad seen, but not all was tested or it is not certain",
    Exit.UNEXPECTED: "an error of attnfit itself; a file with its traceback is named",
    Exit.STOPPED: "stopped by Ctrl-C",
}
# Packages that read files, by the modules of their exceptions.
READERS = ("pandas.errors", "pyarrow", "polars.exceptions")
# The lines stay apart: click would fill them to a paragraph.
EXIT_CODES = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {MEANINGS[code]}" for code in Exit)


class InputError(Exception):
    """What is wrong with the input and what to type instead, in one sentence."""


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions of a command into a sentence and an exit code, and the library's warnings into notes.

    The command has a parameter ``debug``; when it is set, the traceback is printed too.
    """

    @wraps(command)
    def wrapped(**options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _as_note  # type: ignore[assignment]
                warnings.simplefilter("once")
                command(**options)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            # Nobody reads the results any more: there is no one to tell either.
            silence(sys.stdout)
        except KeyboardInterrupt:
            problem("Stopped before the end; nothing was written.")
            raise typer.Exit(Exit.STOPPED) from None
        except Exception as error:
            if options["debug"]:
                traceback.print_exc()
            sentence, code = _describe(error)
            # Other packages write several lines.
            problem(" ".join(sentence.split("\n")))
            raise typer.Exit(code) from None

    return wrapped


@contextmanager
def called(**names: str) -> Iterator[None]:
    """Call the library's arguments what the user calls them, in what it says of bad input.

    Parameters
    ----------
    names : str
        By the names of the arguments.
    """
    try:
        yield
    except ValueError as error:
        if not _is_deliberate(error):
            raise
        words = "|".join(names)
        # Not in the name of a file, such as B.npy.
        sentence = re.sub(rf"(?<![\w./])({words})(?![\w.])", lambda match: names[match[0]], str(error))
        raise InputError(in_options(sentence)) from error


def in_options(sentence: str) -> str:
    """Rewrite the library's arguments as options of the command line."""
    sentence = sentence.replace("set outside_good=False", "leave --outside-good out")
    sentence = sentence.replace("or pass arrays", "or leave out --dask and --memory-limit")
    sentence = sentence.replace(
        "pass groups, or arrays", "name --group, or leave out --dask and --memory-limit"
    )
    # Of a file that is read in pieces.
    sentence = sentence.replace("remove or impute it", "remove or impute it, or add --missing drop")
    sentence = sentence.replace("outside_good=True", "--outside-good").replace("sample_weight", "--weight")
    sentence = sentence.replace(
        "pass data on disk, opened by attnfit.data.open_source", "convert the file to parquet"
    )
    sentence = re.sub(r"\b[by] is negative at index (\d+)", _target, sentence)
    sentence = sentence.replace("memory_limit", "--memory-limit").replace("resume=False", "--afresh")
    return re.sub(r"\b(loss|function|max_iter|ties)(?:='?(\w+)'?)", _option, sentence)


def _option(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} {match[2]}"


def _target(match: re.Match[str]) -> str:
    return f"the target is negative in row {int(match[1]) + 1}"


def suggest(word: str, choices: Iterable[str], otherwise: str = "it must be one of") -> str:
    """Return ``; did you mean ...?`` or, where nothing is close, the choices."""
    choices = list(choices)
    by_lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(by_lower[name]) for name in close)}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"; {otherwise}: {shown}"


def _describe(error: Exception) -> tuple[str, Exit]:
    """Return what to say of an error, and the exit code."""
    from attnfit.solvers import CheckpointError

    if isinstance(error, InputError):
        return str(error), Exit.BAD_INPUT
    # The library's own messages already name argument, index and remedy.
    refusals = ValueError | OverflowError | ModuleNotFoundError | NotImplementedError
    if isinstance(error, CheckpointError) or (isinstance(error, refusals) and _is_deliberate(error)):
        return in_options(str(error)), Exit.BAD_INPUT
    if isinstance(error, MemoryError) and "memory_limit" in str(error):
        return in_options(str(error)), Exit.BAD_INPUT
    if isinstance(error, MemoryError):
        remedy = "Not enough memory for this file; keep only the columns you need, or use parquet."
        return remedy, Exit.BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror if "checkpoint" in error.strerror else error.strerror.lower()
        return f"{where}{reason}", Exit.BAD_INPUT
    # Files that are read in pieces may turn out to be damaged in the middle of a fit.
    if type(error).__module__.startswith(READERS) or isinstance(error, UnicodeDecodeError):
        return f"A file cannot be read: {error}".rstrip(". ") + "; write it again", Exit.BAD_INPUT
    return unexpected(error), Exit.UNEXPECTED


def unexpected(error: Exception) -> str:
    """Return what to say of an error of attnfit itself; its traceback is kept in a file."""
    told = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{told} (unexpected; {_kept(error)} please report it)"


def _is_deliberate(error: BaseException) -> bool:
    """Whether attnfit or scikit-learn's validation raised it in so many words, rather than stumbled."""
    at: TracebackType | None = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    if at is None or at.tb_lasti < 0:
        return True
    name = str(at.tb_frame.f_globals.get("__name__", ""))
    code = at.tb_frame.f_code
    if "__traceback_maker" in code.co_names:
        # Of a frame on a worker only the place has come here.
        said = linecache.getline(code.co_filename, at.tb_lineno).lstrip().startswith("raise")
    else:
        said = dis.opname[code.co_code[at.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return said and name.partition(".")[0] in ("attnfit", "sklearn")


def _kept(error: Exception) -> str:
    """Keep the traceback in a file of the user's own; say where."""
    told = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="attnfit-traceback-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(f"attnfit {__version__}, Python {sys.version.split()[0]}\n\n{told}")
    except OSError:
        return "add --debug to see where, and"
    return f"the traceback is in {path}; look what it tells of your data, and"


def _as_note(message: Warning | str, *_: Any) -> None:
    note(in_options(" ".join(str(message).split("\n"))))
