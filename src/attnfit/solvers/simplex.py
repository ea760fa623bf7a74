"""Mixtures solved exactly: the active set of the simplex, for all right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.problems.layers.duality import GAP_TOLERANCE, duality_gaps, target_sizes
from attnfit.problems.layers.evaluation import LayeredEvaluation
from attnfit.problems.layers.two_layer import TwoLayer
from attnfit.solvers.columns import REMEDIES, describe, overall
from attnfit.solvers.descent import Descent
from attnfit.solvers.faces import minimise_over_simplex
from attnfit.solvers.newton import Outcome
from attnfit.solvers.tracking import StopFit, Tracker
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]

# Right-hand sides that are solved together; more share factors of a face, fewer fit into the cache.
CHUNK = 2**14
# Logits of proportions that are zero lie this far below the largest: exp gives an exact zero.
DEPTH = 800.0
UNCERTIFIED = (
    "the duality gap cannot be brought below its tolerance in float64; bring the signatures to similar "
    "scales, "
    "or raise gap_tolerance of ActiveSet"
)


@dataclass(frozen=True)
class ActiveSet:
    """The exact solver of mixtures, ``min 0.5 sum w (A2 f - b)^2`` over ``f >= 0, sum f = 1``.

    The optimum usually lies on a face of the simplex, which softmax coordinates reach only at infinity, and
    where their gradient vanishes at false optima too. An active-set method on the faces has neither trouble.
    Each right-hand side converges when its duality gap, which bounds its excess over the optimum, is at most
    ``gap_tolerance`` times ``0.5 sum w b^2`` (times the loss where that is larger).

    Parameters
    ----------
    gap_tolerance : float

    Raises
    ------
    ValueError
        If gap_tolerance is not positive.

    Notes
    -----
    In x the answer has logits ``log f`` on the face and 800 less than the largest elsewhere, so that its
    softmax has exact zeros.
    """

    gap_tolerance: float = GAP_TOLERANCE

    def __post_init__(self) -> None:
        if not self.gap_tolerance > 0:
            raise ValueError(
                f"gap_tolerance must be positive, not {self.gap_tolerance!r}; 1e-9 is the default"
            )

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
        """Minimise; `attnfit.minimize` documents the arguments. The start does not matter and ``tol`` is not
        used.

        Raises
        ------
        ValueError
            If the problem is not a mixture.
        """
        if not (isinstance(problem, TwoLayer) and problem.is_mixture):
            raise ValueError(
                "ActiveSet solves mixtures: TwoLayer with A1=None, activation='identity' and no offset, "
                "row_penalty or ridge; leave solver out for other problems"
            )
        n, k = problem.logit_map.shape[1], problem.n_columns
        X, gradient, values = np.zeros((n, k)), np.zeros((n, k)), np.zeros(k)
        gaps, status = np.full(k, np.inf), np.full(k, "interrupted", dtype="<U13")
        scales = target_sizes(problem)
        signatures = Signatures(problem)
        goal, n_changes = 0.0, 0
        try:
            for first in range(0, k, CHUNK):
                run = slice(first, min(first + CHUNK, k))
                solved = signatures.solve(problem.columns(run), tracker)
                X[:, run], gradient[:, run] = solved.X, solved.gradient
                values[run], gaps[run] = solved.values, solved.gaps
                scales[run] = np.maximum(scales[run], values[run])
                good = gaps[run] <= self.gap_tolerance * scales[run]
                status[run] = np.where(good, "converged", "precision")
                goal, n_changes = float(np.hypot(goal, solved.origin)), max(n_changes, solved.n_changes)
                norm = float(np.linalg.norm(gradient[:, : run.stop])) / goal if goal > 0.0 else 0.0
                tracker.record("active set", first // CHUNK, float(values[: run.stop].sum()), norm)
        except (KeyboardInterrupt, StopFit):
            pass
        if status[-1] == "interrupted":
            left = status == "interrupted"
            values[left] = (
                problem.columns(np.flatnonzero(left)).evaluate(X[:, left].reshape(-1)).column_values
            )
        known = np.isfinite(gaps) & (scales > 0.0)
        worst = float((gaps[known] / scales[known]).max(initial=0.0))
        reached = f"largest duality gap {worst:.1e} of 0.5 sum w b^2, certified to {self.gap_tolerance:.0e}"
        at = LayeredEvaluation(X.reshape(-1), float(values.sum()), gradient.reshape(-1), column_values=values)
        verdict = Verdict(Status(overall(status)))
        best = Descent(at, np.array([goal]), verdict.status, n_changes, verdict=verdict)
        return Outcome(
            best,
            {"active set": at.value},
            n_changes,
            "active set on the simplex",
            describe(status, reached, REMEDIES | {"precision": UNCERTIFIED}),
            status,
        )


class Solved(NamedTuple):
    """Some right-hand sides: answers, what is known of them, and the gradient's norm at zero."""

    X: Array
    gradient: Array
    values: Array
    gaps: Array
    n_changes: int
    origin: float


class Signatures:
    """The signatures of a mixture as differences from the shortest one.

    Proportions sum to one, so nothing is lost, what the signatures share does not cancel, and a short
    signature is not drowned by a long one.
    """

    def __init__(self, problem: Any) -> None:
        outer = problem.outer
        matrix = np.asarray(outer.toarray() if sparse.issparse(outer) else outer)
        shortest = int(np.argmin(np.linalg.norm(matrix, axis=0)))
        self.origin = matrix[:, [shortest]]
        self.matrix = matrix - self.origin

    def solve(self, problem: Any, tracker: Tracker) -> Solved:
        """Solve some right-hand sides and evaluate the answers."""
        with tracker.timed("step"):
            f, n_changes, origin = self.proportions(problem)
        with tracker.timed("evaluate"):
            X = logits_of(f)
            gradient, values, gaps = np.empty_like(X), np.empty(X.shape[1]), np.empty(X.shape[1])
            for run in problem.chunks():
                part = problem.columns(run)
                at = part.evaluate(X[:, run].reshape(-1))
                gradient[:, run] = at.gradient.reshape(len(X), -1)
                values[run], gaps[run] = at.column_values, duality_gaps(part, part.layers_of(at))
        return Solved(X, gradient, values, gaps, n_changes, origin)

    def proportions(self, problem: Any) -> tuple[Array, int, float]:
        """Return the proportions of some right-hand sides, shape (n, k), the largest number of changes of the
        active set, and the norm of the gradient in x at zero.
        """
        D, w = self.matrix, problem.weights
        b = problem.b - self.origin
        if w is not None and w.shape[1] > 1:
            gram = np.matmul(D.T[None] * w.T[:, None, :], D)
            size = np.maximum(np.einsum("kii->ki", gram).max(axis=1), np.finfo(float).tiny)
            gram = gram / size[:, None, None]
        else:
            gram = D.T @ (D if w is None else w * D)
            size = np.maximum(gram.diagonal().max(), np.finfo(float).tiny) * np.ones(b.shape[1])
            gram = gram / size[0]
        c = (D.T @ (b if w is None else w * b)).T / size[:, None]
        tolerance = np.maximum(
            1e-3 * GAP_TOLERANCE * target_sizes(problem) / size, 1e-15 * (1.0 + np.abs(c).max(axis=1))
        )
        f, changes = minimise_over_simplex(gram, c, tolerance)
        n = len(D.T)
        uniform = gram.mean(axis=-1) - c
        origin = (uniform - uniform.mean(axis=1, keepdims=True)) * size[:, None] / n
        return f.T, changes, float(np.linalg.norm(origin))


def logits_of(f: Array) -> Array:
    """Return logits, shape (n, k), whose softmax is f."""
    with np.errstate(divide="ignore"):
        x = np.log(f)
    return np.where(f > 0.0, x, x.max(axis=0) - DEPTH)
