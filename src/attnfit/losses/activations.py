"""Entrywise activations h with three derivatives and the constants that bound them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr

Array = NDArray[np.float64]
Function = Callable[[Array], Array]

# Where the derivatives a user passes are compared with differences of the function.
PROBES = np.array([-1.7, -0.6, 0.3, 0.9, 2.1])
STEP = 1e-5
_SIGMOID_CURVATURE = 1.0 / (6.0 * np.sqrt(3.0))


@dataclass(frozen=True)
class Activation:
    """A scalar function h applied entrywise.

    Attributes
    ----------
    name : str
    jet : callable
        ``y -> (h, h', h'')``, which share their work.
    third : callable, optional
        ``h'''``; None where unknown.
    slope, curvature, jerk, size : float
        ``sup |h'|``, ``sup |h''|``, ``sup |h'''|`` and ``sup |h|`` over the reals; infinite where unbounded,
        NaN where unknown.
    """

    name: str
    jet: Callable[[Array], tuple[Array, Array, Array]]
    third: Function | None
    slope: float
    curvature: float
    jerk: float
    size: float

    @property
    def bounds_known(self) -> bool:
        """Whether the three derivatives have known bounds."""
        return bool(np.isfinite([self.slope, self.curvature, self.jerk]).all())

    def __call__(self, y: Array) -> Array:
        return self.jet(y)[0]


def _identity(y: Array) -> tuple[Array, Array, Array]:
    return y, np.broadcast_to(1.0, y.shape), np.broadcast_to(0.0, y.shape)


def _tanh(y: Array) -> tuple[Array, Array, Array]:
    t = np.tanh(y)
    slope = 1.0 / np.cosh(np.clip(y, -350.0, 350.0)) ** 2
    return t, slope, -2.0 * t * slope


def _sigmoid(y: Array) -> tuple[Array, Array, Array]:
    s, rest = expit(y), expit(-y)
    slope = s * rest
    return s, slope, slope * (rest - s)


def _softplus(y: Array) -> tuple[Array, Array, Array]:
    s, slope, _ = _sigmoid(y)
    return np.logaddexp(0.0, y), s, slope


def _gelu(y: Array) -> tuple[Array, Array, Array]:
    below, (near, density) = ndtr(y), _normal_density(y)
    return y * below, below + near * density, density * (2.0 - near * near)


def _normal_density(y: Array) -> tuple[Array, Array]:
    """Return y, cut where the density is zero in float64, and the density."""
    near = np.clip(y, -40.0, 40.0)
    return near, np.exp(-0.5 * near * near) / np.sqrt(2.0 * np.pi)


def _tanh_third(y: Array) -> Array:
    t, slope, _ = _tanh(y)
    return np.asarray(slope * (6.0 * t * t - 2.0))


def _sigmoid_third(y: Array) -> Array:
    _, slope, _ = _sigmoid(y)
    return np.asarray(slope * (1.0 - 6.0 * slope))


def _softplus_third(y: Array) -> Array:
    return _sigmoid(y)[2]


def _gelu_third(y: Array) -> Array:
    near, density = _normal_density(y)
    return np.asarray(density * near * (near * near - 4.0))


ACTIVATIONS = {
    "identity": Activation("identity", _identity, np.zeros_like, 1.0, 0.0, 0.0, np.inf),
    "tanh": Activation("tanh", _tanh, _tanh_third, 1.0, 4.0 / (3.0 * np.sqrt(3.0)), 2.0, 1.0),
    "sigmoid": Activation("sigmoid", _sigmoid, _sigmoid_third, 0.25, _SIGMOID_CURVATURE, 0.125, 1.0),
    "softplus": Activation("softplus", _softplus, _softplus_third, 1.0, 0.25, _SIGMOID_CURVATURE, np.inf),
    # The maxima lie at y = sqrt(2), y = 0 and y^2 = (7 - sqrt(33)) / 2.
    "gelu": Activation("gelu", _gelu, _gelu_third, 1.128905, 0.797885, 0.778771, np.inf),
}


def as_activation(activation: Any) -> Activation:
    """Return an activation by name, or one made of a user's triple ``(h, h', h'')``.

    Parameters
    ----------
    activation : str or tuple of three callables
        Callables take and return arrays, entrywise.

    Raises
    ------
    ValueError
        If the name is unknown, derivatives are missing, or one does not match differences of the function.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {names} or (h, h', h''), not {activation!r}")
        return ACTIVATIONS[activation]
    functions = tuple(activation) if isinstance(activation, list | tuple) else (activation,)
    if len(functions) != 3 or not all(callable(function) for function in functions):
        raise ValueError(
            "activation needs its first two derivatives: pass (h, h', h'') as three callables that work "
            f"entrywise, not {activation!r}"
        )
    return _user_activation(*functions)


def _user_activation(h: Any, dh: Any, d2h: Any) -> Activation:
    def jet(y: Array) -> tuple[Array, Array, Array]:
        h0, h1, h2 = (np.asarray(function(y), dtype=np.float64) for function in (h, dh, d2h))
        return h0, h1, h2

    for name, function in (("h", h), ("h'", dh), ("h''", d2h)):
        values = np.asarray(function(PROBES), dtype=np.float64)
        if values.shape != PROBES.shape or not np.isfinite(values).all():
            raise ValueError(
                f"{name} of activation must map an array to finite numbers of the same shape; "
                f"for shape {PROBES.shape} it gave shape {values.shape}"
            )
    for name, of, function, derivative in (("h'", "h", h, dh), ("h''", "h'", dh, d2h)):
        given = np.asarray(derivative(PROBES))
        measured = (np.asarray(function(PROBES + STEP)) - np.asarray(function(PROBES - STEP))) / (2 * STEP)
        off = np.abs(given - measured) > 1e-5 * (1.0 + np.abs(measured))
        if off.any():
            k = int(np.flatnonzero(off)[0])
            raise ValueError(
                f"{name} of activation is not the derivative of {of}: at y = {PROBES[k]:g} it is "
                f"{given[k]:.6g}, "
                f"while differences of {of} give {measured[k]:.6g}; correct {name}"
            )
    unknown = float("nan")
    return Activation("custom", jet, None, unknown, unknown, unknown, unknown)
