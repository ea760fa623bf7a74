"""Whether the curvature of a sample tells how far the minimum is, where that of all the data is dear.

A model M from drawn rows, corrected by the gradient differences of the steps, proposes the last step. Too
little curvature in M only makes that step too long; too much hides how far the minimum is. So the point is
accepted only if, besides a full step that moves no logit by more than ``tol``,

* the diagonal of M is within a factor of two of that of the Hessian of all rows,
* the last two steps were full, and each halved the gradient in the norm of ``M^-1``,
* along the directions in which M, and a sample that M has not seen, have least curvature, M and the Hessian
  agree within a factor of two.

Measured by the `verdicts_large` benchmark; an exact Hessian settles what this does not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.objectives.objective import Evaluation
from attnfit.objectives.rows import RowProblem
from attnfit.solvers.curvature import Model
from attnfit.solvers.subproblem import Step

Array = NDArray[np.float64]

# A read with the exact Hessian that costs as much as so many reads more is worth avoiding.
DEAR_GRAM = 8.0
# Curvatures agree if their ratio is in this range.
AGREE = (0.5, 2.0)
# Each of the last steps must shrink the gradient to this share.
SHRUNK = 0.5
# Weakest directions of each of the two matrices.
N_WEAK = 4
# Curvatures are those of a point that is no further away, in logits.
SAME_PLACE = 1e-3
# From this move on the point is close enough that evidence is due; evaluations that may pass without it.
CLOSE, PATIENCE = 1e-5, 6
# Failures after which the exact Hessian is asked for.
MAX_FAILURES = 2
# Below this share of the largest eigenvalue a sample may have missed a direction altogether.
FLAT = 3e-13
# Rows of the second sample, and how many at least for one unknown.
N_ROWS, ROWS_PER_UNKNOWN = 8_000, 4


class Evidence:
    """What speaks for a sampled model, gathered along a descent.

    Parameters
    ----------
    problem : RowProblem
    second_sample : callable
        Draws a problem on rows that the model has not seen.
    """

    def __init__(self, problem: RowProblem, second_sample: Callable[[], RowProblem]) -> None:
        self.problem, self._draw = problem, second_sample
        self._second: RowProblem | None = None
        # A point and curvatures of all rows there: the diagonal, directions, and along these.
        self._seen: tuple[Array, Array, Array, Array] | None = None
        self._gradients: list[Array] = []
        self._full: list[bool] = []
        self._at: Array | None = None
        self._n_close = self._n_failures = 0
        self.move = float("nan")
        self.least = float("inf")

    def follow(self, at: Evaluation, *, full: bool) -> None:
        """Note a point of the descent and whether the step that is proposed there is a full one."""
        if self._at is not at.x:
            self._at = at.x
            self._gradients = [*self._gradients[-2:], at.gradient]
            self._full = [*self._full[-2:], full]
        else:
            self._full[-1] = full

    def is_close(self, move: float) -> bool:
        """Note a move, and return whether the descent has been close for too long."""
        self._n_close += move <= CLOSE
        return self._n_close > PATIENCE

    def holds(self, at: Evaluation, model: Model, step: Step, tol: float) -> bool | None:
        """Return whether a point can be accepted; None if no further step will help to tell."""
        if model.negative or not _is_firm(model):
            return None
        if not self._contracted(model):
            return self._failed()
        matrix = model.matrix()
        diagonal = np.diag(matrix)
        if not (diagonal > 0.0).all():
            return None
        moved = None
        if self._seen is not None:
            x, exact, directions, along = self._seen
            moved = self.problem.moves(at, np.stack([step.p, at.x - x], axis=1))
        if moved is None or not moved.largest[1] <= SAME_PLACE:
            directions = self._weak_directions(at, matrix, np.sqrt(diagonal))
            moved, exact, along = self.problem.look_along(at, step.p, directions)
            self._seen = (at.x, exact, directions, along)
        self.move, self.least = float(moved.largest[0]), moved.least
        if not (along > 0.0).all():
            return None
        modelled = np.sum(directions * (matrix @ directions), axis=0)
        agree = _agree(diagonal, exact) and _agree(modelled, along)
        return True if agree and self.move <= tol else self._failed()

    def _weak_directions(self, at: Evaluation, matrix: Array, scale: Array) -> Array:
        """Return the directions of least curvature of the model and of the second sample, shape (d, k)."""
        if self._second is None:
            self._second = self._draw()
        there = self._second.evaluate(at.x)
        found = [_weakest(m / scale / scale[:, None]) for m in (matrix, self._second.hessian_at(there))]
        return np.concatenate(found, axis=1) / scale[:, None]

    def _contracted(self, model: Model) -> bool:
        """Whether the last two steps were full and shrank the gradient as those of a good model do."""
        if len(self._gradients) < 3 or not all(self._full):
            return False
        sizes = [-float(g @ model.solve(g, np.inf).p) for g in self._gradients]
        return all(after <= SHRUNK**2 * before for before, after in pairwise(sizes))

    def _failed(self) -> bool | None:
        self._n_failures += 1
        return None if self._n_failures >= MAX_FAILURES else False


def _is_firm(model: Model) -> bool:
    """Whether the sample saw every direction."""
    return model.base is not None and model.base.is_firm(FLAT)


def _agree(one: Array, other: Array) -> bool:
    ratio = other / one
    return bool(((ratio >= AGREE[0]) & (ratio <= AGREE[1])).all())


def _weakest(matrix: Array) -> Array:
    """Return the eigenvectors of least curvature, shape (d, N_WEAK)."""
    last = min(N_WEAK, len(matrix)) - 1
    return np.asarray(linalg.eigh(matrix, subset_by_index=[0, last], check_finite=False)[1])
