"""Weighted sums of losses of one softmax: ``sum_k c_k L_k(z)``, from one pass over the rows.

Every part is written for the same reference, the log normaliser, so its columns and sums stand beside those
of the others, and gradient, Hessian and state follow by linearity. Parts that see the outputs alone make a
`SoftmaxSum`, which is a loss of a softmax like any other. ``sum exp(z)`` and the rescaled squares, which the
normaliser itself enters, make a `MixedSum`: with ``log alpha`` the log normaliser and ``u = alpha f`` they
are

    sparse    alpha sum w f,                            rescaled  0.5 alpha^2 sum w (f - b)^2.

Source: "In-Context Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax
Regression via a Tensor Trick", Definitions 5.10 to 5.14, and Section 2.3 on losses as penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.losses.elementwise import Total
from attnfit.losses.loss import Accumulated, GramTerm, GroupSizes, GroupStatistics, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import CrossEntropy, SoftmaxLoss
from attnfit.segments import Array, Segments


@dataclass(frozen=True)
class Layout:
    """Where the columns and sums of a part stand among those of a sum; the last column is common."""

    columns: slice
    extras: slice


class Composite(Loss):
    """What both kinds of sum share.

    Attributes
    ----------
    parts : tuple of Loss
        Whose last column is ``exp(z - reference)``.
    factors : tuple of float
    """

    logarithmic = True
    parts: tuple[Loss, ...]
    factors: tuple[float, ...]

    transform = staticmethod(SoftmaxLoss.transform)
    normalise = SoftmaxLoss.normalise
    reference_failed = SoftmaxLoss.reference_failed

    def __init__(self, parts: Sequence[Loss], factors: Sequence[float]) -> None:
        self.parts, self.factors = tuple(parts), tuple(map(float, factors))
        self.convex = all(part.convex for part in self.parts)
        self.needs_mass = all(part.needs_mass for part in self.parts)
        self.has_target = any(part.has_target for part in self.parts)
        self.one_pass = all(part.one_pass for part in self.parts)
        self.compiled = all(part.compiled for part in self.parts)
        self.nonnegative_target = next((p.nonnegative_target for p in self.parts if p.nonnegative_target), "")
        self._layouts, self.exact_sums = _layouts(self.parts)

    def __repr__(self) -> str:
        terms = ", ".join(f"({part!r}, {factor:g})" for factor, part in self.terms)
        return f"{type(self).__name__}([{terms}])"

    @property
    def terms(self) -> tuple[tuple[float, Loss], ...]:
        """The factor and the loss of each part."""
        return tuple(zip(self.factors, self.parts, strict=True))

    @property
    def leaves(self) -> tuple[tuple[float, Loss], ...]:
        """The factor and the loss of every part that is no sum itself, in the order of the columns."""
        return tuple(
            (c * own, leaf)
            for c, part in self.terms
            for own, leaf in (part.leaves if isinstance(part, Composite) else ((1.0, part),))
        )

    @property
    def states_third_derivative(self) -> bool:
        """Whether every part does."""
        return all(part.states_third_derivative for part in self.parts)

    def constants(self, b: Array, w: Array, segments: Segments) -> Array:
        """Return those of the part that has some: of cross entropy and the divergence they are the same."""
        for part in self.parts:
            if type(part).constants is not Loss.constants:
                return part.constants(b, w, segments)
        return super().constants(b, w, segments)

    def accumulate(  # type: ignore[override]
        self, y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        """Return the columns of every part, without the common one, which comes last.

        A loss is proportional to the weights of its rows, so factors are weights.
        """
        columns: list[Array] = []
        extras: list[Array] = []
        for c, part in self.terms:
            own, beside = part.accumulate(y, v, b, c * w, reference, c * constant)
            columns += own[:-1]
            extras += beside
        return (*columns, v), tuple(extras)

    def finalize(  # type: ignore[override]
        self, columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        """Return the sum of what the parts say."""
        value: Any = 0.0
        common: Any = 0.0
        coefficients: list[Array | float] = []
        found = []
        for (c, part), at in zip(self.terms, self._layouts, strict=True):
            sums = [*columns[at.columns], columns[-1]]
            own = part.finalize(sums, extras[at.extras], reference, c * constant)
            value = value + own.value
            coefficients += own.coefficients[:-1]
            common = common + own.coefficients[-1]
            found.append(own)
        return GroupStatistics(value, (*coefficients, common), self._state(found), 1.0 / columns[-1])

    def _state(self, found: list[GroupStatistics]) -> tuple[Array, ...]:
        raise TypeError(f"{type(self).__name__} has no state")

    def negative_curvature(self, groups: GroupSizes, factor: float = 1.0) -> Array:
        """Return the sum of what bounds the parts."""
        bounds = [part.negative_curvature(groups, factor * own) for own, part in self.terms]
        return np.asarray(sum(bounds))


def _layouts(parts: Sequence[Loss]) -> tuple[list[Layout], tuple[int, ...]]:
    """Return where each part's columns and sums stand, and which sums of columns are needed."""
    found, exact = [], []
    n_columns = n_extras = 0
    for part in parts:
        # Any row tells how many there are.
        columns, extras = part.accumulate(*[np.full(1, 0.5)] * 6)
        own = slice(n_columns, n_columns + len(columns) - 1)
        found.append(Layout(own, slice(n_extras, n_extras + len(extras))))
        exact += [n_columns + j for j in part.exact_sums if j < len(columns) - 1]
        n_columns, n_extras = own.stop, n_extras + len(extras)
    return found, tuple(exact)


class SoftmaxSum(Composite, SoftmaxLoss):
    """``sum_k c_k Phi_k(f)`` of the outputs ``f = softmax(z)``.

    With ``p``, ``g2`` and ``g3`` the sums of the parts' everything that holds for a loss of a softmax holds.
    """

    def _state(self, found: list[GroupStatistics]) -> tuple[Array, ...]:
        gamma: Any = sum(own.state[1] for own in found)
        return found[0].state[0], gamma

    def p(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return the sum of the parts' ``p``."""
        return self._sum("p", f, h, b, w)

    def g2(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return the sum of the parts' ``g2``."""
        return self._sum("g2", f, h, b, w)

    def g3(self, f: Array, h: Array, b: Array, w: Array) -> Array:
        """Return the sum of the parts' ``g3``."""
        return self._sum("g3", f, h, b, w)

    def _sum(self, name: str, *point: Array) -> Array:
        return np.asarray(sum(c * getattr(part, name)(*point) for c, part in self.terms))

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return ``f p - f gamma``, with ``f p`` as the parts know it."""
        # Cross entropy's is -w b, which a probability that underflows does not enter.
        own = [state[0], np.zeros_like(state[1])]
        outer = sum(c * part.slope(z, b, w, own) for c, part in self.terms)
        return np.asarray(outer - np.exp(z - state[0]) * state[1])

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        """Return f, the size of what is subtracted from, and f; None where all parts do."""
        found = [(c, part.slope_parts(z, b, w, state)) for c, part in self.terms]
        sizes = [abs(c) * np.abs(parts[1]) for c, parts in found if parts is not None]
        f = np.exp(z - state[0])
        return (f, np.asarray(sum(sizes)), f) if sizes else None

    def subsample(self, b: Array, w: Array, inclusion: Array) -> tuple[Array, Array] | None:
        """Return what all parts agree on; None where they do not."""
        found = [part.subsample(b, w, inclusion) for part in self.parts]
        known = [thinned for thinned in found if thinned is not None]
        agree = len(known) == len(found) and all(
            np.array_equal(own, first)
            for thinned in known
            for own, first in zip(thinned, known[0], strict=True)
        )
        return known[0] if agree else None

    @property
    def is_cross_entropy(self) -> bool:
        """Whether all parts are cross entropies."""
        return all(isinstance(part, CrossEntropy) for part in self.parts)


class NormaliserTotal(Loss):
    """``sum w exp(z)`` as a part of a sum: ``alpha sum w f``; the state is the log normaliser."""

    convex = True
    logarithmic = True
    has_target = False
    exact_sums = (0,)
    n_states = 1
    transform = staticmethod(SoftmaxLoss.transform)
    normalise = SoftmaxLoss.normalise
    reference_failed = SoftmaxLoss.reference_failed

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        return (w * v, v), ()

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        scale, e = np.exp(reference), columns[-1]
        return GroupStatistics(scale * columns[0], (scale, 0.0 * e), (reference + np.log(e),), 1.0 / e)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * np.exp(z)

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        return [GramTerm(w * np.exp(z), None, None)], np.exp(z - state[0])

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        return w * np.exp(z)

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])


class NormaliserSquares(Loss):
    """``0.5 sum w (u - alpha b)^2`` with ``u = exp(z)`` as a part of a sum: ``0.5 alpha^2 sum w (f - b)^2``;
    the state is (log normaliser, ``<w b, f - b>``).
    """

    logarithmic = True
    transform = staticmethod(SoftmaxLoss.transform)
    normalise = SoftmaxLoss.normalise
    reference_failed = SoftmaxLoss.reference_failed

    @staticmethod
    def accumulate(
        y: Array, v: Array, b: Array, w: Array, reference: Array | float, constant: Array | float
    ) -> Accumulated:
        c = v - b
        wc = w * c
        return (v * wc, v * (w * b), v), (b * wc, wc * c, w * b * b)

    @staticmethod
    def finalize(
        columns: Sequence[Array], extras: Sequence[Array], reference: Array, constant: Array
    ) -> GroupStatistics:
        # In units of exp(reference): u - alpha b = (v - b) - k b, with k zero at the exact reference.
        e, scale = columns[-1], np.exp(reference)
        k = e - 1.0
        bc, cc, bb = extras[0], extras[1], extras[2]
        beta = bc - k * bb
        value = 0.5 * scale * scale * (cc - 2.0 * k * bc + k * k * bb)
        square = scale * scale
        state = (reference + np.log(e), beta / e)
        return GroupStatistics(value, (square, -k * square, -beta * square), state, 1.0 / e)

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        f, alpha = np.exp(z - state[0]), np.exp(state[0])
        return alpha * alpha * f * (w * (f - b) - state[1])

    def slope_parts(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[Array, Array, Array] | None:
        f, alpha = np.exp(z - state[0]), np.exp(state[0])
        return alpha * alpha * f, w * (f - b), b + 0.0 * f

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        f, square = np.exp(z - state[0]), np.exp(2.0 * state[0])
        return [
            GramTerm(square * w + 0.0 * f, f, b),
            GramTerm(square * f * (w * (f - b) - state[1]), None, None),
        ], f

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        f, square = np.exp(z - state[0]), np.exp(2.0 * state[0])
        return square * (w * f * f + f * (w * np.abs(f - b) + np.abs(state[1])))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        return np.exp(z - state[0])


class MixedSum(Composite):
    """A sum that the normaliser itself enters: a `SoftmaxSum`, or none, with ``sum exp(z)`` or the rescaled
    squares.

    The state is the log normaliser and what each part has besides.
    """

    def __init__(self, parts: Sequence[Loss], factors: Sequence[float]) -> None:
        super().__init__(parts, factors)
        self.n_states = 1 + sum(part.n_states - 1 for part in self.parts)

    @property
    def plain_terms(self) -> tuple[tuple[float, Loss], ...]:
        """The factor and the loss of each part as it is on its own."""
        alone: dict[type[Loss], Loss] = {NormaliserTotal: Total(), NormaliserSquares: SquaredRescaled("exp")}
        return tuple((c, alone.get(type(part), part)) for c, part in self.terms)

    @property
    def states_third_derivative(self) -> bool:
        """Whether every part does, as it is on its own."""
        return all(part.states_third_derivative for _, part in self.plain_terms)

    def _state(self, found: list[GroupStatistics]) -> tuple[Array, ...]:
        return found[0].state[0], *(s for own in found for s in own.state[1:])

    def _own(self, state: list[Array]) -> list[tuple[float, Loss, list[Array]]]:
        """Return the factor, the loss and the state of each part."""
        out, first = [], 1
        for c, part in self.terms:
            last = first + part.n_states - 1
            out.append((c, part, [state[0], *state[first:last]]))
            first = last
        return out

    def slope(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return the sum of the parts'."""
        return np.asarray(sum(part.slope(z, b, c * w, own) for c, part, own in self._own(state)))

    def gram_terms(
        self, z: Array, b: Array, w: Array, state: list[Array]
    ) -> tuple[list[GramTerm], Array | None]:
        """Return the terms of all parts, about the common centre."""
        terms = [term for c, part, own in self._own(state) for term in part.gram_terms(z, b, c * w, own)[0]]
        return terms, np.exp(z - state[0])

    def importance(self, z: Array, b: Array, w: Array, state: list[Array]) -> Array:
        """Return the sum of the parts'."""
        return np.asarray(sum(part.importance(z, b, c * w, own) for c, part, own in self._own(state)))

    def fitted(self, z: Array, state: list[Array]) -> Array:
        """Return the softmax."""
        return np.exp(z - state[0])
