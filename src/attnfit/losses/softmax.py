"""Losses of ``f = softmax(z)`` within each group.

With ``p = Phi'(f)``, ``gamma = <p, f>`` and ``h = log f`` the gradient in the logits is ``s = f (p - gamma)``
and the Hessian is the Gram of the centred rows with weights ``t = f (Phi'' f + p - gamma)``: only
``g2 = Phi'' f + p`` differs between the losses. ``g3 = Phi''' f^2 + 3 Phi'' f + p`` enters the third
derivative in the same way (see ``attnfit.certificates``).

References: "In-Context Learning for Attention Scheme", Section 5; "The Closeness of In-Context Learning and
Weight Shifting for Softmax Regression", Lemma 4.5 (sign corrected).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from scipy.special import xlogy

from attnfit.losses.base import Closed, GramTerm, Loss
from attnfit.losses.segments import Array, Segments


class SoftmaxLoss(Loss):
    """Shared by all losses of a softmax: the reference is the log normaliser, the state (log normaliser,
    gamma).
    """

    def reference(self, z: Array, segments: Segments) -> Array:
        return self.normalise(z, segments)[0]

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array | None]:
        top = segments.max(z)
        e = np.exp(z - segments.spread(top))
        total = segments.sum(e)
        e *= segments.spread(1.0 / total)
        return top + np.log(total), e

    def merge_references(self, one: Array, other: Array) -> Array:
        return np.asarray(np.logaddexp(one, other))

    def reference_failed(self, reference: Array, state: Array) -> bool:
        # A prediction e^5 off costs four digits in the sums below; beyond that one more read is the better
        # deal.
        return not bool((np.abs(state[0] - reference) < 5.0).all())

    @abstractmethod
    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """``Phi'(f)``, shape (n_rows,)."""

    @abstractmethod
    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """``Phi''(f) f + Phi'(f)``, shape (n_rows,)."""

    @abstractmethod
    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """``Phi'''(f) f^2 + 3 Phi''(f) f + Phi'(f)``, shape (n_rows,)."""

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        h = z - state[0]
        f = np.exp(h)
        return f * (self.p(f, h, b, w) - state[1])

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        h = z - state[0]
        f = np.exp(h)
        return [GramTerm(f * (self.g2(f, h, b, w) - state[1]), None, 1.0)], f

    def score_term(self, z: Array, b: Array, w: Array, state: list[Array]) -> GramTerm:
        # f p: the slope without gamma f, whose part in the centred rows is zero over a group.
        own = self.slope(z, b, w, state) + state[1] * np.exp(z - state[0])
        return GramTerm(own * own, None, 1.0)

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        h = z - state[0]
        f = np.exp(h)
        return np.asarray(f * (np.abs(self.g2(f, h, b, w)) + np.abs(state[1])))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])


class Squared(SoftmaxLoss):
    """``0.5 sum w (f - b)^2``."""

    exact_sums = (0,)

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        e = np.exp(z - reference) if known is None else known
        c = e - b
        we = w * e
        wc = w * c
        return [we * c, we * e, e], [wc * c]

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        ec, ee, e = columns
        (cc,) = extras
        k = 1.0 / e
        k1 = (1.0 - e) * k
        gamma = k * (ec + k1 * ee)
        value = 0.5 * (cc + 2.0 * k1 * ec + k1 * k1 * ee)
        return Closed(value, [k, k * k1, -gamma * k], [reference + np.log(e), gamma], k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (f - b)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (2.0 * f - b)

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (4.0 * f - b)

    def thin(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b / inclusion, w * inclusion


class CrossEntropy(SoftmaxLoss):
    """``-sum w b log f``: convex; its gradient is ``sigma f - w b`` with ``sigma = sum w b``."""

    convex = True

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        return segments.sum(w * b)

    def _log_target(self, b: Array, w: Array) -> Array | float:
        return 0.0

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        h = z - reference
        e = np.exp(h) if known is None else known
        wb = w * b
        return [constant * e - wb, e], [self._log_target(b, w) - wb * h]

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        e = columns[1]
        k = 1.0 / e
        value = extras[0] + constant * np.log(e)
        coefficients = [np.ones_like(k), constant * (1.0 - e) * k]
        return Closed(value, coefficients, [reference + np.log(e), -constant], k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * b * np.exp(-h)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        # f p = -w b exactly: no division by a probability that may underflow.
        return -state[1] * np.exp(z - state[0]) - w * b

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return np.zeros_like(f)

    g3 = g2

    def thin(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b / inclusion, w


class KullbackLeibler(CrossEntropy):
    """``sum w b (log b - log f)``, with ``0 log 0 = 0``."""

    def _log_target(self, b: Array, w: Array) -> Array:
        return np.asarray(w * xlogy(b, b))


class LinearCrossEntropy(SoftmaxLoss):
    """``-sum w b f``: the form some papers print as cross entropy, without the logarithm."""

    exact_sums = (0,)

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        e = np.exp(z - reference) if known is None else known
        return [w * b * e, e], []

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        be, e = columns
        k = 1.0 / e
        gamma = -k * be
        return Closed(gamma, [-k, -gamma * k], [reference + np.log(e), gamma], k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * b

    g2 = p
    g3 = p

    def thin(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b, w


class Entropy(SoftmaxLoss):
    """``-sum w f log f``: no target enters."""

    exact_sums = (0, 1)

    def moments(self, z, b, w, reference, constant, known=None):  # type: ignore[no-untyped-def]
        h = z - reference
        e = np.exp(h) if known is None else known
        we = w * e
        # 0 * (-inf) cannot occur: h is finite wherever z is, and e underflows to an exact zero.
        return [we * h, we, e], []

    def close(self, columns: list[Array], extras: list[Array], reference: Array, constant: Array) -> Closed:
        eh, we, e = columns
        k = 1.0 / e
        log_e = np.log(e)
        value = -k * (eh - log_e * we)
        gamma = value - k * we
        return Closed(value, [-k, (log_e - 1.0) * k, -gamma * k], [reference + log_e, gamma], k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 1.0)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 2.0)

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 3.0)

    def thin(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b, w


LOSSES: dict[str, SoftmaxLoss] = {
    "squared": Squared(),
    "cross_entropy": CrossEntropy(),
    "kl": KullbackLeibler(),
    "linear_cross_entropy": LinearCrossEntropy(),
    "entropy": Entropy(),
}
