"""How the curvature of the objective is modelled: each strategy says what an evaluation should bring along,
and builds a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.sketching import RowSampler
from attnfit.solvers.trust_region import CholeskyModel, Eigenmodel, KrylovModel, SecantModel, Step

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
# A sampled one that shrinks it less than this is too coarse: draw twice the rows.
COARSE = 0.5


class Model(Protocol):
    """A quadratic model in the variables ``scale * x``."""

    @property
    def negative(self) -> bool:
        """Whether negative curvature was met."""
        ...

    def solve(self, g: Array, radius: float) -> Step:
        """Return the minimiser within the radius."""
        ...


class Strategy(Protocol):
    """What the descent asks of a curvature strategy."""

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Return what the next evaluation shall bring along, given the last step's ratio of gradient
        norms.
        """
        ...

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Return the model at an accepted point."""
        ...


def dense_model(hessian: Array, scale: Array) -> Eigenmodel | CholeskyModel:
    """Return the model of a d x d Hessian."""
    scaled = hessian / np.multiply.outer(scale, scale)
    return Eigenmodel(scaled) if len(scale) <= SMALL else CholeskyModel(scaled)


def natural_scale(problem: Problem, at: Evaluation) -> Array:
    """Return the square root of each unknown's curvature, shape (d,): ``scale * x`` has curvature about one.

    One where a column has no effect at all.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        diagonal = problem.diagonal_at(at)
    usable = np.isfinite(diagonal) & (diagonal > 0.0)
    return np.sqrt(np.where(usable, diagonal, 1.0))


class Exact:
    """The full Hessian, accumulated in the same read as the gradient, and kept while it serves.

    Parameters
    ----------
    patient : bool
        Try a Hessian before asking for the next one: right for a start so close that the first is likely to
        be the last.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._patient = patient
        self._untried = False
        self._requested = False

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a Hessian unless the present one works well."""
        works = contraction is not None and contraction <= KEEP
        self._requested = not (works or (self._patient and self._untried))
        self._untried = False
        return {"hessian": self._requested}

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Use the Hessian of the evaluation; where long groups were mispredicted, read once more for it."""
        if last is not None and not self._requested:
            return last
        self._untried = True
        return dense_model(problem.hessian_at(at) if at.hessian is None else at.hessian, scale)


class Corrected:
    """What `Sampled` and `FromSample` share: a model that works is kept, and each step's gradient difference
    folded in.

    Conjugate gradients in effect, at no cost but the evaluation.
    """

    _from: Evaluation | None = None

    def _corrected(self, at: Evaluation, scale: Array, last: Model | None) -> Model | None:
        """Return the last model with the last step learned, if there is one to correct."""
        before, self._from = self._from, at
        if not isinstance(last, SecantModel) or before is None:
            return None
        return last.learn(scale * (at.x - before.x), (at.gradient - before.gradient) / scale)


class Kept(Corrected):
    """An exact Hessian, kept and corrected while it serves: where one costs many gradients."""

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for nothing but value and gradient."""
        return {}

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Correct the last model, or read the data once for a new one where the last step gained little."""
        before = self._from
        corrected = self._corrected(at, scale, last)
        if corrected is not None and before is not None:
            gained = np.linalg.norm(at.gradient / scale) <= DEAR * np.linalg.norm(before.gradient / scale)
            if gained:
                return corrected
        return SecantModel(dense_model(problem.hessian_at(at), scale))


@dataclass
class Sampled(Corrected):
    """The Hessian of rows drawn by approximate leverage scores during the evaluation, kept while it works.

    With ``fresh`` every evaluation draws anew.
    """

    sampler: RowSampler
    fresh: bool = False

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a draw unless the present model works, twice as large where it was far off."""
        if contraction is not None and contraction > COARSE:
            self.sampler.double()
        works = contraction is not None and contraction <= SLOW
        return {} if works and not self.fresh else {"sampler": self.sampler}

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Use the rows that came with the evaluation, or correct the last model."""
        corrected = self._corrected(at, scale, last)
        if at.sample is None and corrected is not None:
            return corrected
        # A draw smaller than the number of unknowns is no model.
        rows = at.sample if at.sample is not None and at.sample.n_rows > len(scale) else None
        return SecantModel(dense_model(problem.hessian_at(at, rows), scale))


@dataclass
class FromSample(Corrected):
    """The Hessian of the sample on which the start was found, kept while it works; then another strategy.

    Parameters
    ----------
    sample : Problem
        Stands for the problem.
    otherwise : callable
        Makes the strategy that takes over where the sample's curvature is too coarse.
    """

    sample: Problem
    otherwise: Callable[[], Strategy]
    successor: Strategy | None = None

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for nothing but value and gradient as long as the sample serves."""
        if self.successor is None and contraction is not None and contraction > SLOW:
            self.successor = self.otherwise()
            contraction = None
        return {} if self.successor is None else self.successor.request(contraction)

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Take the sample's curvature once, then correct it."""
        if self.successor is not None:
            return self.successor.model(problem, at, scale, last)
        corrected = self._corrected(at, scale, last)
        if corrected is not None:
            return corrected
        return SecantModel(dense_model(self.sample.hessian_at(self.sample.evaluate(at.x)), scale))


@dataclass
class MatrixFree:
    """Products with the Hessian of drawn rows, or of all rows without a sampler: no d x d array."""

    sampler: RowSampler | None = None

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a draw, twice as large where the last one was too coarse."""
        if self.sampler is not None and contraction is not None and contraction > COARSE:
            self.sampler.double()
        return {"sampler": self.sampler}

    def model(self, problem: Problem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Multiply by the curvature at this point."""
        product = problem.hessian_operator(at, at.sample)
        # A sample of ten rows an unknown is some thirty per cent off: solving its system further is waste.
        forcing = 0.01 if at.sample is None else 0.1
        return KrylovModel(lambda v: product(v / scale) / scale, forcing)
