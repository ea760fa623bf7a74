"""An attention layer as a function of its input: one residual entry, and the loss of some queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.theory.instances.reading import as_array, as_number

Array = NDArray[np.float64]

# Blocks of second derivatives are looked at for the tokens with the largest attention, this many at most.
TOKENS = 8
# Full losses of this many tokens are evaluated query by query; of longer inputs a few queries stand in.
QUERIES = 64
FEW = 2


@dataclass(frozen=True, eq=False)
class Recovery:
    """An attention layer ``softmax_rows(X^T W X) X^T V``, an output B, and two inputs X and Y.

    The loss is the paper's, ``sum c^2`` without the factor 0.5. In the notation of its derivatives, where
    ``f(X)_i`` is the softmax of ``X^T W x_i``, W is transposed; every bound is the same for both.

    Parameters
    ----------
    X, Y : array_like, shape (d, n)
    W : array_like, shape (d, d)
    V : array_like, shape (d, m)
    B : array_like, shape (n, m)
    i0, j0 : int
        The residual entry that the bounds on one entry speak of.
    queries : sequence of int, optional
        Rows of the output that enter the loss. All of them by default, or two of more than 64: the bounds
        add up over entries, and hold of fewer.
    R : float, optional

    Raises
    ------
    ValueError
        On input that is not finite or of the wrong shape; the message names argument and index.
    """

    X: Any
    W: Any
    V: Any
    B: Any
    Y: Any
    i0: int = 0
    j0: int = 0
    queries: Any = None
    R: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "X", as_array(self.X, "X", (None, None)))
        d, n = self.X.shape
        put(self, "W", as_array(self.W, "W", (d, d)))
        put(self, "V", as_array(self.V, "V", (d, None)))
        m = self.V.shape[1]
        put(self, "B", as_array(self.B, "B", (n, m)))
        put(self, "Y", as_array(self.Y, "Y", (d, n)))
        as_number(self.R, "R")
        for name, index, size in (("i0", self.i0, n), ("j0", self.j0, m)):
            if not 0 <= index < size:
                raise ValueError(f"{name} is {index}; entries are numbered from 0 to {size - 1} there")
        if self.queries is None:
            chosen = np.arange(n) if n <= QUERIES else np.linspace(0, n - 1, FEW).astype(np.intp)
        else:
            chosen = np.asarray(self.queries, dtype=np.intp)
            if not len(chosen) or (chosen < 0).any() or (chosen >= n).any():
                raise ValueError(f"queries must name rows of the output, from 0 to {n - 1}")
        put(self, "queries", chosen)

    @property
    def n(self) -> float:
        """Number of tokens."""
        return float(self.X.shape[1])

    @property
    def d(self) -> float:
        """Number of features of a token, or of an output if those are more."""
        return float(max(self.X.shape[0], self.V.shape[1]))

    @cached_property
    def distance(self) -> float:
        """``|X - Y|_F``."""
        return float(np.linalg.norm(self.X - self.Y))

    @cached_property
    def start(self) -> Rows:
        """The queries of the loss at X."""
        return Rows(self, self.X.T, self.queries)

    @cached_property
    def end(self) -> Rows:
        """The queries of the loss at Y."""
        return Rows(self, self.Y.T, self.queries)

    @cached_property
    def one(self) -> Rows:
        """Query i0 at X."""
        return Rows(self, self.X.T, np.array([self.i0]))

    @cached_property
    def one_moved(self) -> Rows:
        """Query i0 at Y."""
        return Rows(self, self.Y.T, np.array([self.i0]))

    @cached_property
    def unit(self) -> Array:
        """The output weight that picks column j0, shape (1, m)."""
        return np.asarray(np.eye(self.V.shape[1])[self.j0][None])

    @cached_property
    def tokens(self) -> NDArray[np.intp]:
        """i0 and the tokens with the largest attention of query i0."""
        others = np.argsort(-self.one.P[0], kind="stable")
        return np.asarray([self.i0, *(k for k in others if k != self.i0)][:TOKENS], dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some output rows of a layer at one input T, rows are tokens: k queries cost O(k n d).

    With p the attention of a query, ``r = W^T t`` its logits' weights and ``phi = p^T (T v)`` one of its
    outputs or a combination, v = V g:

        d phi = p v^T + a r^T + e (W T^T a)^T,    a = p o (T v - phi)
    """

    of: Recovery
    T: Array
    queries: NDArray[np.intp]

    @cached_property
    def R(self) -> Array:
        """Rows ``W^T t_i`` of the queries, shape (k, d)."""
        return np.asarray(self.T[self.queries] @ self.of.W)

    @cached_property
    def P(self) -> Array:
        """Attention of the queries, shape (k, n)."""
        S = self.R @ self.T.T
        S -= S.max(axis=1, keepdims=True)
        np.exp(S, out=S)
        S /= S.sum(axis=1, keepdims=True)
        return np.asarray(S)

    @cached_property
    def H(self) -> Array:
        """``T V``, shape (n, m)."""
        return np.asarray(self.T @ self.of.V)

    @cached_property
    def C(self) -> Array:
        """Residuals ``P T V - B``, shape (k, m)."""
        return np.asarray(self.P @ self.H - self.of.B[self.queries])

    @cached_property
    def Z(self) -> Array:
        """``z``: mean keys ``P T W^T``, shape (k, d)."""
        return np.asarray(self.P @ self.T @ self.of.W.T)

    def _centred(self, G: Array) -> tuple[Array, Array, Array]:
        """Return v, ``T v - phi`` and a of weights G of the outputs, shape (k, m)."""
        v = G @ self.of.V.T
        gap = v @ self.T.T
        gap = gap - np.sum(self.P * gap, axis=1, keepdims=True)
        return v, gap, self.P * gap

    def gradient(self, G: Array) -> Array:
        """Return the gradient of ``<G, outputs>`` in T, shape (n, d)."""
        v, _, a = self._centred(G)
        out = self.P.T @ v + a.T @ self.R
        np.add.at(out, self.queries, a @ self.T @ self.of.W.T)
        return np.asarray(out)

    def _logits(self, D: Array) -> Array:
        """Return the change of the logits along D."""
        return np.asarray(self.R @ D.T + (D[self.queries] @ self.of.W) @ self.T.T)

    def push(self, D: Array) -> Array:
        """Return the change of the outputs along D, shape (k, m)."""
        dP = self._attention(self._logits(D))
        return np.asarray(dP @ self.H + self.P @ D @ self.of.V)

    def _attention(self, dS: Array) -> Array:
        return np.asarray(self.P * (dS - np.sum(self.P * dS, axis=1, keepdims=True)))

    def second(self, G: Array) -> Callable[[Array], Array]:
        """Return the product with the Hessian of ``<G, outputs>``, (n, d) to (n, d)."""
        v, gap, a = self._centred(G)

        def product(D: Array) -> Array:
            dP = self._attention(self._logits(D))
            dphi = np.sum(dP * (v @ self.T.T), axis=1) + np.sum(self.P * (v @ D.T), axis=1)
            da = dP * gap + self.P * (v @ D.T - dphi[:, None])
            out = dP.T @ v + da.T @ self.R + a.T @ (D[self.queries] @ self.of.W)
            np.add.at(out, self.queries, (a @ D + da @ self.T) @ self.of.W.T)
            return np.asarray(out)

        return product

    def loss_gradient(self) -> Array:
        """Return the gradient of ``sum c^2`` over the queries, shape (n, d)."""
        return self.gradient(2.0 * self.C)

    def loss_hessian(self) -> Callable[[Array], Array]:
        """Return the product with its Hessian, flat to flat."""
        second = self.second(2.0 * self.C)

        def product(v: Array) -> Array:
            D = v.reshape(self.T.shape)
            return (second(D) + self.gradient(2.0 * self.push(D))).reshape(-1)

        return product

    def entry_hessian(self) -> Callable[[Array], Array]:
        """Return the product with the Hessian of the output (i0, j0), flat to flat; for a single query."""
        second = self.second(self.of.unit)
        return lambda v: second(v.reshape(self.T.shape)).reshape(-1)
