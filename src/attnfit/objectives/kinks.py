"""Outputs on the kink of an activation: where a fit ends there, whether it is a minimum; outputs that are
dead.

With ``y = A2 f`` and ``c = h(y) - b`` the objective has at ``y_k = 0`` the one-sided slopes ``-a b_k`` and
``-b_k`` in y_k, a and 1 those of h: a kink is convex where ``b_k < 0``, and no minimiser lies on it where
``b_k > 0``. The generalised gradients (Clarke, "Optimization and Nonsmooth Analysis" (1983), Chapter 2) are
``A1^T J A2^T (s w c)`` with ``s_k`` anywhere between a and 1 on the kinks. A point where zero is one of them
is found as a minimiser of the smooth part subject to ``y_k = 0``: the multipliers are ``s_k w_k c_k``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.objectives.layer_curvature import Layers, column_hessians, outer_rows

if TYPE_CHECKING:
    from attnfit.objectives.layered import LayeredProblem

Array = NDArray[np.float64]
Index = NDArray[np.intp]

# Outputs below this share of the largest entry of their row are on a kink, if a point near has them there.
NEAR = 1e-3
# Below this share they are there up to rounding.
ON = 1e-9
MAX_STEPS = 30
# Multipliers outside their interval by this share of it, and curvature below this share of the largest, count
# as rounding.
ROUNDING = 1e-9


class Kink(NamedTuple):
    """An output on a kink: its number, its right-hand side, ``A2 f`` there, and the side: "left", "right" or
    "on" where it is no more than rounding.
    """

    output: int
    column: int
    y: float
    side: str


@dataclass(frozen=True)
class Settled:
    """What kinks and dead outputs say of the end of a fit.

    Attributes
    ----------
    x : ndarray, shape (d, k)
        The end, moved onto its kinks where it is a minimum there.
    minima : dict of float
        By right-hand side at a minimum on a kink, the move of a logit that the last step there made.
    dead : list of int
        Right-hand sides whose outputs are all dead although some target asks for more: the gradient of the
        data term is zero for all x near.
    """

    x: Array
    minima: dict[int, float]
    dead: list[int]


def kinks_at(problem: LayeredProblem, X: Array) -> list[Kink]:
    """Return the outputs that X, shape (d, k), puts on a kink."""
    if problem.activation.kink is None:
        return []
    out = []
    for j in range(problem.n_columns):
        one = problem.columns(np.array([j]))
        y = _outputs(one, one.layers_at(X[:, [j]]))
        sizes = ON * _sizes(one)
        for k in np.flatnonzero((np.abs(y) <= 1e3 * sizes) & _counts(one)):
            side = "on" if abs(y[k]) <= sizes[k] else "left" if y[k] < 0.0 else "right"
            out.append(Kink(int(k), j, float(y[k]), side))
    return out


def settle(problem: LayeredProblem, X: Array, tol: float) -> Settled | None:
    """Look at the end of a fit, shape (d, k): None where no output is dead or on a kink."""
    if problem.activation.kink is None:
        return None
    X, minima, dead = X.copy(), {}, []
    for j in range(problem.n_columns):
        one = problem.columns(np.array([j]))
        layers = one.layers_at(X[:, [j]])
        y, counts = _outputs(one, layers), _counts(one)
        if problem.activation.kink[0] == 0.0 and (y[counts] < 0.0).all():
            if (one.b[counts, 0] > 0.0).any():
                dead.append(j)
            continue
        near = np.flatnonzero((np.abs(y) <= NEAR * _sizes(one)) & counts & (one.b[:, 0] < 0.0))
        found = _minimum(one, X[:, j], near, tol) if len(near) else None
        if found is not None:
            X[:, j], minima[j] = found
    return Settled(X, minima, dead) if minima or dead else None


def _minimum(one: LayeredProblem, x: Array, kinks: Index, tol: float) -> tuple[Array, float] | None:
    """Return the minimum with these outputs on their kinks, near x, and the last move; None without one.

    Newton's method on the stationarity of the smooth part plus ``sigma^T y``, and ``y = 0``.
    """
    start, value = x, one.evaluate(x).value
    assert one.activation.kink is not None
    w = np.ones(len(one.b)) if one.weights is None else one.weights[:, 0]
    ends = np.sort(np.outer(-(w * one.b[:, 0])[kinks], one.activation.kink), axis=1)
    sigma: Array | None = None
    for _ in range(MAX_STEPS):
        layers = one.layers_at(x[:, None])
        Y = outer_rows(one, layers, 0)[kinks]
        if sigma is None:
            bare = one._gradient(x[:, None], _with_slopes(one, layers, kinks, np.zeros(len(kinks))))[:, 0]
            sigma = linalg.lstsq(Y.T, -bare)[0]
        held = _with_slopes(one, layers, kinks, sigma)
        gradient = one._gradient(x[:, None], held)[:, 0]
        H = column_hessians(one, held, "full")[0]
        zero = np.zeros((len(kinks), len(kinks)))
        step = linalg.lstsq(
            np.block([[H, Y.T], [Y, zero]]), -np.append(gradient, _outputs(one, layers)[kinks]), cond=1e-13
        )[0]
        p = step[: len(x)]
        x, sigma = x + p, np.clip(sigma + step[len(x) :], 2.0 * ends[:, 0] - ends[:, 1], 2.0 * ends[:, 1])
        if not np.isfinite(x).all():
            return None
        move = float(one.column_moves(x[:, None], p[:, None])[0])
        if move <= tol:
            break
    else:
        return None
    slack = ROUNDING * np.abs(ends).max(axis=1)
    inside = (sigma >= ends[:, 0] - slack) & (sigma <= ends[:, 1] + slack)
    along = linalg.null_space(Y)
    values = linalg.eigvalsh(along.T @ H @ along) if along.shape[1] else np.zeros(1)
    convex = values[0] >= -ROUNDING * max(float(np.abs(values).max()), np.finfo(float).tiny)
    lower = one.evaluate(x).value <= value * (1.0 + 1e-9)
    # Far from where the fit ended it is another point.
    close = float(one.column_moves(start[:, None], (x - start)[:, None])[0]) <= 1.0
    return (x, move) if inside.all() and convex and lower and close else None


def _with_slopes(one: LayeredProblem, layers: Layers, kinks: Index, sigma: Array) -> Layers:
    """Return the layers with given slopes, and no curvature of h, at the outputs on kinks."""
    slope, curvature = layers.slope.copy(), np.array(layers.curvature, dtype=np.float64)
    slope[kinks, 0], curvature[kinks, 0] = sigma, 0.0
    q = one._back(slope)
    a = layers.f * (q - np.sum(layers.f * q, axis=0))
    return replace(layers, slope=slope, curvature=curvature, q=q, a=a)


def _outputs(one: LayeredProblem, layers: Layers) -> Array:
    return one._out(layers.f)[:, 0]


def _sizes(one: LayeredProblem) -> Array:
    """Return the largest entry of each row of the last matrix."""
    if one.outer is None:
        return np.ones(len(one.b))
    largest: Any = abs(one.outer).max(axis=1)
    return np.asarray(
        largest.toarray() if hasattr(largest, "toarray") else largest, dtype=np.float64
    ).reshape(-1)


def _counts(one: LayeredProblem) -> NDArray[np.bool_]:
    return np.ones(len(one.b), dtype=bool) if one.weights is None else one.weights[:, 0] > 0.0
