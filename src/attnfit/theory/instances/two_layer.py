"""A softmax followed by a layer: an activation of a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.losses.activations import Activation, as_activation
from attnfit.theory.instances.reading import as_array, as_number
from attnfit.theory.instances.state import Move, State, common_scale

Array = NDArray[np.float64]

# The paper wants 0 < beta < 0.1.
LARGEST_BETA = 0.0999


@dataclass(frozen=True, eq=False)
class TwoLayer:
    """Data of ``0.5 |h(A2 softmax(A1 x)) - b|^2`` and two points x and y.

    Parameters
    ----------
    A1 : array_like, shape (n, d)
    A2 : array_like, shape (m, n)
    b : array_like, shape (m,)
    x, y : array_like, shape (d,)
    activation : str, tuple of three callables or Activation
        h, as in `attnfit.problems.TwoLayer`.
    R, beta, R_h, L_h : float, optional
        The constants of the paper's assumptions: bounds of the data and the points, of the normaliser from
        below, of ``|h|`` and ``|h'|`` at both points, and of ``|h'|`` and ``|h''|`` everywhere. By default
        the tightest admissible; L_h is required for an activation whose bounds are not known.
    l : float
        The convexity that the paper's regulariser aims for.

    Raises
    ------
    ValueError
        On input that is not finite or of the wrong shape; the message names argument and index.
    """

    A1: Any
    A2: Any
    b: Any
    x: Any
    y: Any
    activation: Any = "tanh"
    R: float | None = None
    beta: float | None = None
    R_h: float | None = None
    L_h: float | None = None
    l: float = 1.0  # noqa: E741

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "A1", as_array(self.A1, "A1", (None, None)))
        n, d = self.A1.shape
        put(self, "A2", as_array(self.A2, "A2", (None, n)))
        put(self, "b", as_array(self.b, "b", (len(self.A2),)))
        put(self, "x", as_point(self.x, (d,), "x"))
        put(self, "y", as_point(self.y, (d,), "y"))
        put(self, "activation", as_activation(self.activation))
        for name in ("R", "beta", "R_h", "L_h", "l"):
            as_number(getattr(self, name), name)
        if self.L_h is None and not self.activation.bounds_known:
            raise ValueError(
                "L_h is missing: bounds of this activation's derivatives are not known; pass them"
            )

    @property
    def n(self) -> float:
        """Number of softmax outputs."""
        return float(len(self.A1))

    @cached_property
    def A1_norm(self) -> float:
        """``|A1|``."""
        return float(np.sqrt(max(np.linalg.eigvalsh(self.A1.T @ self.A1)[-1], 0.0)))

    @cached_property
    def A2_norm(self) -> float:
        """``|A2|``."""
        return float(np.linalg.norm(self.A2, 2))

    @cached_property
    def move(self) -> Move:
        """The move of the logits from x to y."""
        z, dz = (self.A1 @ self.x)[None], (self.A1 @ (self.y - self.x))[None]
        scale, none = common_scale("exp", None, z, z + dz), np.zeros_like(z)
        start, end = (State(logits, none, "exp", None, scale) for logits in (z, z + dz))
        return Move(start, end, dz, np.array([np.linalg.norm(self.y - self.x)]))

    @cached_property
    def start(self) -> Layers:
        """The layers at x."""
        return Layers(self, self.move.start.f[0], _spread(self.move.start))

    @cached_property
    def end(self) -> Layers:
        """The layers at y."""
        return Layers(self, self.move.end.f[0], _spread(self.move.end))

    @cached_property
    def size(self) -> float:
        """R_h: given, or the largest of ``|h|`` and ``|h'|`` at both points."""
        if self.R_h is not None:
            return self.R_h
        return max(float(np.linalg.norm(v)) for at in (self.start, self.end) for v in (at.h, at.dh))

    @property
    def slopes(self) -> tuple[float, float, float]:
        """Bounds of ``|h'|, |h''|, |h'''|`` everywhere; L_h for the first two of an unknown activation."""
        h: Activation = self.activation
        if h.bounds_known:
            return h.slope, h.curvature, h.jerk
        assert self.L_h is not None
        return self.L_h, self.L_h, np.inf

    @property
    def lipschitz(self) -> float:
        """L_h."""
        return max(self.slopes[:2]) if self.L_h is None else self.L_h

    @cached_property
    def log_beta(self) -> float:
        """``log beta``: given, or the smallest normaliser at both points, below 0.1."""
        if self.beta is not None:
            return float(np.log(self.beta))
        smallest = min(self.move.start.log_alpha[0], self.move.end.log_alpha[0])
        return float(min(smallest, np.log(LARGEST_BETA)))

    @cached_property
    def largest_residual(self) -> float:
        """A bound of ``|c|`` on the segment from x to y."""
        slope, size = self.slopes[0], self.activation.size
        c = min(float(np.linalg.norm(at.c)) for at in (self.start, self.end))
        near = c + 0.5 * slope * self.A2_norm * float(np.linalg.norm(self.move.dz))
        everywhere = float(np.linalg.norm(self.b)) + np.sqrt(len(self.b)) * size
        return float(np.fmin(near, everywhere))


def _spread(state: State) -> Array:
    """Return ``f - 1/n``, accurate where the logits are nearly equal."""
    n = state.z.shape[1]
    z = state.z[0] - state.z[0].mean()
    if np.abs(z).max() > 0.5:
        return np.asarray(state.f[0] - 1.0 / n)
    return np.asarray(np.expm1(z - np.log1p(np.mean(np.expm1(z)))) / n)


@dataclass(frozen=True, eq=False)
class Layers:
    """The layers of an instance at one point: ``f``, ``y = A2 f``, ``h(y)`` with two derivatives, and so
    on.
    """

    of: TwoLayer
    f: Array
    spread: Array

    @cached_property
    def y(self) -> Array:
        """``A2 f``, shape (m,), through ``f - 1/n``: nearly equal shares keep their digits."""
        return np.asarray(self.of.A2.mean(axis=1) + self.of.A2 @ self.spread)

    @cached_property
    def _jet(self) -> tuple[Array, Array, Array]:
        h, dh, d2h = self.of.activation.jet(self.y)
        return np.asarray(h), np.asarray(dh), np.asarray(d2h)

    @property
    def h(self) -> Array:
        """``h(y)``."""
        return self._jet[0]

    @property
    def dh(self) -> Array:
        """``h'(y)``."""
        return self._jet[1]

    @property
    def d2h(self) -> Array:
        """``h''(y)``."""
        return self._jet[2]

    @cached_property
    def c(self) -> Array:
        """``h(y) - b``."""
        return np.asarray(self.h - self.of.b)

    @cached_property
    def Q2(self) -> Array:
        """``diag(h'(y)) A2``, shape (m, n)."""
        return np.asarray(self.dh[:, None] * self.of.A2)

    @cached_property
    def q(self) -> Array:
        """``Q2^T c``, shape (n,)."""
        return np.asarray(self.Q2.T @ self.c)

    @cached_property
    def fq(self) -> float:
        """``<f, q>``."""
        return float(self.f @ self.q)

    @cached_property
    def a(self) -> Array:
        """``f o (q - <f, q>)``: the gradient in the logits."""
        return np.asarray(self.f * (self.q - self.fq))

    @cached_property
    def P(self) -> Array:
        """Columns ``p_i = f o A_i - <f, A_i> f``, shape (n, d)."""
        return np.asarray(self.f[:, None] * (self.of.A1 - self.f @ self.of.A1))

    @cached_property
    def K(self) -> Array:
        """``A2 (diag(f) - f f^T)``, shape (m, n)."""
        return np.asarray((self.of.A2 - (self.of.A2 @ self.f)[:, None]) * self.f)

    @cached_property
    def factors(self) -> tuple[Array, Array, Array]:
        """``B = diag(a) + U C U^T``, the Hessian in the logits: a, U (n, m + 2) and C."""
        m = len(self.c)
        C = np.zeros((m + 2, m + 2))
        C[np.arange(m), np.arange(m)] = self.dh**2 + self.c * self.d2h
        C[m, m + 1] = C[m + 1, m] = -1.0
        return self.a, np.column_stack([self.K.T, self.a, self.f]), C

    def between(self, rows: Array) -> Array:
        """Return ``rows^T B rows``, rows of shape (n, k)."""
        a, U, C = self.factors
        ends = rows.T @ U
        return np.asarray(rows.T @ (a[:, None] * rows) + ends @ C @ ends.T)

    @cached_property
    def entries(self) -> list[Array]:
        """The six parts of the Hessian ``A1^T B A1``, each (d, d): G_1 to G_6."""
        A, f, q = self.of.A1, self.f, self.q
        pushed = self.of.A2 @ self.P
        mean, weighted = f @ A, (f * q) @ A
        mixed = np.outer(weighted, mean)
        return [
            pushed.T @ ((self.dh**2)[:, None] * pushed),
            pushed.T @ ((self.c * self.d2h)[:, None] * pushed),
            A.T @ ((f * q)[:, None] * A),
            -mixed - mixed.T,
            -self.fq * (A.T @ (f[:, None] * A)),
            2.0 * self.fq * np.outer(mean, mean),
        ]
