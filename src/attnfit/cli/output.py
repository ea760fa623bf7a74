"""Files to be written are checked before any work."""

from __future__ import annotations

from pathlib import Path

from attnfit.cli.errors import InputError


def check_output(path: Path | None, option: str) -> None:
    """Raise InputError before any work if a file cannot be written."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{option}: there is no folder {path.parent}; make it first")
    if path is not None and path.is_dir():
        raise InputError(f"{option}: {path} is a folder; add the name of a file")
