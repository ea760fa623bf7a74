"""Many fits of one problem at the price of a few: replicates of a bootstrap, folds, penalties."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import flatness
from attnfit.objectives.many import all_at_one_point, each_at_its_own, values_and_gradients
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Array, Index
from attnfit.solvers.minimize import minimize
from attnfit.solvers.replicates import Fits
from attnfit.solvers.result import Result
from attnfit.solvers.verdicts import COARSE, MAX_TOL, TRUSTED, WEAK, Status

# Reads that a fit may share; then it goes on alone.
MAX_ROUNDS = 12
# A fit under way is done at this share of the tolerance, by an estimate; the verdict measures.
NEARLY = 0.3
# How often a step is halved before a fit goes on alone.
MAX_HALVINGS = 3
# Steps after which the verdict is sought again.
MAX_LOOKS = 3
# Bytes of the Hessians and weights of fits that share a read.
SHARED_BYTES = 1 << 30


@dataclass
class ManyResult:
    """What `minimize_many` returns: R fits in order.

    Attributes
    ----------
    x : ndarray, shape (R, d)
        Infinite or NaN where a coefficient has no finite value, as in `Result`.
    value : ndarray, shape (R,)
    status : ndarray of str, shape (R,)
        As `Result.status`.
    move : ndarray, shape (R,)
        By how much the next step would change a logit at most; NaN of fits that were made alone and do not
        say.
    full : Result
        The fit with weights of one, where all of them started.
    n_rounds, n_alone : int
        Reads that were shared after that fit, and fits that were made alone.
    n_passes : float
        Reads of the data, those of ``full`` included.
    seconds : float
    """

    x: Array
    value: Array
    status: NDArray[np.str_]
    move: Array
    full: Result
    n_rounds: int
    n_alone: int
    n_passes: float
    seconds: float

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Which fits have converged, shape (R,)."""
        return np.asarray(self.status == str(Status.CONVERGED))

    def __repr__(self) -> str:
        names, counts = np.unique(self.status, return_counts=True)
        found = ", ".join(f"{n} {name}" for name, n in zip(names, counts, strict=True))
        return f"{len(self.x)} fits: {found}; {self.n_passes:.1f} passes, {self.n_alone} fitted alone"


def minimize_many(
    problem: RowProblem,
    weights: Any = None,
    ridge: Any = None,
    folds: Any = None,
    *,
    units: Any = None,
    x0: Any = None,
    tol: float = 1e-8,
    max_iter: int = 100,
    random_state: Any = None,
    separation: Literal["warn", "keep"] = "warn",
) -> ManyResult:
    """Fit one problem many times, with other weights or penalties, sharing every read of the data.

    Fit r minimises ``sum_u W[u, r] L_u(x) + 0.5 ridge_r |x|^2`` with ``L_u`` the loss of unit u: a group, a
    row of a loss without groups, or what has one label in ``units``. All start from the fit x* with weights
    of one, by a Newton step with their own exact gradient and Hessian at x*, which one read gives for all of
    them; then quasi-Newton steps, of which a read serves all fits that are not done.

    Parameters
    ----------
    problem : RowProblem
        ``Softmax``, ``Rescaled``, ``Exponential``, ``Poisson``: in memory or on disk.
    weights : array_like, shape (n_units, R), optional
        By unit, in the order of ``np.unique(units)``; of groups in order of first appearance.
    ridge : array_like, shape (R,) or (L,), optional
        In place of that of the problem. With ``weights`` one for each of their columns; with ``folds`` each
        fold is fitted with each.
    folds : array_like, shape (n,), optional
        Labels of rows: fit k leaves out fold k, in the order of ``np.unique(folds)``; with L penalties the
        fits of fold 0 come first, ``R = n_folds L``.
    units : array_like, shape (n,), optional
        The unit of each row, as clusters; no unit may split a group.
    x0 : array_like, shape (d,), optional
        Where the fit with weights of one starts.
    tol, max_iter, random_state, separation
        As for `minimize`: with "keep" fits without a finite minimum return their last finite point.

    Returns
    -------
    ManyResult

    Raises
    ------
    ValueError
        If an argument is not usable, a unit splits a group, a weight is negative, or the problem has a row
        penalty.
    TypeError
        If the problem is not one over rows in one place.

    Notes
    -----
    A status says of each fit what that of `minimize` says: "converged" means that the exact next step, with
    the fit's own Hessian, moves no logit by more than ``tol``. Fits that do not get there together (with a
    singular Hessian, or without a minimum) are fitted alone, as `minimize` does. Where the loss is not convex
    they stay in the basin of x*, and a fit from elsewhere may have a lower value: use `minimize` with
    ``n_starts`` for that. On data whose groups are longer than a block all fits are made alone.

    Source: the one-step estimator and its iteration, van der Vaart, "Asymptotic Statistics" (1998), section
    5.7; quasi-Newton corrections as in Nocedal and Wright, "Numerical Optimization" (2006), chapter 6.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import datasets, minimize_many, problems
    >>> travel = datasets.load_travel_mode()
    >>> problem = problems.Softmax(travel.A, travel.b, travel.groups, loss="cross_entropy")
    >>> rng = np.random.default_rng(0)
    >>> many = minimize_many(problem, rng.multinomial(210, np.full(210, 1 / 210), size=100).T)
    >>> many.x.shape, bool(many.converged.all())
    ((100, 6), True)
    >>> minimize_many(problem, ridge=[0.1, 1.0, 10.0]).x[:, 3].round(4)
    array([-0.0152, -0.0134, -0.0094])
    """
    started = time.perf_counter()
    over_rows = getattr(problem, "rows_can_be_left_out", False)
    if not over_rows or not problem.rows.is_whole:
        raise TypeError(
            f"minimize_many takes a problem over rows in one place, not {type(problem).__name__}"
            + (" on Dask; compute() the columns first" if over_rows else "")
        )
    if problem.penalty is not None:
        raise ValueError("row_penalty belongs to no unit; leave it out, or use ridge")
    if not 0.0 < tol <= MAX_TOL:
        raise ValueError(f"tol must be in (0, {MAX_TOL:g}], not {tol!r}")
    fits = Fits.read(problem, weights, ridge, folds, units)
    options = {"tol": tol, "max_iter": max_iter, "random_state": random_state, "separation": separation}
    before = problem.n_passes
    base = problem.with_rows(problem.rows)
    if ridge is not None:
        # The smallest penalty leaves the least to do for the others, and a start for all of them.
        base.ridge = float(fits.ridge.min())
    with warnings.catch_warnings():
        # What is said of this fit is said of none of those that are asked for.
        warnings.simplefilter("ignore")
        full = minimize(base, x0=x0, **options)
    together = _Together(base, fits, tol)
    if full.converged and not problem.rows.n_long:
        together.run(np.asarray(full.x, dtype=np.float64))
    alone = np.flatnonzero(together.status == "")
    passes = problem.n_passes - before
    for r in alone.tolist():
        found = _alone(problem, fits, r, together.start(r, full), options)
        together.x[r], together.value[r] = found.x, found.value
        together.status[r], together.move[r] = str(found.status), found.move
    return ManyResult(
        together.x,
        together.value,
        together.status,
        together.move,
        full,
        together.n_rounds,
        len(alone),
        passes + together.passes_alone,
        time.perf_counter() - started,
    )


def _alone(problem: Any, fits: Fits, r: int, x0: Array | None, options: Any) -> Result:
    """Fit one set of weights as `minimize` does."""
    rows = problem.rows
    w = fits.of_rows(problem, fits.weights[:, r])
    if rows.weights is not None:
        w = w * np.asarray(rows.weights)
    own = problem.with_rows(rows.with_loss(rows.loss, rows.b, w))
    own.ridge = float(fits.ridge[r])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minimize(own, x0=x0, **options)


@dataclass
class _State:
    """Fits under way, one row each: indices among all, points, values, gradients, inverse Hessians."""

    index: Index
    x: Array
    value: Array
    gradient: Array
    inverse: Array
    halvings: Index

    def keep(self, mask: NDArray[np.bool_]) -> _State:
        """Return some of the fits."""
        return _State(*(getattr(self, name)[mask] for name in _State.__dataclass_fields__))


@dataclass
class _Together:
    """The fits that share reads, in the problem's better units."""

    given: RowProblem
    fits: Fits
    tol: float
    n_rounds: int = 0
    passes_alone: float = 0.0
    x: Array = field(init=False)
    value: Array = field(init=False)
    move: Array = field(init=False)
    status: NDArray[np.str_] = field(init=False)

    def __post_init__(self) -> None:
        R = len(self.fits.ridge)
        self.x = np.full((R, self.given.n_unknowns), np.nan)
        self.value, self.move = np.full((2, R), np.nan)
        self.status = np.full(R, "", dtype="U16")
        reduction = self.given.reduction()
        self.problem: Any = self.given if reduction is None else reduction.problem
        unit = np.ones(self.given.n_unknowns)
        self.unit = unit if reduction is None else np.asarray(reduction.lift(unit))

    def start(self, r: int, full: Result) -> Array | None:
        """Return where a fit goes on alone."""
        for x in (self.x[r], full.x):
            if np.isfinite(x).all():
                return np.asarray(x)
        return None

    def run(self, x: Array) -> None:
        """Make the fits from x, in the user's units, as many together as fit into memory."""
        d, R = len(x), len(self.fits.ridge)
        step = max(1, SHARED_BYTES // (8 * (3 * d * d + len(self.fits.weights))))
        at = self.problem.evaluate(x / self.unit)
        unseen = self.problem.unseen_directions(at)
        for first in range(0, R, step):
            self._run(at, unseen, np.arange(first, min(first + step, R)))

    def _penalty(self, index: Index) -> Array:
        return self.fits.ridge[index, None] * self.unit**2

    def _run(self, at: Any, unseen: Array, index: Index) -> None:
        W, units = self.fits.weights[:, index], self.fits.units
        values, gradients, H = self.problem.rows.reduce(all_at_one_point, at, W, units)
        self.n_rounds += 1
        ridge = self._penalty(index)
        values += 0.5 * np.sum(ridge * at.x**2, axis=1)
        gradients += ridge * at.x
        H += ridge[:, :, None] * np.eye(len(at.x))
        inverse, firm = _inverses(H, unseen)
        start = np.broadcast_to(at.x, gradients.shape)
        state = _State(index, start, values, gradients, inverse, np.zeros(len(index), dtype=np.intp))
        state = state.keep(firm)
        if not len(state.index):
            return
        # How far a step of decrement one goes, in logits: the rule while fits are under way.
        root = np.sqrt(_decrements(state))
        moves = self.problem.moves(at, _steps(state).T).largest
        size = moves / np.maximum(root, np.finfo(float).tiny)
        going = moves > self.tol
        done = [state.keep(~going)]
        # As small a share of the way from the fit of all the data is wanted as of a logit.
        enough = NEARLY * self.tol * np.minimum(moves, 1.0)
        state, size, enough = state.keep(going), size[going], enough[going]
        target = state.x + _steps(state)
        for _ in range(MAX_ROUNDS):
            if not len(state.index):
                break
            state, lower = self._round(state, target)
            small = lower & (size * np.sqrt(_decrements(state)) <= enough)
            lost = state.halvings > MAX_HALVINGS
            done.append(state.keep(small))
            self._remember(state.keep(lost))
            target = np.where(lower[:, None], state.x + _steps(state), 0.5 * (state.x + target))
            going = ~(small | lost)
            state, target = state.keep(going), target[going]
            size, enough = size[going], enough[going]
        self._remember(state)
        for part in done:
            self._judge(at, unseen, part)

    def _round(self, state: _State, target: Array) -> tuple[_State, NDArray[np.bool_]]:
        """Evaluate the fits at their targets; those that are lower there stay, as the second tells."""
        values, gradients = self._evaluate(state.index, target)
        with np.errstate(invalid="ignore"):
            lower = np.isfinite(gradients).all(axis=1) & (values <= state.value + 1e-10 * np.abs(state.value))
        here = lower[:, None]
        return _State(
            state.index,
            np.where(here, target, state.x),
            np.where(lower, values, state.value),
            np.where(here, gradients, state.gradient),
            _corrected(state.inverse, target - state.x, gradients - state.gradient, lower),
            np.where(lower, 0, state.halvings + 1),
        ), lower

    def _evaluate(self, index: Index, X: Array) -> tuple[Array, Array]:
        W = self.fits.weights[:, index]
        with np.errstate(over="ignore", invalid="ignore"):
            values, gradients = self.problem.rows.reduce(values_and_gradients, X, W, self.fits.units)
            ridge = self._penalty(index)
            self.n_rounds += 1
            return values + 0.5 * np.sum(ridge * X**2, axis=1), gradients + ridge * X

    def _judge(self, at: Any, unseen: Array, state: _State) -> None:
        """Accept the fits whose exact next step, with their own Hessian, is small enough."""
        rows = self.problem.rows
        for _ in range(MAX_LOOKS):
            if not len(state.index):
                return
            far = self.problem.moves(at, (state.x - at.x).T).largest > TRUSTED
            W = self.fits.weights[:, state.index]
            inverse, ridge = state.inverse, self._penalty(state.index)
            firm = np.ones(len(far), dtype=bool)
            if far.any():
                H = rows.reduce(each_at_its_own, state.x[far], W[:, far], self.fits.units)
                self.n_rounds += 1
                inverse = inverse.copy()
                inverse[far], firm[far] = _inverses(H + ridge[far, :, None] * np.eye(len(at.x)), unseen)
            state = _State(state.index, state.x, state.value, state.gradient, inverse, state.halvings)
            steps, decrements = _steps(state), _decrements(state)
            moves = self.problem.moves(at, steps.T).largest
            coarse = np.finfo(float).eps * np.abs(state.value) * moves**2 > COARSE * decrements
            small = firm & (moves <= self.tol) & ~(coarse & (decrements > 0.0))
            kept = state.keep(small)
            self._remember(kept)
            self.status[kept.index], self.move[kept.index] = str(Status.CONVERGED), moves[small]
            self._remember(state.keep(~small))
            state, steps = state.keep(firm & ~small), steps[firm & ~small]
            if not len(state.index):
                return
            x = state.x + steps
            values, gradients = self._evaluate(state.index, x)
            state = _State(state.index, x, values, gradients, state.inverse, state.halvings)

    def _remember(self, state: _State) -> None:
        x = state.x * self.unit
        self.x[state.index], self.value[state.index] = x, state.value


def _steps(state: _State) -> Array:
    return np.asarray(-np.einsum("rij,rj->ri", state.inverse, state.gradient))


def _decrements(state: _State) -> Array:
    return np.asarray(np.maximum(-np.einsum("ri,ri->r", state.gradient, _steps(state)), 0.0))


def _inverses(H: Array, unseen: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Return the inverses of Hessians off the directions that no row sees, and which have no other weak one;
    a Hessian that is not positive has none.
    """
    if unseen.shape[1]:
        scale = np.einsum("rii->r", H) / H.shape[1]
        H = H + scale[:, None, None] * (unseen @ unseen.T)
    diagonal = np.sqrt(np.maximum(np.einsum("rii->ri", H), 0.0))
    firm = (diagonal > 0.0).all(axis=1) & np.isfinite(H).all(axis=(1, 2))
    diagonal[diagonal == 0.0] = 1.0
    scaled = np.where(
        firm[:, None, None], H / diagonal[:, :, None] / diagonal[:, None, :], np.eye(H.shape[1])
    )
    values, vectors = np.linalg.eigh(scaled)
    firm &= values[:, 0] > max(WEAK, flatness(H.shape[1])) * values[:, -1]
    values = np.where(firm[:, None], values, 1.0)
    inverse = np.einsum("rij,rj,rkj->rik", vectors, 1.0 / values, vectors)
    inverse = np.asarray(inverse / diagonal[:, :, None] / diagonal[:, None, :])
    if unseen.shape[1]:
        off = np.eye(H.shape[1]) - unseen @ unseen.T
        inverse = np.asarray(off @ inverse @ off)
    return inverse, firm


def _corrected(inverse: Array, s: Array, y: Array, where: NDArray[np.bool_]) -> Array:
    """Return inverse Hessians corrected by a step and its change of gradient: the update of Broyden,
    Fletcher, Goldfarb and Shanno.
    """
    y = np.where(where[:, None], y, 0.0)
    curvature = np.einsum("ri,ri->r", s, y)
    usable = curvature > 0.0
    rho = np.where(usable, 1.0 / np.where(usable, curvature, 1.0), 0.0)
    By = np.einsum("rij,rj->ri", inverse, y)
    yBy = np.einsum("ri,ri->r", y, By)
    cross = np.einsum("ri,rj->rij", By, s)
    change = (rho * rho * yBy + rho)[:, None, None] * np.einsum("ri,rj->rij", s, s)
    change -= rho[:, None, None] * (cross + cross.transpose(0, 2, 1))
    return np.asarray(inverse + change)
