"""One gradient step, one step on the data, and the linear attention layers that equal a gradient step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.incontext.shifts import Shift, data_shift, shift
from attnfit.problems import Softmax

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OneStep:
    """A gradient step on the unknowns beside one on the data.

    Attributes
    ----------
    x_new : ndarray, shape (d,)
        ``x - step_size gradient``.
    A_new : ndarray, shape (n, d)
        ``A - data_step dL/dA``.
    weight, data : Shift
        What either does to the target.
    cosine : float
        Between the two shifts; NaN where one is zero.
    scale : float
        k with the least ``|weight.delta - k data.delta|``.
    relative_error : float
        ``|weight.delta - scale data.delta| / |weight.delta|``: ``sqrt(1 - cosine^2)``.
    losses : tuple of float
        Before, after the step on the unknowns, after the step on the data.
    """

    x_new: Array
    A_new: Array
    weight: Shift
    data: Shift
    cosine: float
    scale: float
    relative_error: float
    losses: tuple[float, float, float]


def one_step(A: Any, b: Any, x: Any, step_size: float, data_step: float | None = None) -> OneStep:
    """Take one gradient step of ``0.5 |softmax(A x) - b|^2`` on x, and one on A.

    With ``s = f o (f - b - <f, f - b>)`` the steps move the logits by ``-step_size A A^T s`` and by
    ``-data_step |x|^2 s``. They are parallel if and only if ``A A^T s`` is parallel to s.

    Parameters
    ----------
    A : array_like, shape (n, d)
    b : array_like, shape (n,)
    x : array_like, shape (d,)
    step_size : float
    data_step : float, optional
        Default ``step_size trace(A A^T) / (n |x|^2)``: equal to the step on x where ``A A^T`` is a multiple
        of the identity.

    Returns
    -------
    OneStep

    Raises
    ------
    ValueError
        If the arrays do not fit a softmax regression, or x is zero and no data_step is given.

    Notes
    -----
    "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression", Section 5.1, prints
    ``x + step_size gradient``, which ascends.
    """
    problem = Softmax(A, b)
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    x = as_point(x, problem.shape)
    if data_step is None:
        square = float(x @ x)
        if square == 0.0:
            raise ValueError("x is zero: a step on the data then moves no logit; pass another x or data_step")
        data_step = step_size * float(np.sum(A * A)) / (len(A) * square)
    slope, _ = problem.data_gradient(x)
    x_new = x - step_size * (A.T @ slope)
    A_new = A - data_step * np.outer(slope, x)
    weight, data = shift(problem, x, x_new), data_shift(problem, x, A, A_new)
    cosine, scale, error = compare(weight.delta, data.delta)
    losses = problem.value(x), problem.value(x_new), Softmax(A_new, b).value(x)
    return OneStep(x_new, A_new, weight, data, cosine, scale, error, losses)


def compare(reference: Array, other: Array) -> tuple[float, float, float]:
    """Return the cosine of two shifts, the best factor of the other, and the relative error with it."""
    sizes = float(np.linalg.norm(reference)), float(np.linalg.norm(other))
    if min(sizes) == 0.0:
        return np.nan, 0.0, 1.0 if sizes[0] > 0.0 else np.nan
    cosine = float(np.sum(reference / sizes[0] * (other / sizes[1])))
    scale = cosine * sizes[0] / sizes[1]
    return cosine, scale, float(np.linalg.norm(reference - scale * other) / sizes[0])


@dataclass(frozen=True)
class LinearLayer:
    """A linear self-attention layer and the tokens it is made for.

    ``apply`` maps tokens, rows of E, to ``E + ((E W_Q^T)(E W_K^T)^T)(E W_V^T) P^T``, keys and values being
    those of the context alone.

    Attributes
    ----------
    tokens : ndarray, shape (N, width)
    W_K, W_Q, W_V, P : ndarray, shape (width, width)
    """

    tokens: Array
    W_K: Array
    W_Q: Array
    W_V: Array
    P: Array

    def apply(self, queries: Array | None = None) -> Array:
        """Return the context tokens after the layer, or other tokens that attend to the context."""
        E = self.tokens if queries is None else queries
        attention = (E @ self.W_Q.T) @ (self.tokens @ self.W_K.T).T
        return np.asarray(E + attention @ (self.tokens @ self.W_V.T) @ self.P.T)


def linear_regression_layer(X: Any, Y: Any, W0: Any, step_size: float) -> LinearLayer:
    """Return the linear attention layer that equals a gradient step of linear regression.

    On ``(1 / 2N) sum |W x_i - y_i|^2`` from W0 the step is
    ``dW = -(step_size / N) sum (W0 x_i - y_i) x_i^T``. The layer moves the target of every context token by
    ``-dW x_j``, and a query token ``(x, -W0 x)`` to ``(x, -(W0 + dW) x)``.

    Parameters
    ----------
    X : array_like, shape (N, dx)
    Y : array_like, shape (N, dy)
    W0 : array_like, shape (dy, dx)
    step_size : float

    Returns
    -------
    LinearLayer
        Tokens ``(x_j, y_j)``.

    Raises
    ------
    ValueError
        If shapes do not fit.

    Notes
    -----
    von Oswald et al., "Transformers learn in-context by gradient descent" (2022), Proposition 1.
    """
    X, Y, W0 = (np.atleast_2d(np.asarray(one, dtype=np.float64)) for one in (X, Y, W0))
    (N, dx), dy = X.shape, Y.shape[1]
    if Y.shape != (N, dy) or W0.shape != (dy, dx):
        raise ValueError(
            f"X {X.shape}, Y {Y.shape} and W0 {W0.shape} do not fit; expected (N, dx), (N, dy) and (dy, dx)"
        )
    width = dx + dy
    W_K = np.zeros((width, width))
    W_K[:dx, :dx] = np.eye(dx)
    W_V = np.zeros((width, width))
    W_V[dx:, :dx], W_V[dx:, dx:] = W0, -np.eye(dy)
    return LinearLayer(np.hstack([X, Y]), W_K, W_K, W_V, step_size / N * np.eye(width))


def softmax_regression_layer(A: Any, b: Any, x: Any, step_size: float) -> LinearLayer:
    """Return the linear attention layer that equals a gradient step of softmax regression.

    Tokens ``(a_j, z_j, s_j)`` with logits ``z = A x`` and ``s = f o (f - b - <f, f - b>)``; after the layer
    the logits are those of ``x - step_size A^T s``. That s is in the token takes a layer before it, with two
    sums over all tokens; with softmax weights in place of linear ones equality is lost.

    Parameters
    ----------
    A : array_like, shape (n, d)
    b : array_like, shape (n,)
    x : array_like, shape (d,)
    step_size : float

    Returns
    -------
    LinearLayer
    """
    problem = Softmax(A, b)
    A = np.asarray(A, dtype=np.float64)
    slope, _ = problem.data_gradient(x)
    d = A.shape[1]
    W_K = np.zeros((d + 2, d + 2))
    W_K[:d, :d] = np.eye(d)
    W_V = np.zeros((d + 2, d + 2))
    W_V[d, d + 1] = -step_size
    tokens = np.column_stack([A, A @ as_point(x, (d,)), slope])
    return LinearLayer(tokens, W_K, W_K, W_V, np.eye(d + 2))
