"""What transformer blocks are made of beside attention: norms and perceptrons, with their derivatives and
with bounds of these on a ball.

Every function takes arrays with leading axes, and complex ones too: a second derivative is the first one at
a point moved by an imaginary step, exact to rounding (Squire and Trapp, "Using complex variables to estimate
derivatives of real functions" (1998), doi:10.1137/S003614459631241X).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from attnfit.data.inputs import choose
from attnfit.objectives.inverse_layer import read_matrix

Array = NDArray[Any]

ROOT_2, ROOT_2PI, ROOT_2_OVER_PI, CUBIC = 2.0**0.5, (2.0 * np.pi) ** 0.5, (2.0 / np.pi) ** 0.5, 0.044715


class Activation(NamedTuple):
    """A function of one variable, its derivative, and the largest sizes of its first two derivatives (the
    second infinite where the first jumps).
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    steepest: float
    sharpest: float


class Bounds(NamedTuple):
    """Bounds on a ball: of the size of what a map adds, of its derivative and of its second derivative, in
    the operator norms of 2-norms.
    """

    size: float
    first: float
    second: float


def _phi(x: Array) -> Array:
    return np.asarray(np.exp(-0.5 * x * x) / ROOT_2PI)


def _cdf(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + erf(x / ROOT_2)))


def _logistic(x: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def _inner(x: Array) -> Array:
    return np.asarray(np.tanh(ROOT_2_OVER_PI * (x + CUBIC * x**3)))


def _tanh_gelu_slope(x: Array) -> Array:
    t = _inner(x)
    slope = ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
    return np.asarray(0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)


def _silu_slope(x: Array) -> Array:
    s = _logistic(x)
    return s * (1.0 + x * (1.0 - s))


ACTIVATIONS = {
    "gelu": Activation(lambda x: x * _cdf(x), lambda x: _cdf(x) + x * _phi(x), 1.12891, 0.79789),
    "gelu_tanh": Activation(lambda x: 0.5 * x * (1.0 + _inner(x)), _tanh_gelu_slope, 1.12900, 0.79789),
    "silu": Activation(lambda x: x * _logistic(x), _silu_slope, 1.09984, 0.5),
    "relu": Activation(lambda x: x * (x.real > 0.0), lambda x: 1.0 * (x.real > 0.0), 1.0, np.inf),
    "tanh": Activation(np.tanh, lambda x: 1.0 - np.tanh(x) ** 2, 1.0, 0.76981),
}
ActivationName = Literal["gelu", "gelu_tanh", "silu", "relu", "tanh"]


@dataclass(frozen=True, eq=False)
class Norm:
    """``g o c / s + b`` with ``s = sqrt(mean(c^2) + eps)``: RMSNorm, c = x, or LayerNorm, c = x - mean(x).

    Parameters
    ----------
    gains : array_like, shape (d,)
    bias : array_like, shape (d,), optional
    eps : float
        Not negative.
    centred : bool
        Whether the mean is taken off, as LayerNorm does.

    Raises
    ------
    ValueError
        If gains or bias are no finite vectors of one length, or eps is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.inversion import Norm
    >>> Norm(np.ones(2), eps=0.0).forward(np.array([3.0, 4.0]))[0].round(3)
    array([0.849, 1.131])
    """

    gains: Any
    bias: Any = None
    eps: float = 1e-6
    centred: bool = False

    def __post_init__(self) -> None:
        gains = _vector(self.gains, None, "gains")
        object.__setattr__(self, "gains", gains)
        object.__setattr__(self, "bias", _vector(self.bias, len(gains), "bias"))
        if not (np.isfinite(self.eps) and self.eps >= 0.0):
            raise ValueError(f"eps must be a number >= 0, not {self.eps!r}")

    @property
    def width(self) -> int:
        """Numbers that it takes."""
        return len(self.gains)

    @property
    def lost(self) -> int:
        """Directions of its input that its output does not show."""
        return 2 if self.centred else 1

    @property
    def largest(self) -> float:
        """``sqrt(d) max|g| + |b|``, above all outputs."""
        return float(np.sqrt(self.width) * np.abs(self.gains).max() + np.linalg.norm(self.bias))

    def forward(self, x: Array) -> tuple[Array, tuple[Array, Array]]:
        """Return the output and (c, s)."""
        c = x - x.mean(axis=-1, keepdims=True) if self.centred else x
        s = np.sqrt(np.mean(c * c, axis=-1, keepdims=True) + self.eps)
        return self.gains * c / s + self.bias, (c, s)

    def push(self, at: tuple[Array, Array], dx: Array) -> Array:
        """Return ``J dx``."""
        c, s = at
        dc = dx - dx.mean(axis=-1, keepdims=True) if self.centred else dx
        inner = np.sum(c * dc, axis=-1, keepdims=True)
        return np.asarray(self.gains * (dc / s - c * (inner / (self.width * s**3))))

    def pull(self, at: tuple[Array, Array], v: Array) -> Array:
        """Return ``J^T v``."""
        c, s = at
        t = self.gains * v
        dx = t / s - c * (np.sum(c * t, axis=-1, keepdims=True) / (self.width * s**3))
        return np.asarray(dx - dx.mean(axis=-1, keepdims=True) if self.centred else dx)

    def bounds(self, x: Array, radius: float) -> Bounds:
        """Return bounds within a distance of x, shape (d,)."""
        c = x - x.mean() if self.centred else x
        near = max(float(np.linalg.norm(c)) - radius, 0.0)
        r = float(np.sqrt(near**2 + self.width * self.eps))
        top = float(np.sqrt(self.width) * np.abs(self.gains).max())
        if r == 0.0:
            return Bounds(self.largest, np.inf, np.inf)
        return Bounds(self.largest, top / r, 2.0 / np.sqrt(3.0) * top / r**2)


@dataclass(frozen=True, eq=False)
class Mlp:
    """``act(x W_1 + b_1) W_2 + b_2``, or gated: ``(act(x W_g + b_g) o (x W_1 + b_1)) W_2 + b_2``.

    Parameters
    ----------
    W_1, W_2 : array_like, shapes (d, f) and (f, d)
    b_1, b_2 : array_like, shapes (f,) and (d,), optional
    activation : {"gelu", "gelu_tanh", "silu", "relu", "tanh"}
        GELU by the error function, or by the hyperbolic tangent.
    gate : array_like, shape (d, f), optional
    gate_bias : array_like, shape (f,), optional

    Raises
    ------
    ValueError
        If shapes do not belong together or the activation is unknown.
    """

    W_1: Any
    W_2: Any
    b_1: Any = None
    b_2: Any = None
    activation: ActivationName = "gelu"
    gate: Any = None
    gate_bias: Any = None

    def __post_init__(self) -> None:
        choose(self.activation, ACTIVATIONS, "activation")
        W_1, W_2 = read_matrix(self.W_1, "W_1"), read_matrix(self.W_2, "W_2")
        if W_2.shape != W_1.shape[::-1]:
            raise ValueError(f"W_2 has shape {W_2.shape}; expected {W_1.shape[::-1]}, that of W_1 turned")
        read = {"W_1": W_1, "W_2": W_2}
        read["b_1"] = _vector(self.b_1, W_1.shape[1], "b_1")
        read["b_2"] = _vector(self.b_2, W_1.shape[0], "b_2")
        if self.gate is not None:
            read["gate"] = read_matrix(self.gate, "gate")
            if read["gate"].shape != W_1.shape:
                raise ValueError(f"gate has shape {read['gate'].shape}; expected {W_1.shape}, that of W_1")
            read["gate_bias"] = _vector(self.gate_bias, W_1.shape[1], "gate_bias")
        elif self.gate_bias is not None:
            raise ValueError("gate_bias is given without gate; pass both or none")
        for name, value in read.items():
            object.__setattr__(self, name, value)

    def forward(self, x: Array) -> tuple[Array, tuple[Array, Array]]:
        """Return the output, and what enters the activation with what it is multiplied by."""
        act = ACTIVATIONS[self.activation]
        up = x @ self.W_1 + self.b_1
        if self.gate is None:
            return act.value(up) @ self.W_2 + self.b_2, (up, up)
        gate = x @ self.gate + self.gate_bias
        return (act.value(gate) * up) @ self.W_2 + self.b_2, (gate, up)

    def push(self, at: tuple[Array, Array], dx: Array) -> Array:
        """Return ``J dx``."""
        act, (gate, up) = ACTIVATIONS[self.activation], at
        moved = dx @ self.W_1
        if self.gate is None:
            return np.asarray((act.slope(up) * moved) @ self.W_2)
        return np.asarray((act.slope(gate) * up * (dx @ self.gate) + act.value(gate) * moved) @ self.W_2)

    def pull(self, at: tuple[Array, Array], v: Array) -> Array:
        """Return ``J^T v``."""
        act, (gate, up) = ACTIVATIONS[self.activation], at
        back = v @ self.W_2.T
        if self.gate is None:
            return np.asarray((back * act.slope(up)) @ self.W_1.T)
        return np.asarray((back * act.slope(gate) * up) @ self.gate.T + (back * act.value(gate)) @ self.W_1.T)

    def bounds(self, x: Array, radius: float) -> Bounds:
        """Return bounds within a distance of x, shape (d,)."""
        act, n = ACTIVATIONS[self.activation], self._norms
        up = np.abs(x @ self.W_1 + self.b_1) + radius * n["columns"]
        if self.gate is None:
            # All of these activations lie between -|t| and |t|.
            size = n["W_2"] * float(np.linalg.norm(up)) + n["b_2"]
            return Bounds(size, n["W_2"] * n["W_1"] * act.steepest, n["W_2"] * n["W_1"] ** 2 * act.sharpest)
        gate = np.abs(x @ self.gate + self.gate_bias) + radius * n["gate_columns"]
        size = n["W_2"] * float(np.linalg.norm(gate * up)) + n["b_2"]
        first = act.steepest * n["gate"] * float(up.max()) + n["W_1"] * float(gate.max())
        second = act.sharpest * n["gate"] ** 2 * float(up.max()) + 2.0 * act.steepest * n["gate"] * n["W_1"]
        return Bounds(size, n["W_2"] * first, n["W_2"] * second)

    @cached_property
    def _norms(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "W_1": spectral_norm(self.W_1), "W_2": spectral_norm(self.W_2),
            "b_2": float(np.linalg.norm(self.b_2)), "columns": np.linalg.norm(self.W_1, axis=0),
        }  # fmt: skip
        if self.gate is not None:
            found["gate"] = spectral_norm(self.gate)
            found["gate_columns"] = np.linalg.norm(self.gate, axis=0)
        return found


def spectral_norm(matrix: Array) -> float:
    """Return the largest singular value, rounding on its safe side."""
    return float(np.linalg.norm(matrix, 2)) * (1.0 + 1e-12) if matrix.size else 0.0


def _vector(values: Any, n: int | None, name: str) -> NDArray[np.float64]:
    """Return a finite vector of length n, zeros where there is none."""
    if values is None and n is not None:
        return np.zeros(n)
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector) or (n is not None and len(vector) != n):
        expected = "(d,)" if n is None else f"({n},)"
        raise ValueError(f"{name} has shape {vector.shape}; expected {expected}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise ValueError(f"{name} is not finite at index {bad[0]}")
    return vector
