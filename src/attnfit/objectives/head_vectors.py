"""Queries or keys of one sequence inside a head: projected, normalised, scaled by gains and turned; with two
derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnfit.objectives.rotary import Turn
from attnfit.segments import Array


@dataclass(frozen=True)
class Inputs:
    """What enters a head on one side.

    Attributes
    ----------
    A : ndarray, shape (n, d)
    turn : Turn, optional
        The rotation of each vector.
    eps : float, optional
        Vectors are divided by the root of their mean square plus this; None where they are not.
    """

    A: Array
    turn: Turn | None
    eps: float | None

    def at(self, W: Array, gains: Array) -> Vectors:
        """Return the vectors for a factor W, shape (d, h), and gains, shape (h,) (none without a norm)."""
        y = self.A @ W
        if self.eps is None:
            return Vectors(self, y, np.ones((len(y), 1)), gains)
        size = np.sqrt(np.mean(y * y, axis=1, keepdims=True) + self.eps)
        return Vectors(self, y / size, size, gains)


@dataclass(frozen=True)
class Vectors:
    """Vectors ``turn(gains o A W / size)`` at a point.

    Attributes
    ----------
    inputs : Inputs
    unit : ndarray, shape (n, h)
        ``A W / size``.
    size : ndarray, shape (n, 1)
    gains : ndarray, shape (h,) or (0,)
    """

    inputs: Inputs
    unit: Array
    size: Array
    gains: Array

    @property
    def normed(self) -> bool:
        """Whether there are norms and gains."""
        return self.inputs.eps is not None

    @property
    def turned(self) -> Array:
        """The vectors, shape (n, h)."""
        y = self.unit * self.gains if self.normed else self.unit
        return y if self.inputs.turn is None else self.inputs.turn(y)

    def moved(self, dW: Array, dgains: Array) -> Array:
        """Return the change of the vectors, shape (n, h), to first order."""
        y = self.inputs.A @ dW
        if self.normed:
            y = self._shed(y) * self.gains + self.unit * dgains
        return y if self.inputs.turn is None else self.inputs.turn(y)

    def pulled(self, R: Array) -> tuple[Array, Array]:
        """Return the gradient in W and in the gains, given the one in the vectors."""
        y = R if self.inputs.turn is None else self.inputs.turn.back(R)
        if not self.normed:
            return self.inputs.A.T @ y, np.zeros(0)
        return self.inputs.A.T @ self._shed(y * self.gains), np.sum(y * self.unit, axis=0)

    def bent(self, R: Array, dW: Array, dgains: Array) -> tuple[Array, Array]:
        """Return the change of `pulled` for a fixed R, to first order; zero without a norm."""
        if not self.normed:
            return np.zeros_like(dW), np.zeros(0)
        y = R if self.inputs.turn is None else self.inputs.turn.back(R)
        h = y.shape[1]
        step = self.inputs.A @ dW
        dunit = self._shed(step)
        # The relative change of the size.
        share = np.sum(self.unit * step, axis=1, keepdims=True) / (h * self.size)
        u = y * self.gains
        inner = np.sum(u * self.unit, axis=1, keepdims=True)
        change = dunit * inner + self.unit * np.sum(u * dunit, axis=1, keepdims=True)
        out = self._shed(y * dgains) - share * self._shed(u) - change / (h * self.size)
        return self.inputs.A.T @ out, np.sum(y * dunit, axis=0)

    def _shed(self, y: Array) -> Array:
        """Return the change of a vector of unit size where it moves by y before the norm."""
        along = np.mean(self.unit * y, axis=1, keepdims=True)
        return np.asarray((y - self.unit * along) / self.size)

    def metric(self, matrices: Array, some: Array) -> tuple[Array, Array]:
        """Return what curvatures in some of the vectors, shape (k, h, h), are in A W, averaged, and summed in
        the gains.

        The part of a norm that takes off the direction of the vector is left out: a preconditioner may.
        """
        if self.inputs.turn is not None:
            matrices = self.inputs.turn.unturn(matrices, some)
        if not self.normed:
            return matrices.mean(axis=0), np.zeros(0)
        curved = np.einsum("kii,ki->i", matrices, self.unit[some] ** 2) * len(self.unit) / len(some)
        scale = self.gains / self.size[some]
        return (matrices * scale[:, :, None] * scale[:, None, :]).mean(axis=0), curved
