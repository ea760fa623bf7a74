"""Rescaled regression: ``0.5 sum w (u(z) - alpha b)^2`` with ``alpha = sum u(z)`` of the group.

The target is compared without dividing by ``alpha``, which may vanish for sinh. With ``c = u - alpha b``,
``beta = <w b, c>``: gradient ``v (w c - beta)``; Hessian = Gram of the rows ``v_i a_i - b_i A^T v`` with
weights ``w`` plus the Gram of the rows ``a_i`` with weights ``u (w c - beta)``.

Reference: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definitions 7.5 and 8.2
(low-rank part built from v, as corrected).
"""

from __future__ import annotations

import numpy as np

from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.exponential import FUNCTIONS
from attnfit.losses.segments import Array, Segments


class SquaredRescaled(Loss):
    """``0.5 sum w (u - alpha b)^2``; the reference is alpha, the state (alpha, beta)."""

    def __init__(self, function: str) -> None:
        self.function = function
        self._u, self._v = FUNCTIONS[function]

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        return segments.sum(w * b * b)

    def reference(self, z: Array, segments: Segments) -> Array:
        return segments.sum(self._u(z))

    def reference_failed(self, reference: Array, state: Array) -> bool:
        # The sums below cancel to the square of this ratio.
        return not bool((np.abs(state[0] - reference) <= 10.0 * np.abs(state[0])).all())

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        u, v = self._u(z), self._v(z)
        # The sums are of ct = u - alpha_ref b, which is small near a fit, never of u and b apart.
        wct = w * (u - reference * b)
        wb = w * b
        return [v * wct, v * wb, v], [u, b * wct, wct * (u - reference * b)]

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        alpha, bct, cct = extras
        k = alpha - reference
        beta = bct - k * constant
        value = 0.5 * (cct - 2.0 * k * bct + k * k * constant)
        one = np.ones_like(k)
        return Closed(value, [one, -k, -beta], [alpha, beta], one)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        alpha, beta = state
        return self._v(z) * (w * (self._u(z) - alpha * b) - beta)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        u, v = self._u(z), self._v(z)
        alpha, beta = state
        return [
            GramTerm(w + 0.0 * u, v, b),
            GramTerm(u * (w * (u - alpha * b) - beta), None, None),
        ], v

    def score_term(self, z: Array, b: Array, w: Array, state: list[Array]) -> GramTerm:
        u = self._u(z)
        return GramTerm((w * (u - state[0] * b)) ** 2, self._v(z), b)

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        u, v = self._u(z), self._v(z)
        alpha, beta = state
        return w * v * v + np.abs(u) * (w * np.abs(u - alpha * b) + np.abs(beta))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return self._u(z) / state[0]
