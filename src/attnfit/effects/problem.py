"""Problems with absorbed effects: the profile of their loss, and the fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_design, choose, is_dask
from attnfit.effects.levels import read_sets
from attnfit.effects.newton import ROUNDING_C, SEEN, ConvexFit, Curvature, Ending, Point
from attnfit.effects.prepared import Data, Prepared
from attnfit.effects.rows import Features
from attnfit.effects.values import Effects, effects_at, fitted_rows
from attnfit.losses.elementwise import PoissonDeviance, SquaredExponential
from attnfit.losses.softmax import CrossEntropy, Squared
from attnfit.objectives.objective import Evaluation, Moved, Offer, Problem
from attnfit.objectives.rows import RowProblem

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
# Rows with outcomes that a direction of recession leaves alone move by less than this share of the largest,
# and coefficients that it leaves alone by less than this share of their largest.
UNMOVED = 1e-6
# Move of a logit beyond which the effects at a given beta are not at their optimum.
PROFILE_TOL, PROFILE_STEPS = 1e-11, 100
# Relative residual of the solves behind a Hessian.
PRECISE = 1e-10
# Steps for which a stride is looked at before it is taken for slow convergence.
MAX_LOOKS = 40
DASK = (
    "absorb needs labels and cells in memory and is not supported on Dask; call .compute(), or write the "
    "data to disk and pass what attnfit.data.open_source returns"
)
ROW_PENALTY = "row_penalty does not go with absorb; use ridge, which penalises x only"


@dataclass(frozen=True)
class AbsorbedEvaluation(Evaluation):
    """An evaluation with the effects at their optimum there."""

    point: Point | None = field(default=None, repr=False)


@dataclass(frozen=True)
class AbsorbedEnd:
    """The end of a fit.

    Attributes
    ----------
    at : Evaluation
    x : ndarray, shape (K,)
        Coefficients; NaN where the effects explain a column, infinite where it is separated.
    ending : Ending
    n_iter : int
    flat : ndarray, shape (K, k)
        Orthonormal directions that the effects explain.
    separated : bool
        Whether a coefficient has no finite value.
    note : str
        What was left out and what is not identified.
    prepared, point, curvature, fit
        The rows that were kept, and the end there.
    """

    at: Evaluation
    x: Array
    ending: Ending
    n_iter: int
    flat: Array
    separated: bool
    note: str
    prepared: Prepared = field(repr=False)
    point: Point = field(repr=False)
    curvature: Curvature = field(repr=False)
    fit: ConvexFit = field(repr=False)

    @cached_property
    def precise(self) -> Curvature:
        """The curvature with regressions on the effects solved for to rounding: what standard errors take."""
        return self.fit.curvature(self.point, self.curvature, PRECISE, ROUNDING_C)

    @property
    def effects(self) -> Effects:
        """The effects of all sets that were passed."""
        return effects_at(self.prepared, self.point)

    @property
    def dropped(self) -> dict[str, Any]:
        """What was left out of the fit, by name."""
        return self.prepared.dropped.report(self.prepared.data.sets)


class AbsorbedProblem(Problem):
    """``L(beta) = min over effects of sum phi(X beta + sum_s a_s[c_s] + offset) + 0.5 ridge ||beta||^2``.

    Made by `attnfit.problems.Poisson`, `Softmax` and `Exponential` with ``absorb``. `value`, `gradient` and
    `hessian` are those of the profile: the effects are at their optimum for each beta.

    Parameters
    ----------
    data : Data
    """

    offers = frozenset({Offer.ABSORBED})
    best_hessian = "exact"
    penalty = None

    def __init__(self, data: Data) -> None:
        self.data, self.plain = data, data.plain
        self.ridge: Any = data.plain.ridge
        self._rows_read = 0.0
        self.prepared = data.prepare()
        # What a fit works on, where it has left out more.
        self._current = self.prepared

    # ---- what it is made of

    @property
    def loss(self) -> Any:
        """The loss of the logits."""
        return self.plain.loss

    @property
    def shape(self) -> tuple[int, ...]:
        """Natural shape of the unknown, (K,): the structural coefficients."""
        return (0 if self.data.X is None else int(self.data.X.shape[1]),)

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.data.n_rows

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return self.plain.n_groups

    @property
    def n_passes(self) -> float:
        """Reads of X since the problem was made."""
        read = self._rows_read + self.prepared.rows.features.rows_read
        if self._current is not self.prepared:
            read += self._current.rows.features.rows_read
        return float(read / self.prepared.rows.n)

    @property
    def convex(self) -> bool:
        """Whether the loss is convex in the logits."""
        return bool(self.loss.convex)

    def with_memory_limit(self, limit: int) -> AbsorbedProblem:
        """Refuse.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(
            "memory_limit does not go with absorb, whose labels and cells are held in memory; leave "
            "memory_limit out"
        )

    # ---- value and derivatives of the profile

    def _evaluation(self, point: Point, prepared: Prepared | None = None) -> AbsorbedEvaluation:
        prepared = self.prepared if prepared is None else prepared
        gradient = (point.moments.gradient + prepared.ridge() * point.beta) * prepared.rows.features.scale
        value = point.value + prepared.constant()
        return AbsorbedEvaluation(prepared.user(point.beta), value, gradient, point=point)

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient of the profile at x, shape (K,): two reads, for logits and for sums."""
        rows = self.prepared.rows
        beta = self.prepared.standard(np.asarray(x, dtype=np.float64))
        logits = rows.logits(beta)
        places = Features(None, rows.features.places, 0)
        zero = np.zeros(0)
        alone = replace(rows, features=places, offset=logits)
        inner = replace(self.prepared.fit(PROFILE_TOL), rows=alone, ridge=zero)
        start = inner.at(*inner.start())
        end = inner.descend(start, PROFILE_STEPS, _silent, watch_stride=False)
        found = self._evaluation(self.prepared.fit().at(beta, end.point.a))
        second = self.hessian_at(found) if hessian else None
        origin = self.evaluate(np.zeros_like(x)).gradient if at_zero else None
        return AbsorbedEvaluation(
            found.x, found.value, found.gradient, point=found.point, hessian=second, gradient_at_zero=origin
        )

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian of the profile, shape (K, K): the information on beta with the effects
        eliminated.
        """
        if at.hessian is not None:
            return at.hessian
        scale = self.prepared.rows.features.scale
        G = self._curvature(at).G + np.diag(self.prepared.ridge())
        return np.asarray(G * scale * scale[:, None])

    def _curvature(self, at: Evaluation) -> Curvature:
        point = at.point if isinstance(at, AbsorbedEvaluation) else None
        if point is None:
            return self._curvature(self.evaluate(at.x))
        return self.prepared.fit().curvature(point, None, PRECISE, ROUNDING_C)

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step, shape (K, k), changes a logit at most, the effects following it to
        first order.
        """
        here, scale = self._curvature(at), self.prepared.rows.features.scale
        found = []
        for step in (steps * scale[:, None]).T:
            moved = self.prepared.rows.along(step, -here.C @ step, -here.C_first @ step)
            found.append(float(np.abs(moved).max()))
        return Moved(np.array(found))

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v at an evaluated point."""
        H = self.hessian_at(at)
        return lambda v: np.asarray(H @ v)

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the diagonal of the Hessian, shape (K,)."""
        return np.maximum(np.diag(self.hessian_at(at)), 0.0)

    def predict(self, x: Any) -> Array:
        """Return the model's output on every row at x, the effects at their optimum there, shape (n,): zero
        for rows that are separated, NaN for those of weight zero.
        """
        at = self._evaluate_checked(x)
        assert isinstance(at, AbsorbedEvaluation) and at.point is not None
        return fitted_rows(self.prepared, at.point.moments.mu)

    # ---- the fit

    def descend(
        self,
        x0: Array | None,
        tol: float,
        max_iter: int,
        record: Callable[[int, Evaluation, float, bool], None],
    ) -> AbsorbedEnd:
        """Fit coefficients and effects together.

        Parameters
        ----------
        x0 : ndarray, shape (K,), optional
        tol : float
            The largest change of a logit that the next Newton step may still make.
        max_iter : int
        record : callable
            Told of each read: iteration, evaluation, move of the next step, whether it was accepted.
        """
        self._work_on(self.prepared)
        fit = self.prepared.fit(tol)
        beta, a = fit.start()
        if x0 is not None:
            beta = self.prepared.standard(x0)
            a = fit.sweep(beta, np.zeros_like(a), 2)
        separated, direction = np.zeros(self.n_rows, dtype=bool), np.zeros(self.shape[0])
        done, looks = 0, 0

        def listen(n_iter: int, point: Point, here: Curvature, accepted: bool) -> None:
            record(done + n_iter, self._evaluation(point, self._current), here.move, accepted)

        point = fit.at(beta, a)
        while True:
            left = max_iter - done
            # Once a fit keeps its stride, every step is a candidate for a direction of recession.
            looking = 0 < looks < MAX_LOOKS
            steps = min(1, left) if looking else left
            end = fit.descend(point, steps, listen, watch_stride=not looks)
            point, here, done = end.point, end.curvature, done + end.n_iter
            if end.ending is not Ending.STRIDING and not (end.ending is Ending.MAX_ITER and done < max_iter):
                break
            looks += 1
            found = self._recession(here)
            if found is not None:
                separated |= found
                direction = direction + self._current.user(here.d_beta)
                x, effects = self._current.user(point.beta), self._current.spread(point.a)
                self._work_on(self.data.prepare(separated))
                fit, looks = self._current.fit(tol), 0
                point = fit.at(self._current.standard(x), self._current.gather(effects))
        return self._ended(end.ending, fit, point, here, done, direction)

    def _work_on(self, prepared: Prepared) -> None:
        if self._current is not self.prepared:
            self._rows_read += self._current.rows.features.rows_read
        self._current = prepared

    def _recession(self, here: Curvature) -> Mask | None:
        """Return the rows that fall along the step, if it is a direction of recession: rows with outcomes
        stay where they are, and of the others none rises. One read.
        """
        rows = self._current.rows
        moved = rows.along(here.d_beta, here.d_a, here.d_first)
        small = UNMOVED * float(np.abs(moved).max())
        if small == 0.0 or np.abs(moved[rows.target > 0.0]).max() > small or moved.max() > small:
            return None
        found = np.zeros(self.n_rows, dtype=bool)
        found[rows.features.places[moved < -small]] = True
        return found

    def _sees(self, fit: ConvexFit, point: Point, here: Curvature) -> bool:
        """Whether the rows see a direction that is left out for want of curvature."""
        precise = fit.curvature(point, here, PRECISE, ROUNDING_C)
        for step in (precise.open / np.sqrt(precise.sizes)[:, None]).T:
            if self._current.rows.seen(step, -precise.C @ step, -precise.C_first @ step) > SEEN:
                return True
        return False

    def _ended(
        self,
        ending: Ending,
        fit: ConvexFit,
        point: Point,
        here: Curvature,
        n_iter: int,
        direction: Array,
    ) -> AbsorbedEnd:
        prepared, data = self._current, self.data
        at = self._evaluation(point, prepared)
        unknown = here.unknown & (not np.any(self.ridge))
        endless = unknown & (np.abs(direction) > UNMOVED * np.abs(direction).max(initial=0.0))
        x = np.where(unknown, np.nan, at.x)
        x[endless] = np.copysign(np.inf, direction[endless])
        notes = [prepared.dropped.sentence(data.sets)]
        collinear = np.flatnonzero(unknown & ~endless)
        if len(collinear):
            some = ", ".join(map(str, collinear[:5])) + (", ..." if len(collinear) > 5 else "")
            told = ("s", "are", "they have") if len(collinear) > 1 else ("", "is", "it has")
            how = "collinear with the effects" + (", or with one another" if len(collinear) > 1 else "")
            if ending in (Ending.CONVERGED, Ending.AT_FLOOR) and self._sees(fit, point, here):
                ending, how = Ending.FLAT, "hardly told from the effects, or from one another"
            notes.append(f"column{told[0]} {some} {told[1]} {how}: {told[2]} no coefficient")
        constant = [s.name for k, s in enumerate(data.sets) if k not in prepared.order]
        if constant:
            notes.append(f"{', '.join(constant)} has one level: a constant that the other effects hold")
        flat = here.open / prepared.rows.features.scale[:, None] if unknown.any() else here.open[:, :0]
        return AbsorbedEnd(
            at, x, ending, n_iter, np.linalg.qr(flat)[0], bool(endless.any()),
            "; ".join(note for note in notes if note), prepared, point, here, fit,
        )  # fmt: skip


def _silent(n_iter: int, point: Point, here: Curvature, accepted: bool) -> None:
    """Hear nothing."""


def require_absorbable(plain: Any) -> None:
    """Raise NotImplementedError for a problem that has no form with absorbed effects."""
    if not plain.rows.is_whole:
        raise NotImplementedError(DASK)
    if plain.penalty is not None:
        raise NotImplementedError(ROW_PENALTY)
    if not isinstance(plain.loss, PoissonDeviance | CrossEntropy | Squared) and not (
        isinstance(plain.loss, SquaredExponential) and plain.loss.function == "exp"
    ):
        raise NotImplementedError(
            f"absorb has no form for {type(plain.loss).__name__}; it takes Poisson, Exponential with "
            "function='exp', and Softmax with loss 'cross_entropy', 'kl' or 'squared'"
        )


def absorbed_problem(
    make: Callable[[Any], RowProblem],
    A: Any,
    absorb: Any,
    row_penalty: Any,
    singletons: str,
    names: list[str] | None = None,
) -> AbsorbedProblem:
    """Return a problem with effects.

    Parameters
    ----------
    make : callable
        Takes a design to the problem without effects.
    A : array, sparse matrix, data frame, something on disk, or None
        Structural columns; there may be none.

    Raises
    ------
    NotImplementedError
        For data on Dask, a row penalty, or a loss without effects.
    ValueError
        For labels that are none.
    """
    choose(singletons, dict.fromkeys(("keep", "drop")), "singletons")
    if is_dask(A):
        raise NotImplementedError(DASK)
    if np.any(np.asarray(row_penalty) != 0.0):
        raise NotImplementedError(ROW_PENALTY)
    without = A is None or (len(np.shape(A)) == 2 and np.shape(A)[1] == 0)
    design = None if without else as_design(A)
    n = read_sets(absorb, names=names)[0].codes.shape[0] if A is None else int(np.shape(A)[0])
    # The problem without effects needs a column; nobody looks at this one.
    plain = make(np.zeros((n, 1)) if design is None else design)
    require_absorbable(plain)
    return AbsorbedProblem(Data(plain, design, absorb, drop_singletons=singletons == "drop", names=names))
