"""Whether a minimum exists: the linear programme behind separable data, and what it says of the answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from attnfit.data.gram import flatness
from attnfit.objectives.moves import Kind, kind_of
from attnfit.objectives.objective import MAX_DENSE, Evaluation, Problem
from attnfit.objectives.passes import slope_sizes
from attnfit.objectives.recession import (
    FixedSums,
    Frame,
    Free,
    Signs,
    fixed_sums,
    free_rows,
    long_means,
    separated_by_user,
    separated_rows,
    separated_sums,
    verify,
)

if TYPE_CHECKING:
    from attnfit.solvers.result import Result

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Free rows of the first programme, and those added where it is violated.
FIRST_ROWS, MORE_ROWS = 5_000, 2_000
MAX_ROUNDS = 20
# Projections that may spare the programme, what counts as positive among numbers of size one, and singular
# values below which a direction of the rows is rounding.
MAX_PROJECTIONS, CLEARLY, RANK = 100, 1e-3, 1e-10
# How far, in logits, a minimum may be that is proven: a quarter would do for the curvature at the point, and
# this may have been formed a quarter away. By how much more than one rounding sums over rows are off.
NEAR, GROWN = 0.1, 64.0
# A programme that takes longer, in seconds, decides nothing.
MAX_SECONDS = 20.0
# Steps of a fit of remaining rows, which begins where that of all rows stood.
MAX_ITER = 50
# Whether such a fit is under way: one that does not arrive has no limit to look at, and none is looked for.
_WITHIN: ContextVar[bool] = ContextVar("within", default=False)
# Logits by which separated rows are lowered to look at the limit: their shares are then rounding.
FAR = 60.0
# Logits below which an exponential is zero; and is no more than rounding, where the exponentials of other
# rows must not overflow.
NOTHING, NEXT_TO_NOTHING = 800.0, 40.0
# Entries of a direction below this share of the largest, in scaled variables, are rounding.
ENTRY = 1e-7
# Entries of a basis of directions, orthonormal in scaled variables, that are rounding of its eigenvectors.
NULL_ENTRY = 1e-13


class Undecided(Exception):
    """Raised where the programme takes too long: nobody knows whether a minimum exists."""


@dataclass(frozen=True)
class Separation:
    """Why there is no finite minimum.

    Attributes
    ----------
    direction : ndarray, shape (d,)
        The loss falls along it for ever.
    columns : list of (int, float)
        The unknowns that it moves and their entries, the largest first, all of them.
    rows : ndarray of int
        The rows of the data, in the user's order, whose outputs go to zero.
    remaining : ndarray of bool, shape (n,)
        The other rows.
    exact : bool
        True where no minimum exists at all; False where the loss is not convex, and none exists that way.
    """

    direction: Array
    columns: list[tuple[int, float]]
    rows: NDArray[np.intp]
    remaining: Mask
    exact: bool
    _problem: Any = field(repr=False)
    _at: Evaluation = field(repr=False)
    _frame: Frame = field(repr=False)
    _along: Array = field(repr=False)
    _drop: float = field(repr=False)
    # The direction in the unknowns of the fit.
    _along_unknowns: Array = field(repr=False)
    # The problem as it was given, and the way back to its unknowns, where the fit took place in others.
    _given: Any = field(default=None, repr=False)
    _lift: Callable[[Array], Array] | None = field(default=None, repr=False)

    def lifted(self, given: Any, lift: Callable[[Array], Array], least: float) -> Separation:
        """Return what is said here of a problem in better variables as the user knows it; entries of the
        direction below ``least`` of the largest are rounding.
        """
        moved = lift(self._along_unknowns)
        # The largest entry may be beyond the range of float64, or all but nothing.
        moved = moved / max(float(np.abs(moved).max()), np.finfo(float).tiny)
        order = np.argsort(-np.abs(moved), kind="stable")
        columns = [(int(j), float(moved[j])) for j in order if abs(moved[j]) > least]
        return replace(self, direction=moved, columns=columns, _given=given, _lift=lift)

    @property
    def value(self) -> float:
        """What the loss falls to; NaN where no rows can be left out."""
        if not self.remaining.any():
            return 0.0
        return self.rest.value if self.has_rest else float("nan")

    @property
    def point(self) -> Array:
        """A finite point, shape (d,), where the outputs of all separated rows are zero in float64, on from
        the last one of the fit where no rows can be left out; that one itself where none would remain.
        """
        x = self._at.x
        if self.remaining.any():
            if self.has_rest:
                deeper = self.rest.separation
                x = np.asarray(self.rest.x if deeper is None else deeper.point).reshape(-1)
            far = NOTHING if self._problem.loss.coupled else NEXT_TO_NOTHING
            x = x + (far / self._drop) * self._along_unknowns
        return x if self._lift is None else self._lift(x)

    @property
    def unit(self) -> Array:
        """By what the unknowns of `problem` are multiplied to give the user's, shape (d,)."""
        one = np.ones(len(self.direction))
        return one if self._lift is None else self._lift(one)

    @property
    def has_rest(self) -> bool:
        """Whether there are remaining rows, and can be fitted on their own."""
        return bool(self._problem.rows_can_be_left_out and self.remaining.any())

    def fit(self, **options: Any) -> Result:
        """Fit the remaining rows; takes the options of `attnfit.minimize`.

        Raises
        ------
        ValueError
            If no rows can be left out: the pairs of attention maps.
        """
        if not self.remaining.any():
            raise ValueError("no row remains: the outputs of all go to zero; add ridge")
        if not self._problem.rows_can_be_left_out:
            raise ValueError(
                "pairs of queries and keys cannot be left out; leave those of result.separation.rows out of "
                "the mask, or add ridge"
            )
        from attnfit.solvers.minimize import minimize

        if self._given is None:
            return minimize(self.problem, **options)
        here = self._problem
        dropped = separated_rows(here.rows, here.rows.chunks, self._at, self._frame, self._along)
        return minimize(self._given.with_rows(self._given.rows.without(dropped)), **options)

    @cached_property
    def problem(self) -> Any:
        """The problem on the remaining rows, in the unknowns of the fit."""
        return self._problem.without_separated_rows(self._at, self._frame, self._along)

    @cached_property
    def rest(self) -> Result:
        """The fit of the remaining rows from where the fit of all of them stood."""
        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            # What is said of the remaining rows is said of them alone.
            warnings.simplefilter("ignore", ConvergenceWarning)
            within = _WITHIN.set(True)
            try:
                return replace(self, _given=None).fit(x0=self._at.x, max_iter=MAX_ITER)
            finally:
                _WITHIN.reset(within)

    def coefficients(self, x: Array) -> Array:
        """Return the answer, shape (d,): the fit of the remaining rows; infinite where a coefficient has no
        finite value, NaN where only its combinations with others have one.

        Where no rows can be left out it is the last point x, NaN where the direction moves a coefficient.
        """
        if not self.has_rest:
            alone = (self.direction != 0.0) & (len(self.columns) == 1) & ~self.remaining.any()
            return np.where(alone, np.copysign(np.inf, self.direction), np.where(self.direction, np.nan, x))
        x = np.array(self.rest.x, dtype=np.float64)
        open_now, open_before = (
            np.linalg.norm(problem.unseen_directions(problem.evaluate(self._at.x)), axis=1)
            for problem in (self.problem, self._problem)
        )
        moved = (self.direction != 0.0) | (open_now > open_before + ENTRY)
        alone = (open_now > 1.0 - ENTRY) & (self.direction != 0.0)
        return np.where(alone, np.copysign(np.inf, self.direction), np.where(moved, np.nan, x))


def minimum_is_proven(problem: Problem, at: Evaluation, hessian: Array, decrement: float) -> bool:
    """Return whether the Newton step and the curvature at a point prove that a minimum exists nearby.

    With G the Gram of the rows, less what their group has in common, and ``H >= kappa G``, a row moves by at
    most ``kappa^-1/2`` for a step of length one in the norm of H. The third derivative along a step is at
    most twice its largest move times the second, so that a minimum exists where
    ``R kappa^-1/2 |g|_{H^-1} <= 1/2``: Bach, "Self-concordant analysis for logistic regression" (2010),
    proposition 2, doi:10.1214/09-EJS521, with R = 2. What rounding adds to the gradient counts in full.

    Parameters
    ----------
    hessian : ndarray, shape (d, d)
    decrement : float
        ``g^T H^-1 g``.
    """
    rows: Any = problem
    if not hasattr(rows, "structure") or not rows.convex or kind_of(rows.loss) is not Kind.EXACT:
        return False
    if rows.penalty is not None or np.any(rows.ridge):
        return False
    gram, sizes = rows.structure(at)
    # Where columns are large beside what of them differs within groups, so is the rounding.
    gram = gram + np.diag(len(sizes) * np.maximum(sizes - np.diag(gram), 0.0))
    scale = np.sqrt(np.diag(gram))
    if not (scale > 0.0).all():
        return False
    values, vectors = linalg.eigh(gram / scale / scale[:, None])
    if not values[0] > 0.0:
        return False
    root = vectors / np.sqrt(values) / scale[:, None]
    rounding = GROWN * float(np.finfo(np.float64).eps)
    kappa = float(linalg.eigvalsh(root.T @ hessian @ root)[0]) - rounding * len(scale) / float(values[0])
    if not kappa > 0.0:
        return False
    rounding *= float(np.sqrt(rows.rows.reduce(slope_sizes, at)))
    return bool(np.sqrt(max(decrement, 0.0) / kappa) + rounding / kappa <= NEAR)


def find_separation(problem: Problem, at: Evaluation) -> Separation | None:
    """Return a recession direction with all separated rows, None where there is none or the loss has none.

    ``max sum t  subject to  F v + t <= 0, 0 <= t <= 1``, over directions v along which the fixed rows stay
    together, F the free rows relative to them: t is 0 or 1 at the optimum, and 1 exactly for the rows that
    some direction separates. The rows that run away come first; the others join where they object.
    """
    if not problem.has_logits or problem.n_unknowns > MAX_DENSE:
        return None
    over_rows: Any = problem
    kind = kind_of(over_rows.loss)
    if kind is Kind.NONE or np.any(over_rows.ridge) or over_rows.penalty is not None:
        return None
    if kind is Kind.LOCAL and _WITHIN.get():
        return None
    found = _along(over_rows, at, kind, each=True)
    if found is None and kind is Kind.LOCAL:
        # Rows that share a column fall together if they do so on balance.
        found = _along(over_rows, at, kind, each=False)
    return found


def _along(problem: Any, at: Evaluation, kind: Kind, *, each: bool) -> Separation | None:
    frame = _frame(problem, at, each)
    if frame is None:
        return None
    y = _programme(problem, at, frame)
    if y is None or not (each or _falls_apart(problem, at, frame, y)):
        return None
    for direction in (_shortest(problem, at, frame, y), y):
        scaled = frame.basis @ direction
        scaled = np.where(np.abs(scaled) > ENTRY * np.abs(scaled).max(), scaled, 0.0)
        v = scaled / frame.scale
        v /= max(float(np.abs(v).max()), np.finfo(float).tiny)
        signs: Signs = problem.rows.reduce(verify, at, frame, v)
        if signs.confirm(frame) and _is_strict(signs, direction is y):
            break
    else:
        return None
    separated = np.concatenate(problem.rows.collect(separated_by_user, at, frame, y))
    found = Separation(
        direction=v,
        columns=[(int(j), float(v[j])) for j in np.argsort(-np.abs(scaled), kind="stable") if v[j] != 0.0],
        rows=np.flatnonzero(separated),
        remaining=~separated,
        exact=kind is Kind.EXACT,
        _problem=problem,
        _at=at,
        _frame=frame,
        _along=y,
        _drop=signs.drop,
        _along_unknowns=v,
    )
    if kind is Kind.LOCAL and not _holds_at_the_limit(problem, found, signs, frame):
        return None
    return found


def _falls_apart(problem: Any, at: Evaluation, frame: Frame, y: Array) -> bool:
    """Whether each direction of the frame separates rows of its own, and the loss falls along every one."""
    free: Free = problem.rows.reduce(free_rows, at, frame, None, FIRST_ROWS)
    if free.n_all > FIRST_ROWS or ((free.rows != 0.0).sum(axis=1) > 1).any():
        return False
    for j, size in enumerate(y):
        v = frame.basis[:, j] * size / frame.scale
        signs: Signs = problem.rows.reduce(verify, at, frame, v)
        if not signs.pull > 0.0:
            return False
    return True


def _holds_at_the_limit(problem: Any, found: Separation, signs: Signs, frame: Frame) -> bool:
    """Whether the gradient still agrees at the best point of the remaining rows, infinitely far along."""
    if not problem.rows_can_be_left_out or not found.rest.converged:
        return False
    far = np.asarray(found.rest.x).reshape(-1) + (FAR / signs.drop) * found.direction
    limit = problem.evaluate(far)
    agreed: Signs = problem.rows.reduce(verify, limit, frame, found.direction)
    return agreed.confirm(frame)


def _shortest(problem: Any, at: Evaluation, frame: Frame, y: Array) -> Array:
    """Return the shortest direction, in the user's units, along which all separated rows fall alike, if there
    is one: what it says of other rows does not depend on how often a row occurs.
    """
    gram, total = problem.rows.reduce(separated_sums, at, frame, y)
    upper = np.linalg.qr(frame.basis / frame.scale[:, None])[1]
    inverse = linalg.pinv(upper)
    e = -linalg.pinvh(inverse.T @ gram @ inverse, rtol=1e-11) @ (inverse.T @ total)
    return np.asarray(inverse @ e)


def _is_strict(signs: Signs, anyhow: bool) -> bool:
    """Whether all separated rows fall, and alike where that was sought."""
    return anyhow or signs.most - signs.drop <= 1e-6 * signs.drop


def _frame(problem: Any, at: Evaluation, each: bool) -> Frame | None:
    """Return the directions along which the fixed rows stay together; None where there are none."""
    means = np.zeros((0, problem.n_unknowns))
    if problem.rows.n_long:
        sums = problem.rows.reduce(long_means, at, each)
        means = sums[:, :-1] / np.maximum(sums[:, -1:], 1.0)
    found: FixedSums = problem.rows.reduce(fixed_sums, at, means, each)
    gram, sizes = found.gram.result(), found.sizes
    scale = np.sqrt(np.where(sizes > 0.0, sizes, 1.0))
    values, vectors = linalg.eigh(gram / scale / scale[:, None], driver="evd")
    null = values <= flatness(len(values)) * max(float(values[-1]), np.finfo(float).tiny)
    if not null.any() or not np.isfinite(found.least):
        return None
    if kind_of(problem.loss) is Kind.SCALING:
        # Whole groups fall: not relative to rows of their own.
        means = np.zeros_like(means)
    # What rounding leaves of a column that fixed rows hold would take any row that has it for one that moves.
    basis = np.where(np.abs(vectors[:, null]) > NULL_ENTRY, vectors[:, null], 0.0)
    return Frame(basis, scale, means, each)


def _programme(problem: Any, at: Evaluation, frame: Frame) -> Array | None:
    """Return the direction that separates most rows, in coordinates of the frame; None without any."""
    free: Free = problem.rows.reduce(free_rows, at, frame, None, FIRST_ROWS)
    F = free.rows
    for _ in range(MAX_ROUNDS):
        y = _solve(F)
        if y is None:
            return None
        if free.n_all <= len(F):
            return y
        others: Free = problem.rows.reduce(free_rows, at, frame, y, len(F) + MORE_ROWS)
        known = {row.tobytes() for row in F}
        fresh = [row for row in others.rows if row.tobytes() not in known]
        if not fresh:
            return y
        F = np.concatenate([F, np.stack(fresh)])
    raise Undecided


def _by_projection(F: Array) -> tuple[bool, Array | None]:
    """Return whether projections decide which of these rows some direction lowers while it raises none, and
    the direction that lowers them all, by one at least; None where there is none.

    With P the projection on the range of F and ``u_0 = 1``, ``u_k+1 = max(P u_k, 0)``: where ``P u_k`` is
    positive on all rows it is such a direction. The residuals ``u_k - P u_k`` are orthogonal to the range and
    add up to at least ``1 - u_K``: where that is positive, a strictly positive combination of the rows
    vanishes, and there is no direction (Stiemke). Rows that go to zero stay where they are, perhaps. The
    iteration is the rectifier of Correia, Guimaraes and Zylkin (arXiv:1903.01633).
    """
    U, sizes, W = linalg.svd(F, full_matrices=False, check_finite=False)
    seen = sizes > RANK * max(float(sizes[0]), np.finfo(float).tiny)
    U, back = U[:, seen], W[seen].T / sizes[seen]
    u = np.ones(len(F))
    for _ in range(MAX_PROJECTIONS):
        inside = U.T @ u
        along = U @ inside
        if float(along.min()) > CLEARLY * float(along.max()):
            return True, -back @ inside / float(along.min())
        u = np.maximum(along, 0.0)
        if float(u.max()) < 1.0 - CLEARLY:
            return True, None
    # One at least: else the last projection would have been clearly positive.
    stay = u <= CLEARLY * float(u.max())
    null = linalg.null_space(F[stay], rcond=RANK)
    if not null.shape[1]:
        return False, None
    decided, y = _by_projection(F[~stay] @ null)
    if not decided or y is None:
        return False, None
    v = null @ y
    falls = F @ v <= -0.5
    decided, others = _by_projection(F[~falls]) if not falls.all() else (True, None)
    if not decided:
        return False, None
    if others is None:
        return True, v
    # Far enough along v the rows that it lowers fall whatever the others' direction does to them.
    return True, others + (1.0 + max(float((F[falls] @ others).max()), 0.0)) * v


def _solve(F: Array) -> Array | None:
    # Most fits need none.
    from scipy.optimize import linprog

    m, r = F.shape
    if m == 0:
        return None
    decided, y = _by_projection(F)
    if decided:
        return y
    matrix = sparse.hstack([sparse.csr_array(F), sparse.eye_array(m)], format="csr")
    cost = np.concatenate([np.zeros(r), -np.ones(m)])
    bounds = [(None, None)] * r + [(0.0, 1.0)] * m
    found = linprog(
        cost,
        A_ub=matrix,
        b_ub=np.zeros(m),
        bounds=bounds,
        method="highs",
        options={"time_limit": MAX_SECONDS},
    )
    if found.x is None or found.status != 0:
        raise Undecided
    return None if -found.fun < 0.5 else np.asarray(found.x[:r])
