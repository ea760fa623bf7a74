"""Activations h: entrywise with three derivatives and the constants that bound them; with kinks; of all
outputs together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
# Where the bounds a user states are tried.
GRID = np.linspace(-10.0, 10.0, 2001)
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
    kink : tuple of float, optional
        The slopes of h left and right of y = 0, where it has a kink; h is then linear on both sides, h' at
        the kink is the left one, and h' has no Lipschitz constant: ``curvature`` and ``jerk`` are infinite.

    Raises
    ------
    ValueError
        If a bound is less than a value on [-10, 10]; the message names the point.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.losses import Activation
    >>> wave = Activation(
    ...     "sine", lambda y: (np.sin(y), np.cos(y), -np.sin(y)), None,
    ...     slope=1.0, curvature=1.0, jerk=1.0, size=1.0,
    ... )
    >>> wave.bounds_known
    True
    """

    name: str
    jet: Callable[[Array], tuple[Array, Array, Array]]
    third: Function | None
    slope: float
    curvature: float
    jerk: float
    size: float
    kink: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _require_bounds(self)

    @property
    def bounds_known(self) -> bool:
        """Whether the three derivatives have known bounds."""
        return bool(np.isfinite([self.slope, self.curvature, self.jerk]).all())

    def __call__(self, y: Array) -> Array:
        return self.jet(y)[0]

    def derivatives(self, y: Array, b: Array, w: Array | None) -> tuple[Array, Array, Array, Array]:
        """Return ``c = h(y) - b``, and of ``0.5 sum w c^2`` the gradient in y, ``w h'^2`` and the second
        derivative, shape (m, k) each.
        """
        h, dh, d2h = self.jet(y)
        residual = h - b
        if self is ACTIVATIONS["identity"]:
            # Its derivatives are constants: mixtures come by the hundred thousand.
            slope, gauss, curvature = residual, dh, dh
        else:
            slope, gauss = dh * residual, dh * dh
            curvature = gauss + residual * d2h
        if w is not None:
            slope, gauss, curvature = (w * part for part in (slope, gauss, curvature))
        return residual, slope, gauss, curvature


def _require_bounds(h: Activation) -> None:
    """Refuse a bound that a value exceeds."""
    bounds = {"size": h.size, "slope": h.slope, "curvature": h.curvature, "jerk": h.jerk}
    if not any(np.isfinite(bound) for bound in bounds.values()):
        return
    values = [np.asarray(part) + 0.0 * GRID for part in h.jet(GRID)]
    if h.third is not None:
        values.append(np.asarray(h.third(GRID)) + 0.0 * GRID)
    else:
        later, earlier = (np.asarray(h.jet(GRID + s)[2]) + 0.0 * GRID for s in (STEP, -STEP))
        values.append((later - earlier) / (2.0 * STEP))
    for (name, bound), found, of in zip(bounds.items(), values, ("h", "h'", "h''", "h'''"), strict=True):
        sizes = np.abs(found)
        k = int(np.argmax(sizes))
        if np.isfinite(bound) and not sizes[k] <= bound * (1.0 + 1e-6) + 1e-9:
            raise ValueError(
                f"{name}={bound:.6g} of activation {h.name!r} bounds no |{of}|: at y = {GRID[k]:g} it is "
                f"{sizes[k]:.6g}; state a larger {name}"
            )


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


def _silu(y: Array) -> tuple[Array, Array, Array]:
    s, slope, _ = _sigmoid(y)
    near = np.clip(y, -800.0, 800.0)
    return y * s, s + near * slope, slope * (2.0 + near * (1.0 - 2.0 * s))


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


def _silu_third(y: Array) -> Array:
    s, slope, _ = _sigmoid(y)
    near = np.clip(y, -800.0, 800.0)
    return np.asarray(slope * (3.0 * (1.0 - 2.0 * s) + near * (1.0 - 6.0 * slope)))


def leaky_relu(slope: float = 0.01) -> Activation:
    """Return ``h(y) = y`` for y > 0 and ``slope y`` for y <= 0; `relu` is the one with slope zero.

    Parameters
    ----------
    slope : float
        At least 0 and less than 1.

    Raises
    ------
    ValueError
        If it is not.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.losses import leaky_relu
    >>> leaky_relu(0.1)(np.array([-2.0, 3.0]))
    array([-0.2,  3. ])
    """
    if not 0.0 <= slope < 1.0:
        raise ValueError(f"slope of leaky_relu must be at least 0 and less than 1, not {slope!r}")

    def jet(y: Array) -> tuple[Array, Array, Array]:
        steep = np.where(y > 0.0, 1.0, slope)
        return steep * y, steep, np.zeros_like(steep)

    name = "relu" if slope == 0.0 else f"leaky_relu({slope:g})"
    return Activation(name, jet, np.zeros_like, 1.0, np.inf, np.inf, np.inf, (slope, 1.0))


ACTIVATIONS = {
    "identity": Activation("identity", _identity, np.zeros_like, 1.0, 0.0, 0.0, np.inf),
    "tanh": Activation("tanh", _tanh, _tanh_third, 1.0, 4.0 / (3.0 * np.sqrt(3.0)), 2.0, 1.0),
    "sigmoid": Activation("sigmoid", _sigmoid, _sigmoid_third, 0.25, _SIGMOID_CURVATURE, 0.125, 1.0),
    "softplus": Activation("softplus", _softplus, _softplus_third, 1.0, 0.25, _SIGMOID_CURVATURE, np.inf),
    # The maxima lie at y = sqrt(2), y = 0 and y^2 = (7 - sqrt(33)) / 2.
    "gelu": Activation("gelu", _gelu, _gelu_third, 1.128905, 0.797885, 0.778771, np.inf),
    # The maxima lie at y = 2.399357, 0 and -1.031958.
    "silu": Activation("silu", _silu, _silu_third, 1.0998394, 0.5, 0.3081816, np.inf),
    "relu": leaky_relu(0.0),
    "leaky_relu": leaky_relu(),
}


def as_activation(activation: Any) -> Activation:
    """Return an activation by name, or one made of a user's ``(h, h', h'')``.

    Parameters
    ----------
    activation : str, Activation or tuple of three callables
        Callables take and return arrays, entrywise. A fourth item, ``{"slope": .., "curvature": .., "jerk":
        ..}``, bounds ``|h'|``, ``|h''|`` and ``|h'''|``: fits are then certified.

    Raises
    ------
    ValueError
        If the name is unknown, derivatives are missing, one does not match differences of the function, or a
        bound is less than a value on [-10, 10].
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            names = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {names} or (h, h', h''), not {activation!r}")
        return ACTIVATIONS[activation]
    functions = tuple(activation) if isinstance(activation, list | tuple) else (activation,)
    bounds: Mapping[str, float] = {}
    if len(functions) == 4 and isinstance(functions[3], Mapping):
        bounds, functions = functions[3], functions[:3]
        unknown = sorted(set(bounds) - {"slope", "curvature", "jerk", "size"})
        if unknown:
            raise ValueError(f"activation states {unknown[0]!r}; bounds are slope, curvature, jerk and size")
    if len(functions) != 3 or not all(callable(function) for function in functions):
        raise ValueError(
            "activation needs its first two derivatives: pass (h, h', h'') as three callables that work "
            f"entrywise, not {activation!r}"
        )
    return _user_activation(*functions, bounds)


def _user_activation(h: Any, dh: Any, d2h: Any, bounds: Mapping[str, float]) -> Activation:
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
    slope, curvature, jerk, size = (
        float(bounds.get(name, np.nan)) for name in ("slope", "curvature", "jerk", "size")
    )
    return Activation("custom", jet, None, slope, curvature, jerk, size)
