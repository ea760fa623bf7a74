"""Loops compiled by Numba, kept on disk where that is possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


class Compiled:
    """A compiled function that is kept on disk between processes, or compiled anew where nothing can be kept.

    Numba refuses to compile at all where its cache can not be written: a read-only installation without a
    home directory, a full disk.

    Parameters
    ----------
    function : callable
        What Numba compiles in nopython mode; it must not raise OSError itself.
    **options
        Of `numba.njit`.
    """

    _warned = False

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        import numba

        self.function, self.options = function, options
        self._compiled = numba.njit(**options)(function)
        try:
            self._compiled.enable_caching()
        except (RuntimeError, OSError) as error:
            self._without_cache(error)

    def __call__(self, *args: Any) -> Any:
        """Run it; it is compiled for the types of the first call."""
        try:
            return self._compiled(*args)
        except OSError as error:
            # Numba reads and writes its cache before it runs anything.
            self._without_cache(error)
            return self._compiled(*args)

    @property
    def stats(self) -> Any:
        """What Numba counts of its cache."""
        return self._compiled.stats

    def _without_cache(self, error: Exception) -> None:
        import numba

        self._compiled = numba.njit(**self.options)(self.function)
        if not Compiled._warned:
            Compiled._warned = True
            reason = str(error).splitlines()[0]
            warnings.warn(
                f"compiled loops cannot be kept ({reason}): every process compiles them anew, some seconds "
                "each; set NUMBA_CACHE_DIR to a directory that can be written",
                RuntimeWarning,
                stacklevel=3,
            )
