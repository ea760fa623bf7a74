"""Outputs of heads from many starts: the values projected out, factors by Levenberg-Marquardt."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.head_maps import MapsAt
from attnfit.objectives.projected_heads import ProjectedHeads
from attnfit.solvers.factors import FEW, STEPS, Fit, Point
from attnfit.solvers.loop import Descent, Outcome, StopFit, Tracker
from attnfit.solvers.outputs import EXACT, SAME, Reached
from attnfit.solvers.verdicts import Status

Array = NDArray[np.float64]

# Deviations of the logits of the starts in turn; steps to first order, and from there where all starts are
# followed.
SIZES, FIRST_ORDER_STEPS, FOLLOWED = (0.5, 1.0, 0.25, 2.0), 12, 60
# Starts by default: where all are followed, and where a few steps of each choose the best.
N_STARTS, N_STARTS_MANY = 40, 4
# So many starts in the lowest minimum end the search.
REACHED = 2
# A descent goes on to this share of |B|: what it fits to EXACT has the digits then.
REST = 1e-12
DESCRIPTION = "variable projection, Levenberg-Marquardt on factors by conjugate gradients"


class FactorSearch:
    """Descents from starts to first order, and what they reached."""

    def __init__(self, problem: ProjectedHeads, tracker: Tracker, tol: float) -> None:
        self.problem, self.tracker, self.tol = problem, tracker, tol
        full = problem.full
        self.root = np.sqrt(full.weights)[:, None]
        self.size = float(np.sum((self.root * full.B) ** 2)) or 1.0
        self.at_zero = problem.value_at_zero()
        self.fit = Fit(problem, tracker, tol, self.at_zero, 0.5 * REST**2 * self.size)
        self.ends: dict[str, Point] = {}

    @property
    def few(self) -> bool:
        """Whether unknowns are so few that all starts are followed."""
        return self.problem.n_unknowns <= FEW

    @property
    def best(self) -> str:
        """The start with the lowest value."""
        return min(self.ends, key=lambda name: self.ends[name].at.value)

    @property
    def n_reached(self) -> int:
        """How many starts reached the lowest value."""
        least = self.ends[self.best].at.value
        return sum(end.at.value <= least * (1.0 + SAME) for end in self.ends.values())

    def is_exact(self, value: float) -> bool:
        """Whether a value is that of a zero residual."""
        return value <= 0.5 * EXACT**2 * self.size

    def run(self, x0: Array | None, n_starts: int | None, max_iter: int, rng: np.random.Generator) -> Outcome:
        """Return the end of the best descent."""
        n_starts = n_starts or (N_STARTS if self.few else N_STARTS_MANY)
        try:
            if x0 is not None:
                self._follow("x0", x0, max_iter)
            steps = FOLLOWED if self.few else STEPS if n_starts > 1 else 0
            while x0 is None and len(self.ends) < n_starts:
                k = len(self.ends)
                self._follow(f"start {k + 1}", self._start(k, rng), min(steps, max_iter))
                if self.is_exact(self.ends[self.best].at.value) or (self.few and self.n_reached >= REACHED):
                    break
            self.fit.descend(self.ends[self.best], max_iter, self.best)
        except (KeyboardInterrupt, StopFit):
            if not self.ends:
                raise
            self.ends[self.best].status = Status.INTERRUPTED
        point = self.ends[self.best]
        run = Descent(point.at, self.fit.reference)
        run.verdict = self.fit.verdict(point)
        run.status, run.n_iter = run.verdict.status, point.n_iter
        values = {name: end.at.value for name, end in self.ends.items()}
        values = dict(sorted(values.items(), key=lambda pair: pair[1]))
        message = "" if run.status is Status.INTERRUPTED else f"{run.status}: {self.said(point.at.x)}"
        n_iter = sum(end.n_iter for end in self.ends.values())
        return Outcome(run, values, n_iter, DESCRIPTION, message, n_starts=len(self.ends))

    def _follow(self, name: str, x: Array, steps: int) -> None:
        self.ends[name] = self.fit.begin(x)
        self.fit.descend(self.ends[name], steps, name)

    def _start(self, k: int, rng: np.random.Generator) -> Array:
        """Return the solution to first order from a random point, with logits of a deviation of at most 1."""
        problem = self.problem
        x = problem.initial_point(rng)
        x = problem.scaled(x, SIZES[k % len(SIZES)] / np.maximum(problem.spread(x), 1e-300))
        bilinear = Fit(problem.to_first_order(), self.tracker, self.tol, self.at_zero, self.fit.exact)
        point = bilinear.begin(x)
        bilinear.descend(point, FIRST_ORDER_STEPS, f"start {k + 1} to first order")
        return problem.scaled(point.at.x, 1.0 / np.maximum(problem.spread(point.at.x), 1.0))

    def said(self, x: Array) -> str:
        """Return what the lowest value means, and how much of B it explains, as a message."""
        full, problem = self.problem.full, self.problem
        share = float(np.sqrt(problem.squared_residual(x) / self.size))
        n_equations = int(np.sum(full.weights > 0)) * full.B.shape[1]
        zero = MapsAt(full, np.zeros(full.n_factors)).stacked()
        uniform = self.root * zero[:, : full.A3.shape[1]]
        affine = self.root * np.column_stack([full.A1, np.ones(len(full.B))])
        reached = Reached(share, n_equations, full.n_identified, len(self.ends), self.n_reached)
        return reached.said([uniform, affine], self.root * full.B)


def run_factors(
    problem: Any,
    x0: Array | None,
    n_starts: int | None,
    tol: float,
    max_iter: int,
    tracker: Tracker,
    rng: np.random.Generator,
) -> Outcome:
    """Return where the best of several descents over factors ends."""
    return FactorSearch(problem, tracker, tol).run(x0, n_starts, max_iter, rng)
