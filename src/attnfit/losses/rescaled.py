"""Rescaled regression: ``0.5 sum w (u(z) - alpha b)^2`` with ``alpha = sum u(z)`` of the group.

The target is compared without dividing by ``alpha``, which may vanish for sinh. With ``c = u - alpha b``,
``beta = <w b, c>``: gradient ``v (w c - beta)``; Hessian = Gram of the rows ``v_i a_i - b_i A^T v`` with
weights ``w`` plus the Gram of the rows ``a_i`` with weights ``u (w c - beta)``.

Reference: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definitions 7.5 and 8.2
(low-rank part built from v, as corrected).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnfit.losses.elementwise import FUNCTIONS, FunctionName
from attnfit.losses.loss import Accumulated, GramTerm, GroupStatistics, Loss
from attnfit.segments import Array, Segments


class SquaredRescaled(Loss):
    """``0.5 sum w (u - alpha b)^2``; the reference is alpha, the state (alpha, beta)."""

    certifiable = True

    def __init__(self, function: FunctionName) -> None:
        self.function = function
        self.transform = FUNCTIONS[function]

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        return segments.sum(w * b * b)

    def reference_failed(self, reference: Array, state: Array) -> bool:
        # The sums below cancel to the square of this ratio.
        return not bool((np.abs(state[0] - reference) <= 10.0 * np.abs(state[0])).all())

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        # The sums are of ct = u - alpha_ref b, which is small near a fit, never of u and b apart.
        ct = y - reference * b
        wct = w * ct
        return (v * wct, v * (w * b), v), (y, b * wct, wct * ct)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        alpha, bct, cct = extras[0], extras[1], extras[2]
        k = alpha - reference
        beta = bct - k * constant
        value = 0.5 * (cct - 2.0 * k * bct + k * k * constant)
        return GroupStatistics(value, (1.0, -k, -beta), (alpha, beta), 1.0)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        alpha, beta = state
        u, v = self.transform(z, 0.0)
        return v * (w * (u - alpha * b) - beta)

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        u, v = self.transform(z, 0.0)
        return v, w * (u - state[0] * b), b

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        u, v = self.transform(z, 0.0)
        alpha, beta = state
        return [
            GramTerm(w + 0.0 * u, v, b),
            GramTerm(u * (w * (u - alpha * b) - beta), None, None),
        ], v

    def gauss_newton_terms(self, z: Array, b: Array, w: Array, state: list[Array]) -> list[GramTerm]:
        return self.gram_terms(z, b, w, state)[0][:1]

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        u, v = self.transform(z, 0.0)
        alpha, beta = state
        return w * v * v + np.abs(u) * (w * np.abs(u - alpha * b) + np.abs(beta))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return self.transform(z, 0.0)[0] / state[0]
