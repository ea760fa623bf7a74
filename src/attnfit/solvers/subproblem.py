"""The trust-region subproblem: minimise ``g^T p + 0.5 p^T H p`` subject to ``||p|| <= radius``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]

# Eigenvalues below this share of the largest are rounding: the direction is not identified. A Hessian that is
# one Gram is known better than that: see `attnfit.data.gram.flatness`.
RANK_TOLERANCE = 1e-13
# Numbers that the products of conjugate gradients may take.
KEPT_NUMBERS = 1 << 25
# Residuals, relative to the gradient, at which systems of all rows and of drawn ones are solved.
FINE, ROUGH = 0.01, 0.1
# Drawn rows precondition where they are at most this share of all: more would cost what they save.
HELPFUL = 0.2
TINY = float(np.finfo(np.float64).tiny)


def length(v: Array) -> float:
    """Return the Euclidean length of a vector; NumPy's norm takes as long to begin as a short one takes."""
    return math.sqrt(v @ v)


@dataclass(frozen=True)
class Step:
    """A step, the decrease that the quadratic model promises, whether the radius bounded it, and its length
    in scaled variables.
    """

    p: Array
    predicted: float
    bounded: bool
    size: float = 0.0


class MoreSorensen:
    """A quadratic model in its eigenbasis: exact solutions for every radius, minimum-norm where it is
    singular.

    More and Sorensen, "Computing a trust region step" (1983).
    """

    def __init__(self, hessian: Array, tolerance: float = RANK_TOLERANCE) -> None:
        # `scipy.linalg.eigh` takes as long to find this routine as a small matrix takes.
        self.values, self.vectors, failed = linalg.lapack.dsyevd(hessian, lower=1)
        if failed:
            raise linalg.LinAlgError(f"eigenvectors were not found: dsyevd returned {failed}")
        largest = float(np.abs(self.values).max())
        self.floor = tolerance * max(largest, TINY)
        self._flat = np.abs(self.values) <= self.floor
        # Number of directions without curvature.
        self.n_flat = int(np.count_nonzero(self._flat))
        # Whether some direction has negative curvature beyond rounding.
        self.negative = bool(self.values[0] < -1e-9 * largest)

    def is_firm(self, share: float) -> bool:
        """Whether every direction has more curvature than this share of the largest."""
        return bool(self.values[0] > share * self.values[-1])

    @property
    def hessian(self) -> Array:
        """The matrix, shape (d, d)."""
        return np.asarray((self.vectors * self.values) @ self.vectors.T)

    @property
    def unidentified(self) -> Array:
        """Directions without curvature, shape (n_unknowns, k), as columns."""
        return np.asarray(self.vectors[:, self._flat])

    def weakest(self) -> tuple[Array, float, float]:
        """Return the direction of least curvature that is not flat, shape (d,), its curvature, and that as a
        share of the largest.
        """
        size = np.abs(self.values)
        k = int(np.argmin(np.where(size > self.floor, size, np.inf)))
        return self.vectors[:, k], float(self.values[k]), float(size[k] / size.max())

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return the global minimiser of the model within the radius; with ``steep_only`` it does not move
        along directions without curvature.
        """
        along = self.vectors.T @ g
        if self.n_flat:
            # A gradient in a flat direction that is rounding must not be divided by a curvature that is
            # rounding.
            rounding = np.abs(along) <= 1e-3 * length(along)
            along[self._flat & (steep_only | rounding)] = 0.0
        bounded = self.negative or bool(along[self._flat].any())
        if not bounded:
            # Curvature that is negative by rounding counts by its size.
            q = -along / np.where(self._flat, 1.0, np.abs(self.values))
            bounded = not length(q) <= radius
        if bounded:
            if not np.isfinite(radius):
                # No radius yet and no Newton step: take the scale between a gradient step (the diagonal is
                # about one) and the step of the model with the curvature's absolute values.
                size = np.maximum(np.abs(self.values), max(self.floor, 1e-100))
                radius = float(np.sqrt(length(along / size) * length(along)))
            q = self._boundary(along, max(radius, TINY))
        predicted = -float(along @ q + 0.5 * (self.values * q) @ q)
        return Step(self.vectors @ q, predicted, bounded)

    def approach(self, g: Array) -> Array:
        """Return the Newton step with the curvature taken by absolute value, off flat directions: how far a
        stationary point is, whatever its kind.
        """
        size = np.where(np.abs(self.values) > self.floor, np.abs(self.values), np.inf)
        return np.asarray(self.vectors @ (-(self.vectors.T @ g) / size))

    def _boundary(self, along: Array, radius: float) -> Array:
        """Solve ``||(H + shift)^-1 g|| = radius`` for a shift that makes H + shift positive, by safeguarded
        Newton.
        """
        lowest = max(0.0, -float(self.values[0]))
        low, high = lowest, lowest + length(along) / radius + self.floor
        gap = self.floor
        if lowest > 0 and length(along / (self.values + (lowest + gap))) < radius:
            # Hard case: fill up to the radius along the direction of most negative curvature.
            q = -along / np.maximum(self.values + lowest + gap, gap)
            q[0] = 0.0
            missing = np.sqrt(max(radius**2 - float(q @ q), 0.0))
            q[0] = -missing if along[0] > 0 else missing
            return np.asarray(q)
        shift = max(low + gap, 0.5 * (low + high))
        for _ in range(100):
            norm = length(along / (self.values + shift))
            if abs(norm - radius) <= 1e-6 * radius:
                break
            low, high = (shift, high) if norm > radius else (low, shift)
            # Of a step of length one: squares and cubes of what rounding left of a gradient may underflow.
            unit = along / (self.values + shift) / norm if norm > 0.0 else np.zeros_like(along)
            slope = float(np.sum(unit * unit / (self.values + shift)))
            newton = shift + (norm - radius) / (radius * slope) if radius * slope > 0.0 else np.inf
            shift = newton if low < newton < high else 0.5 * (low + high)
        return np.asarray(-along / (self.values + shift))


class Cholesky:
    """A quadratic model that is factored only as far as needed: Cholesky for a plain Newton step, else
    eigenvectors.
    """

    def __init__(self, hessian: Array, tolerance: float = RANK_TOLERANCE) -> None:
        self.hessian, self.tolerance = hessian, tolerance
        self._eigen: MoreSorensen | None = None
        self._factor: Array | None = None
        self._reciprocal = 0.0
        try:
            factor = linalg.cholesky(hessian, lower=True, check_finite=False)
        except linalg.LinAlgError:
            return
        # The estimate of the condition number is rarely off by more than three (Higham 1987).
        size = float(np.abs(hessian).sum(axis=0).max())
        reciprocal, _ = linalg.lapack.dpocon(factor, size, uplo="L")
        self._reciprocal = float(reciprocal)
        if reciprocal > 100 * tolerance:
            self._factor = factor

    def is_firm(self, share: float) -> bool:
        """Whether every direction has more curvature than this share of the largest, by the estimate of the
        condition number, rarely off by more than three.
        """
        return self._reciprocal > 3.0 * share

    @property
    def eigen(self) -> MoreSorensen:
        """The model in its eigenbasis."""
        if self._eigen is None:
            self._eigen = MoreSorensen(self.hessian, self.tolerance)
        return self._eigen

    @property
    def eigen_if_needed(self) -> MoreSorensen | None:
        """The model in its eigenbasis, or None where a factorisation shows that it has full rank."""
        return None if self._factor is not None else self.eigen

    @property
    def negative(self) -> bool:
        """Whether some direction has negative curvature beyond rounding."""
        return self._factor is None and self.eigen.negative

    @property
    def n_flat(self) -> int:
        """Number of directions without curvature."""
        return 0 if self._factor is not None else self.eigen.n_flat

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return the global minimiser of the model within the radius."""
        if self._factor is not None:
            p = -linalg.cho_solve((self._factor, True), g, check_finite=False)
            if length(p) <= radius:
                return Step(p, -0.5 * float(g @ p), False)
        return self.eigen.solve(g, radius, steep_only=steep_only)


class QuasiNewton:
    """A model corrected by pairs of steps and gradient differences: limited-memory BFGS on top of a factored
    Hessian.

    Nocedal, "Updating quasi-Newton matrices with limited storage" (1980), with the model in place of a
    multiple of the identity.
    """

    def __init__(self, base: MoreSorensen | Cholesky) -> None:
        self.base = base
        self._pairs: list[tuple[Array, Array, float]] = []

    @property
    def negative(self) -> bool:
        """Whether some direction has negative curvature beyond rounding."""
        return self.base.negative

    @property
    def hessian(self) -> Array:
        """The corrected matrix, shape (d, d)."""
        matrix = self.base.hessian.copy()
        for s, y, rho in self._pairs:
            along = matrix @ s
            matrix += rho * np.multiply.outer(y, y) - np.multiply.outer(along, along) / float(s @ along)
        return matrix

    def learn(self, s: Array, y: Array) -> QuasiNewton:
        """Add a step and its gradient difference, in scaled variables."""
        curvature = float(s @ y)
        if curvature > 0.0:
            self._pairs.append((s, y, 1.0 / curvature))
        return self

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return the quasi-Newton step, or the base model's step where that one is too long."""
        q, coefficients = g.copy(), []
        for s, y, rho in reversed(self._pairs):
            coefficients.append(rho * float(s @ q))
            q -= coefficients[-1] * y
        inner = self.base.solve(q, np.inf, steep_only=steep_only)
        if not self._pairs or inner.bounded:
            return self.base.solve(g, radius, steep_only=steep_only)
        r = -inner.p
        for (s, y, rho), alpha in zip(self._pairs, reversed(coefficients), strict=True):
            r += (alpha - rho * float(y @ r)) * s
        if length(r) > radius:
            return self.base.solve(g, radius, steep_only=steep_only)
        return Step(-r, 0.5 * float(g @ r), False)


class SteihaugToint:
    """A quadratic model known through products only: conjugate gradients stopped at the radius.

    Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (1983). Started
    from zero it never leaves the range of the Hessian, so the step has minimum norm where that is singular. A
    model belongs to one gradient.
    """

    def __init__(self, product: Callable[[Array], Array], forcing: float, max_products: int = 250) -> None:
        self.product = product
        self.forcing = forcing
        self.max_products = max_products
        self.negative = False
        # A shorter radius follows the same path less far: its products are known, as many as may be kept.
        self._known: list[Array] = []

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return an approximate minimiser of the model within the radius."""
        p, Hp = np.zeros_like(g), np.zeros_like(g)
        r, direction = g.copy(), -g
        square = float(r @ r)
        target = self.forcing**2 * square
        for k in range(self.max_products):
            Hd = self._known[k] if k < len(self._known) else self.product(direction)
            if k == len(self._known) and (k + 1) * len(g) <= KEPT_NUMBERS:
                self._known.append(Hd)
            curvature = float(direction @ Hd)
            if curvature <= RANK_TOLERANCE * float(direction @ direction):
                self.negative = True
                # Without a radius yet, a gradient step sets the scale: the model's diagonal is about one.
                reach = radius if np.isfinite(radius) else max(length(g), length(p))
                tau = _to_boundary(p, direction, reach)
                return _krylov_step(g, p + tau * direction, Hp + tau * Hd, True)
            alpha = square / curvature
            if length(p + alpha * direction) > radius:
                tau = _to_boundary(p, direction, radius)
                return _krylov_step(g, p + tau * direction, Hp + tau * Hd, True)
            p, Hp, r = p + alpha * direction, Hp + alpha * Hd, r + alpha * Hd
            fresh = float(r @ r)
            if fresh <= target:
                break
            direction = -r + (fresh / square) * direction
            square = fresh
        return _krylov_step(g, p, Hp, False)


class FlexibleGradients(SteihaugToint):
    """The same with a preconditioner that is itself a solver and may differ a little from call to call.

    Notay, "Flexible conjugate gradients" (2000), doi:10.1137/S1064827599362314. Where the radius or negative
    curvature comes in, the step is that of `SteihaugToint`.

    Parameters
    ----------
    precondition : callable
        An approximate solution of ``H z = r``; None where it has none.
    """

    def __init__(
        self,
        product: Callable[[Array], Array],
        forcing: float,
        precondition: Callable[[Array], Array | None],
        max_products: int = 250,
    ) -> None:
        super().__init__(product, forcing, max_products)
        self.precondition = precondition
        self._whole: Step | None = None

    def solve(self, g: Array, radius: float, *, steep_only: bool = False) -> Step:
        """Return an approximate minimiser of the model within the radius."""
        if self._whole is None:
            self._whole = self._flexible(g)
        whole = self._whole
        return whole if whole is not None and length(whole.p) <= radius else super().solve(g, radius)

    def _flexible(self, g: Array) -> Step | None:
        p, Hp, r = np.zeros_like(g), np.zeros_like(g), g.copy()
        target = self.forcing * length(g)
        direction, before, square = np.zeros_like(g), r, 1.0
        for _ in range(self.max_products):
            z = self.precondition(r)
            if z is None or not float(z @ r) > 0.0:
                return None
            beta = float(z @ (r - before)) / square if direction.any() else 0.0
            direction, before, square = -z + beta * direction, r, float(z @ r)
            Hd = self.product(direction)
            curvature = float(direction @ Hd)
            if curvature <= RANK_TOLERANCE * float(direction @ direction):
                return None
            alpha = -float(r @ direction) / curvature
            p, Hp, r = p + alpha * direction, Hp + alpha * Hd, r + alpha * Hd
            if length(r) <= target:
                break
        return _krylov_step(g, p, Hp, False)


def preconditioned(product: Callable[[Array], Array], drawn: Callable[[Array], Array]) -> FlexibleGradients:
    """Return the model of all rows, solved with the help of products with the Hessian of drawn rows, which
    cost a share of a read: with 1,000,000 x 10,000 sparse rows 20 reads a step in place of 115.
    """

    def precondition(r: Array) -> Array | None:
        near = SteihaugToint(drawn, ROUGH)
        z = near.solve(r, np.inf).p
        # Nor does it help where some direction is in no drawn row.
        return None if near.negative else -z

    return FlexibleGradients(product, FINE, precondition)


def _krylov_step(g: Array, p: Array, Hp: Array, bounded: bool) -> Step:
    return Step(p, -float(g @ p + 0.5 * p @ Hp), bounded)


def _to_boundary(p: Array, direction: Array, radius: float) -> float:
    """Return tau >= 0 with ``||p + tau direction|| = radius``."""
    dd, pd, pp = float(direction @ direction), float(p @ direction), float(p @ p)
    gap = max(radius**2 - pp, 0.0)
    root = np.sqrt(pd * pd + dd * gap)
    return float(gap / (pd + root) if pd > 0 else (root - pd) / dd)
