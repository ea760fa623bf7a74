"""Losses of ``f = softmax(z)`` within each group.

With ``p = Phi'(f)``, ``gamma = <p, f>`` and ``h = log f`` the gradient in the logits is ``s = f (p - gamma)``
and the Hessian is the Gram of the centred rows with weights ``t = f (Phi'' f + p - gamma)``: only
``g2 = Phi'' f + p`` differs between the losses. ``g3 = Phi''' f^2 + 3 Phi'' f + p`` enters the third
derivative in the same way (see ``attnfit.certificates``).

`LogRatio` is least squares on logarithms of shares, each group centred, and quadratic in the logits: an exact
softmax is fitted exactly, whatever constant a row of logits has, and a share known to a relative error gets a
weight that does not depend on its size.

References: "In-Context Learning for Attention Scheme", Section 5; "The Closeness of In-Context Learning and
Weight Shifting for Softmax Regression", Lemma 4.5 (sign corrected); Aitchison, "The Statistical Analysis of
Compositional Data" (1986), Chapter 4.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, Literal

import numpy as np

from attnfit.losses.loss import Accumulated, GramTerm, GroupSizes, GroupStatistics, Loss
from attnfit.segments import Array, Segments


class SoftmaxLoss(Loss):
    """Shared by all losses of a softmax: the reference is the log normaliser, the state (log normaliser,
    gamma).
    """

    logarithmic = True
    shift_invariant = True

    @staticmethod
    def transform(z: Array, reference: Array | float) -> tuple[Array, Array]:
        h = z - reference
        return h, np.exp(h)

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array, Array]:
        top = segments.max(z)
        e = np.exp(z - segments.spread(top))
        total = segments.sum(e)
        e *= segments.spread(1.0 / total)
        reference = top + np.log(total)
        return reference, z - segments.spread(reference), e

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

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """``Phi'''(f) f^2 + 3 Phi''(f) f + Phi'(f)``, shape (n_rows,): of a `certifiable` loss."""
        raise TypeError(f"{type(self).__name__} states no third derivative")

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        h = z - state[0]
        f = np.exp(h)
        return f * (self.p(f, h, b, w) - state[1])

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        h = z - state[0]
        f = np.exp(h)
        return f, self.p(f, h, b, w), f

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        h = z - state[0]
        f = np.exp(h)
        return [GramTerm(f * (self.g2(f, h, b, w) - state[1]), None, 1.0)], f

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        h = z - state[0]
        f = np.exp(h)
        return np.asarray(f * (np.abs(self.g2(f, h, b, w)) + np.abs(state[1])))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])


class Squared(SoftmaxLoss):
    """``0.5 sum w (f - b)^2``."""

    certifiable = True
    exact_sums = (0,)

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        c = v - b
        wc = w * c
        return (v * wc, w * v * v, v), (wc * c,)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        ec, ee, e = columns[0], columns[1], columns[-1]
        k = 1.0 / e
        k1 = (1.0 - e) * k
        gamma = k * (ec + k1 * ee)
        value = 0.5 * (extras[0] + 2.0 * k1 * ec + k1 * k1 * ee)
        return GroupStatistics(value, (k, k * k1, -gamma * k), (reference + np.log(e), gamma), k)

    def gauss_newton_terms(self, z: Array, b: Array, w: Array, state: list[Array]) -> list[GramTerm]:
        f = np.exp(z - state[0])
        return [GramTerm(w * f * f, None, 1.0)]

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (f - b)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (2.0 * f - b)

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return w * (4.0 * f - b)

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b / inclusion, w * inclusion

    def negative_curvature(self, groups: GroupSizes, factor: float = 1.0) -> Array:
        # Of <f, p> alone: |N(f, p)| <= |p| / sqrt(2), with |w (f - b)| <= max w + |w b|.
        return np.asarray(factor * np.sqrt(0.5) * (groups.high + groups.target))


class CrossEntropy(SoftmaxLoss):
    """``-sum w b log f``: convex; its gradient is ``sigma f - w b`` with ``sigma = sum w b``."""

    convex = True
    certifiable = True
    needs_mass = True
    nonnegative_target = "cross_entropy"

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        return segments.sum(w * b)

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        wb = w * b
        return (constant * v - wb, v), (-wb * y,)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        e = columns[-1]
        k = 1.0 / e
        value = extras[0] + constant * np.log(e)
        return GroupStatistics(value, (1.0, constant * (1.0 - e) * k), (reference + np.log(e), -constant), k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        # Beyond float64 a probability is zero; a target of zero asks nothing of it even so.
        return -w * b * np.exp(np.minimum(-h, 700.0))

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        # f p = -w b exactly: no division by a probability that may underflow.
        return -state[1] * np.exp(z - state[0]) - w * b

    def slope_parts(self, z: Array, b: Array, w: Array, state: list[Array]) -> None:
        # The curvature is the size of what is subtracted.
        return None

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return np.zeros_like(f)

    g3 = g2

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b / inclusion, w


class KullbackLeibler(CrossEntropy):
    """``sum w b (log b - log f)``, with ``0 log 0 = 0``."""

    certifiable = True
    nonnegative_target = "kl"

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        wb = w * b
        # The second logarithm is that of one where b is zero.
        return (constant * v - wb, v), (wb * (np.log(b + (b == 0.0)) - y),)


class LinearCrossEntropy(SoftmaxLoss):
    """``-sum w b f``: the form some papers print as cross entropy, without the logarithm."""

    certifiable = True
    exact_sums = (0,)

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        return (w * b * v, v), ()

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        be, e = columns[0], columns[-1]
        k = 1.0 / e
        gamma = -k * be
        return GroupStatistics(gamma, (-k, -gamma * k), (reference + np.log(e), gamma), k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * b

    g2 = p
    g3 = p

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b, w

    def negative_curvature(self, groups: GroupSizes, factor: float = 1.0) -> Array:
        return np.asarray(abs(factor) * np.sqrt(0.5) * groups.target)


class Entropy(SoftmaxLoss):
    """``-sum w f log f``: no target enters."""

    certifiable = True
    exact_sums = (0, 1)
    has_target = False

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        we = w * v
        # 0 * (-inf) cannot occur: y is finite wherever z is, and v underflows to an exact zero.
        return (we * y, we, v), ()

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        eh, we, e = columns[0], columns[1], columns[-1]
        k = 1.0 / e
        log_e = np.log(e)
        value = -k * (eh - log_e * we)
        gamma = value - k * we
        return GroupStatistics(value, (-k, (log_e - 1.0) * k, -gamma * k), (reference + log_e, gamma), k)

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 1.0)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 2.0)

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        return -w * (h + 3.0)

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array]:
        return b, w

    def negative_curvature(self, groups: GroupSizes, factor: float = 1.0) -> Array:
        # v^T H v = sum t (v - <f, v>)^2 with t = f (w |h| - 2 w + <w, f> - <w, f |h|>), the variance at most
        # |v|^2 / 2, a deviation at most sqrt(2) |v|, and <f, |h|> <= log n.
        largest = groups.high * np.log(groups.sizes)
        if factor >= 0.0:
            return factor * 0.5 * (2.0 * groups.high - groups.low + largest)
        return -factor * (2.0 * largest + 0.5 * np.maximum(groups.high - 2.0 * groups.low, 0.0))


LossName = Literal["squared", "cross_entropy", "kl", "linear_cross_entropy", "entropy"]
LOSSES: dict[str, SoftmaxLoss] = {
    "squared": Squared(),
    "cross_entropy": CrossEntropy(),
    "kl": KullbackLeibler(),
    "linear_cross_entropy": LinearCrossEntropy(),
    "entropy": Entropy(),
}
LossTerms = Sequence[tuple[str | Loss, float]]
LossLike = LossName | Loss | LossTerms
# Entry points of this group name a loss, or a function that returns one.
GROUP = "attnfit.losses"


def find_loss(loss: Any, name: str = "loss") -> Loss:
    """Return a loss, given itself, its name, or a weighted sum of losses.

    Parameters
    ----------
    loss : str, Loss or list of (str or Loss, float)
        One of `LOSSES`, a name registered under the entry point group ``attnfit.losses``, or a loss; of
        several, each with its weight, the weighted sum, in which "sparse" (``sum w exp(z)``) and "rescaled"
        (``0.5 sum w (exp(z) - alpha b)^2``, alpha the sum of ``exp(z)``) have names too. Weights are
        positive; those of "entropy" and "linear_cross_entropy", which are bounded on both sides, may be
        negative. The weights of a name that comes twice are added.
    name : str
        What the argument is called, for messages.

    Raises
    ------
    ValueError
        If there is no loss of that name, what is registered gives none, or terms cannot be added; the message
        names the term.

    Examples
    --------
    >>> from attnfit.losses import find_loss
    >>> find_loss("kl").convex
    True
    >>> find_loss([("cross_entropy", 1.0), ("sparse", 0.1)]).convex
    True
    >>> find_loss([("squared", 1.0), ("entropy", -0.01)]).convex
    False
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, list | tuple):
        # What makes sums knows all losses, this file its own.
        from attnfit.losses.named import sum_of

        return sum_of(loss, name)
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        for entry in entry_points(group=GROUP):
            if entry.name == loss:
                found = entry.load()
                found = found if isinstance(found, Loss) else found()
                if isinstance(found, Loss):
                    return found
                raise ValueError(f"{name}={loss!r} is registered, but gives no attnfit.losses.Loss")
    known = ", ".join(map(repr, LOSSES))
    raise ValueError(
        f"{name} must be one of {known}, an attnfit.losses.Loss, or a list of them with weights such as "
        f"[('squared', 1.0), ('entropy', 0.01)], not {loss!r}"
    )


class LogRatio(Loss):
    """``0.5 sum w (z - b - mean)^2`` with b the logarithm of the target; the state is (mean, group's
    weight).
    """

    convex = True
    shift_invariant = True
    certifiable = True
    exact_sums = (0, 1)

    @staticmethod
    def transform(z: Array, reference: Array | float) -> tuple[Array, Array]:
        return z, z

    def normalise(self, z: Array, segments: Segments) -> tuple[Array, Array, Array]:
        return np.zeros(len(segments)), z, z

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        r = y - b
        wr = w * r
        return (wr, w + 0.0 * y), (wr * r,)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        weight = np.where(columns[1] > 0, columns[1], 1.0)
        mean = columns[0] / weight
        value = 0.5 * np.maximum(extras[0] - columns[0] * mean, 0.0)
        return GroupStatistics(value, (1.0, -mean), (mean, weight), 1.0 / weight)

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

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w + 0.0 * z

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])
