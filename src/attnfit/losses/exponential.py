"""Losses of an unnormalised ``u(z)``, ``u`` one of exp, cosh, sinh; no coupling between rows.

With ``v = u'`` and ``u'' = u`` the gradient in the logits is ``w (u - b) v`` and the Hessian weight
``w (v^2 + (u - b) u)``. Reference: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression",
Definition 7.5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.segments import Array, Segments

FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "exp": (np.exp, np.exp),
    "cosh": (np.cosh, np.sinh),
    "sinh": (np.sinh, np.cosh),
}


class UncoupledLoss(Loss):
    """A sum over rows: one column, coefficient one, no state."""

    coupled = False

    def reference(self, z: Array, segments: Segments) -> Array:
        return np.zeros(1)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        zero = np.zeros(1)
        return self.moments(z, b, w, zero, zero)[0][0]

    def score_term(self, z: Array, b: Array, w: Array, state: list[Array]) -> GramTerm:
        return GramTerm(self.slope(z, b, w, state) ** 2, None, None)

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        return Closed(extras[0], [np.ones_like(extras[0])], [], None)


class SquaredExponential(UncoupledLoss):
    """``0.5 sum w (u(z) - b)^2``."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._u, self._v = FUNCTIONS[function]

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        wc = self._u(z)
        wc -= b
        extra = wc * wc
        extra *= 0.5 * w
        wc *= w
        wc *= self._v(z)
        return [wc], [extra]

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        u, v = self._u(z), self._v(z)
        return [GramTerm(w * (v * v + (u - b) * u), None, None)], None

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        u, v = self._u(z), self._v(z)
        return w * (v * v + np.abs((u - b) * u))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return self._u(z)


class PoissonDeviance(UncoupledLoss):
    """``sum w (exp(z) - b z)``: the convex neighbour of squared exponential regression, used for starts (b >=
    0).
    """

    convex = True

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        u = np.exp(z)
        return [w * (u - b)], [w * (u - b * z)]

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w * np.exp(z), None, None)], None

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * np.exp(z)

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z)


class Total(UncoupledLoss):
    """``sum w exp(z)``, the loss that the papers on sparsity use; no target enters."""

    convex = True

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        wu = w * np.exp(z)
        return [wu], [wu]

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w * np.exp(z), None, None)], None

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return np.asarray(w * np.exp(z))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z)


class LeastSquares(UncoupledLoss):
    """``0.5 sum w (z - b)^2``: the start of sinh regression, whose inverse exists for every target."""

    convex = True

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        c = z - b
        return [w * c], [0.5 * w * c * c]

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w + 0.0 * z, None, None)], None

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w + 0.0 * z

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return z
