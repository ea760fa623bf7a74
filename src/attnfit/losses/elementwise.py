"""Losses of an unnormalised ``u(z)``, ``u`` one of exp, cosh, sinh; no coupling between rows.

With ``v = u'`` and ``u'' = u`` the gradient in the logits is ``w (u - b) v`` and the Hessian weight
``w (v^2 + (u - b) u)``. Reference: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression",
Definition 7.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from attnfit.losses.loss import Accumulated, GramTerm, GroupStatistics, Loss
from attnfit.segments import Array, Segments


def _exp(z: Array, reference: Array | float) -> tuple[Array, Array]:
    u = np.exp(z)
    return u, u


def _cosh(z: Array, reference: Array | float) -> tuple[Array, Array]:
    return np.cosh(z), np.sinh(z)


def _sinh(z: Array, reference: Array | float) -> tuple[Array, Array]:
    return np.sinh(z), np.cosh(z)


# u and its derivative.
FunctionName = Literal["exp", "cosh", "sinh"]
FUNCTIONS = {"exp": _exp, "cosh": _cosh, "sinh": _sinh}


def output_range(function: FunctionName, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
    """Return the smallest and the largest u, then those of u', for logits in ``[low, high]``, entrywise."""
    if function == "exp":
        u = np.exp(low), np.exp(high)
        return *u, *u
    sinh = np.sinh(low), np.sinh(high)
    closest = np.where((low < 0) & (high > 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    cosh = np.cosh(closest), np.cosh(np.maximum(np.abs(low), np.abs(high)))
    return (*cosh, *sinh) if function == "cosh" else (*sinh, *cosh)


class ElementwiseLoss(Loss):
    """A sum over rows: one column, coefficient one, no state."""

    coupled = False

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array, Array]:
        return np.zeros(1), *self.transform(z, 0.0)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return self.accumulate(*self.transform(z, 0.0), b, w, 0.0, 0.0)[0][0]

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        return GroupStatistics(extras[0], (1.0,), (), 0.0)


class SquaredExponential(ElementwiseLoss):
    """``0.5 sum w (u(z) - b)^2``."""

    certifiable = True

    def __init__(self, function: FunctionName) -> None:
        self.function = function
        self.transform = FUNCTIONS[function]

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        c = y - b
        wc = w * c
        return (wc * v,), (0.5 * wc * c,)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        u, v = self.transform(z, 0.0)
        return [GramTerm(w * (v * v + (u - b) * u), None, None)], None

    def gauss_newton_terms(self, z: Array, b: Array, w: Array, state: list[Array]) -> list[GramTerm]:
        v = self.transform(z, 0.0)[1]
        return [GramTerm(w * v * v, None, None)]

    def third_derivative_bound(self, low: Array, high: Array, b: Array, w: Array) -> Array:
        # The weight t = w (v^2 + (u - b) u) has dt/dz = w v (4 u - b).
        u_low, u_high, v_low, v_high = output_range(self.function, low, high)
        slope = np.maximum(-v_low, v_high)
        return np.asarray(w * slope * np.maximum(b - 4.0 * u_low, 4.0 * u_high - b))

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        u, v = self.transform(z, 0.0)
        return w * (v * v + np.abs((u - b) * u))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return self.transform(z, 0.0)[0]


class PoissonDeviance(ElementwiseLoss):
    """``sum w (exp(z) - b z)``, b >= 0: Poisson regression, and the convex neighbour of squared exponential
    regression.
    """

    convex = True
    certifiable = True
    nonnegative_target = "Poisson regression"

    @staticmethod
    def transform(z: Array, reference: Array | float) -> tuple[Array, Array]:
        return z, np.exp(z)

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        return (w * (v - b),), (w * (v - b * y),)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w * np.exp(z), None, None)], None

    def third_derivative_bound(self, low: Array, high: Array, b: Array, w: Array) -> Array:
        return np.asarray(w * np.exp(high))

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * np.exp(z)

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z)


class Total(ElementwiseLoss):
    """``sum w exp(z)``, the loss that the papers on sparsity use; no target enters."""

    convex = True
    has_target = False
    certifiable = True
    transform = staticmethod(_exp)

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        return (w * v,), (w * y,)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w * np.exp(z), None, None)], None

    def third_derivative_bound(self, low: Array, high: Array, b: Array, w: Array) -> Array:
        return np.asarray(w * np.exp(high))

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return np.asarray(w * np.exp(z))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z)


class LeastSquares(ElementwiseLoss):
    """``0.5 sum w (z - b)^2``: the start of sinh regression, whose inverse exists for every target."""

    convex = True
    certifiable = True

    @staticmethod
    def transform(z: Array, reference: Array | float) -> tuple[Array, Array]:
        return z, z

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        c = y - b
        return (w * c,), (0.5 * w * c * c,)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w + 0.0 * z, None, None)], None

    def third_derivative_bound(self, low: Array, high: Array, b: Array, w: Array) -> Array:
        return np.asarray(0.0 * high)

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w + 0.0 * z

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return z
