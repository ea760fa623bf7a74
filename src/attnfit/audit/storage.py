"""Where results that are worth keeping between runs live on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """Return the directory of cached models and calibrations.

    ``$ATTNFIT_CACHE``, else ``$XDG_CACHE_HOME/attnfit``, else ``~/.cache/attnfit``.
    """
    own = os.environ.get("ATTNFIT_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "attnfit"


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
