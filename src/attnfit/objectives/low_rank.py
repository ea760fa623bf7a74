"""Regression of attention maps with a matrix of given rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point, as_ridge
from attnfit.objectives.attention import Attention
from attnfit.objectives.budget import keeps_row_weights
from attnfit.objectives.objective import Evaluation, Moved, Problem, Reduction
from attnfit.objectives.passes import change_of_slope
from attnfit.objectives.whitening import Whitening
from attnfit.segments import Array


class LowRankAttention(Problem):
    """`Attention` over ``X = U V^T`` with U (d1, rank) and V (d2, rank); made by
    ``Attention(..., rank=rank)``.

    The unknown is U above V, shape (d1 + d2, rank); with p pair features the flat vector (U, V, c). The ridge
    is ``0.5 ridge (||U||_F^2 + ||V||_F^2 + |c|^2)``: at its minimum over all factors of one X, ridge times
    the sum of the singular values of X. With G = dL/dX: ``dL/dU = G V``, ``dL/dV = G^T U``. The factors are
    determined up to an invertible matrix between them, X is not affected.

    Parameters
    ----------
    full : Attention
        The problem over all X, without ridge.
    rank : int
    ridge : float or ndarray, shape (n_unknowns,)

    Raises
    ------
    ValueError
        If the rank is not between 1 and min(d1, d2).
    """

    linear = False
    best_hessian = "matrix_free"

    def __init__(self, full: Attention, rank: int, ridge: Any = 0.0) -> None:
        widest = min(full.design.d1, full.design.d2)
        if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or not 1 <= rank <= widest:
            raise ValueError(
                f"rank must be an integer from 1 to min(d1, d2) = {widest}, not {rank!r}; leave it out for a "
                "full matrix"
            )
        self.full, self.rank = full, int(rank)
        self.ridge: float | Array = as_ridge(ridge) if np.ndim(ridge) == 0 else ridge

    @property
    def shape(self) -> tuple[int, ...]:
        """(d1 + d2, rank), or flat with pair features."""
        d = self.full.design
        rows = d.d1 + d.d2
        return (rows * self.rank + d.n_features,) if d.n_features else (rows, self.rank)

    @property
    def n_passes(self) -> float:
        """Reads of the pairs since the problem was made."""
        return self.full.n_passes

    def factors(self, x: Any) -> tuple[Array, Array, Array]:
        """Return U, V and the coefficients of the pair features."""
        flat, d = as_point(x, self.shape), self.full.design
        first, second = d.d1 * self.rank, (d.d1 + d.d2) * self.rank
        U, V = flat[:first].reshape(-1, self.rank), flat[first:second].reshape(-1, self.rank)
        return U, V, flat[second:]

    def split(self, x: Any) -> tuple[Array, Array]:
        """Return X = U V^T, shape (d1, d2), and the coefficients of the pair features."""
        U, V, c = self.factors(x)
        return U @ V.T, c

    def predict(self, x: Any) -> Any:
        """Return the fitted maps, as `Attention.predict`."""
        return self.full.predict(self._full_point(as_point(x, self.shape)))

    def relative_error(self, x: Any) -> float:
        """Return the error of the fitted maps, as `Attention.relative_error`."""
        return self.full.relative_error(self._full_point(as_point(x, self.shape)))

    def _full_point(self, x: Array) -> Array:
        X, c = self.split(x)
        return np.concatenate([X.reshape(-1), c])

    def _pull(self, gradient: Array, x: Array) -> Array:
        """Return the gradient in the factors, given the one in (X, c)."""
        U, V, _ = self.factors(x)
        d = self.full.design
        size = d.d1 * d.d2
        G = gradient[:size].reshape(d.d1, d.d2)
        return np.concatenate([(G @ V).reshape(-1), (G.T @ U).reshape(-1), gradient[size:]])

    # ---- for the solvers

    def evaluate(
        self,
        x: Array,
        near: Evaluation | None = None,
        sampler: Any = None,
        *,
        at_zero: bool = False,
        hessian: bool = False,
    ) -> Evaluation:
        """Return value and gradient; the gradient "at zero" is that of maps without a bilinear part, since
        zero
        factors are stationary.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            inner = self.full.evaluate(self._full_point(x), at_zero=at_zero)
            value = inner.value + 0.5 * float(np.sum(self.ridge * x * x))
            gradient = self._pull(inner.gradient, x) + self.ridge * x
        gradient_at_zero = None if inner.gradient_at_zero is None else self._pull(inner.gradient_at_zero, x)
        return Evaluation(x, value, gradient, gradient_at_zero=gradient_at_zero, inner=inner)

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> H v, in products of width rank: no matrix of shape (d1, d2) but the gradient takes
        part.
        """
        inner = at.inner
        assert inner is not None
        full, d = self.full, self.full.design
        size = d.d1 * d.d2
        G = inner.gradient[:size].reshape(d.d1, d.d2)
        U, V, _ = self.factors(at.x)
        projected = [(s.queries @ U, s.keys @ V) for s in d.sequences]
        prepared = list(full.curvature(inner)) if keeps_row_weights(full.rows) else None

        def product(v: Array) -> Array:
            dU, dV, dc = self.factors(v)
            moved = [s.keys @ dV for s in d.sequences]
            by_u, by_c = G @ dV, np.zeros_like(dc)
            by_key = [np.zeros_like(m) for m in moved]
            for chunk, terms, weights in prepared or full.curvature(inner):
                assert isinstance(chunk.index, slice)
                block = full.rows.fetch(chunk)
                s, queries = d.find_queries(chunk.index)
                left, right = projected[s][0][queries], projected[s][1]
                z = (block.queries @ dU) @ right.T + left @ moved[s].T
                along = z.reshape(-1) if block.mask is None else z[block.mask]
                for feature, coefficient in zip(block.features, dc, strict=True):
                    along = along + coefficient * feature
                rows = change_of_slope(chunk, terms, weights, along)
                S = block.matrix(rows)
                by_u += block.queries.T @ (S @ right)
                by_key[s] += S.T @ left
                by_c += [float(rows @ feature) for feature in block.features]
            by_v = G.T @ dU + sum(s.keys.T @ m for s, m in zip(d.sequences, by_key, strict=True))
            return np.concatenate([by_u.reshape(-1), by_v.reshape(-1), by_c]) + self.ridge * v

        return product

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most, to first order."""
        U, V, _ = self.factors(at.x)
        changes = []
        for step in steps.T:
            dU, dV, dc = self.factors(step)
            changes.append(np.concatenate([(dU @ V.T + U @ dV.T).reshape(-1), dc]))
        assert at.inner is not None
        return self.full.moves(at.inner, np.stack(changes, axis=1))

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian column by column."""
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the curvature of each entry of a factor while the other factor stands still."""
        assert at.inner is not None
        d = self.full.design
        U, V, _ = self.factors(at.x)
        diagonal = self.full.diagonal_at(at.inner)
        D = diagonal[: d.d1 * d.d2].reshape(d.d1, d.d2)
        parts = [(D @ V**2).reshape(-1), (D.T @ U**2).reshape(-1), diagonal[d.d1 * d.d2 :]]
        return np.asarray(np.concatenate(parts) + self.ridge)

    # ---- where a fit begins

    def initial_point(self, random_state: Any = None) -> Array:
        """Return small random factors: zero is stationary."""
        rng = np.random.default_rng(random_state)
        d = self.full.design
        U, V = rng.standard_normal((d.d1, self.rank)), rng.standard_normal((d.d2, self.rank))
        c = np.zeros(d.n_features)
        block = self.full.design.block(self.full.rows.chunks[0].index)
        size = float(np.std(block @ np.concatenate([(U @ V.T).reshape(-1), c]))) or 1.0
        scale = np.sqrt(0.1 / size)
        return np.concatenate([scale * U.reshape(-1), scale * V.reshape(-1), c]).reshape(self.shape)

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return the closed form cut to rank where there is one, else small random factors."""
        starts = self.full.starts(rng)
        if "closed form" in starts:
            return {"closed form": self.adopt(starts["closed form"])}
        return {"small": self.initial_point(rng).reshape(-1)} if self.convex_surrogate() is None else {}

    def convex_surrogate(self) -> Problem | None:
        """Return a convex problem over all X, unless there is a closed form."""
        return self.full if self.full.convex else self.full.convex_surrogate()

    def adopt(self, x: Array) -> Array:
        """Return the balanced factors of the best approximation of this rank to X."""
        X, c = self.full.split(x)
        left, sizes, right = np.linalg.svd(X, full_matrices=False)
        root = np.sqrt(sizes[: self.rank])
        U, V = left[:, : self.rank] * root, right[: self.rank].T * root
        return np.concatenate([U.reshape(-1), V.reshape(-1), c])

    def reduction(self) -> Reduction | None:
        """Return the problem in whitened variables: truncation there loses least of the maps."""
        inner = self.full.reduction()
        if inner is None:
            return None
        assert isinstance(inner.problem, Attention)
        whitening = Whitening.of(self.full.design, centred=self.full._centred)
        left, right = whitening.queries, whitening.keys
        rank = min(self.rank, left.sizes.size, right.sizes.size)
        on_u, on_v = np.repeat(left.sizes**-2.0, rank), np.repeat(right.sizes**-2.0, rank)
        ridge = self.ridge * np.concatenate([on_u, on_v, np.ones(self.full.design.n_features)])
        other = LowRankAttention(inner.problem, rank, ridge)

        def between(x: Array, problem: LowRankAttention, P: Array, Q: Array, width: int) -> Array:
            U, V, c = problem.factors(x)
            out = [np.zeros((len(P), width)), np.zeros((len(Q), width))]
            kept = min(width, U.shape[1])
            out[0][:, :kept], out[1][:, :kept] = (P @ U)[:, :kept], (Q @ V)[:, :kept]
            return np.concatenate([out[0].reshape(-1), out[1].reshape(-1), c])

        return Reduction(
            other,
            lambda y: between(y, other, left.forward, right.forward, self.rank),
            lambda x: between(x, self, left.backward, right.backward, rank),
            inner.note,
        )
