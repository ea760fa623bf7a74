"""The one way in which attnfit writes a file: beside it, to the disk, and then in its place."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["rendered", "write"]


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
    # Numba and SciPy come with it, for which the help of a command should not wait.
    from attnfit.solvers.checkpoint_file import clean_up, replace_file

    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            with target.open("wb") as stream:
                stream.write(content)
            return
        clean_up(target)
        # The new file is created with the permissions that the umask leaves: those of the old one.
        umask = None if mode is None else os.umask(0o777 & ~mode)
        try:
            replace_file(target, content)
        finally:
            if umask is not None:
                os.umask(umask)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


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
