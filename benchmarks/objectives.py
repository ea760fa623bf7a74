"""The objectives a careful user would write for scipy: vectorised, two products an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.data import Array, Case
    from benchmarks.meter import Meter


class Objective(ABC):
    """``scale`` times the objective, with every product with A booked on a meter.

    A subclass gives ``_logits_terms(z)`` -> value, slope, and ``_curve(v)`` -> (Hessian in the logits) v.
    """

    def __init__(self, case: Case, meter: Meter, scale: float = 1.0) -> None:
        self.A, self.b, self.meter, self.scale = case.A, case.b, meter, scale
        self.starts = np.zeros(1, dtype=np.int64) if case.starts is None else case.starts
        self.sizes = np.diff(self.starts, append=len(case.b))
        self._at: Array | None = None

    def __call__(self, x: Array) -> tuple[float, Array]:
        """Value and gradient: one evaluation, two reads."""
        self.meter.spend(2)
        value, slope = self._logits_terms(self.A @ x)
        self._at = np.array(x)
        gradient = self.scale * (self.A.T @ slope)
        self.meter.arrive(x, self.scale * value, gradient)
        return self.scale * value, gradient

    def hessp(self, x: Array, v: Array) -> Array:
        """Exact Hessian times ``v``: one evaluation, two reads unless ``x`` is new."""
        if self._at is None or not np.array_equal(x, self._at):
            self.meter.spend(1, evaluations=0)
            self._logits_terms(self.A @ x)
            self._at = np.array(x)
        self.meter.spend(2)
        return np.asarray(self.scale * (self.A.T @ self._curve(self.A @ v)))

    @abstractmethod
    def _logits_terms(self, z: Array) -> tuple[float, Array]:
        """Value and slope at these logits."""

    @abstractmethod
    def _curve(self, v: Array) -> Array:
        """The loss's own Hessian times a change of the logits."""


class SoftmaxSquares(Objective):
    """``0.5 ||softmax(A x) - b||^2``."""

    def _logits_terms(self, z: Array) -> tuple[float, Array]:
        z -= z.max()
        f = np.exp(z, out=z)
        f /= f.sum()
        r = f - self.b
        self._f, self._weight = f, f * f + f * r - (f @ r) * f
        return 0.5 * float(r @ r), f * (r - f @ r)

    def _curve(self, v: Array) -> Array:
        w = self._weight * (v - self._f @ v)
        return np.asarray(w - self._f * w.sum())


class ExponentialSquares(Objective):
    """``0.5 ||exp(A x) - b||^2``."""

    def _logits_terms(self, z: Array) -> tuple[float, Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            u = np.exp(z, out=z)
            r = u - self.b
            self._weight = u * (u + r)
            return 0.5 * float(r @ r), u * r

    def _curve(self, v: Array) -> Array:
        return np.asarray(self._weight * v)


class ConditionalLogit(Objective):
    """Minus the log-likelihood of a conditional logit, one choice a group."""

    def _logits_terms(self, z: Array) -> tuple[float, Array]:
        chosen = self.b @ z
        top = np.maximum.reduceat(z, self.starts)
        f = np.exp(z - np.repeat(top, self.sizes))
        total = np.add.reduceat(f, self.starts)
        f /= np.repeat(total, self.sizes)
        self._f = f
        return float(np.sum(top) + np.sum(np.log(total)) - chosen), f - self.b

    def _curve(self, v: Array) -> Array:
        w = self._f * v
        return np.asarray(w - self._f * np.repeat(np.add.reduceat(w, self.starts), self.sizes))


def scaled(case: Case, meter: Meter) -> Objective:
    """The objective in the units in which scipy's absolute tolerances mean something."""
    if case.spec.family == "softmax":
        return SoftmaxSquares(case, meter, float(len(case.b)))
    return unscaled(case, meter, 1.0 / (len(case.b) if case.starts is None else len(case.starts)))


def unscaled(case: Case, meter: Meter, scale: float = 1.0) -> Objective:
    """The objective as it is printed in a paper."""
    kinds: dict[str, Any] = {
        "softmax": SoftmaxSquares,
        "exponential": ExponentialSquares,
        "choice": ConditionalLogit,
    }
    made: Objective = kinds[case.spec.family](case, meter, scale)
    return made
