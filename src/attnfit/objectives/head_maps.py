"""The maps of several heads at given factors, and what they make of values, steps and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attnfit.objectives.full_attention import KEPT_PAIRS
from attnfit.objectives.head_passes import Logits, Pull
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.objective import Evaluation, Moved
from attnfit.objectives.projected import softmax
from attnfit.segments import Array

if TYPE_CHECKING:
    from attnfit.objectives.head_outputs import HeadOutputs


@dataclass(frozen=True)
class HeadMap:
    """The map of one head for a block of queries, its sink as a last column.

    Attributes
    ----------
    group, head, text : int
    rows : slice
        The queries among those of all texts.
    at : Logits
    P : ndarray, shape (rows, k)
        Shares of the keys.
    D : ndarray, shape (rows, k)
        Shares with which they move: P, but to first order those of uniform attention.
    """

    group: int
    head: int
    text: int
    rows: slice
    at: Logits
    P: Array
    D: Array

    def slope(self, back: Array) -> Array:
        """Return the gradient in the logits of one in the map."""
        return np.asarray(self.D * (back - np.sum(self.D * back, axis=1, keepdims=True)))


class Step(NamedTuple):
    """Changes along a step: of queries, keys, their products, and the map."""

    dq: Array
    dk: Array
    dy: Array
    dP: Array


class MapsAt:
    """The maps of all heads at given factors, and what steps and gradients make of them.

    Parameters
    ----------
    full : HeadOutputs
    factors : ndarray, shape (n_factors,)
    heads : HeadAttention, optional
        Queries and keys in other variables.
    first_order : bool
        Replace maps by ``U o (1 + z - sum_k U z)``, U being those of equal logits.
    """

    def __init__(
        self,
        full: HeadOutputs,
        factors: Array,
        heads: HeadAttention | None = None,
        *,
        first_order: bool = False,
    ) -> None:
        self.full, self.heads, self.first_order = full, heads or full.heads, first_order
        self.points = [self.heads.parts(part) for part in factors.reshape(full.n_groups, -1)]
        self.vectors = [self.heads.vectors(point) for point in self.points]
        small = full.n_heads * sum(len(t.A1) * len(t.A2) for t in full.texts) <= KEPT_PAIRS
        self._kept = list(self._maps()) if small else None

    def maps(self) -> Iterable[HeadMap]:
        """Return the maps, from memory where they are small: one pass."""
        if self._kept is None:
            return self._maps()
        for _ in self.points:
            self.heads.count_pass()
        return self._kept

    def _maps(self) -> Iterator[HeadMap]:
        n_texts = len(self.full.texts)
        nothing = self.heads.parts(np.zeros(self.heads.n_unknowns))
        for g, (point, vectors) in enumerate(zip(self.points, self.vectors, strict=True)):
            found = self.heads.logits(point, vectors)
            equal = self.heads.logits(nothing) if self.first_order else iter(())
            for at in found:
                s, own = self.heads.place(at.chunk)
                head, text = divmod(s, n_texts)
                first = self.full.texts[text].first
                rows = slice(first + own.start, first + own.stop)
                if self.first_order:
                    base = next(equal).z
                    U = softmax(base.copy())
                    z = np.where(U > 0.0, at.z - np.where(U > 0.0, base, 0.0), 0.0)
                    P = U * (1.0 + z - np.sum(U * z, axis=1, keepdims=True))
                else:
                    P = U = softmax(at.z.copy())
                yield HeadMap(g, g * self.full.per_group + head, text, rows, at, P, U)

    # ---- what maps make of the values

    def stacked(self) -> Array:
        """Return ``[P_1 A3 ... P_H A3]``, shape (n, heads v)."""
        return self._stacked((one, one.P) for one in self.maps())

    def _stacked(self, changes: Iterable[tuple[HeadMap, Array]]) -> Array:
        v = self.full.A3.shape[1]
        out = np.zeros((len(self.full.B), self.full.n_heads * v))
        for one, P in changes:
            out[one.rows, one.head * v : (one.head + 1) * v] = P @ self.full.values[one.text]
        return out

    def outputs(self, Y: Array) -> Array:
        """Return ``sum_h P_h A3 Y_h``, shape (n, m), for Y of shape (heads, v, m)."""
        return self._outputs(((one, one.P) for one in self.maps()), Y)

    def _outputs(self, changes: Iterable[tuple[HeadMap, Array]], Y: Array) -> Array:
        W, out = self.weighted(Y), np.zeros_like(self.full.B)
        for one, P in changes:
            out[one.rows] += P @ W[one.text][one.head]
        return out

    def weighted(self, Y: Array) -> list[Array]:
        """Return ``A3 Y_h`` of each text, shape (heads, k, m)."""
        return [values @ Y for values in self.full.values]

    # ---- along a step of the factors

    def steps(self, v: Array) -> Iterator[tuple[HeadMap, Step]]:
        """Yield the maps with their changes along a step: one pass."""
        along = [self.heads.parts(part) for part in v.reshape(len(self.points), -1)]
        moved = [self.heads.moved(*pair) for pair in zip(self.vectors, along, strict=True)]
        for one in self.maps():
            dq, dk, dy, dz = self.heads.step(one.at, along[one.group], *moved[one.group])
            yield one, Step(dq, dk, dy, one.slope(dz))

    def moved(self, v: Array) -> Array:
        """Return the change of `stacked`."""
        return self._stacked((one, step.dP) for one, step in self.steps(v))

    def moved_outputs(self, v: Array, Y: Array) -> Array:
        """Return the change of `outputs`."""
        return self._outputs(((one, step.dP) for one, step in self.steps(v)), Y)

    # ---- back to the factors

    def pulled(self, G: Array, Y: Array) -> Array:
        """Return the gradient in the factors, given the one in the outputs, shape (n, m)."""
        W, pulls = self.weighted(Y), self._pulls()
        for one in self.maps():
            slope = one.slope(G[one.rows] @ W[one.text][one.head].T)
            pulls[one.group].add(one.at, slope, slope * one.at.passed)
        return np.concatenate([self.heads.join(pull.result()) for pull in pulls])

    def second(self, v: Array, G: Array, dG: Array, Y: Array, dY: Array) -> Array:
        """Return the change of `pulled` along a step of factors, outputs' gradient and values."""
        W, dW, pulls = self.weighted(Y), self.weighted(dY), self._pulls()
        along = [self.heads.parts(part) for part in v.reshape(len(self.points), -1)]
        for one, step in self.steps(v):
            at, w, dw = one.at, W[one.text][one.head], dW[one.text][one.head]
            g, dg = G[one.rows], dG[one.rows]
            back, dback = g @ w.T, dg @ w.T + g @ dw.T
            mean = np.sum(one.P * back, axis=1, keepdims=True)
            dmean = np.sum(step.dP * back + one.P * dback, axis=1, keepdims=True)
            slope = one.P * (back - mean)
            change = step.dP * (back - mean) + one.P * (dback - dmean)
            pull = pulls[one.group]
            pull.add_moved(at, slope * at.passed, step.dq, step.dk)
            pull.add(at, change, change * at.passed + slope * at.bend * step.dy)
        return np.concatenate(
            [self.heads.join(pull.result(own)) for pull, own in zip(pulls, along, strict=True)]
        )

    def _pulls(self) -> list[Pull]:
        return [Pull(self.heads, *pair) for pair in zip(self.points, self.vectors, strict=True)]


def moves_of(heads: HeadAttention, n_groups: int, factors: Array, steps: Array) -> Moved:
    """Return by how much each step of the factors, shape (n_factors, k), changes a logit at most."""
    size, largest = heads.n_unknowns, np.zeros(steps.shape[1])
    for g in range(n_groups):
        own = slice(g * size, (g + 1) * size)
        at = Evaluation(factors[own], 0.0, factors[own])
        largest = np.maximum(largest, heads.moves(at, steps[own]).largest)
    return Moved(largest)
