"""Clock, reads and history of a running fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from attnfit.solvers.result import History, Record

Callback = Callable[[Record], Any]


class StopFit(Exception):
    """Raised by a callback to end the fit: the best point so far is returned with status "interrupted"."""


class Interrupted(Exception):
    """Carries the best point out of the search for a start."""

    def __init__(self, x: Any) -> None:
        super().__init__("interrupted while searching for a start")
        self.x = x


class Tracker:
    """Record what happens; tell the callback.

    Parameters
    ----------
    n_passes : callable
        Reads of the data so far.
    callback : callable, optional
        Called with each record. A true return value ends the fit.
    clock : callable
        The time in seconds.
    """

    def __init__(
        self,
        n_passes: Callable[[], float],
        callback: Callback | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.n_passes = n_passes
        self.history = History()
        self.clock = clock
        self.began = clock()
        self._callback = callback
        self._seconds = {"model": 0.0, "step": 0.0, "evaluate": 0.0}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside to one part of the next record."""
        began = self.clock()
        try:
            yield
        finally:
            self._seconds[part] += self.clock() - began

    def record(
        self,
        phase: str,
        iteration: int,
        value: float,
        gradient_norm: float,
        *,
        step_norm: float = 0.0,
        radius: float = float("inf"),
        accepted: bool = True,
    ) -> None:
        """Append a record.

        Raises
        ------
        StopFit
            If the callback asks for it.
        """
        seconds = {f"seconds_{part}": value for part, value in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        record = Record(
            phase, iteration, value, gradient_norm, step_norm, radius, accepted, self.n_passes(), **seconds
        )
        self.history.append(record)
        if self._callback is not None and self._callback(record):
            raise StopFit

    def seconds(self) -> float:
        """Return the time since the fit began."""
        return self.clock() - self.began
