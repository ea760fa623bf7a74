"""What a pass over the pairs of a head hands on, and what gradients in its vectors are in the unknowns."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.loss import GramTerm
from attnfit.objectives.head_vectors import Inputs, Vectors
from attnfit.objectives.rotary import Turn
from attnfit.segments import Array, Chunk

if TYPE_CHECKING:
    from attnfit.objectives.heads import HeadAttention

# Largest curvature in a logit with which products are formed in single precision: its range is 1e-38 to 1e38.
SINGLE_RANGE = (1e-15, 1e15)


class HeadPoint(NamedTuple):
    """The unknowns of a head: W_Q (heads, d1, h), W_K (d2, h), gains of queries and keys (h,), or (0,)
    without norms, and coefficients of the features of pairs (heads, p), that of the sink last.
    """

    W_Q: Array
    W_K: Array
    gains_q: Array
    gains_k: Array
    c: Array


class Logits(NamedTuple):
    """A chunk of pairs at a point, as matrices (queries, keys).

    Attributes
    ----------
    z : ndarray
        Logits, minus infinity where masked.
    passed, bend : ndarray or float
        First and second derivative of a logit in the product of query and key.
    Q, K : ndarray, shapes (queries, h) and (keys, h)
    mask : ndarray of bool, or None
    """

    chunk: Chunk
    z: Array
    passed: Array | float
    bend: Array | float
    Q: Array
    K: Array
    mask: NDArray[np.bool_] | None

    @property
    def flat(self) -> Array:
        """The logits of the pairs, shape (n_pairs,)."""
        return (self.z if self.mask is None else self.z[self.mask]).reshape(-1)

    def dense(self, values: Any) -> Any:
        """Return one value a pair as a matrix, zero where masked; numbers stay numbers."""
        return dense(self.mask, self.z.shape, values)


class Curved(NamedTuple):
    """A chunk at a point with the gradient in its logits and their curvature, as matrices."""

    at: Logits
    slope: Array
    terms: list[GramTerm]
    weights: Array | None


class InSingle:
    """Copies of arrays, and of what holds them, in single precision; an array met twice is copied once."""

    def __init__(self) -> None:
        # With each copy its original, so that no other array takes its identity.
        self._made: dict[int, tuple[Array, Any]] = {}

    @staticmethod
    def holds(curvature: list[Curved]) -> bool:
        """Whether products with the curvature stay far from the limits of single precision."""
        sizes = [float(np.max(np.abs(t), initial=0.0)) for one in curvature for t, _, _ in one.terms]
        low, high = SINGLE_RANGE
        return low <= max(sizes, default=0.0) <= high

    def __call__(self, part: Any) -> Any:
        """Return the copy; what is no array and holds none is returned as it is."""
        if isinstance(part, np.ndarray) and part.dtype == np.float64:
            if id(part) not in self._made:
                self._made[id(part)] = (part, part.astype(np.float32))
            return self._made[id(part)][1]
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(self, part))
        if isinstance(part, list):
            return [self(one) for one in part]
        if isinstance(part, tuple):
            return tuple(self(one) for one in part)
        if isinstance(part, Vectors | Inputs | Turn):
            return replace(part, **{field.name: self(getattr(part, field.name)) for field in fields(part)})
        return part


def dense(mask: NDArray[np.bool_] | None, shape: tuple[int, ...], values: Any) -> Any:
    """Return one value a pair as a matrix, zero where masked; numbers stay numbers."""
    if values is None:
        return None
    if np.size(values) == 1:
        return float(np.reshape(values, -1)[0])
    if mask is None:
        return values.reshape(shape)
    out = np.zeros(shape)
    out[mask] = values
    return out


def change_of_matrix(terms: list[GramTerm], weights: Array | None, along: Array) -> Array:
    """Return the change of the gradient in the logits where these change by ``along``, all of them matrices
    (queries, keys) with zeros where masked: `attnfit.objectives.passes.change_of_slope`, row by row.
    """
    out = None
    for t, r, q in terms:
        y = along if r is None else r * along
        if q is None:
            part = t * y
        else:
            assert weights is not None
            part = y - q * np.einsum("ij,ij->i", weights, along)[:, None]
            part *= t
            total = part.sum(axis=1) if np.ndim(q) == 0 else np.einsum("ij,ij->i", q, part)
            back = weights * (total if np.ndim(q) else q * total)[:, None]
            out = -back if out is None else out - back
        part = part if r is None else r * part
        out = part if out is None else out + part
    return np.zeros_like(along) if out is None else out


class Pull:
    """Gradients in the vectors, added up over chunks, and what they are in the unknowns."""

    def __init__(self, problem: HeadAttention, point: HeadPoint, vectors: Any = None) -> None:
        self.problem = problem
        found: tuple[list[Vectors], list[Vectors]] = vectors or problem.vectors(point)
        self.left, self.right = found
        h = problem.rank
        self.by_query, self.by_key = (
            [np.zeros((len(v.unit), h), dtype=v.unit.dtype) for v in side] for side in (self.left, self.right)
        )
        # The same for what the point itself pulls, of which a step bends the norms.
        self.fixed_query, self.fixed_key = ([r.copy() for r in side] for side in (self.by_query, self.by_key))
        self.by_c = np.zeros_like(point.c)

    def add(self, at: Logits, slope: Array, S: Array) -> None:
        """Add a chunk with gradients ``slope`` in the logits and S in the products of vectors."""
        s, queries = self.problem.place(at.chunk)
        texts = len(self.right)
        self.by_query[s][queries] += S @ at.K
        self.by_key[s % texts] += S.T @ at.Q
        for p, F in enumerate(self.problem.read.features[s]):
            self.by_c[s // texts, p] += float(np.sum(slope * F[queries]))

    def add_moved(self, at: Logits, T: Array, dq: Array, dk: Array) -> None:
        """Add what a step of the vectors makes of the gradient T in their products."""
        s, queries = self.problem.place(at.chunk)
        text = s % len(self.right)
        self.by_query[s][queries] += T @ dk
        self.by_key[text] += T.T @ dq
        self.fixed_query[s][queries] += T @ at.K
        self.fixed_key[text] += T.T @ at.Q

    def result(self, along: HeadPoint | None = None) -> HeadPoint:
        """Return the gradient in the unknowns; with a step along, its change."""
        problem, texts = self.problem, len(self.right)
        W_Q = np.zeros((problem.read.n_heads, problem.d1, problem.rank))
        W_K = np.zeros((problem.d2, problem.rank))
        gains_q, gains_k = np.zeros(problem.n_gains), np.zeros(problem.n_gains)
        for s, (v, R) in enumerate(zip(self.left, self.by_query, strict=True)):
            dW, dg = v.pulled(R)
            if along is not None:
                bent = v.bent(self.fixed_query[s], along.W_Q[s // texts], along.gains_q)
                dW, dg = dW + bent[0], dg + bent[1]
            W_Q[s // texts] += dW
            gains_q += dg
        for s, (v, R) in enumerate(zip(self.right, self.by_key, strict=True)):
            dW, dg = v.pulled(R)
            if along is not None:
                bent = v.bent(self.fixed_key[s], along.W_K, along.gains_k)
                dW, dg = dW + bent[0], dg + bent[1]
            W_K += dW
            gains_k += dg
        return HeadPoint(W_Q, W_K, gains_q, gains_k, self.by_c)
