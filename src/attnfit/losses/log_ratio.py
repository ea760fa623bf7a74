"""Least squares on logarithms of shares, each group centred: quadratic in the logits.

With r = z - b, b the logarithm of the target, and m the mean of r over a group with weights w:
``0.5 sum w (r - m)^2``. An exact softmax is fitted exactly, whatever constant a row of logits has; a share
known to a relative error deserves a weight that does not depend on its size. The Hessian is the Gram of rows
centred with fixed weights. Reference: Aitchison, "The Statistical Analysis of Compositional Data" (1986),
Chapter 4.
"""

from __future__ import annotations

import numpy as np

from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.segments import Array, Segments


class LogRatio(Loss):
    """``0.5 sum w (z - b - mean)^2`` with b the logarithm of the target; the state is (mean, group's
    weight).
    """

    convex = True
    exact_sums = (0, 1)

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        return segments.sum(w + 0.0 * b)

    def reference(self, z: Array, segments: Segments) -> Array:
        return np.zeros(len(segments))

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        r = z - b
        wr = w * r
        return [wr, w + 0.0 * z], [wr * r]

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        total, weight = columns
        mean = total / np.where(weight > 0, weight, 1.0)
        value = 0.5 * np.maximum(extras[0] - total * mean, 0.0)
        return Closed(value, [np.ones_like(mean), -mean], [mean, np.where(weight > 0, weight, 1.0)], None)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * (z - b - state[0])

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
