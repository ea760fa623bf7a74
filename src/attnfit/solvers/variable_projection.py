"""Variable projection from many starts: attention outputs with bilinear form and values unknown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.objectives.objective import MAX_DENSE, Offer
from attnfit.objectives.projected import ProjectedAttention
from attnfit.objectives.separable import Points, Separable
from attnfit.solvers.curvature import FrozenHessian, MatrixFree, natural_scale
from attnfit.solvers.factor_projection import run_factors
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker, descend
from attnfit.solvers.outputs import EXACT, SAME, Reached
from attnfit.solvers.verdicts import Judge, Status, Verdict

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Steps to first order in X, of all from there, and of one text; a start is left after IDLE_STEPS without a
# gain of IDLE, relatively.
FIRST_ORDER_STEPS, STEPS, STEPS_ONE_TEXT, IDLE_STEPS, IDLE = 12, 40, 60, 15, 1e-4
# Deviations of the logits of the starts in turn: to first order, and of one text.
SIZES, DEVIATIONS = (0.05, 0.25, 0.5, 1.0), (0.25, 0.75, 2.0)
# Starts at once: of several texts; of one text with up to NARROW features, and with more.
TOGETHER, NARROW, MANY, SOME = 4, 8, 50, 20
# Of one text after so many steps, the share of these that go on: those that end at a zero residual are mostly
# among the lower ones by then.
CULLED = {10: 0.4, 16: 0.2}
# So many starts in the lowest minimum end the search.
REACHED, REACHED_ONE_TEXT = 2, 4
# Starts by default, and numbers that those at once work on.
STARTS, STARTS_ONE_TEXT, BATCH = 40, 400, 200 * (1 << 20) // 8
# Damping as a share of the mean diagonal: of the first step, and its least.
DAMPING, LEAST_DAMPING, LEAST_GAIN = 1e-4, 1e-12, 1e-4
# Newton's method ends the best descent, in so many steps; up to FEW unknowns with the Hessian itself.
POLISH, FEW = 30, 500
SAID = {
    "converged": "converged",
    "max_iter": "not converged from the best end",
    "precision": "no further decrease is possible in float64",
}
# Logits of a smaller deviation show X C Y of one text and little else.
WEAK = 0.5
TINY = float(np.finfo(np.float64).tiny)
DESCRIPTION = "variable projection, Levenberg-Marquardt"


@dataclass(frozen=True)
class VariableProjection(Solver):
    """Levenberg-Marquardt on ``phi(X) = min_Y L(X, Y)`` from many starts, several at once.

    Several texts, or a mask, are started from the solution to first order in X: there the covariances of keys
    and values that queries see differ, and the bilinear problem fixes X and Y. One text without a mask is
    started from random X. Starts go on until the residual is zero, until the lowest value was reached
    twice (by one text without a mask four times), or until they are used up.

    Factors of heads (``rank=``) are fitted by conjugate gradients, from solutions to first order. With more
    than 600 of them a few steps of each start choose the one that goes on.

    Parameters
    ----------
    n_starts : int, optional
        Largest number of starts; 40 by default, 400 for one text without a mask, 4 for many factors.
    seconds : float
        One text without a mask gets no further starts after this time.

    Notes
    -----
    Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose
    variables separate" (1973), with the Jacobian of Kaufman, "A variable projection method for solving
    separable nonlinear least squares problems" (1975).
    """

    n_starts: int | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        n = self.n_starts
        if n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1):
            raise ValueError(f"n_starts must be an integer >= 1, not {n!r}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, not {self.seconds!r}")

    @staticmethod
    def suits(problem: Any) -> bool:
        """Return whether the maps and the normal equations of a start fit in memory."""
        if Offer.PROJECTION not in problem.offers:
            return False
        if Offer.FACTORS in problem.offers:
            return True
        if problem.n_unknowns > MAX_DENSE:
            return False
        return Separable(problem).numbers <= BATCH

    def run(
        self,
        problem: Any,
        start: Any,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise; `attnfit.minimize` documents the arguments. ``max_iter`` bounds the steps a start."""
        if not self.suits(problem):
            raise ValueError(
                f"VariableProjection takes FullAttention with at most {MAX_DENSE:,} unknowns in X, and maps "
                "that fit in memory; leave solver out"
            )
        if Offer.FACTORS in problem.offers:
            return run_factors(problem, x0, self.n_starts, tol, max_iter, tracker, rng)
        search = Search(problem, tracker, max_iter)
        try:
            if x0 is None:
                self._search(search, rng)
            else:
                search.descend(problem.by_head(x0)[None], max_iter, "x0")
            search.finish()
        except (KeyboardInterrupt, StopFit):
            end = Descent.begin(problem.evaluate(search.best.reshape(-1)))
            end.status, end.verdict = Status.INTERRUPTED, Verdict(Status.INTERRUPTED)
            return Outcome(end, search.local_values, search.n_iter, DESCRIPTION)
        with tracker.timed("evaluate"):
            at = problem.evaluate(search.best.reshape(-1), at_zero=True)
        few = problem.n_unknowns <= FEW
        strategy = FrozenHessian() if few else MatrixFree(natural_scale(problem, at))
        steps, judge = min(max_iter, POLISH), Judge(problem, tol)
        end = descend(problem, at, strategy, judge, tracker, phase="fit: polish", max_iter=steps)
        search.settle(end.at.value)
        if end.status != Status.INTERRUPTED and search.vanishes(end.at.x):
            # No value is lower than zero, whatever the last steps did.
            end.status, end.verdict = Status.CONVERGED, Verdict(Status.CONVERGED)
        message = ""
        if x0 is None and end.status != Status.INTERRUPTED:
            message = f"{SAID.get(end.status, end.status)}: {search.verdict(end.at.x)}"
        return Outcome(end, search.local_values, search.n_iter + end.n_iter, DESCRIPTION, message)

    def _search(self, search: Search, rng: np.random.Generator) -> None:
        """Descend from batches of starts until there is reason to stop."""
        alike = search.seen_alike
        n_starts = self.n_starts or (STARTS_ONE_TEXT if alike else STARTS)
        together = TOGETHER if not alike else MANY if max(search.shape[1:]) <= NARROW else SOME
        together = max(1, min(together, BATCH // search.exactly.numbers))
        while search.n_starts < n_starts:
            numbers = np.arange(search.n_starts, min(search.n_starts + together, n_starts))
            phase = f"starts {numbers[0] + 1} to {numbers[-1] + 1}"
            X = rng.standard_normal((len(numbers), *search.shape))
            X *= np.take(DEVIATIONS if alike else SIZES, numbers, mode="wrap")[:, None, None, None]
            X /= np.maximum(search.exactly.spread(X), TINY)[:, :, None, None]
            if alike:
                search.descend(X, STEPS_ONE_TEXT, phase, CULLED)
            else:
                search.descend(search.to_first_order(X), STEPS, phase)
            late = alike and search.tracker.clock() - search.tracker.began > self.seconds
            if search.is_exact or search.n_reached >= (REACHED_ONE_TEXT if alike else REACHED) or late:
                return


class Search:
    """Descents from starts, several at once, and what they reached."""

    def __init__(self, problem: ProjectedAttention, tracker: Tracker, max_iter: int) -> None:
        self.problem, self.tracker, self.max_iter = problem, tracker, max_iter
        self.exactly, self.bilinear = Separable(problem), Separable(problem, first_order=True)
        self.shape = (problem.full.n_heads, *problem.shape[-2:])
        self.size = float(np.sum(self.exactly.B**2)) or 1.0
        self.values: list[float] = []
        self.best, self.least, self.square, self.n_iter = np.zeros(self.shape), np.inf, np.inf, 0

    @property
    def n_starts(self) -> int:
        """Starts that were descended from."""
        return len(self.values)

    @property
    def seen_alike(self) -> bool:
        """Whether all queries see the same keys alike: then X shows through one covariance only."""
        texts = self.problem.full.texts
        return len(texts) == 1 and texts[0].mask is None and texts[0].offset is None

    @property
    def is_exact(self) -> bool:
        """Whether a residual is zero."""
        return self.square <= EXACT**2 * self.size

    def vanishes(self, x: Array) -> bool:
        """Return whether the residual at a point is zero."""
        square = self.exactly.evaluate(x.reshape(1, *self.shape)).squares[0]
        return bool(square <= EXACT**2 * self.size)

    @property
    def n_reached(self) -> int:
        """How many starts reached the lowest value."""
        return sum(value <= self.least * (1.0 + SAME) for value in self.values)

    @property
    def local_values(self) -> dict[str, float]:
        """Values at the ends by start, the lowest first."""
        return {f"start {k + 1}": self.values[k] for k in np.argsort(self.values)}

    def to_first_order(self, X: Array) -> Array:
        """Return solutions of the problem to first order, scaled to logits of a deviation of at most 1."""
        X = self._descend(self.bilinear, X, FIRST_ORDER_STEPS, "").X
        return X / np.maximum(self.exactly.spread(X), 1.0)[:, :, None, None]

    def descend(self, X: Array, steps: int, phase: str, culled: dict[int, float] | None = None) -> None:
        """Descend from starts, shape (s, heads, d1, d2), and keep the best end.

        After some steps a share of them is kept: ``culled`` says when and how many.
        """
        ends = self._descend(self.exactly, X, min(steps, self.max_iter), phase, culled)
        self.values += ends.values.tolist()

    def finish(self) -> None:
        """Descend further from the best end."""
        self._descend(self.exactly, self.best[None], self.max_iter, "best")
        self.settle(self.least)

    def settle(self, value: float) -> None:
        """Take what the best end came down to as its value."""
        self.least = min(value, self.least)
        self.values[int(np.argmin(self.values))] = self.least

    def verdict(self, x: Array) -> str:
        """Return what the lowest value means, and how much of B it explains, as a message."""
        full, exactly = self.problem.full, self.exactly
        at = exactly.evaluate(x.reshape(1, *self.shape))
        n_equations = int(np.sum(full.weights > 0)) * full.B.shape[1]
        n_unknowns = self.problem.n_unknowns + at.Y[0].size
        share = float(np.sqrt(at.squares[0] / self.size))
        texts = zip(exactly.uniform, full.texts, strict=True)
        uniform = exactly.root * np.concatenate([U[0] @ text.A3 for U, text in texts])
        affine = exactly.root * np.column_stack([full.A1, np.ones(len(exactly.root))])
        reached = Reached(share, n_equations, n_unknowns, self.n_starts, self.n_reached)
        said = reached.said([uniform, affine], exactly.B)
        weak = share > EXACT and self.seen_alike and float(exactly.spread(at.X).max()) < WEAK
        return f"{said}; X is determined only up to X C Y to first order" if weak else said

    def _descend(
        self, model: Separable, X: Array, steps: int, phase: str, culled: dict[int, float] | None = None
    ) -> Points:
        """Return where Levenberg-Marquardt ends from each start; those of the exact model may become best."""
        with self.tracker.timed("evaluate"):
            at = model.evaluate(X)
        gradients, normals = model.normal(at)
        own = np.arange(gradients.shape[1])
        damping, idle = np.full(len(X), DAMPING), np.zeros(len(X), dtype=int)
        largest = max(float(np.linalg.norm(gradients, axis=1).max(initial=0.0)), TINY)
        self._keep(model, at)
        for step in range(steps):
            if culled and step in culled:
                idle[np.argsort(at.values)[int(np.ceil(culled[step] * len(X))) :]] = IDLE_STEPS
            live = np.flatnonzero((idle < IDLE_STEPS) & np.isfinite(at.values))
            if not len(live) or (model is self.exactly and self.is_exact):
                break
            with self.tracker.timed("step"):
                H = normals[live]
                mean = np.maximum(np.mean(H[:, own, own], axis=1), TINY)
                shift = damping[live] * mean
                H[:, own, own] += shift[:, None]
                p = -np.linalg.solve(H, gradients[live][:, :, None])[:, :, 0]
                promised = 0.5 * np.sum(p * (shift[:, None] * p - gradients[live]), axis=1)
            with self.tracker.timed("evaluate"):
                trial = model.evaluate(at.X[live] + p.reshape(len(live), *self.shape))
            with np.errstate(invalid="ignore", divide="ignore"):
                fall = at.values[live] - trial.values
                gain = np.where(promised > 0.0, fall / promised, -1.0)
            accepted = np.isfinite(trial.values) & (gain > LEAST_GAIN)
            gained = accepted & (fall > IDLE * at.values[live])
            idle[live] = np.where(gained, 0, idle[live] + 1)
            factor = np.where(gain > 0.75, 0.2, np.where(accepted, np.where(gain < 0.25, 2.0, 1.0), 4.0))
            damping[live] = np.maximum(damping[live] * factor, LEAST_DAMPING)
            taken = np.flatnonzero(accepted)
            if len(taken):
                with self.tracker.timed("model"):
                    kept = trial.take(taken)
                    at.put(live[taken], kept)
                    gradients[live[taken]], normals[live[taken]] = model.normal(kept)
            self.n_iter += 1
            self._keep(model, at)
            self._record(model, at, gradients, largest, phase, step + 1, p, bool(accepted.any()))
        return at

    def _keep(self, model: Separable, at: Points) -> None:
        k = int(np.argmin(at.values))
        if model is self.exactly and at.values[k] < self.least:
            self.best, self.least, self.square = at.X[k].copy(), float(at.values[k]), float(at.squares[k])

    def _record(
        self, model: Separable, at: Points, gradients: Array, largest: float, phase: str, step: int, p: Any,
        accepted: bool,
    ) -> None:  # fmt: skip
        if model is not self.exactly:
            return
        k = int(np.argmin(at.values))
        norm = float(np.linalg.norm(gradients[k])) / largest
        size = float(np.linalg.norm(p, axis=1).max())
        self.tracker.record(
            f"fit: {phase}", step, float(at.values[k]), norm, step_norm=size, accepted=accepted
        )
