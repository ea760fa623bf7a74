"""Search for every continuous input that gives the output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems import LayerInversion
from attnfit.solvers.damped import DampedFits
from attnfit.solvers.result import Record
from attnfit.solvers.tracking import Tracker

Array = NDArray[np.float64]

# Inputs closer than this, relative to their size, are one; with an uncertain output, this many times its
# error.
SAME = 1e-6
SAME_ERRORS = 1e3


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
    layer: LayerInversion,
    precision: float,
    n_starts: int,
    max_iter: int,
    rng: np.random.Generator,
    callback: Callable[[float, int], Any],
) -> Found:
    """Descend from ``B V^+``, from the moments of the output and from Gaussian tokens.

    Where there are more equations than unknowns it ends at the first zero residual; otherwise all starts are
    used, to find out whether there are several. The callback gets the starts done, with the share of the
    running one, and those planned.
    """

    def tell(record: Record) -> None:
        callback(done + min(record.iteration / max_iter, 1.0), len(starts))

    planned = list(layer.starts(rng).values())[:n_starts]
    starts = np.vstack([*planned, layer.gaussian_starts(n_starts - len(planned), rng)])
    goal = float(np.linalg.norm(layer.gradient(np.zeros(layer.shape))))
    enough = precision**2 * float(np.sum(layer.B**2))
    same = max(SAME, SAME_ERRORS * precision)
    best, least, done = starts[0], np.inf, 0
    inputs: list[Array] = []
    for start in starts:
        fit = DampedFits(
            layer,
            start[None].copy(),
            1e-10,
            goal,
            max_iter,
            Tracker(lambda: 0.0, tell),
            "recover",
            zero=precision**2,
        )
        fit.descend()
        done += 1
        x, square = fit.x[0], float(fit.squares[0])
        if square < least:
            best, least = x, square
        if square <= enough:
            if not any(np.linalg.norm(other - x) <= same * np.linalg.norm(other) for other in inputs):
                inputs.append(x)
            if layer.B.size > layer.n_unknowns:
                break
    return Found(best, least, inputs, done)
