"""How the curvature of the objective is modelled: each strategy says what an evaluation should bring along,
and builds a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.data.gram import flatness
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.objective import Evaluation, Problem
from attnfit.solvers.subproblem import (
    FINE,
    HELPFUL,
    RANK_TOLERANCE,
    ROUGH,
    Cholesky,
    MoreSorensen,
    QuasiNewton,
    SteihaugToint,
    Step,
    length,
    preconditioned,
)

Array = NDArray[np.float64]

# Below this size an eigendecomposition costs less than finding out whether it is needed.
SMALL = 128
# Beyond this many unknowns an indefinite model costs less by conjugate gradients on a sample than by
# eigenvectors.
MEDIUM = 500
# An exact Hessian that shrinks the gradient this much a step is kept: the next one would cost more than it
# saves.
KEEP = 0.02
# A sampled one that shrinks it more than this is kept and corrected.
SLOW = 0.15
# One that costs ten evaluations is kept even if it shrinks the gradient no more than this.
DEAR = 0.5
# A sampled one that shrinks it less than this is too coarse: draw twice the rows; after so many draws all.
COARSE, MAX_COARSE = 0.5, 3


class Quadratic(Protocol):
    """A quadratic model in scaled variables."""

    @property
    def negative(self) -> bool:
        """Whether negative curvature was met."""
        ...

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return the minimiser within the radius."""
        ...


@dataclass(frozen=True)
class Model:
    """A quadratic model of the objective in the variables ``scale * x``.

    Attributes
    ----------
    quadratic : Quadratic
    scale : ndarray, shape (d,)
        The root of each unknown's curvature where the model was made.
    exact_at : ndarray, shape (d,), optional
        The point at which the model has the curvature of all the data; None where it has that of a sample.
    """

    quadratic: Quadratic
    scale: Array
    exact_at: Array | None = None

    def solve(self, gradient: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return the minimiser within the radius; ``p`` is in the user's units."""
        step = self.quadratic.solve(gradient / self.scale, radius, steep_only=steep_only)
        return Step(step.p / self.scale, step.predicted, step.bounded, length(step.p))

    def approach(self, gradient: Array) -> Array | None:
        """Return how far a stationary point is, whatever its kind, shape (d,); None without a matrix."""
        if self.base is None:
            return None
        eigen = self.base.eigen if isinstance(self.base, Cholesky) else self.base
        return eigen.approach(gradient / self.scale) / self.scale

    def weakest(self) -> tuple[Array, float, float]:
        """Return the direction v of least curvature that is not flat, in the user's units, ``v^T H v``, and
        its share of the largest in scaled variables.
        """
        assert self.base is not None
        eigen = self.base.eigen if isinstance(self.base, Cholesky) else self.base
        v, curvature, share = eigen.weakest()
        return v / self.scale, curvature, share

    def norm(self, v: Array) -> float:
        """Return the length of a step in scaled variables."""
        return length(self.scale * v)

    def dual_norm(self, gradient: Array) -> float:
        """Return the length of a gradient in scaled variables."""
        with np.errstate(over="ignore", invalid="ignore"):
            return length(gradient / self.scale)

    @property
    def negative(self) -> bool:
        """Whether negative curvature was met."""
        return self.quadratic.negative

    @property
    def base(self) -> MoreSorensen | Cholesky | None:
        """The matrix that the model is built on, None where there is none."""
        inner = self.quadratic.base if isinstance(self.quadratic, QuasiNewton) else self.quadratic
        return inner if isinstance(inner, MoreSorensen | Cholesky) else None

    def matrix(self) -> Array:
        """Return the model's matrix in the user's units, shape (d, d)."""
        assert isinstance(self.quadratic, QuasiNewton | MoreSorensen | Cholesky)
        return np.asarray(self.quadratic.hessian * self.scale * self.scale[:, None])

    @property
    def flat(self) -> Array | None:
        """An orthonormal basis, in the user's units, of the directions without curvature, shape (d, k); None
        if unknown.
        """
        if self.base is None:
            return None
        if self.base.n_flat == 0:
            return np.zeros((len(self.scale), 0))
        eigen = self.base.eigen if isinstance(self.base, Cholesky) else self.base
        return np.asarray(np.linalg.qr(eigen.unidentified / self.scale[:, None])[0])


class Strategy(Protocol):
    """What the descent asks of a curvature strategy."""

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Return what the next evaluation shall bring along, given the last step's ratio of gradient norms
        (None where there is none to judge by); with ``exact`` the curvature of all the data.
        """
        ...

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Return the model at an accepted point; ``learn`` says whether the last step was long enough for its
        gradient difference to be more than rounding.
        """
        ...


def dense_model(problem: Problem, at: Evaluation, hessian: Array | None = None) -> Model:
    """Return a model of a point with this Hessian, shape (d, d), scaled to a unit diagonal; by default with
    that of all the data, which the evaluation may have brought along.
    """
    exact_at = at.x if hessian is None else None
    if hessian is None:
        hessian = problem.hessian_at(at) if at.hessian is None else at.hessian
    unseen = problem.unseen_columns(at)
    if unseen.any():
        # Rounding must not be scaled up to matter.
        hessian = np.where(unseen | unseen[:, None], 0.0, hessian)
    diagonal = np.abs(np.diag(hessian))
    scale = np.sqrt(np.where(diagonal > 0.0, diagonal, 1.0))
    for _ in range(5):
        # An entry beside the diagonal exceeds it in indefinite matrices only: they are scaled further.
        largest = (np.abs(hessian) / scale).max(axis=1) / scale
        if not (largest > 2.0).any():
            break
        scale = scale * np.sqrt(np.maximum(largest, 1.0))
    scaled = hessian / scale / scale[:, None]
    tolerance = flatness(len(scale)) if problem.has_logits else RANK_TOLERANCE
    make = MoreSorensen if len(scale) <= SMALL else Cholesky
    return Model(make(scaled, tolerance), scale, exact_at)


def natural_scale(problem: Problem, at: Evaluation) -> Array:
    """Return the square root of each unknown's curvature, shape (d,): ``scale * x`` has curvature about one.

    One where a column has no effect at all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        diagonal = problem.diagonal_at(at)
    usable = np.isfinite(diagonal) & (diagonal > 0.0)
    return np.sqrt(np.where(usable, diagonal, 1.0))


@dataclass
class Exact:
    """The full Hessian, accumulated in the same read as the gradient, and kept while it serves.

    Parameters
    ----------
    patient : bool
        Try a Hessian before asking for the next one: for a start so close that the first may be the last.
    """

    patient: bool = False
    _untried: bool = False
    _requested: bool = False

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for a Hessian unless the present one works well."""
        works = contraction is not None and contraction <= KEEP
        self._requested = exact or not (works or (self.patient and self._untried))
        self._untried = False
        return {"hessian": self._requested}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Use the Hessian of the evaluation; where long groups were mispredicted, read once more for it."""
        if last is not None and not self._requested:
            return last
        self._untried = True
        return dense_model(problem, at)


class QuasiNewtonCorrected:
    """What `FrozenHessian`, `SampledHessian` and `PilotHessian` share: a model that works is kept, and each
    step's gradient difference folded in, until the curvature of all the data is asked for.

    Conjugate gradients in effect, at no cost but the evaluation.
    """

    _from: Evaluation | None = None
    _exact: Exact | None = None

    def _exactly(self, contraction: float | None, exact: bool) -> dict[str, Any] | None:
        """Return the request of the exact Hessian once it has been asked for."""
        if exact and self._exact is None:
            self._exact, contraction = Exact(patient=True), None
        return None if self._exact is None else self._exact.request(contraction, exact=exact)

    def _corrected(self, at: Evaluation, last: Model | None, learn: bool) -> Model | None:
        """Return the last model with the last step learned, if there is one to correct."""
        before, self._from = self._from, at
        if last is None or not isinstance(last.quadratic, QuasiNewton) or before is None:
            return None
        if not learn:
            return last
        step = last.scale * (at.x - before.x)
        change = (at.gradient - before.gradient) / last.scale
        return replace(last, quadratic=last.quadratic.learn(step, change))

    @staticmethod
    def _correctable(model: Model) -> Model:
        assert model.base is not None
        return replace(model, quadratic=QuasiNewton(model.base))


class FrozenHessian(QuasiNewtonCorrected):
    """An exact Hessian, kept and corrected while it serves: where one costs many gradients."""

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for nothing but value and gradient."""
        self._wanted = exact
        return {}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Correct the last model, or read the data once for a new one where the last step gained little."""
        before = self._from
        corrected = self._corrected(at, last, learn)
        if corrected is not None and before is not None and not self._wanted:
            gained = corrected.dual_norm(at.gradient) <= DEAR * corrected.dual_norm(before.gradient)
            if gained:
                return corrected
        return self._correctable(dense_model(problem, at))


@dataclass
class SampledHessian(QuasiNewtonCorrected):
    """The Hessian of rows drawn by approximate leverage scores during the evaluation, kept while it works.

    With ``fresh`` every evaluation draws anew.
    """

    sampler: RowSampler
    fresh: bool = False
    _n_coarse: int = 0
    _all_rows: FrozenHessian | None = None

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for a draw unless the present model works, twice as large where it was far off; for the
        Hessian of all rows where draws do not serve.
        """
        wanted = self._exactly(contraction, exact)
        if wanted is not None:
            return wanted
        if contraction is not None and contraction > COARSE and self._all_rows is None:
            self.sampler.double()
            self._n_coarse += 1
            if self._n_coarse > MAX_COARSE and not self.fresh:
                self._all_rows = FrozenHessian()
        if self._all_rows is not None:
            return self._all_rows.request(contraction)
        works = contraction is not None and contraction <= SLOW
        return {} if works and not self.fresh else {"sampler": self.sampler}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Use the rows that came with the evaluation, or correct the last model."""
        if self._exact is not None:
            return self._exact.model(problem, at, last)
        if self._all_rows is not None:
            return self._all_rows.model(problem, at, last, learn=learn)
        corrected = self._corrected(at, last, learn)
        if at.sample is None and corrected is not None:
            return corrected
        # A draw smaller than the number of unknowns is no model.
        if at.sample is None or at.sample.n_rows <= at.x.size:
            return self._correctable(dense_model(problem, at))
        return self._correctable(dense_model(problem, at, problem.hessian_at(at, at.sample)))


@dataclass
class PilotHessian(QuasiNewtonCorrected):
    """The Hessian of the sample on which the start was found, kept while it works; then another strategy.

    Parameters
    ----------
    sample : Problem
        Stands for the problem.
    x : ndarray, shape (d,)
        Where the fit on all the data begins.
    otherwise : callable
        Makes the strategy that takes over where the sample's curvature is too coarse, or has none along some
        direction.
    """

    sample: Problem
    x: Array
    otherwise: Callable[[], Strategy]
    successor: Strategy | None = None

    def __post_init__(self) -> None:
        at = self.sample.evaluate(self.x)
        model = dense_model(self.sample, at, self.sample.hessian_at(at))
        assert model.base is not None
        if model.negative or model.base.n_flat:
            self.successor = self.otherwise()
        else:
            self._first = replace(model, quadratic=QuasiNewton(model.base))

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for nothing but value and gradient as long as the sample serves."""
        wanted = self._exactly(contraction, exact)
        if wanted is not None:
            return wanted
        if self.successor is None and contraction is not None and contraction > SLOW:
            self.successor = self.otherwise()
            contraction = None
        return {} if self.successor is None else self.successor.request(contraction)

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Take the sample's curvature once, then correct it."""
        if self._exact is not None:
            return self._exact.model(problem, at, last)
        if self.successor is not None:
            return self.successor.model(problem, at, last, learn=learn)
        return self._corrected(at, last, learn) or self._first


@dataclass
class MatrixFree:
    """Products with the Hessian of drawn rows, or of all rows without a sampler: no d x d array.

    Parameters
    ----------
    scale : ndarray, shape (d,)
    sampler : RowSampler, optional
    """

    scale: Array
    sampler: RowSampler | None = None
    _exact: bool = False

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for a draw, twice as large where the last was too coarse; in the end it preconditions."""
        self._exact = self._exact or exact
        if self.sampler is not None and not self._exact and contraction is not None and contraction > COARSE:
            self.sampler.double()
        return {"sampler": self.sampler}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Multiply by the curvature at this point."""
        sample, scale = None if self.sampler is None else at.sample, self.scale

        def scaled(rows: Any) -> Callable[[Array], Array]:
            product = problem.hessian_operator(at, rows)
            return lambda v: np.asarray(product(v / scale) / scale)

        if sample is not None and self._exact and sample.n_rows <= HELPFUL * problem.n_rows:  # type: ignore[attr-defined]
            return Model(preconditioned(scaled(None), scaled(sample)), scale, at.x)
        if sample is None or self._exact:
            return Model(SteihaugToint(scaled(None), FINE), scale, at.x)
        # A sample of ten rows an unknown is some thirty per cent off: solving its system further is waste.
        return Model(SteihaugToint(scaled(sample), ROUGH), scale)


@dataclass
class SampledJacobian:
    """``J^T D J`` of residuals drawn by leverage scores, plus their own curvature, exact.

    Every model draws anew. The approximate Newton step of "Unmasking Transformers: A Theoretical Approach to
    Data Recovery via Attention Weights": it samples what is positive and leaves alone what is not. It
    pays where residuals far outnumber the unknowns: many known tokens, several outputs.

    Parameters
    ----------
    budget : float
        Expected number of residuals drawn.
    rng : numpy.random.Generator
    """

    budget: float
    rng: np.random.Generator

    _exact: bool = False

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, object]:
        """Ask for nothing: residuals are drawn when the model is made."""
        self._exact = exact
        return {}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Draw residuals and add the exact part."""
        return dense_model(problem, at, None if self._exact else self.curvature(problem, at))

    def curvature(self, problem: Any, at: Evaluation) -> Array:
        """Return an unbiased estimate of the Hessian."""
        J = problem.jacobian_at(at)
        scores = np.sum(linalg.qr(J, mode="economic", check_finite=False)[0] ** 2, axis=1)
        chances = np.minimum(1.0, self.budget * scores / max(float(scores.sum()), np.finfo(float).tiny))
        drawn = np.flatnonzero(self.rng.random(len(chances)) < chances)
        weighted = J[drawn] / np.sqrt(chances[drawn])[:, None]
        return np.asarray(weighted.T @ weighted + problem.residual_curvature_at(at))
