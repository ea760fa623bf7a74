"""What a result came from: the command as it was typed, and the software."""

from __future__ import annotations

import platform
import shlex
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version

from attnfit.version import __version__

# The words after attnfit; `Commands` sets them.
TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())


def command() -> str:
    """Return the command that runs, as a shell takes it."""
    return shlex.join(["attnfit", *TYPED.get()])


def versions() -> dict[str, str]:
    """Return the versions of what a fit depends on."""
    found = {"attnfit": __version__, "Python": platform.python_version()}
    for package in ("numpy", "scipy", "formulaic"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
