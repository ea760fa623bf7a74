"""How the curvature of the objective is modelled: each strategy says what an evaluation should bring along, and builds a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.grouped import GroupedProblem
from attnfit.problems.partition import Chunk
from attnfit.problems.reading import Evaluation
from attnfit.sketching import RowSampler
from attnfit.solvers.trust_region import CholeskyModel, Eigenmodel, KrylovModel, Step

Array = NDArray[np.float64]

# Below this size an eigendecomposition costs less than finding out whether it is needed.
SMALL = 128
# d x d arrays beyond this size cost more than the products that replace them.
MAX_DENSE = 3_000
# An exact Hessian that shrinks the gradient this much a step is kept: the next one would cost more than it saves.
KEEP = 0.02
# A sampled one that shrinks it less than this is too coarse: draw twice the rows.
COARSE = 0.25


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
        """Return what the next evaluation shall bring along, given the last step's ratio of gradient norms."""
        ...

    def model(self, problem: GroupedProblem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Return the model at an accepted point."""
        ...


def dense_model(hessian: Array, scale: Array) -> Eigenmodel | CholeskyModel:
    """Return the model of a d x d Hessian."""
    scaled = hessian / np.multiply.outer(scale, scale)
    return Eigenmodel(scaled) if len(scale) <= SMALL else CholeskyModel(scaled)


class Exact:
    """The full Hessian, accumulated in the same read as the gradient, and kept while it serves.

    Parameters
    ----------
    patient : bool
        Try a Hessian before asking for the next one: right for a start so close that the first is likely to be the last.
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

    def model(self, problem: GroupedProblem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Use the Hessian of the evaluation; where long groups were mispredicted, read once more for it."""
        if last is not None and not self._requested:
            return last
        self._untried = True
        return dense_model(problem.hessian_at(at) if at.hessian is None else at.hessian, scale)


@dataclass
class Sampled:
    """The Hessian of rows drawn by approximate leverage scores during the evaluation; all draws so far are pooled."""

    sampler: RowSampler
    pooled: list[Chunk] | None = None

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a draw, twice as large where the last one was too coarse."""
        if contraction is not None and contraction > COARSE:
            self.sampler.budget *= 2.0
        return {"sampler": self.sampler}

    def model(self, problem: GroupedProblem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Weight the pooled rows by the curvature at this point: nothing is stale."""
        self.pooled = pool(self.pooled, at.sample)
        return dense_model(problem.hessian_at(at, self.pooled), scale)


@dataclass
class SampledThenExact:
    """A sampled Hessian for the first step, then an exact one taken where that step lands, and kept."""

    first: Sampled
    then: Exact
    started: bool = False

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a draw at the start, for a Hessian afterwards."""
        if not self.started:
            self.started = True
            return self.first.request(None)
        return self.then.request(contraction)

    def model(self, problem: GroupedProblem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Use whichever the evaluation brought."""
        if at.sample is not None:
            return self.first.model(problem, at, scale, last)
        return self.then.model(problem, at, scale, last)


@dataclass
class MatrixFree:
    """Products with the Hessian of drawn rows, or of all rows without a sampler: no d x d array."""

    sampler: RowSampler | None = None
    pooled: list[Chunk] | None = None

    def request(self, contraction: float | None) -> dict[str, Any]:
        """Ask for a draw, twice as large where the last one was too coarse."""
        if self.sampler is not None and contraction is not None and contraction > COARSE:
            self.sampler.budget *= 2.0
        return {"sampler": self.sampler}

    def model(self, problem: GroupedProblem, at: Evaluation, scale: Array, last: Model | None) -> Model:
        """Multiply by the curvature at this point."""
        self.pooled = pool(self.pooled, at.sample)
        rows = self.pooled
        return KrylovModel(lambda v: problem.hvp_at(at, v / scale, rows) / scale)


def pool(earlier: list[Chunk] | None, fresh: list[Chunk] | None) -> list[Chunk] | None:
    """Join a fresh draw to earlier ones, each weighted by its share of all draws."""
    if earlier is None or fresh is None:
        return fresh
    n_draws = 1 + max((chunk.n_draws for chunk in earlier), default=0)
    joined = [(chunk, (n_draws - 1) / n_draws) for chunk in earlier] + [(chunk, 1 / n_draws) for chunk in fresh]
    return [
        replace(chunk, multiplier=chunk.multiplier * share, n_draws=n_draws)
        for chunk, share in joined
        if chunk.multiplier is not None
    ]
