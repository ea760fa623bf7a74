"""Least squares on logarithms of shares, each group centred: quadratic in the logits.

With r = z - b, b the logarithm of the target, and m the mean of r over a group with weights w:
``0.5 sum w (r - m)^2``. An exact softmax is fitted exactly, whatever constant a row of logits has; a share
known to a relative error deserves a weight that does not depend on its size. The Hessian is the Gram of rows
centred with fixed weights. Reference: Aitchison, "The Statistical Analysis of Compositional Data" (1986),
Chapter 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnfit.losses.base import Closed, GramTerm, Loss, Moments
from attnfit.losses.segments import Array, Segments


class LogRatio(Loss):
    """``0.5 sum w (z - b - mean)^2`` with b the logarithm of the target; the state is (mean, group's
    weight).
    """

    convex = True
    shift_invariant = True
    certifiable = True
    exact_sums = (0, 1)

    @staticmethod
    def link(z: Array, reference: Array | float) -> tuple[Array, Array]:
        return z, z

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array, Array]:
        return np.zeros(len(segments)), z, z

    @staticmethod
    def moments(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Moments:
        r = y - b
        wr = w * r
        return (wr, w + 0.0 * y), (wr * r,)

    @staticmethod
    def close(columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array) -> Closed:
        weight = np.where(columns[1] > 0, columns[1], 1.0)
        mean = columns[0] / weight
        value = 0.5 * np.maximum(extras[0] - columns[0] * mean, 0.0)
        return Closed(value, (1.0, -mean), (mean, weight), 1.0 / weight)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * (z - b - state[0])

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        weight = w + 0.0 * z
        return weight, z - b, weight / state[1]

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        weight = w + 0.0 * z
        return [GramTerm(weight, None, 1.0)], weight / state[1]

    def score_term(self, z: Array, b: Array, w: Array, state: list[Array]) -> GramTerm:
        return GramTerm(self.slope(z, b, w, state) ** 2, None, 1.0)

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w + 0.0 * z

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])
