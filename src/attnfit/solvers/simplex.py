"""Mixtures solved exactly, for all right-hand sides at once: convex quadratics over the simplex by the
active-set method on its faces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.objectives.layer_curvature import LayeredEvaluation
from attnfit.objectives.objective import Offer
from attnfit.objectives.saturation import GAP_TOLERANCE, duality_gaps, target_sizes
from attnfit.solvers.batched import REMEDIES, describe, overall
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.simplex_loop import over_simplex
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]

# Added to the unit diagonal of scaled systems: dependent columns share their weight, and every face has one
# answer. Refinement removes its effect on the optimality conditions.
RIDGE = 1e-12
N_REFINEMENTS = 2
# Factors of distinct faces held at once, in numbers.
FACTOR_ENTRIES = 2**22
# Right-hand sides that are solved together; more share factors of a face, fewer fit into the cache.
CHUNK = 2**14
# Logits of proportions that are zero lie this far below the largest: exp gives an exact zero.
DEPTH = 800.0
# Right-hand sides times signatures from which on the compiled loop pays for being loaded: 50 ms without it.
COMPILED = 20_000
UNCERTIFIED = (
    "the duality gap cannot be brought below its tolerance in float64; bring the signatures to similar "
    "scales, "
    "or raise gap_tolerance of ActiveSet"
)


class Faces:
    """``min 0.5 f^T G f - c^T f`` over the affine hulls of faces ``{f : sum f = 1, f_i = 0 off the face}``.

    Parameters
    ----------
    gram : ndarray, shape (n, n) or (k, n, n)
        One for all problems or one each.
    """

    def __init__(self, gram: Array) -> None:
        self.gram = gram
        self.shared = gram.ndim == 2
        size = np.sqrt(np.einsum("...ii->...i", gram))
        smallest = np.where(size > 0.0, size, np.inf).min(axis=-1, keepdims=True)
        # Systems are solved in variables of unit curvature; one without any takes the smallest scale.
        self.scale = np.where(size > 0.0, size, np.where(np.isfinite(smallest), smallest, 1.0))

    def solve(self, problems: Index, passive: Mask, c: Array) -> Array:
        """Return the minimisers on the faces where ``passive``, shape (p, n); zero elsewhere.

        Parameters
        ----------
        problems : ndarray, shape (p,)
            Whose quadratics, where each has its own.
        passive : ndarray of bool, shape (p, n)
            Each row marks at least one vertex.
        c : ndarray, shape (p, n)
        """
        out = np.empty_like(c)
        step = max(1, FACTOR_ENTRIES // (int(passive.sum(axis=1).max()) + 1) ** 2)
        # Problems on the same face next to each other share its factor within a chunk.
        order = _by_face(passive) if self.shared else np.arange(len(passive))
        for first in range(0, len(order), step):
            part = order[first : first + step]
            out[part] = self._solve(problems[part], passive[part], c[part])
        return out

    def multiply(self, problems: Index, f: Array) -> Array:
        """Return ``G f`` of each problem, shape (p, n)."""
        if self.shared:
            return np.asarray(f @ self.gram)
        return np.asarray(np.matmul(self.gram[problems], f[:, :, None])[:, :, 0])

    def _solve(self, problems: Index, passive: Mask, c: Array) -> Array:
        # The vertices of each face first, and no more of the others than the largest face needs.
        vertices = np.argsort(~passive, axis=1, kind="stable")[:, : int(passive.sum(axis=1).max())]
        if self.shared:
            change = np.append(True, (passive[1:] != passive[:-1]).any(axis=1))
            inverse = self._inverse(problems[change], passive[change], vertices[change])[
                np.cumsum(change) - 1
            ]
        else:
            inverse = self._inverse(problems, passive, vertices)
        f, multiplier = np.zeros_like(c), np.zeros((len(c), 1))
        for _ in range(1 + N_REFINEMENTS):
            miss = np.where(passive, c - self.multiply(problems, f) - multiplier, 0.0)
            right = np.append(
                np.take_along_axis(miss, vertices, axis=1), 1.0 - f.sum(axis=1, keepdims=True), axis=1
            )
            solved = np.matmul(inverse, right[:, :, None])[:, :, 0]
            known = np.take_along_axis(f, vertices, axis=1)
            np.put_along_axis(f, vertices, known + solved[:, :-1], axis=1)
            multiplier = multiplier + solved[:, -1:]
        return np.where(passive, f, 0.0)

    def _inverse(self, problems: Index, passive: Mask, vertices: Index) -> Array:
        """Return the inverses of the optimality conditions on faces, shape (p, size + 1, size + 1)."""
        p, size = vertices.shape
        rows, columns = vertices[:, :, None], vertices[:, None, :]
        gram = self.gram[rows, columns] if self.shared else self.gram[problems[:, None, None], rows, columns]
        member = np.take_along_axis(passive, vertices, axis=1)
        unit = 1.0 / (self.scale[vertices] if self.shared else self.scale[problems[:, None], vertices])
        system = np.zeros((p, size + 1, size + 1))
        gram = gram * unit[:, :, None] * unit[:, None, :]
        system[:, :size, :size] = np.where(member[:, :, None] & member[:, None, :], gram, 0.0)
        system[:, np.arange(size), np.arange(size)] += np.where(member, RIDGE, 1.0)
        # The last unknown is the multiplier of the sum, scaled so that its column has entries up to one.
        border = np.where(member, unit, 0.0)
        last = border.max(axis=1, keepdims=True)
        system[:, :size, size] = system[:, size, :size] = border / last
        unit = np.append(unit, 1.0 / last, axis=1)
        return np.linalg.inv(system) * unit[:, :, None] * unit[:, None, :]


def _by_face(passive: Mask) -> Index:
    return np.lexsort(np.packbits(passive, axis=1).T)


def minimise_over_simplex(
    gram: Array, c: Array, tolerance: Array, max_changes: int | None = None
) -> tuple[Array, int]:
    """Minimise ``0.5 f^T G f - c^T f`` over ``f >= 0, sum f = 1`` for each row of c.

    The vertex that promises most joins the face; on the way to the face's minimiser, vertices whose weight
    reaches zero leave it. Every step is feasible and lowers the objective, so any end has a valid duality
    gap.

    Parameters
    ----------
    gram : ndarray, shape (n, n) or (k, n, n)
    c : ndarray, shape (k, n)
    tolerance : ndarray, shape (k,)
        Stop at a duality gap of this size.
    max_changes : int, optional
        Changes of the face a problem may take, 10 n + 30 by default.

    Returns
    -------
    f : ndarray, shape (k, n)
    n_changes : int
        The largest number that a problem took.

    Notes
    -----
    Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23, with the sum as a further
    condition.
    """
    n = c.shape[1]
    limit = 10 * n + 30 if max_changes is None else max_changes
    if c.size >= COMPILED:
        f, changes = over_simplex(gram.reshape(-1, n, n), c, tolerance, limit)
        left = np.flatnonzero(changes < 0)
        most = int(changes.max())
        if len(left):
            own = gram if gram.ndim == 2 else gram[left]
            f[left], others = _by_faces(own, c[left], tolerance[left], limit)
            most = max(most, others)
        return f, most
    return _by_faces(gram, c, tolerance, limit)


def _by_faces(gram: Array, c: Array, tolerance: Array, limit: int) -> tuple[Array, int]:
    """Do what `minimise_over_simplex` documents, all right-hand sides at a time: from the face that is left
    when negative weights are dropped, the vertex that promises most joins; dependent signatures share their
    weight.
    """
    k, n = c.shape
    faces = Faces(gram)
    f, passive = _first_faces(faces, c)
    blocked = np.zeros((k, n), dtype=bool)
    live = np.arange(k)
    for change in range(limit + 1):
        g = faces.multiply(live, f[live]) - c[live]
        mean = np.sum(f[live] * g, axis=1, keepdims=True)
        promise = np.where(passive[live] | blocked[live], -np.inf, mean - g)
        joining = promise.argmax(axis=1)
        going = promise[np.arange(len(live)), joining] > tolerance[live]
        live, joining = live[going], joining[going]
        if not len(live) or change == limit:
            return f, change
        passive[live, joining] = True
        _descend_to_face(faces, c, f, passive, live)
        stuck = ~passive[live, joining]
        # A vertex that leaves at once joined because of rounding: it has to wait until another one joins.
        blocked[live[~stuck]] = False
        blocked[live[stuck], joining[stuck]] = True
    raise AssertionError("unreachable")


def _first_faces(faces: Faces, c: Array) -> tuple[Array, Mask]:
    """Drop negative weights, all at once, until a face's minimiser has none."""
    passive = np.ones(c.shape, dtype=bool)
    f = np.zeros_like(c)
    live = np.arange(len(c))
    while len(live):
        f[live] = faces.solve(live, passive[live], c[live])
        negative = passive[live] & (f[live] <= 0.0)
        live, negative = live[negative.any(axis=1)], negative[negative.any(axis=1)]
        passive[live] &= ~negative
    return f, passive


def _descend_to_face(faces: Faces, c: Array, f: Array, passive: Mask, rows: Index) -> None:
    """Move each row of f to the minimiser of its face, which loses the vertices that block the way."""
    while len(rows):
        goal = faces.solve(rows, passive[rows], c[rows])
        blocking = passive[rows] & (goal <= 0.0)
        free = ~blocking.any(axis=1)
        f[rows[free]] = goal[free]
        rows, goal, blocking = rows[~free], goal[~free], blocking[~free]
        if not len(rows):
            return
        here = f[rows]
        room = np.where(blocking, here / np.where(blocking, here - goal, 1.0), np.inf)
        room[blocking & (here <= 0.0)] = 0.0
        step = room.min(axis=1, keepdims=True)
        leaving = blocking & (room <= step)
        passive[rows] &= ~leaving
        f[rows] = np.where(leaving, 0.0, np.maximum(here + step * (goal - here), 0.0))


@dataclass(frozen=True)
class ActiveSet(Solver):
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
        if Offer.MIXTURE not in problem.offers:
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
