"""The one way in which attnfit writes a file: beside it, to the disk, and then in its place."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

# Bytes of a prefix that leave room for a process's number and mkstemp's letters among the 255 of a name.
LONGEST = 200

__all__ = ["clean_up", "rendered", "replace_file", "write"]


def write(path: str | PathLike[str], data: bytes | str) -> None:
    """Replace a file in one step: whatever happens, it is the old one or the new one.

    A link stays one and keeps pointing to the file; a file keeps its permissions. Pipes and devices, which
    cannot be replaced, are written to.

    Parameters
    ----------
    path : str or path-like
    data : bytes or str
        Text is written as UTF-8.

    Raises
    ------
    OSError
        If it cannot be written; what was there is intact then.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from attnfit.writing import write
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder, "a.txt"), "one")
    ...     write(Path(folder, "a.txt"), "two")
    ...     Path(folder, "a.txt").read_text()
    'two'
    """
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    try:
        # A pipe that the shell has opened has no other name than this one.
        if is_special(path):
            with open(path, "wb") as stream:
                stream.write(content)
            return
        target = Path(os.path.realpath(path))
        clean_up(target)
        replace_file(target, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_special(path: str | PathLike[str]) -> bool:
    """Whether a path leads to a pipe, a device or a socket: something that is written to, not replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def replace_file(path: Path, data: bytes) -> None:
    """Write a regular file in one step: a reader sees the old one or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path) + f"{os.getpid()}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _permissions(path))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        # The new name lasts only once the directory is on disk.
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _permissions(path: Path) -> int:
    """Return those of the file that is there, or those that any other file of the user has."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:
        # A umask can be read only by setting it.
        umask = os.umask(0o077)
        os.umask(umask)
        return 0o666 & ~umask


def clean_up(path: Path) -> None:
    """Remove what processes of this machine that were killed while they wrote the file left behind."""
    for left in _siblings(path):
        process = left.name.removeprefix(_prefix(path)).split("-")[0]
        if process.isdecimal() and not _runs(int(process)):
            with suppress(OSError):
                left.unlink()


def _prefix(path: Path) -> str:
    prefix = f".{path.name}.{socket.gethostname()}-"
    if len(os.fsencode(prefix)) <= LONGEST:
        return prefix
    # Names of files have an end: that of a long one is told apart by its digest.
    return f".{hashlib.sha256(os.fsencode(prefix)).hexdigest()}-"


def _siblings(path: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (p for p in list(path.parent.iterdir()) if p.name.startswith(_prefix(path)))


def _runs(process: int) -> bool:
    if os.name != "posix":
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def rendered(draw: Callable[[Any], object]) -> bytes:
    """Return what a function writes to a binary stream.

    Examples
    --------
    >>> rendered(lambda stream: stream.write(b"abc"))
    b'abc'
    """
    stream = io.BytesIO()
    draw(stream)
    return stream.getvalue()
