"""A step of approximate Newton, and a run of gradient descent, near a minimum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point
from attnfit.theory.instances.reading import as_array, as_number

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Step:
    """One step from ``x* + e`` on ``L = 1/2 x^T H x + M/6 <q, x>^3``, whose Hessian is M-Lipschitz; x* = 0.

    The approximate Hessian is ``H_e^(1/2) (I + E) H_e^(1/2)`` with the Hessian H_e at e, so that
    ``(1 - |E|) H_e <= H~ <= (1 + |E|) H_e``.

    Parameters
    ----------
    H : array_like, shape (d, d)
        Positive definite.
    e : array_like, shape (d,)
    E : array_like, shape (d, d), optional
        Symmetric; zero by default.
    q : array_like, shape (d,), optional
        Normed to length 1.
    M : float
    previous : float, optional
        The distance from x* one step before, for statements that assume how it shrank; None at the start.
    t : float, optional
        Step of gradient descent; 1.9/(m + L) by default, with m and L the extreme eigenvalues of H.
    k : int
        Its number of steps.

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape, or an H that is not positive definite.
    """

    H: Any
    e: Any
    E: Any = None
    q: Any = None
    M: float = 0.0
    previous: float | None = None
    t: float | None = None
    k: int = 0
    R: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        H = as_array(self.H, "H", (None, None))
        d = len(H)
        H = as_array(0.5 * (H + H.T) if H.shape == (d, d) else H, "H", (d, d))
        put(self, "H", H)
        put(self, "e", as_point(self.e, (d,), "e"))
        E = np.zeros((d, d)) if self.E is None else as_array(self.E, "E", (d, d))
        put(self, "E", 0.5 * (E + E.T))
        q = np.eye(d)[0] if self.q is None else as_point(self.q, (d,), "q")
        length = float(np.linalg.norm(q))
        put(self, "q", q / length if length > 0 else np.eye(d)[0])
        for name in ("previous", "t"):
            as_number(getattr(self, name), name)
        as_number(self.M, "M", positive=False)
        if self.spectrum[0] <= 0.0:
            raise ValueError(
                f"H has the eigenvalue {self.spectrum[0]:g}; a minimum with H > 0 is needed, so add a ridge"
            )

    @cached_property
    def spectrum(self) -> Array:
        """Eigenvalues of H, ascending."""
        return np.asarray(np.linalg.eigvalsh(self.H))

    @property
    def l(self) -> float:  # noqa: E743
        """The smallest."""
        return float(self.spectrum[0])

    @property
    def cond(self) -> float:
        """The largest over the smallest."""
        return float(self.spectrum[-1] / self.spectrum[0])

    @cached_property
    def eps(self) -> float:
        """``|E|``: the spectral accuracy of the approximate Hessian."""
        return float(np.linalg.norm(self.E, 2))

    @cached_property
    def r(self) -> float:
        """``|e|``."""
        return float(np.linalg.norm(self.e))

    @cached_property
    def here(self) -> Array:
        """The Hessian at e."""
        return np.asarray(self.H + self.M * (self.q @ self.e) * np.outer(self.q, self.q))

    def length(self, v: Array, metric: Array) -> float:
        """Return ``(v^T metric v)^(1/2)``."""
        return float(np.sqrt(max(float(v @ metric @ v), 0.0)))

    @cached_property
    def after(self) -> Array:
        """The error after the step."""
        values, vectors = np.linalg.eigh(self.here)
        root = (vectors / np.sqrt(values.clip(np.finfo(float).tiny))) @ vectors.T
        gradient = self.H @ self.e + 0.5 * self.M * (self.q @ self.e) ** 2 * self.q
        moved = root @ np.linalg.solve(np.eye(len(self.e)) + self.E, root @ gradient)
        return np.asarray(self.e - moved)

    @cached_property
    def descended(self) -> float:
        """``|x_k - x*|`` after k steps of gradient descent on the quadratic part."""
        values, vectors = np.linalg.eigh(self.H)
        return float(np.linalg.norm((1.0 - self.descent_step * values) ** self.k * (vectors.T @ self.e)))

    @property
    def descent_step(self) -> float:
        """The step of gradient descent: given, or 1.9/(m + L)."""
        return 1.9 / float(self.spectrum[0] + self.spectrum[-1]) if self.t is None else self.t
