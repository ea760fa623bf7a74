"""Many small regressions at once, of one softmax or several, normalised or rescaled, and their moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from attnfit.data.inputs import choose

Array = NDArray[np.float64]
Link = Literal["softmax", "exp", "cosh", "sinh"]

# Of steps, and of damping relative to the mean diagonal.
STEP_SIZES = np.logspace(-7.0, 3.0, 51)
DAMPINGS = np.logspace(-6.0, 2.0, 9)
# Deviation of the noise in the logits of the targets.
NOISE = 0.3


@dataclass(frozen=True)
class Family:
    """Instances of ``0.5 sum_i |f_i - b_i|^2``, f_i the softmax of row i of the logits, or, rescaled, of
    ``0.5 sum_i |u_i - <u_i, 1> b_i|^2`` with u = exp, cosh or sinh of them.

    Attributes
    ----------
    link : {"softmax", "exp", "cosh", "sinh"}
    rows : ndarray, shape (count, G, m, D)
        Features of each logit: those of the vector problem have G = 1, those of a matrix problem are
        ``a_i (x) k_j``.
    b, z : ndarray, shape (count, G, m)
        Targets, and logits: ``rows x``, and what moves have made of them.
    x : ndarray, shape (count, D)
    sides : tuple of two ndarrays, or None
        Queries (count, G, d1) and keys (count, m, d2) of a matrix problem.
    """

    link: Link
    rows: Array
    b: Array
    x: Array
    z: Array
    sides: tuple[Array, Array] | None = None

    def __post_init__(self) -> None:
        choose(self.link, dict.fromkeys(("softmax", "exp", "cosh", "sinh")), "link")

    def __len__(self) -> int:
        return len(self.z)

    def moved(self, dz: Array) -> Family:
        """Return the instances after a move of their logits."""
        return replace(self, z=self.z + dz)

    # ---- the state: values are scaled by a factor an instance, which drops out of what is returned

    def _values(self, z: Array, peak: Array) -> tuple[Array, Array]:
        """Return u and its derivative, both times ``exp(-peak)``."""
        up = np.exp(z - peak)
        if self.link in ("softmax", "exp"):
            return up, up
        down = np.exp(-z - peak)
        even, odd = 0.5 * (up + down), 0.5 * (up - down)
        return (even, odd) if self.link == "cosh" else (odd, even)

    @cached_property
    def _peak(self) -> Array:
        size = self.z if self.link in ("softmax", "exp") else np.abs(self.z)
        return np.asarray(size.max(axis=(1, 2), keepdims=True))

    @cached_property
    def _state(self) -> tuple[Array, Array, Array, Array]:
        """Residual and its weights: u and v (f and f of a softmax), the normaliser and c."""
        if self.link == "softmax":
            f = np.asarray(softmax(self.z, axis=2))
            return f, f, np.ones((*f.shape[:2], 1)), f - self.b
        u, v = self._values(self.z, self._peak)
        alpha = u.sum(axis=2, keepdims=True)
        return u, v, alpha, u - alpha * self.b

    @cached_property
    def slope(self) -> Array:
        """Derivative of the loss in the logits, up to a positive factor an instance."""
        _, v, _, c = self._state
        weight = v if self.link == "softmax" else self.b
        return np.asarray(v * (c - np.sum(weight * c, axis=2, keepdims=True)))

    def loss(self, dz: Array | float = 0.0) -> Array:
        """Return ``0.5 sum_i |f_i - b_i|^2`` after a move, rescaled ``0.5 sum_i |c_i|^2 / alpha_i^2``.

        ``|c|^2`` itself falls to zero as logits of exp fall without end, which a free move uses at once.
        """
        after = self.moved(np.asarray(dz)) if np.any(dz) else self
        _, _, alpha, c = after._state
        return np.asarray(0.5 * np.sum((c / alpha) ** 2, axis=(1, 2)))

    def shift(self, dz: Array) -> Array:
        """Return the change of the target that reproduces a move: ``f' - f``, rescaled ``(c' - c)/alpha``.

        By a plain difference: it has four digits fewer than the move has zeros.
        """
        u, _, alpha, _ = self._state
        if self.link == "softmax":
            return np.asarray(softmax(self.z + dz, axis=2) - u)
        moved, _ = self._values(self.z + dz, self._peak)
        change = moved - u
        return np.asarray((change - change.sum(axis=2, keepdims=True) * self.b) / alpha)

    # ---- moves of the logits, by step size

    def gradient_move(self, step: float) -> Array:
        """Return that of a gradient step on x, ``-step A A^T s``."""
        g = np.einsum("cgmd,cgm->cd", self.rows, self.slope)
        return np.asarray(-step * np.einsum("cgmd,cd->cgm", self.rows, g))

    def data_move(self, step: float) -> Array:
        """Return that of a gradient step on the rows, ``-step |x|^2 s``."""
        return np.asarray(-step * np.sum(self.x**2, axis=1)[:, None, None] * self.slope)

    def sides_move(self, step: float) -> Array:
        """Return that of a gradient step on queries and keys, ``(A1 + dA1) X (A2 + dA2)^T - A1 X A2^T``."""
        if self.sides is None:
            raise ValueError("these problems have no queries and keys; use data_move")
        A1, A2 = self.sides
        X = self.x.reshape(len(self), A1.shape[2], A2.shape[2])
        keys, queries = A2 @ np.swapaxes(X, 1, 2), A1 @ X
        dA1 = -step * self.slope @ keys
        dA2 = -step * np.swapaxes(self.slope, 1, 2) @ queries
        new = (A1 + dA1) @ X @ np.swapaxes(A2 + dA2, 1, 2)
        return np.asarray(new - queries @ np.swapaxes(A2, 1, 2))

    def damped_move(self, damping: float) -> Array:
        """Return that of a Gauss-Newton step on x, damped relative to the mean diagonal."""
        _, v, _, c = self._state
        mean = np.einsum("cgm,cgmd->cgd", v, self.rows)[:, :, None, :]
        if self.link == "softmax":
            J = v[..., None] * (self.rows - mean)
        else:
            J = v[..., None] * self.rows - self.b[..., None] * mean
        count, D = len(self), self.rows.shape[3]
        J, c = J.reshape(count, -1, D), c.reshape(count, -1)
        scale = damping * np.einsum("cnd,cnd->c", J, J) / D + np.finfo(float).tiny
        step: Array
        if J.shape[1] < D:
            # (J^T J + t)^-1 J^T = J^T (J J^T + t)^-1: the smaller of the two systems.
            H = J @ np.swapaxes(J, 1, 2) + scale[:, None, None] * np.eye(J.shape[1])
            step = np.einsum("cnd,cn->cd", J, np.linalg.solve(H, c[..., None])[..., 0])
        else:
            H = np.swapaxes(J, 1, 2) @ J + scale[:, None, None] * np.eye(D)
            step = np.linalg.solve(H, np.einsum("cnd,cn->cd", J, c)[..., None])[..., 0]
        return np.asarray(-np.einsum("cgmd,cd->cgm", self.rows, step))

    def best(self, move: Callable[[float], Array], sizes: Sequence[float] | Array) -> Array:
        """Return the move of least loss of each instance, none where all raise it."""
        moves = [np.zeros_like(self.z), *(move(float(size)) for size in sizes)]
        with np.errstate(over="ignore", invalid="ignore"):
            losses = np.nan_to_num([self.loss(dz) for dz in moves], nan=np.inf)
        return np.asarray(np.stack(moves)[np.argmin(losses, axis=0), np.arange(len(self))])

    def projected(self, dz: Array) -> Array:
        """Return the part of a move that some x makes, up to constants that no softmax sees."""
        count, G, m, D = self.rows.shape
        columns = self.rows.reshape(count, G * m, D)
        if self.link in ("softmax", "exp"):
            constants = np.kron(np.eye(G), np.ones((m, 1)))
            columns = np.concatenate([columns, np.broadcast_to(constants, (count, G * m, G))], axis=2)
        basis = np.linalg.svd(columns, full_matrices=False)
        kept = (basis.S / basis.S[:, :1] > 1e-10)[:, None, :] * basis.U
        flat = dz.reshape(count, -1)
        return np.asarray(np.einsum("cnk,cpk,cp->cn", kept, kept, flat).reshape(dz.shape))


def draw(link: Link, count: int, shape: Sequence[int], rng: np.random.Generator) -> Family:
    """Draw instances: rows from N(0, I/d), x and x_true from N(0, I), b the softmax of ``A x_true`` plus
    noise of deviation 0.3, which some x nearly attains for softmax and exp, and none for cosh and sinh.

    Parameters
    ----------
    link : {"softmax", "exp", "cosh", "sinh"}
    count : int
    shape : (n, d), or (n1, n2, d1, d2) for a matrix problem
    rng : numpy.random.Generator

    Raises
    ------
    ValueError
        If the shape has neither two numbers nor four.
    """
    sides: Any = None
    if len(shape) == 2:
        n, d = shape
        rows = rng.standard_normal((count, 1, n, d)) / np.sqrt(d)
    elif len(shape) == 4:
        n1, n2, d1, d2 = shape
        sides = (
            rng.standard_normal((count, n1, d1)) / np.sqrt(d1),
            rng.standard_normal((count, n2, d2)) / np.sqrt(d2),
        )
        rows = np.einsum("cia,cjb->cijab", *sides).reshape(count, n1, n2, d1 * d2)
    else:
        raise ValueError(f"shape is {tuple(shape)}; pass (n, d), or (n1, n2, d1, d2) for a matrix problem")
    x, truth = (rng.standard_normal((count, rows.shape[3])) for _ in range(2))
    logits = np.einsum("cgmd,cd->cgm", rows, truth)
    b = softmax(logits + NOISE * rng.standard_normal(logits.shape), axis=2)
    return Family(link, rows, np.asarray(b), x, np.einsum("cgmd,cd->cgm", rows, x), sides)
