"""Search for every continuous input that gives the output."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.recovered import AnyInversion
from attnfit.solvers.damped import DampedFits
from attnfit.solvers.loop import Tracker
from attnfit.solvers.result import Record

Array = NDArray[np.float64]

# Inputs closer than this, relative to their size, are one; with an uncertain output, this many times its
# error.
SAME = 1e-6
SAME_ERRORS = 1e3
# A descent in balanced columns that ends within this many times the errors goes on in the columns as given.
NEAR = 100.0


@dataclass(frozen=True)
class Found:
    """What restarts found.

    Attributes
    ----------
    best : ndarray, shape (n_unknowns,)
    square : float
        Its squared residual.
    inputs : list of ndarray
        The distinct inputs with a zero residual, flat.
    n_starts : int
    """

    best: Array
    square: float
    inputs: list[Array]
    n_starts: int


def search(
    layer: AnyInversion,
    enough: float,
    n_starts: int,
    max_iter: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
    client: Any = None,
    *,
    until_first: bool,
    ahead: Sequence[Array] = (),
) -> Found:
    """Descend from ``B V^+``, from the moments of the output and from Gaussian tokens.

    A squared residual of at most ``enough`` counts as zero. With ``until_first`` the first one ends the
    search; otherwise all starts are used, to find out whether there are several. The callback gets the starts
    done, with the share of the running one, and those planned. With a Dask client the starts run on its
    workers, with the same result. Points of `ahead` are tried first.
    """
    share = enough / (float(np.sum(layer.B**2)) or 1.0)
    precision = float(np.sqrt(share))
    balanced = layer.balanced(float(np.sqrt(precision)))
    planned = list(balanced.starts(rng).values())[:n_starts]
    planned = [*ahead, *planned][:n_starts]
    starts = np.vstack([*planned, balanced.gaussian_starts(n_starts - len(planned), rng)])
    descend = partial(_descend, balanced=balanced, layer=layer, max_iter=max_iter, zero=share)
    same = max(SAME, SAME_ERRORS * precision)
    best, least, done = starts[0], np.inf, 0
    inputs: list[Array] = []
    ends = (
        _here(descend, starts, callback) if client is None else _elsewhere(descend, starts, callback, client)
    )
    with closing(ends):
        for x, square in ends:
            done += 1
            if square < least:
                best, least = x, square
            if square <= enough:
                if not any(np.linalg.norm(other - x) <= same * np.linalg.norm(other) for other in inputs):
                    inputs.append(x)
                if until_first:
                    break
    return Found(best, least, inputs, done)


Ends = Generator[tuple[Array, float], None, None]


def _here(descend: Callable[..., Any], starts: Array, callback: Callable[[float, int], Any]) -> Ends:
    for done, start in enumerate(starts):
        yield descend(start, tell=lambda share, done=done: callback(done + share, len(starts)))


def _elsewhere(
    descend: Callable[..., Any], starts: Array, callback: Callable[[float, int], Any], client: Any
) -> Ends:
    """Yield the ends in the order of the starts; those no longer wanted are called off."""
    running = client.map(descend, list(starts), pure=False)
    try:
        for done, future in enumerate(running):
            yield future.result()
            callback(done + 1, len(starts))
    finally:
        client.cancel(running)


def _descend(
    start: Array,
    *,
    balanced: AnyInversion,
    layer: AnyInversion,
    max_iter: int,
    zero: float,
    tell: Callable[[float], Any] | None = None,
) -> tuple[Array, float]:
    """Return where a descent ends, and its squared residual."""

    def share(record: Record) -> None:
        if tell is not None:
            tell(min(record.iteration / max_iter, 1.0))

    x = start[None].copy()
    for problem in (balanced, layer):
        goal = float(np.linalg.norm(problem.gradient(np.zeros(problem.shape))))
        fit = DampedFits(problem, x, 1e-10, goal, max_iter, Tracker(lambda: 0.0, share), "recover", zero=zero)
        fit.descend()
        x = fit.x
        # What errors of the output leave where columns of little weight were enlarged.
        if not fit.squares[0] <= NEAR * np.sqrt(zero) * np.sum(problem.B**2):
            break
    return x[0], float(layer.evaluate_many(x).squares[0])
