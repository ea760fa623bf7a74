"""Counts what a solver spends, and stops it when it has arrived or has spent too much."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.data import Array


class Stop(Exception):
    """Raised inside an objective to leave a solver that offers no other way out."""


@dataclass
class Outcome:
    """What one run of one solver gave.

    ``reads`` counts every fetch of all entries of A, ``evaluations`` the calls for a gradient, a
    Hessian-vector product or a Gram; nan where nobody counted.
    """

    x: Array
    seconds: float
    cpu: float
    iterations: float = np.nan
    evaluations: float = np.nan
    reads: float = np.nan
    status: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"x": np.asarray(self.x, dtype=float).ravel().tolist()}


@dataclass
class Meter:
    """Counter, clock and best iterate of one run.

    Parameters
    ----------
    tol : float
        Relative gradient at which the run is stopped; 0 leaves stopping to the solver.
    limit : float
        Seconds after which the run is stopped and called capped.
    """

    tol: float
    limit: float
    evaluations: int = 0
    reads: float = 0.0
    status: str = ""
    x: Any = None
    first: float = 0.0
    best: float = np.inf
    lowest: float = np.inf
    began: float = field(default_factory=perf_counter)

    def spend(self, reads: float, evaluations: int = 1) -> None:
        """Book ``reads`` of A; leave the solver when its time is over."""
        self.evaluations += evaluations
        self.reads += reads
        if perf_counter() - self.began > self.limit:
            self.status = f"cap ({self.evaluations} evaluations, {self.limit:.0f} s)"
            raise Stop

    def arrive(self, x: Array, value: float, gradient: Array) -> None:
        """Keep ``x`` if it is the best so far; leave the solver when it is good enough.

        A trial point of a line search that raises the objective is no place to stop: the gradient of a
        saturated softmax is zero there.
        """
        if not value <= self.lowest * (1 + 1e-9):
            return
        size = float(np.linalg.norm(gradient))
        self.first = self.first or size
        if size < self.best or value < self.lowest * (1 - 1e-6):
            self.best, self.x = size, np.array(x)
        self.lowest = min(self.lowest, value)
        if size < self.tol * self.first:
            raise Stop


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = perf_counter(), process_time()

    def outcome(self, x: Array, **counts: Any) -> Outcome:
        """Stop the clock."""
        return Outcome(x, perf_counter() - self._wall, process_time() - self._cpu, **counts)


@contextmanager
def counted(owner: type, charges: dict[str, Any]) -> Iterator[None]:
    """Replace methods of ``owner`` by ones that first call ``charges[name](*args, **kwargs)``."""
    originals = {name: getattr(owner, name) for name in charges}

    def wrap(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            charges[name](*args, **kwargs)
            return originals[name](self, *args, **kwargs)

        return method

    try:
        for name in charges:
            setattr(owner, name, wrap(name))
        yield
    finally:
        for name, method in originals.items():
            setattr(owner, name, method)
