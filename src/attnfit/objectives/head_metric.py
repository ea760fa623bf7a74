"""The mean curvature of the factors of a head, block by block: damping and preconditioner of its fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from attnfit.objectives.head_bases import SlowBases
from attnfit.segments import Array

if TYPE_CHECKING:
    from attnfit.objectives.heads import HeadAttention

# Queries and keys of a text from which the curvature of the factors is averaged: a preconditioner may be
# rough, and each costs h^2 numbers a key.
AVERAGED = 48


class Metric:
    """The mean curvature of each factor, block by block.

    Parameters
    ----------
    problem : HeadAttention
    by_q : ndarray, shape (heads, h, h)
    by_k : ndarray, shape (h, h)
    rest : ndarray
        Of gains and coefficients, one by one.
    bases : SlowBases, optional
        The curvature of changes of basis that maps hardly show.
    """

    def __init__(
        self, problem: HeadAttention, by_q: Array, by_k: Array, rest: Array, bases: SlowBases | None = None
    ) -> None:
        self.problem, self.bases = problem, bases
        self.by_q, self.by_k = by_q, by_k
        self.rest = np.maximum(rest, 1e-12 * max(float(rest.max(initial=0.0)), np.finfo(np.float64).tiny))
        self._inverses = [_inverse(M) for M in (*by_q, by_k)]

    def damped(self, v: Array, of_first: float, of_second: float) -> Array:
        """Return v times the curvature, as shares of it: one for W_Q, another for W_K and the rest."""
        W_Q, W_K, rest = self._split(v)
        parts = (of_first * (W_Q @ self.by_q), of_second * (W_K @ self.by_k), of_second * self.rest * rest)
        return np.concatenate([part.reshape(-1) for part in parts])

    def solve(self, v: Array) -> Array:
        """Return v divided by the curvature: a preconditioner."""
        W_Q, W_K, rest = self._split(v)
        n = len(W_Q)
        by_q = [W @ inverse for W, inverse in zip(W_Q, self._inverses[:n], strict=True)]
        return np.concatenate([*(W.reshape(-1) for W in by_q), (W_K @ self._inverses[n]).reshape(-1),
                               rest / self.rest])  # fmt: skip

    def preconditioner(self, of_first: float, of_second: float) -> Callable[[Array], Array]:
        """Return what divides by the curvature and that of damping, such shares of it; along changes of basis
        exactly.
        """
        if self.bases is None:
            return self.solve
        along = self.bases.solver(of_first * self.by_q, of_second * self.by_k)

        def solve(v: Array) -> Array:
            W_Q, W_K, rest = self._split(v)
            step_q, step_k = along(W_Q, W_K)
            step = np.concatenate([step_q.reshape(-1), step_k.reshape(-1), np.zeros_like(rest)])
            return np.asarray(self.solve(v) + step)

        return solve

    def diagonal(self) -> Array:
        """Return the curvature of each unknown."""
        problem = self.problem
        parts = [np.tile(np.diag(M), problem.d1) for M in self.by_q]
        found = np.concatenate([*parts, np.tile(np.diag(self.by_k), problem.d2), self.rest])
        return np.asarray(np.maximum(found, 1e-12 * float(found.max())) + problem.ridge)

    def _split(self, v: Array) -> tuple[Array, Array, Array]:
        problem, h = self.problem, self.problem.rank
        first = problem.read.n_heads * problem.d1 * h
        second = first + problem.d2 * h
        return v[:first].reshape(-1, problem.d1, h), v[first:second].reshape(-1, h), v[second:]


def mean_curvature(problem: HeadAttention, x: Array, *, fine: bool = False) -> Metric:
    """Return ``P_Q = mean_t R_t^-1 Cov_t(K) R_t``, its mirror P_K, and the curvature of each other unknown.

    Some of the queries and keys stand for all. Where the columns of A1 and of A2 are orthonormal, as in the
    variables of `reduction`, the curvature of W_Q is about ``I (x) P_Q``.
    """
    point, read = problem.parts(x), problem.read
    left, right = problem.vectors(point)
    texts, h = len(right), problem.rank
    by_q = np.zeros((read.n_heads, h, h))
    by_k, gains_q, gains_k = np.zeros((h, h)), np.zeros(problem.n_gains), np.zeros(problem.n_gains)
    by_c = np.zeros_like(point.c)
    n_q, n_k = sum(len(i.A) for i in problem.left), sum(len(i.A) for i in problem.right)
    # Of each text as many keys as its share, in curvature summed over all queries.
    keys = [np.unique(np.linspace(0, len(i.A) - 1, AVERAGED).astype(int)) for i in problem.right]
    sums = [np.zeros((len(some), h, h)) for some in keys]
    bases = SlowBases(problem, point) if fine and len(problem.slow) else None
    for curved in problem.curvature(point, gauss_newton=True):
        Q, K = curved.at.Q, curved.at.K
        s, queries = problem.place(curved.at.chunk)
        head, text = divmod(s, texts)
        u = sum((np.abs(t) if r is None else np.abs(t) * r * r for t, r, _ in curved.terms), 0.0 * Q @ K.T)
        share = 0.0 if curved.weights is None else curved.weights
        if bases is not None:
            bases.add(curved.at, u, share)
        u = u * curved.at.passed**2
        n = len(problem.left[text].A)
        chosen = np.unique(np.linspace(0, n - 1, AVERAGED).astype(int))
        own = chosen[(chosen >= queries.start) & (chosen < queries.stop)] - queries.start
        if len(own):
            means = (share * np.ones_like(u))[own] @ K
            cov = _second_moments(u[own], K) - u[own].sum(1)[:, None, None] * _outer(means)
            found, curved_gains = left[s].metric(cov, own + queries.start)
            by_q[head] += found * (n * len(own) / len(chosen) / n_q)
            gains_q = gains_q + curved_gains * (len(own) / len(chosen))
        some = keys[text]
        centred = u[:, some] * (1.0 - (share * np.ones_like(u))[:, some])
        sums[text] += _second_moments(centred.T, Q)
        for p, F in enumerate(read.features[s]):
            by_c[head, p] += float(np.sum(u * F[queries] ** 2))
    for text, some in enumerate(keys):
        found, curved_gains = right[text].metric(sums[text], some)
        by_k += found * (len(problem.right[text].A) / n_k)
        gains_k = gains_k + curved_gains
    return Metric(problem, by_q, by_k, np.concatenate([gains_q, gains_k, by_c.reshape(-1)]), bases)


def _second_moments(weights: Array, rows: Array) -> Array:
    """Return ``sum_s w_ks r_s r_s'`` for each row k of the weights, without an array of all squares."""
    return np.stack([(rows.T * w) @ rows for w in weights])


def _outer(m: Array) -> Array:
    return np.asarray(m[:, :, None] * m[:, None, :])


def _inverse(M: Array) -> Array:
    values, vectors = np.linalg.eigh(0.5 * (M + M.T))
    floor = 1e-10 * max(float(values.max(initial=0.0)), float(np.finfo(np.float64).tiny))
    return np.asarray((vectors / np.maximum(values, floor)) @ vectors.T)
