"""Variables in which queries and keys have orthonormal columns: only what the data identify is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.data.pairs import KroneckerDesign

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """Thin singular value decomposition of the factors of all sequences, ``U diag(sizes) directions^T``.

    Attributes
    ----------
    directions : ndarray, shape (d, r)
        Orthonormal basis of what the rows span.
    sizes : ndarray, shape (r,)
        Singular values.
    rank : int
        Number of directions that the data identify: r, or zero where the factors are zero and the one
        direction kept has no effect.
    """

    directions: Array
    sizes: Array
    rank: int

    @classmethod
    def of(cls, factors: list[Array], share: float = 0.0) -> Side:
        """Decompose the factors stacked; singular values within rounding of zero, or below a share of the
        largest, are dropped.
        """
        stacked = np.concatenate([np.linalg.qr(f, mode="r") for f in factors])
        _, sizes, rows = np.linalg.svd(stacked, full_matrices=False)
        longest = max(sum(len(f) for f in factors), rows.shape[1])
        least = max(longest * float(np.finfo(np.float64).eps), share)
        keep = sizes > least * max(float(sizes[0]), np.finfo(np.float64).tiny)
        rank = int(keep.sum())
        # A factor without any size still leaves one direction: a problem needs an unknown.
        keep[0] = True
        return cls(rows[keep].T, np.where(sizes[keep] > 0, sizes[keep], 1.0), rank)

    @property
    def forward(self) -> Array:
        """P with ``factor @ P`` orthonormal, shape (d, r)."""
        return np.asarray(self.directions / self.sizes)

    @property
    def backward(self) -> Array:
        """The pseudo-inverse of `forward`, shape (r, d)."""
        return np.asarray((self.directions * self.sizes).T)


@dataclass(frozen=True)
class Whitening:
    """Both sides of a bilinear map, and the design in the new variables.

    ``centred`` keys have their mean over each sequence removed, which adds a constant to a row of logits: of
    all X with the same softmax, those that come back through `forward` have the least norm.
    """

    queries: Side
    keys: Side
    design: KroneckerDesign

    @classmethod
    def of(cls, design: KroneckerDesign, *, centred: bool) -> Whitening:
        """Whiten both sides of a design."""
        keys = [b.keys - b.keys.mean(axis=0) if centred else b.keys for b in design.sequences]
        left, right = Side.of([b.queries for b in design.sequences]), Side.of(keys)
        pairs = zip(design.sequences, keys, strict=True)
        factors = [(b.queries @ left.forward, k @ right.forward) for b, k in pairs]
        return cls(left, right, design.with_factors(factors))

    def lift(self, y: Array) -> Array:
        """Take the flat unknown of the whitened problem, pair features last, to that of the original."""
        r1, r2 = self.queries.sizes.size, self.keys.sizes.size
        Y = y[: r1 * r2].reshape(r1, r2)
        X = self.queries.forward @ Y @ self.keys.forward.T
        return np.concatenate([X.reshape(-1), y[r1 * r2 :]])

    def restrict(self, x: Array) -> Array:
        """Take an unknown of the original problem to the whitened one; what is not identified is dropped."""
        d1, d2 = len(self.queries.directions), len(self.keys.directions)
        X = x[: d1 * d2].reshape(d1, d2)
        Y = self.queries.backward @ X @ self.keys.backward.T
        return np.concatenate([Y.reshape(-1), x[d1 * d2 :]])

    @property
    def ridge(self) -> Array:
        """What ``|X|^2`` is in the new variables: weights of the squares of Y, shape (r1 r2,)."""
        return np.multiply.outer(self.queries.sizes**-2.0, self.keys.sizes**-2.0).reshape(-1)

    @property
    def note(self) -> str:
        """What is identified, in a clause."""
        d1, d2 = len(self.queries.directions), len(self.keys.directions)
        r1, r2 = self.queries.rank, self.keys.rank
        if (d1, d2) == (r1, r2):
            return ""
        return (
            f"the data identify {r1} of {d1} directions of the queries and {r2} of {d2} of the keys, and "
            "x has no part in the others"
        )
