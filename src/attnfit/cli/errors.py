"""Bad input ends in one sentence and exit code 1."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Annotated, Any

import typer

from attnfit.cli.console import note, problem

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class InputError(Exception):
    """What is wrong with the input and what to type instead, in one sentence."""


def one_sentence(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions of a command into a sentence, and the library's warnings into notes.

    The command has a parameter ``debug``; when it is set, exceptions pass unchanged.
    """

    @wraps(command)
    def wrapped(**options: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _as_note  # type: ignore[assignment]
                warnings.simplefilter("once")
                command(**options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            problem("Stopped before the end; nothing was written.")
            raise typer.Exit(130) from None
        except Exception as error:
            if options["debug"]:
                raise
            problem(_describe(error))
            raise typer.Exit(1) from None

    return wrapped


def in_options(sentence: str) -> str:
    """Rewrite the library's arguments as options of the command line."""
    sentence = sentence.replace("set outside_good=False", "leave --outside-good out")
    sentence = sentence.replace("outside_good=True", "--outside-good").replace("sample_weight", "--weight")
    sentence = sentence.replace("memory_limit", "--memory-limit").replace("resume=False", "--afresh")
    return re.sub(r"\b(loss|function|max_iter)(?:='?(\w+)'?)", _option, sentence)


def _option(match: re.Match[str]) -> str:
    return f"--{match[1].replace('_', '-')} {match[2]}"


def suggest(word: str, choices: Iterable[str], otherwise: str = "it must be one of") -> str:
    """Return ``; did you mean ...?`` or, where nothing is close, the choices."""
    choices = list(choices)
    by_lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(repr(by_lower[name]) for name in close)}?"
    shown = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"; {otherwise}: {shown}"


def _describe(error: Exception) -> str:
    # The library's own messages already name argument, index and remedy.
    if isinstance(error, InputError | ValueError | OverflowError):
        return str(error) if isinstance(error, InputError) else in_options(str(error))
    if isinstance(error, MemoryError) and "memory_limit" in str(error):
        return in_options(str(error))
    if isinstance(error, MemoryError):
        return "Not enough memory for this file; keep only the columns you need, or use parquet."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    return f"{type(error).__name__}: {error} (unexpected; add --debug to see where, and please report it)"


def _as_note(message: Warning | str, *_: Any) -> None:
    note(in_options(str(message)))
