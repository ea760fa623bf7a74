"""Levenberg-Marquardt for residuals that can vanish: the inversion of attention layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import MAX_DENSE
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inversion.layer_inversion import LayerInversion
from attnfit.solvers.damped import DampedFits
from attnfit.solvers.descent import Descent
from attnfit.solvers.newton import Outcome
from attnfit.solvers.tracking import Tracker
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]

# Starts that are descended from together: as many as keep their Jacobians in cache.
BATCH_ENTRIES = 1 << 21
# Steps with each gamma of a continuation.
STEPS = 20


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damped Gauss-Newton: ``(J^T J + gamma + damping) p = -gradient``.

    The damping falls while the quadratic model predicts the decrease and grows where a step is rejected. At a
    zero residual the neglected curvature vanishes and convergence is quadratic. Each step is corrected to
    second order with the same matrix: in the curved valleys of attention that saves more than half of the
    steps, and finds zeros that are missed without. Cholesky up to 3,000 unknowns; beyond, conjugate gradients
    on products, with no matrix formed.

    Without ``x0`` it starts from ``B V^+``, from the moments of the output, and then from Gaussian tokens,
    several at once with batched linear algebra, and stops at the first zero residual (square at most 1e-18 of
    that of B). Such a point need not be the input sought: `attnfit.problems.LayerInversion` may have several.

    Parameters
    ----------
    n_restarts : int
        Largest number of Gaussian starts.
    continuation : sequence of float
        Values of gamma that every start first descends with, one after the other, 20 steps each: ``(1, 0.1,
        ..., 1e-8)`` helps where half of the tokens are known, and misleads where none is.

    Raises
    ------
    ValueError
        If n_restarts or a gamma is negative, or the problem is no LayerInversion.

    Notes
    -----
    Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); Transtrum and
    Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization"
    (2012). The problem is that of "Unmasking Transformers: A Theoretical Approach to Data Recovery via
    Attention Weights", whose gamma, large enough to make the loss convex, draws X to zero.
    """

    n_restarts: int = 8
    continuation: Sequence[float] = ()

    def __post_init__(self) -> None:
        for k, gamma in enumerate(self.continuation):
            if not (np.isfinite(gamma) and gamma >= 0.0):
                raise ValueError(f"continuation[{k}] is {gamma!r}; every gamma must be finite and >= 0")
        if not isinstance(self.n_restarts, int | np.integer) or self.n_restarts < 0:
            raise ValueError(f"n_restarts must be an integer >= 0, not {self.n_restarts!r}")

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
        if not isinstance(problem, LayerInversion):
            raise ValueError(
                f"LevenbergMarquardt takes LayerInversion, not {type(problem).__name__}; leave solver out"
            )
        reference = problem.evaluate(np.zeros(problem.n_unknowns)).gradient
        goal = float(np.linalg.norm(reference))
        ends: dict[str, Descent] = {}
        n_iter = 0
        for names, points in self._batches(problem, x0, rng):
            phase = f"fit: {names[0]}" if len(names) == 1 else f"fit: {names[0]} to {names[-1].split()[-1]}"
            steps = [(problem.with_gamma(gamma), STEPS) for gamma in self.continuation]
            for one, most in [*steps, (problem, max_iter)]:
                fits = DampedFits(one, points, tol, goal, most, tracker, phase)
                stopped = fits.descend()
                points, n_iter = fits.x, n_iter + fits.n_iter
                if stopped:
                    break
            for k, name in enumerate(names):
                at = Evaluation(fits.x[k], float(fits.values[k]), fits.gradients[k])
                status = Status(str(fits.status[k]))
                ends[name] = Descent(at, reference, status, verdict=Verdict(status))
            if stopped or len(fits.solved):
                break
        best = min(ends, key=lambda name: ends[name].at.value)
        if not np.isfinite(ends[best].at.value):
            problem.value(ends[best].at.x)
        values = {name: end.at.value for name, end in ends.items()}
        method = "Cholesky" if problem.n_unknowns <= MAX_DENSE else "conjugate gradients"
        return Outcome(
            ends[best],
            dict(sorted(values.items(), key=lambda item: item[1])),
            n_iter,
            f"Levenberg-Marquardt, {method}, {len(ends)} start{'s'[: len(ends) > 1]}",
            self._message(problem, ends, best, len(fits.solved) > 0),
        )

    def _batches(
        self, problem: LayerInversion, x0: Array | None, rng: np.random.Generator
    ) -> Iterator[tuple[list[str], Array]]:
        """Yield names and points of the starts that are descended from together."""
        if x0 is not None:
            yield ["x0"], x0[None].copy()
            return
        for name, point in problem.starts(rng).items():
            yield [name], point[None].copy()
        size = problem.n_unknowns
        entries = (problem.B.size + size) * size
        together = max(1, BATCH_ENTRIES // entries)
        points = problem.gaussian_starts(self.n_restarts, rng)
        for first in range(0, self.n_restarts, together):
            part = points[first : first + together]
            yield [f"Gaussian {first + k + 1}" for k in range(len(part))], part.copy()

    def _message(self, problem: LayerInversion, ends: dict[str, Descent], best: str, solved: bool) -> str:
        """Return what a zero residual, or the lack of one, means; nothing where gamma hides it."""
        end = ends[best]
        share = np.sqrt(2.0 * end.at.value) / max(float(np.linalg.norm(problem.B)), np.finfo(float).tiny)
        if solved:
            return f"converged: zero residual (relative {share:.1e}) from the start {best}"
        if problem.gamma > 0.0 or end.status not in ("converged", "max_iter"):
            return ""
        if end.status == "max_iter":
            return (
                f"not converged: no zero residual after max_iter steps from each of {len(ends)} starts, the "
                f"least relative residual is {share:.1e}; raise max_iter or n_restarts"
            )
        return (
            f"converged to a local minimum: relative residual {share:.1e} is not zero; try more restarts, or "
            "no input gives this output"
        )
