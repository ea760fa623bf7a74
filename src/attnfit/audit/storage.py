"""Where results that are worth keeping between runs live on disk."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path


def cache_directory() -> Path:
    """Return the directory of cached models and calibrations.

    ``$ATTNFIT_CACHE``, else ``$XDG_CACHE_HOME/attnfit``, else ``~/.cache/attnfit``; for a user without a home
    one that lasts as long as the process.
    """
    own = os.environ.get("ATTNFIT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "attnfit"
    except RuntimeError:
        return _scratch()


def kept(target: Path, write: Callable[[Path], None]) -> Path:
    """Return a directory that holds what ``write`` puts there, written once.

    Where nothing can be written, it is one that lasts as long as the process, and a warning says so.
    """
    if target.is_dir():
        return target
    try:
        write_atomically(target, write)
        return target
    except OSError as error:
        spare = _scratch() / target.name
        if not spare.is_dir():
            write_atomically(spare, write)
        _warn(str(target.parent), error.strerror or str(error))
        return spare


@cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="attnfit-")
    _LASTING.append(folder)
    return Path(folder.name)


@cache
def _warn(folder: str, why: str) -> None:
    """Warn once a folder."""
    warnings.warn(
        f"nothing can be kept in {folder} ({why.lower()}): what is learned about a model is learned again by "
        "the next run; set ATTNFIT_CACHE to a folder that can be written",
        UserWarning,
        stacklevel=4,
    )


# Removed with the process.
_LASTING: list[tempfile.TemporaryDirectory[str]] = []


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Let write fill a new directory, then rename it to target: readers see all of it or nothing.

    If another process was faster, its directory stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        write(fresh)
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():
                raise
