"""Outputs of groups of logits at one point and their change along a move, accurate for the smallest moves and
scaled against overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attnfit.theory.logs import log

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Beyond it the fourth powers in the papers' constants leave float64.
LARGE = 150.0


@dataclass(frozen=True)
class State:
    """Logits z of groups, shape (groups, n), and what the papers derive from them.

    ``u, v, c`` and ``alpha`` are divided by ``exp(scale)``, one number a group: zero as long as nothing
    overflows. Padding of short groups is False in ``mask``, and zero in every output.

    Attributes
    ----------
    z, b : ndarray, shape (groups, n)
    function : {"exp", "cosh", "sinh"}
    mask : ndarray of bool, shape (groups, n), or None
    scale : ndarray, shape (groups, 1)
    """

    z: Array
    b: Array
    function: str
    mask: Mask | None
    scale: Array

    def _masked(self, values: Array) -> Array:
        return values if self.mask is None else np.where(self.mask, values, 0.0)

    @cached_property
    def u(self) -> Array:
        """``u(z) exp(-scale)``."""
        return self._masked(self._of(self.function))

    @cached_property
    def v(self) -> Array:
        """``u'(z) exp(-scale)``."""
        return self._masked(self._of({"exp": "exp", "cosh": "sinh", "sinh": "cosh"}[self.function]))

    def _of(self, function: str) -> Array:
        """Return exp, cosh or sinh of z, over ``exp(scale)``."""
        return scaled(function, self.z, self.scale)

    @cached_property
    def alpha(self) -> Array:
        """``<u, 1> exp(-scale)``, shape (groups,)."""
        return np.asarray(self.u.sum(axis=1))

    @cached_property
    def c(self) -> Array:
        """``(u - alpha b) exp(-scale)``: the residuals of the rescaled loss."""
        return self.u - self.alpha[:, None] * self.b

    @cached_property
    def h(self) -> Array:
        """``log softmax(z)``."""
        z = self.z if self.mask is None else np.where(self.mask, self.z, -np.inf)
        h = z - z.max(axis=1, keepdims=True)
        with np.errstate(under="ignore"):
            h = h - np.log(np.exp(h).sum(axis=1, keepdims=True))
        return self._masked(h)

    @cached_property
    def f(self) -> Array:
        """``softmax(z)``."""
        with np.errstate(under="ignore"):
            return self._masked(np.exp(self.h))

    @cached_property
    def residual(self) -> Array:
        """``f - b``: the residuals of the normalised loss."""
        return self._masked(self.f - self.b)

    @cached_property
    def log_alpha(self) -> Array:
        """``log |alpha|``, shape (groups,), minus infinity where it is zero. Exact for exp far beyond the
        range of float64.
        """
        if self.function != "exp":
            return log(np.abs(self.alpha)) + self.scale[:, 0]
        z = self.z if self.mask is None else np.where(self.mask, self.z, -np.inf)
        top = z.max(axis=1)
        with np.errstate(under="ignore"):
            return np.asarray(top + np.log(np.exp(z - top[:, None]).sum(axis=1)))


def scaled(function: str, z: Array, scale: Array) -> Array:
    """Return exp, cosh or sinh of z over ``exp(scale)``, accurate near zero."""
    with np.errstate(under="ignore"):
        up = np.exp(z - scale)
        if function == "exp":
            return up
        down = np.exp(-z - scale)
        if function == "cosh":
            return 0.5 * (up + down)
        # The exponentials cancel near zero.
        return np.where(np.abs(z) < 1.0, np.sinh(np.clip(z, -1.0, 1.0)) * np.exp(-scale), 0.5 * (up - down))


def common_scale(function: str, mask: Mask | None, *logits: Array) -> Array:
    """Return the scale of each group, shape (groups, 1), that keeps fourth powers of outputs in float64."""
    sizes = logits if function == "exp" else tuple(np.abs(z) for z in logits)
    top = np.max([(z if mask is None else np.where(mask, z, -np.inf)).max(axis=1) for z in sizes], axis=0)
    return np.where(np.abs(top) > LARGE, top, 0.0)[:, None]


@dataclass(frozen=True)
class Move:
    """A move of the logits from ``start.z`` to ``end.z = start.z + dz``.

    Attributes
    ----------
    start, end : State
    dz : ndarray, shape (groups, n)
    size : ndarray, shape (groups,)
        ``|x - y|`` of a move of the weights, ``|A - A'|`` of each group of a move of the data.
    """

    start: State
    end: State
    dz: Array
    size: Array

    def _change(self, function: str) -> Array:
        """Return the change of exp, cosh or sinh: half a small step on either side of the middle, where the
        difference of two values would cancel.
        """
        small = np.abs(self.dz) < 1.0
        half = 0.5 * np.where(small, self.dz, 0.0)
        derivative = {"exp": "exp", "cosh": "sinh", "sinh": "cosh"}[function]
        near = 2.0 * np.sinh(half) * scaled(derivative, self.start.z + half, self.start.scale)
        far = self.end._of(function) - self.start._of(function)
        return self.start._masked(np.where(small, near, far))

    @cached_property
    def du(self) -> Array:
        """Change of u over ``exp(scale)``."""
        return self._change(self.start.function)

    @cached_property
    def dv(self) -> Array:
        """Change of v over ``exp(scale)``."""
        return self._change({"exp": "exp", "cosh": "sinh", "sinh": "cosh"}[self.start.function])

    @cached_property
    def dalpha(self) -> Array:
        """Change of alpha over ``exp(scale)``, shape (groups,)."""
        return np.asarray(self.du.sum(axis=1))

    @cached_property
    def dc(self) -> Array:
        """Change of c over ``exp(scale)``."""
        return self.du - self.dalpha[:, None] * self.start.b

    @cached_property
    def dh(self) -> Array:
        """Change of the logarithms of the softmax."""
        small = np.abs(self.dz).max(axis=1, keepdims=True, initial=0.0) < 1.0
        growth = np.expm1(np.where(small, self.dz, 0.0))
        near = self.dz - np.log1p((self.start.f * growth).sum(axis=1, keepdims=True))
        return self.start._masked(np.where(small, near, self.end.h - self.start.h))

    @cached_property
    def df(self) -> Array:
        """Change of the softmax."""
        small = np.abs(self.dh) < 1.0
        near = self.start.f * np.expm1(np.where(small, self.dh, 0.0))
        return np.where(small, near, self.end.f - self.start.f)

    @cached_property
    def log_dalpha_inverse(self) -> Array:
        """``log |1 / alpha' - 1 / alpha|``, shape (groups,)."""
        with np.errstate(divide="ignore"):
            return np.asarray(
                log(np.abs(self.dalpha)) + self.scale - self.start.log_alpha - self.end.log_alpha
            )

    @property
    def scale(self) -> Array:
        """``log`` of the unit of u, v, c and alpha, shape (groups,)."""
        return np.asarray(self.start.scale[:, 0])


def slopes(state: State, loss: str) -> Array:
    """Return the gradient of a loss in the logits; "rescaled" over ``exp(2 scale)``, "sparse" over
    ``exp(scale)``.
    """
    f, b, h = state.f, state.b, state.h
    if loss == "rescaled":
        return np.asarray(state.v * (state.c - np.sum(b * state.c, axis=1, keepdims=True)))
    if loss == "sparse":
        return state.v
    p: Array = {"squared": state.residual, "dot": -b, "entropy": -h}[loss]
    return np.asarray(f * (p - np.sum(f * p, axis=1, keepdims=True)))
