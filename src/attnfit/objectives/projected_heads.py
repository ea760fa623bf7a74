"""Variable projection: outputs of heads as a function of the factors of queries and keys alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.gram import majorant
from attnfit.data.inputs import as_point
from attnfit.objectives.head_maps import MapsAt, moves_of
from attnfit.objectives.head_metric import AVERAGED, Metric
from attnfit.objectives.head_outputs import HeadOutputs
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.objective import Evaluation, Moved, Offer, Problem
from attnfit.objectives.projected import best_values, floored_ridge, solve_factored
from attnfit.segments import Array


class ProjectedHeads(Problem):
    """``phi(x) = min_Y L(x, Y)`` of a `HeadOutputs` problem, over the factors x of all groups of heads.

    Parameters
    ----------
    full : HeadOutputs
    heads : HeadAttention
        The heads of a group, perhaps in other variables.
    first_order : bool
        Replace maps by what they are to first order in the logits, which makes outputs bilinear in logits
        and Y: the minimum of that is a start.

    Notes
    -----
    The gradient of phi is that of L at ``Y(x) = (Z^T W Z + ridge)^-1 Z^T W B``; the Gauss-Newton product has
    Kaufman's Jacobian: see `attnfit.objectives.projected.ProjectedAttention`.
    """

    linear = False
    best_hessian = "matrix_free"
    offers = frozenset({Offer.PROJECTION, Offer.FACTORS})

    def __init__(self, full: HeadOutputs, heads: HeadAttention, *, first_order: bool = False) -> None:
        self.full, self.heads, self.first_order = full, heads, first_order
        # Each group has the ridge of its own variables.
        each = np.broadcast_to(heads.ridge, (heads.n_unknowns,)) if np.any(heads.ridge) else 0.0
        self.ridge: float | Array = np.tile(each, full.n_groups) if np.ndim(each) else 0.0
        self.value_ridge = floored_ridge(full.A3, full.weights, full.ridge)

    @property
    def shape(self) -> tuple[int, ...]:
        """(groups' unknowns,)."""
        return (self.full.n_groups * self.heads.n_unknowns,)

    @property
    def n_passes(self) -> float:
        """Reads of the maps since the problem was made."""
        return self.heads.n_passes / self.full.n_groups

    @property
    def first_factor(self) -> NDArray[np.bool_]:
        """Which unknowns are solved for again where the others stand still: W_Q and the coefficients."""
        return np.tile(self.heads.first_factor, self.full.n_groups)

    def to_first_order(self) -> ProjectedHeads:
        """Return the problem to first order in the logits."""
        return ProjectedHeads(self.full, self.heads, first_order=True)

    def initial_point(self, random_state: Any = None) -> Array:
        """Return random factors with logits of deviation one."""
        rng = np.random.default_rng(random_state)
        return np.concatenate([self.heads.initial_point(rng).reshape(-1) for _ in range(self.full.n_groups)])

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return random factors."""
        return {f"random {k + 1}": self.initial_point(rng) for k in range(self.heads.read.n_starts)}

    def best_values(self, x: Any) -> Array:
        """Return Y(x), shape (heads, v, m)."""
        return self._project(self._maps(as_point(x, self.shape)))[2]

    def _maps(self, x: Array) -> MapsAt:
        return MapsAt(self.full, x, self.heads, first_order=self.first_order)

    def _project(self, maps: MapsAt) -> tuple[Array, Array, Array]:
        """Return Z, the factor of its normal equations, and Y, shape (heads, v, m)."""
        full, Z = self.full, maps.stacked()
        factor, Y = best_values(Z, full.weights, full.B, full.ridge, self.value_ridge)
        return Z, factor, Y.reshape(full.n_heads, -1, full.B.shape[1])

    def squared_residual(self, x: Array) -> float:
        """Return the weighted squared residual at x."""
        Z, _, Y = self._project(self._maps(x))
        C = Z @ Y.reshape(-1, Y.shape[2]) - self.full.B
        return float(np.sum(self.full.weights[:, None] * C * C))

    def spread(self, x: Array) -> Array:
        """Return the standard deviation of the logits of each head less the mean of a query, (heads,)."""
        total = np.zeros(self.full.n_heads)
        for one in self._maps(x).maps():
            seen = one.P > 0.0 if one.at.mask is None else one.at.mask
            z = np.where(seen, one.at.z, 0.0)
            n = np.sum(seen, axis=1, keepdims=True)
            z = np.where(seen, z - np.sum(z, axis=1, keepdims=True) / n, 0.0)
            total[one.head] += float(np.sum(z * z / n))
        return np.asarray(np.sqrt(total / len(self.full.B)))

    def scaled(self, x: Array, sizes: Array) -> Array:
        """Return factors with W_Q and coefficients of each head times a number, shape (heads,)."""
        per, out = self.full.per_group, []
        for g, part in enumerate(x.reshape(self.full.n_groups, -1)):
            point, own = self.heads.parts(part), sizes[g * per : (g + 1) * per, None]
            changed = point._replace(W_Q=point.W_Q * own[:, :, None], c=point.c * own)
            if self.heads.n_gains:
                # A norm undoes what W_Q is multiplied by.
                changed = point._replace(gains_q=point.gains_q * float(own.mean()), c=point.c * own)
            out.append(self.heads.join(changed))
        return np.concatenate(out)

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
        """Return phi and its gradient at x."""
        full, maps = self.full, self._maps(x)
        Z, _, Y = self._project(maps)
        C = Z @ Y.reshape(-1, Y.shape[2]) - full.B
        G = full.weights[:, None] * C
        square = np.sum(G * C) + full.ridge * np.sum(Y * Y) + np.sum(self.ridge * x * x)
        gradient = maps.pulled(G, Y) + self.ridge * x
        start = self.evaluate(np.zeros_like(x)).gradient if at_zero and not self.heads.n_gains else None
        return Evaluation(x, 0.5 * float(square), gradient, gradient_at_zero=start)

    def value_at_zero(self) -> float:
        """Return the value where all logits are equal: what the fit explains is measured against it."""
        return self.evaluate(np.zeros(self.n_unknowns)).value

    def gauss_newton_operator(self, at: Evaluation, *, single: bool = False) -> Callable[[Array], Array]:
        """Return v -> J^T J v with Kaufman's Jacobian of the residual, always in double precision: the
        projection takes off nearly all of what the heads have in common.
        """
        full, maps = self.full, self._maps(at.x)
        Z, factor, Y = self._project(maps)
        w = full.weights[:, None]

        def product(v: Array) -> Array:
            change = maps.moved_outputs(v, Y)
            change -= Z @ solve_factored(factor, Z.T @ (w * change))
            return maps.pulled(w * change, Y) + self.ridge * v

        return product

    def hessian_operator(self, at: Evaluation, sample: Any = None) -> Callable[[Array], Array]:
        """Return v -> (H_XX - H_XY H_YY^-1 H_YX) v, exactly."""
        full, maps = self.full, self._maps(at.x)
        Z, factor, Y = self._project(maps)
        flat, w = Y.reshape(-1, Y.shape[2]), full.weights[:, None]
        G = w * (Z @ flat - full.B)

        def product(v: Array) -> Array:
            dZ = maps.moved(v)
            dY = -solve_factored(factor, dZ.T @ G + Z.T @ (w * (dZ @ flat)))
            dG = w * (dZ @ flat + Z @ dY)
            return maps.second(v, G, dG, Y, dY.reshape(Y.shape)) + self.ridge * v

        return product

    def hessian_at(self, at: Evaluation, sample: Any = None, *, absolute: bool = False) -> Array:
        """Return the Hessian column by column."""
        product = self.hessian_operator(at)
        H = np.column_stack([product(column) for column in np.eye(self.n_unknowns)])
        H = 0.5 * (H + H.T)
        return majorant(H) if absolute else H

    def diagonal_at(self, at: Evaluation) -> Array:
        """Return the mean curvature of the columns of the factors: `metric` without what couples them."""
        x = at.x[: self.n_unknowns]
        parts = self.metric(Evaluation(x, at.value, x)).parts
        return np.concatenate([part.diagonal() for part in parts])

    def moves(self, at: Evaluation, steps: Array) -> Moved:
        """Return by how much each step changes a fitted logit at most, to first order."""
        return moves_of(self.heads, self.full.n_groups, at.x, steps)

    def followed(self, x: Array, step: Array) -> Array:
        """Return the point that a step leads to."""
        return x + step

    def metric(self, at: Evaluation, *, fine: bool = False) -> Metrics:
        """Return the mean curvature of each factor while the other, and Y, stand still."""
        maps = self._maps(at.x)
        return Metrics(mean_curvatures(maps, self._project(maps)[2]))


class Metrics:
    """The mean curvature of the factors of several groups of heads.

    Parameters
    ----------
    parts : list of Metric
    """

    def __init__(self, parts: list[Metric]) -> None:
        self.parts = parts

    def damped(self, v: Array, of_first: float, of_second: float) -> Array:
        """Return v times the curvature, as `Metric.damped`."""
        return np.concatenate([m.damped(own, of_first, of_second) for m, own in self._each(v)])

    def solve(self, v: Array) -> Array:
        """Return v divided by the curvature: a preconditioner."""
        return np.concatenate([m.solve(own) for m, own in self._each(v)])

    def preconditioner(self, of_first: float, of_second: float) -> Callable[[Array], Array]:
        """Return `solve`: damping changes little of it."""
        return self.solve

    def _each(self, v: Array) -> Any:
        return zip(self.parts, v.reshape(len(self.parts), -1), strict=True)


def mean_curvatures(maps: MapsAt, Y: Array) -> list[Metric]:
    """Return for each group ``P_Q = mean_t R_t^-1 T_t^T T_t R_t``, its mirror P_K, and the curvature of each
    other unknown, with ``T_t = sum_s P_ts (W_s - mean) k_s^T`` and ``W = A3 Y_h``.

    Some of the queries and keys stand for all, as in `attnfit.objectives.head_metric.mean_curvature`.
    """
    heads, full = maps.heads, maps.full
    W, h, n_texts = maps.weighted(Y), heads.rank, len(full.texts)
    n_q, n_k = len(full.B), sum(len(i.A) for i in heads.right)
    keys = [np.unique(np.linspace(0, len(i.A) - 1, AVERAGED).astype(int)) for i in heads.right]
    groups = range(full.n_groups)
    by_q = np.zeros((full.n_groups, full.per_group, h, h))
    by_k, sums = np.zeros((full.n_groups, h, h)), [[np.zeros((len(k), h, h)) for k in keys] for _ in groups]
    gains = np.zeros((full.n_groups, 2, heads.n_gains))
    by_c = np.zeros((full.n_groups, full.per_group, heads.read.n_features))
    for one in maps.maps():
        g, at, w = one.group, one.at, W[one.text][one.head]
        head, n = one.head % full.per_group, len(full.texts[one.text].A1)
        s, queries = heads.place(at.chunk)
        mean, passed = one.D @ w, one.D * at.passed
        weights = full.weights[one.rows]
        # |W_s - mean_t|^2, a query a row.
        apart = np.sum(w * w, axis=1) - 2.0 * mean @ w.T + np.sum(mean * mean, axis=1, keepdims=True)
        chosen = np.unique(np.linspace(0, n - 1, AVERAGED).astype(int))
        own = chosen[(chosen >= queries.start) & (chosen < queries.stop)] - queries.start
        if len(own):
            T = (passed[own][:, None, :] * w.T) @ at.K - mean[own][:, :, None] * (passed[own] @ at.K)[:, None]
            squares = weights[own, None, None] * (np.swapaxes(T, 1, 2) @ T)
            found, curved = maps.vectors[g][0][s].metric(squares, own + queries.start)
            by_q[g, head] += found * (n * len(own) / len(chosen) / n_q)
            gains[g, 0] += curved * (len(own) / len(chosen)) if heads.n_gains else 0.0
        u = weights[:, None] * np.maximum(apart, 0.0)
        some = keys[one.text]
        cells = (u * passed**2)[:, some]
        sums[g][one.text] += np.stack([(at.Q.T * column) @ at.Q for column in cells.T])
        for p, F in enumerate(heads.read.features[s]):
            by_c[g, head, p] += float(np.sum(u * (one.D * F[queries]) ** 2))
    for g in groups:
        for text in range(n_texts):
            found, curved = maps.vectors[g][1][text].metric(sums[g][text], keys[text])
            by_k[g] += found * (len(heads.right[text].A) / n_k)
            gains[g, 1] += curved if heads.n_gains else 0.0
    rest = [np.concatenate([gains[g].reshape(-1), by_c[g].reshape(-1)]) for g in groups]
    return [Metric(heads, by_q[g], by_k[g], rest[g]) for g in groups]
