"""The Hessian of rescaled regression, ``A^T (B + W^2) A``, part by part: sizes, convexity, sampling.

``B = diag(v^2 + u o (c - <c, b>)) - (v o b) v^T - v (v o b)^T + |b|^2 v v^T`` is never formed: norms of its
parts come from their factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnfit.theory.bound import Bound, Condition, Sharp
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.state import State
from attnfit.theory.logs import Array, largest, log, log_max, log_norm, total
from attnfit.theory.spectra import extreme_eigenvalues, factored_eigenvalues, factored_norm

MODELS = ("rescaled",)


@dataclass(frozen=True)
class Middle:
    """The matrix B of each group over ``exp(2 scale)``: ``diag(t) + U C U^T`` with ``U = [v, v o b]``."""

    state: State

    @cached_property
    def t(self) -> Array:
        """The diagonal, shape (groups, n)."""
        s = self.state
        return np.asarray(s.v**2 + s.u * (s.c - np.sum(s.c * s.b, axis=1, keepdims=True)))

    @cached_property
    def U(self) -> Array:
        """Shape (groups, n, 2)."""
        return np.stack([self.state.v, self.state.v * self.state.b], axis=-1)

    @cached_property
    def C(self) -> Array:
        """Shape (groups, 2, 2)."""
        bb = np.sum(self.state.b**2, axis=1)
        ones = np.ones_like(bb)
        return np.stack([np.stack([bb, -ones], -1), np.stack([-ones, 0 * ones], -1)], axis=-2)

    @cached_property
    def extremes(self) -> tuple[Array, Array]:
        """Smallest and largest eigenvalue of each group, shape (groups,)."""
        mask = np.ones(self.t.shape, dtype=bool) if self.state.mask is None else self.state.mask
        ends = [
            extreme_eigenvalues(t[kept], U[kept], C)
            for t, U, C, kept in zip(self.t, self.U, self.C, mask, strict=True)
        ]
        return np.array([low for low, _ in ends]), np.array([high for _, high in ends])

    def between(self, rows: Array) -> Array:
        """Return ``rows^T B rows``, shape (groups, k, k)."""
        across = np.swapaxes(rows, 1, 2)
        ends = across @ self.U
        return np.asarray(across @ (self.t[..., None] * rows) + ends @ self.C @ np.swapaxes(ends, 1, 2))


def size(i: Regression) -> Array:
    """Return ``log R_0``, ``R_0 = max(|u|, |v|, |b|, |c|, 1)``, of each group."""
    s, scale = i.weights.start, i.weights.scale
    return largest(
        log_norm(s.u, scale), log_norm(s.v, scale), log_norm(s.c, scale), log(i.b_norms), np.zeros(i.n_groups)
    )


# ---- orders of matrices: X <= Y is written as largest eigenvalue of (X - Y) + |Y| <= |Y|


def _order(i: Regression, low_core: Array, high_core: Array) -> Array:
    """Return ``log`` of the left side of ``-Y <= X <= Y`` from the cores of ``-X - Y`` and ``X - Y`` over
    [v, v o b], in units of ``|b| |v|^2``.
    """
    U = Middle(i.weights.start).U
    top = np.maximum(*(factored_eigenvalues(U, core)[1] for core in (low_core, high_core)))
    return log(np.maximum(top, 0.0) + np.exp(_order_size(i) - 2 * i.weights.scale)) + 2 * i.weights.scale


def _order_size(i: Regression) -> Array:
    return np.asarray(log(i.b_norms) + 2 * log_norm(i.weights.start.v, i.weights.scale))


def _cores(i: Regression, symmetric_part: float) -> tuple[Array, Array]:
    """Return the cores of ``-X - Y`` and ``X - Y``, ``X`` the symmetric part of ``-v (v o b)^T``, ``Y = |b|
    v v^T``.
    """
    core = np.zeros((2, i.n_groups, 2, 2))
    core[:, :, 0, 0] = -i.b_norms
    for sign, one in zip((1.0, -1.0), core, strict=True):
        one[:, 0, 1] = one[:, 1, 0] = sign * symmetric_part
    return core[0], core[1]


def _corrected_order(i: Regression) -> Array:
    """Return the left side of ``+-(B_1 + B_2) <= v v^T + (v o b)(v o b)^T``."""
    core = np.tile(-np.eye(2), (2, i.n_groups, 1, 1))
    for sign, one in zip((1.0, -1.0), core, strict=True):
        one[:, 0, 1] = one[:, 1, 0] = sign
    U = Middle(i.weights.start).U
    top = np.maximum(*(factored_eigenvalues(U, one)[1] for one in core))
    size = factored_norm(U, U)
    return log(np.maximum(top, 0.0) + size) + 2 * i.weights.scale


def _order_counterexample() -> Regression:
    """Return a target that is not parallel to one."""
    return Regression(np.eye(2), [1.0, -1.0], [0.0, 0.0], [0.0, 0.0])


def _middle_sizes() -> list[Bound[Regression]]:
    def start(i: Regression) -> State:
        return i.weights.start

    def twice(i: Regression) -> Array:
        return 2 * i.weights.scale

    orders = [
        Bound(
            f"RH-8.3.{k}", f"the rank-one part B_rank{k} of B, {what}",
            f"-|b| v v^T <= B_rank{k} <= |b| v v^T", Regression,
            lambda i: _order(i, *_cores(i, 0.5)), lambda i, R: _order_size(i), status="fails",
            worst="unbounded",
            sharp=Sharp(
                "+-(B_rank1 + B_rank2) <= v v^T + (v o b)(v o b)^T",
                lambda i, R: log(factored_norm(Middle(start(i)).U, Middle(start(i)).U)) + twice(i),
                _corrected_order,
            ),
            remark="not symmetric; its symmetric part has directions outside v. X <= Y is tested as "
            "lambda_max(X - Y) + |Y| <= |Y|",
            counterexample=_order_counterexample, models=MODELS,
        )
        for k, what in ((1, "-v (v o b)^T"), (2, "-(v o b) v^T"))
    ]  # fmt: skip
    return [
        *orders,
        Bound(
            "RH-8.3.3", "the rank-one part B_rank3 of B", "B_rank3 = |b|^2 v v^T", Regression,
            lambda i: log(
                factored_norm(i.b_norms[:, None, None] * start(i).v[..., None],
                              i.b_norms[:, None, None] * start(i).v[..., None])
            ) + twice(i),
            lambda i, R: 2 * log(i.b_norms) + 2 * log_norm(start(i).v, i.weights.scale),
            worst="1.00, a definition", models=MODELS,
        ),
        Bound(
            "RH-8.3.4", "the diagonal part B_diag1 = diag(v^2 + c o u) of B",
            "|B_diag1| <= 1 + (|u|_inf + |c|_inf) |u|_inf", Regression,
            lambda i: log_max(start(i).v ** 2 + start(i).c * start(i).u, twice(i)),
            lambda i, R: total(
                np.zeros(i.n_groups),
                total(log_max(start(i).u), log_max(start(i).c)) + log_max(start(i).u) + twice(i),
            ),
            worst="1.00", models=MODELS,
        ),
        Bound(
            "RH-8.3.5", "the diagonal part B_diag2 = <c, b> diag(u) of B",
            "|<c, b>| |u|_inf <= |b| |c| |u|_inf", Regression,
            lambda i: log(np.abs(np.sum(start(i).c * i.b, axis=1))) + log_max(start(i).u, twice(i)),
            lambda i, R: log(i.b_norms) + log_norm(start(i).c) + log_max(start(i).u, twice(i)),
            worst="1.00", models=MODELS,
        ),
        Bound(
            "RH-8.3.6", "B, with R_0 = max(|u|, |v|, |b|, |c|, 1)", "|B| <= 10 R_0^4", Regression,
            lambda i: log(np.max(np.abs(Middle(start(i)).extremes), axis=0)) + twice(i),
            lambda i, R: np.log(10.0) + 4 * size(i), worst="0.42",
            sharp=Sharp("|B| <= 6 R_0^4", lambda i, R: np.log(6.0) + 4 * size(i)), models=MODELS,
        ),
    ]  # fmt: skip


# ---- convexity from the papers' regulariser


def _full_rank(i: Regression, R: float) -> str | None:
    smallest = i.smallest_singular_values
    bad = int(np.argmin(smallest / i.block_norms.clip(np.finfo(float).tiny)))
    if smallest[bad] > 1e-12 * i.block_norms[bad]:
        return None
    return f"the smallest singular value of A in group {bad} is {smallest[bad]:.3g}: no w makes it convex"


FULL_RANK = Condition[Regression]("A has full column rank", _full_rank)


def _penalty(i: Regression, c: float) -> Array:
    """Return ``log w^2 = log(c R_0^4 + l / sigma_min^2)``."""
    return total(np.log(c) + 4 * size(i), np.log(i.l) - 2 * log(i.smallest_singular_values))


def _log_convexity(i: Regression) -> Array:
    """Return the logarithm of the smallest eigenvalue of ``A^T (B + w^2) A``, ``w^2 = 10 R_0^4 + l /
    sigma_min^2``.

    As one over the largest eigenvalue of the inverse, which does not lose digits where A is ill-conditioned.
    """
    out = np.full(i.n_groups, np.nan)
    full = i.smallest_singular_values > 0.0
    if not full.any():
        return out
    log_w = _penalty(i, 10.0)
    left, values, _ = np.linalg.svd(i.A, full_matrices=False)
    relative = np.exp(2 * i.weights.scale - log_w)[:, None, None]
    K = np.eye(left.shape[2]) + relative * Middle(i.weights.start).between(left)
    whitened = np.linalg.inv(K[full]) / (values[full, :, None] * values[full, None, :])
    out[full] = log_w[full] - log(np.linalg.norm(whitened, 2, axis=(1, 2)))
    return out


def _sandwich(i: Regression) -> Array:
    """Return the larger of the two ratios in ``0.9 (B + W^2) <= W^2 <= 1.1 (B + W^2)``."""
    log_w = _penalty(i, 200.0)
    low, high = (ends * np.exp(2 * i.weights.scale - log_w) for ends in Middle(i.weights.start).extremes)
    return log(np.maximum(0.9 * (1.0 + high), 1.0 / (1.1 * (1.0 + low).clip(0.0))))


def _sampling_error(i: Regression) -> float:
    return sampling_error(i.A.reshape(-1, i.A.shape[2]) * np.sqrt(i.weights.start.f.reshape(-1, 1)))


def sampling_error(rows: Array) -> float:
    """Return the logarithm of the relative spectral error of one draw of rows ``D^(1/2) A`` by leverage."""
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    left = left[:, values > 1e-12 * values.max(initial=0.0)]
    if not left.size:
        return -np.inf
    scores = np.sum(left**2, axis=1)
    count = sampled_rows(left.shape[1])
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(count, scores / scores.sum()) / count
    sampled = left.T @ (
        np.where(drawn > 0, drawn * scores.sum() / np.where(scores > 0, scores, 1.0), 0.0)[:, None] * left
    )
    return float(log(np.linalg.norm(sampled - np.eye(left.shape[1]), 2)))


def sampled_rows(d: int, eps: float = 0.3, delta: float = 0.05) -> int:
    """Return ``m = 3 d ln(2 d / delta) / eps^2``."""
    return int(np.ceil(3 * d * np.log(2 * d / delta) / eps**2))


# eps0 and delta at which Lemma 5.3, and its like for two layers, are tested.
SAMPLED = (
    "relative spectral error of A^T D A from m = 3 d ln(2 d/delta)/eps^2 rows drawn by leverage; eps = 0.3, "
    "delta = 0.05, D = diag(softmax), one draw from a fixed seed"
)
SAMPLING = "|D~ - D| <= eps D over range(A)"
DRAWS = "no failure in 60 draws"
EXPLICIT = "holds with probability 1 - delta; O(eps^-2 d log(n/delta)) rows are made explicit"


def _convexity() -> list[Bound[Regression]]:
    return [
        Bound(
            "RH-8.4.1", "convexity of the regularised problem, w^2 = 10 R_0^4 + l/sigma_min(A)^2",
            "l <= lambda_min(A^T (B + W^2) A)", Regression,
            lambda i: np.full(i.n_groups, np.log(i.l)), lambda i, R: _log_convexity(i), (FULL_RANK,),
            worst="1.00", models=MODELS,
        ),
        Bound(
            "RH-8.4.2", "spectral sandwich of W^2, w^2 = 200 R_0^4 + l/sigma_min(A)^2",
            "0.9 (B + W^2) <= W^2 <= 1.1 (B + W^2)", Regression, _sandwich, lambda i, R: 0.0, (FULL_RANK,),
            worst="0.91", remark="the left side is the larger of the two ratios", models=MODELS,
        ),
        Bound(
            "RH-5.3", SAMPLED, SAMPLING, Regression, _sampling_error, lambda i, R: np.log(0.3), worst=DRAWS,
            remark=EXPLICIT, models=("exponential", "softmax", "rescaled"),
        ),
    ]  # fmt: skip


BOUNDS: list[Bound[Regression]] = [*_middle_sizes(), *_convexity()]
