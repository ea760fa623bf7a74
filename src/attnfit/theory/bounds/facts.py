"""Elementary facts that the papers build on, each object the worst of its inequalities.

An order ``X <= Y`` of symmetric matrices is tested as ``lambda_max(X - Y) + |Y| <= |Y|``.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attnfit.theory.bound import Bound, Condition, Sharp, Size
from attnfit.theory.instances.facts import Facts
from attnfit.theory.logs import Array, log, log_max, log_norm, product
from attnfit.theory.spectra import factored_eigenvalues, factored_norm

A = Size[Facts]("|a|", lambda i: float(np.linalg.norm(i.a)))
B = Size[Facts]("|b|", lambda i: float(np.linalg.norm(i.b)))


def _order_violation(i: Facts, R: float) -> str | None:
    X, Y = i.symmetric
    top = float(np.linalg.eigvalsh(X - i.alpha * Y)[-1])
    if top <= 1e-9 * np.linalg.norm(X, 2):
        return None
    return f"the largest eigenvalue of X - alpha Y is {top:.6g}, not <= 0"


ORDERED = Condition[Facts]("X <= alpha Y", _order_violation)


def _norm_counterexample() -> Facts:
    """Return a negative matrix, which may be as large as it likes."""
    return Facts([0.0], [0.0], -10.0 * np.eye(2), np.eye(2), factor=1.0)


def _largest_eigenvalue(i: Facts) -> Array:
    return log(max(float(np.linalg.eigvalsh(i.symmetric[0])[-1]), 0.0))


def _norm_bound(id: str) -> Bound[Facts]:
    return Bound(
        id, "norm of a matrix below another", "X <= alpha Y implies |X| <= alpha |Y|", Facts,
        lambda i: log(np.linalg.norm(i.symmetric[0], 2)),
        lambda i, R: product(max(i.alpha, 0.0), np.linalg.norm(i.symmetric[1], 2)), (ORDERED,),
        status="fails", worst="10",
        sharp=Sharp(
            "lambda_max(X) <= alpha |Y|, which is |X| where X >= 0",
            lambda i, R: product(max(i.alpha, 0.0), np.linalg.norm(i.symmetric[1], 2)), _largest_eigenvalue,
        ),
        counterexample=_norm_counterexample,
    )  # fmt: skip


def _gap(factor: Array, core: Array, size: float) -> float:
    """Return ``log(lambda_max(factor core factor^T) + size)``, the left side of an order."""
    return float(log(max(float(factored_eigenvalues(factor, core)[1]), 0.0) + size))


def _two(i: Facts) -> tuple[Array, Array, Array]:
    """Return u = a, v o u and both as columns."""
    vu = i.b * i.a
    return i.a, vu, np.column_stack([i.a, vu])


MIXED = np.array([[0.0, 0.5], [0.5, 0.0]])


def _square_order(i: Facts) -> float:
    """``(v o u)(v o u)^T <= |v|_inf^2 u u^T``."""
    u, _, both = _two(i)
    top = float(np.abs(i.b).max()) ** 2
    return _gap(both, np.diag([-top, 1.0]), top * float(u @ u))


def _mixed_order(i: Facts) -> float:
    """``-|v|_inf u u^T <= (v o u) u^T <= |v|_inf u u^T``."""
    u, _, both = _two(i)
    top = float(np.abs(i.b).max())
    return max(_gap(both, np.array([[-top, s], [s, 0.0]]), top * float(u @ u)) for s in (0.5, -0.5))


def _orders() -> list[Bound[Facts]]:
    def top(i: Facts) -> float:
        return float(np.abs(i.b).max())

    def orders(i: Facts) -> Array:
        """Return the left sides of six orders that hold."""
        u, v = i.a, i.b
        uu, vv = float(u @ u), float(v @ v)
        pair = np.column_stack([u, v])
        size = float(factored_norm(pair, pair))
        sums = [_gap(pair, np.array([[-1.0, s], [s, -1.0]]), size) for s in (1.0, -1.0)]
        largest = float(np.abs(u).max())
        return np.array(
            [log(uu), log(max(float(u.max()), 0.0)), log(largest**2), *sums, log(largest * np.sqrt(vv))]
        )

    def sizes(i: Facts) -> Array:
        u, v = i.a, i.b
        pair = np.column_stack([u, v])
        size = float(log(factored_norm(pair, pair)))
        uu, vv = float(u @ u), float(v @ v)
        return np.array([log(uu), 0.5 * log(uu), log(uu), size, size, 0.5 * (log(uu) + log(vv))])

    return [
        Bound(
            "RH-F4.3.1-6", "orders of diagonal and rank-one matrices",
            "u u^T <= |u|^2 I, diag(u) <= |u| I, diag(u o u) <= |u|^2 I, +-(u v^T + v u^T) <= u u^T + v v^T, "
            "|diag(u) v| <= |u| |v|",
            Facts, orders, lambda i, R: sizes(i), worst="1.00",
        ),
        Bound(
            "RH-F4.3.7", "order of a scaled rank-one matrix, u = a and v = b",
            "(v o u)(v o u)^T <= |v|_inf^2 u u^T", Facts, _square_order,
            lambda i, R: product(top(i) ** 2, i.a @ i.a), status="fails", worst="unbounded",
            sharp=Sharp(
                "(v o u)(v o u)^T <= |v o u|^2 I", lambda i, R: product((i.a * i.b) @ (i.a * i.b)),
                lambda i: 2 * log_norm(i.a * i.b),
            ),
            counterexample=lambda: Facts([1.0, 1.0], [1.0, -1.0], [[1.0]], [[1.0]]),
        ),
        Bound(
            "RH-F4.3.8-9", "order of a mixed product, u = a and v = b",
            "-|v|_inf u u^T <= (v o u) u^T <= |v|_inf u u^T", Facts, _mixed_order,
            lambda i, R: product(top(i), i.a @ i.a), status="fails", worst="unbounded",
            sharp=Sharp(
                "|sym((v o u) u^T)| <= |v|_inf |u|^2", lambda i, R: product(top(i), i.a @ i.a),
                lambda i: log(np.abs(factored_eigenvalues(_two(i)[2], MIXED)).max()),
            ),
            remark="not symmetric; the last line also lacks its minus",
            counterexample=lambda: Facts([1.0, 1.0], [1.0, -1.0], [[1.0]], [[1.0]]),
        ),
    ]  # fmt: skip


def _norms(i: Facts) -> tuple[Array, Array]:
    """Return both sides of inequalities of vector and matrix norms."""
    a, b = i.a, i.b
    n, (X, Y) = len(a), i.symmetric
    na, nb, ia = np.linalg.norm(a), np.linalg.norm(b), np.abs(a).max()
    NX, NY = np.linalg.norm(X, 2), np.linalg.norm(Y, 2)
    pairs = [
        (ia, na), (na, np.sqrt(n) * ia), (np.linalg.norm(a * b), ia * nb), (np.linalg.norm(a + b), na + nb),
        (abs(a @ b), na * nb), (NX, np.linalg.norm(X)), (np.linalg.norm(X + Y, 2), NX + NY),
        (np.linalg.norm(X @ Y, 2), NX * NY),
    ]  # fmt: skip
    left, right = np.array(pairs).T
    return log(left), log(right)


def _hyperbolic(i: Facts) -> tuple[Array, Array]:
    """Return both sides of inequalities between exp, cosh and sinh of a vector and of its norm, as
    logarithms.
    """
    top, norm = float(np.abs(i.a).max()), float(np.linalg.norm(i.a))
    signed = float(i.a.max())

    def cosh(t: float) -> float:
        return float(np.logaddexp(t, -t) - np.log(2.0))

    def sinh(t: float) -> float:
        return float(t + log(-np.expm1(-2 * t)) - np.log(2.0))

    pairs = [
        (signed, norm), (cosh(top), cosh(norm)), (cosh(norm), norm), (sinh(top), sinh(norm)),
        (sinh(norm), cosh(norm)),
    ]  # fmt: skip
    left, right = np.array(pairs).T
    return left, right


def _series(i: Facts) -> tuple[Array, Array]:
    """Return both sides of the bounds of the first terms of the series."""
    t = np.clip(i.a, -0.1, 0.1)
    left = [np.expm1(t) - t, 2 * np.sinh(t / 2) ** 2, np.sinh(t) - t]
    return np.array([log_max(values) for values in left]), np.full(3, 2 * float(log_max(t)))


def _exponential(i: Facts) -> Array:
    """Return ``log |e^a - e^b|``, whatever the size of a and b."""
    top = np.maximum(i.a, i.b)
    scale = float(top.max())
    gap = np.abs(i.a - i.b)
    return log_norm(np.exp(top - scale) * -np.expm1(-gap), scale)


def _product_rule(i: Facts) -> tuple[float, float, float]:
    """Return the change of ``prod a_k`` to ``prod b_k`` (first eight), the printed and the sharper bound, as
    logarithms. M_k is the larger magnitude, at least one.
    """
    a, b = i.a[:8], i.b[:8]
    M = np.maximum(np.maximum(np.abs(a), np.abs(b)), 1.0)
    L = np.abs(a - b)
    whole = float(product(*M))
    printed = float(product(2.0 ** (len(a) - 1), L.max(), exponent=whole))
    return float(log(abs(np.prod(a) - np.prod(b)))), printed, whole + float(log(np.sum(L / M)))


def _blocks_counterexample() -> Facts:
    """Every block the identity."""
    return Facts([0.0], [0.0], np.ones((50, 50)), np.eye(50))


# Any vectors and matrices will do: an audit of a paper's problem takes logits and Gram matrices. A step of a
# proof is about blocks of a Hessian of its own.
MODELS: dict[str, tuple[str, ...]] = {
    "WS": ("softmax",), "RH": ("exponential", "rescaled"), "TT": ("softmax", "rescaled", "exponential"),
    "TL": ("two_layer",), "UT": ("layer",),
}  # fmt: skip
STEP = "UT-H.1.step"
_FACTS: list[Bound[Facts]] = [
    _norm_bound("TT-F4.4"),
    _norm_bound("WS-F3.2"),
    *_orders(),
    Bound(
        "RH-F4.5", "norms of vectors and matrices",
        "|a|_inf <= |a| <= sqrt(n) |a|_inf, |a o b| <= |a|_inf |b|, |a + b| <= |a| + |b|, <a, b> <= |a| |b|, "
        "|X| <= |X|_F, |X + Y| <= |X| + |Y|, |X Y| <= |X| |Y|",
        Facts, lambda i: _norms(i)[0], lambda i, R: _norms(i)[1], worst="1.00",
    ),
    Bound(
        "RH-F4.7", "exp, cosh and sinh of a vector against those of its norm",
        "|exp a|_inf <= e^{|a|}, |cosh a|_inf <= cosh |a| <= e^{|a|}, |sinh a|_inf <= sinh |a| <= cosh |a|",
        Facts, lambda i: _hyperbolic(i)[0], lambda i, R: _hyperbolic(i)[1], worst="1.00",
    ),
    Bound(
        "RH-F4.8.series", "first terms of the series, entries cut to |a| <= 0.1",
        "|exp a - 1 - a|_inf, |cosh a - 1|_inf, |sinh a - a|_inf <= |a|_inf^2", Facts,
        lambda i: _series(i)[0], lambda i, R: _series(i)[1], worst="0.52",
    ),
    Bound(
        "TL-A.3", "exp is Lipschitz on a ball", "|e^a - e^b| <= e^R |a - b|", Facts, _exponential,
        lambda i, R: product(np.linalg.norm(i.a - i.b), exponent=R), (A, B), worst="0.98",
    ),
    Bound(
        "TL-A.4-5", "norms of vectors and matrices",
        "|a|_inf <= |a| <= sqrt(n) |a|_inf, |a o b| <= |a|_inf |b|, |X Y| <= |X| |Y| and the like", Facts,
        lambda i: _norms(i)[0], lambda i, R: _norms(i)[1], worst="1.00",
    ),
    Bound(
        "UT-G.2",
        "Lipschitz constant of a product of k functions of values a_i and b_i, at most M_i, M_i >= 1",
        "|prod a - prod b| <= 2^{k-1} max L_i prod M_i", Facts, lambda i: _product_rule(i)[0],
        lambda i, R: _product_rule(i)[1], worst="0.72",
        sharp=Sharp("sum_i L_i prod_{j != i} M_j", lambda i, R: _product_rule(i)[2]),
    ),
    Bound(
        STEP, "a step of the proof of Lemma H.1: a matrix of n x n blocks, here numbers",
        "p^T H p <= max |H_ij| p^T p", Facts, lambda i: log(np.linalg.norm(i.symmetric[0], 2)),
        lambda i, R: log(np.abs(i.symmetric[0]).max()), status="fails", worst="n",
        sharp=Sharp("|H| <= n max |H_ij|", lambda i, R: product(len(i.X), np.abs(i.symmetric[0]).max())),
        counterexample=_blocks_counterexample,
    ),
]  # fmt: skip

BOUNDS: list[Bound[Facts]] = [
    replace(bound, models=() if bound.id == STEP else MODELS[bound.id.split("-")[0]]) for bound in _FACTS
]
