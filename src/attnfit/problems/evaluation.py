"""What is known after one read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attnfit.losses.segments import Array


@dataclass(frozen=True)
class Drawn:
    """Rows drawn during a read: ``chunks`` is for the problem that drew them, and may be kept elsewhere."""

    chunks: Any = field(repr=False)
    n_rows: int


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at ``x``, and what later reads need of the long groups.

    Attributes
    ----------
    x, gradient : ndarray, shape (d,)
    value : float
        Infinite where the loss overflows.
    state : ndarray, shape (n_states, n_long)
        Normaliser and inner product of each group too long for one chunk; shorter groups recompute theirs.
    centre : ndarray, shape (n_long, d)
        ``mu_g = A_g^T centre weights`` of the long groups: also the derivative of their normaliser.
    origin_gradient : ndarray, shape (d,), optional
        The gradient at zero, when asked for.
    sample : Drawn, optional
        Rows drawn during the read.
    hessian : ndarray, shape (d, d), optional
        The Hessian, when asked for and the predicted states of long groups were good enough to weight the
        rows.
    inner : Evaluation, optional
        Of the problem that this one is made of.
    """

    x: Array
    value: float
    gradient: Array
    state: Array = field(default_factory=lambda: np.zeros((0, 0)))
    centre: Array = field(default_factory=lambda: np.zeros((0, 0)))
    origin_gradient: Array | None = None
    sample: Drawn | None = field(default=None, repr=False)
    hessian: Array | None = field(default=None, repr=False)
    inner: Evaluation | None = field(default=None, repr=False)

    def bare(self) -> Evaluation:
        """Return what other reads need of this one."""
        return Evaluation(self.x, self.value, self.gradient, self.state, self.centre)

    def predict_reference(self, x: Array) -> Array:
        """Return the normalisers of the long groups at a nearby x, to first order."""
        return np.asarray(self.state[0] + self.centre @ (x - self.x))
