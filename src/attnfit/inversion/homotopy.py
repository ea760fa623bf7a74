"""Solve F(x) = y for a map with as many outputs as inputs: Newton's method, and a path that must arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Map = Callable[[Array], Array]

# Relative residuals: what ends Newton's method at once, and what ends it when a step gains little.
DONE, NEARLY = 1e-13, 1e-12
# Steps of Newton's method, and the shortest that is tried.
MAX_NEWTON, SHORTEST = 60, 1e-3
# Corrections of a point of the path, cosines of consecutive tangents, and how the step follows them.
MAX_CORRECTIONS, CONVERGED = 6, 1e-10
LEAST_COSINE, TURNED, STRAIGHT = 0.3, 0.7, 0.97
SMALLEST_STEP, MAX_POINTS = 1e-6, 300
# Of paths in more dimensions than this, where a point takes seconds.
WIDE, MAX_POINTS_WIDE = 128, 60
# First steps of the attempts.
STEPS = (0.25, 0.0625, 0.015625)
# A path that has come so far beyond s = 1 seldom turns back.
FAR = 3.0


@dataclass(frozen=True)
class Equation:
    """``F(x) = y`` with a Jacobian; both sides flat, of the same length."""

    value: Map
    jacobian: Map
    y: Array

    def residual(self, x: Array) -> Array:
        """Return ``F(x) - y``."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self.value(x) - self.y


def newton(equation: Equation, x: Array) -> tuple[Array, float]:
    """Return where Newton's method ends from x, its steps halved while the residual does not fall, and the
    residual there relative to y.
    """
    size = float(np.linalg.norm(equation.y)) or 1.0
    r = equation.residual(x)
    least = float(np.linalg.norm(r))
    for _ in range(MAX_NEWTON):
        if not least > DONE * size:
            break
        try:
            p = np.linalg.solve(equation.jacobian(x), -r)
        except np.linalg.LinAlgError:
            break
        share = 1.0
        while True:
            trial = equation.residual(x + share * p)
            norm = float(np.linalg.norm(trial))
            if norm <= (1.0 - share / 4.0) * least:
                break
            share *= 0.5
            if share < SHORTEST:
                return x, least / size
        gained = least / max(norm, np.finfo(float).tiny)
        x, r, least = x + share * p, trial, norm
        if least <= NEARLY * size and gained < 2.0:
            break
    return x, least / size


@dataclass
class Path:
    """The path of ``H(x, s) = x + s (F(x) - x) = y`` from (y, 0), which crosses s = 1 at inputs.

    Where F(x) - x is bounded, almost every y has a path that reaches s = 1: Chow, Mallet-Paret and Yorke,
    "Finding zeros of maps: homotopy methods that are constructive with probability one" (1978); Watson et
    al., "HOMPACK" (1987), doi:10.1145/29380.214343. The determinant of the Jacobian is positive at the first
    crossing and changes its sign from one to the next.

    Attributes
    ----------
    n_steps : int
        Points of the path so far.
    """

    equation: Equation
    step: float = 0.25
    n_steps: int = 0

    def crossings(self) -> Iterator[Array]:
        """Yield inputs in the order of the path, until it cannot be followed or has gone far beyond them."""
        y = self.equation.y
        d = len(y)
        rms = float(np.sqrt(np.mean(y**2))) or 1.0
        # s weighs as much as all coordinates together.
        scale = np.r_[np.full(d, 1.0 / rms), np.sqrt(d)]
        at, tangent = np.r_[y, 0.0], np.r_[np.zeros(d), 1.0]
        tangent = self._tangent(at, tangent, scale)
        h, largest = self.step, 4.0 * self.step
        most = MAX_POINTS if d <= WIDE else min(MAX_POINTS, MAX_POINTS_WIDE)
        while self.n_steps < most and h > SMALLEST_STEP and at[-1] < FAR:
            self.n_steps += 1
            found = self._corrected(at + h * np.sqrt(d) * tangent / scale, tangent, scale)
            turned = None if found is None else self._tangent(found, tangent, scale)
            cosine = -1.0 if turned is None else float(turned @ tangent)
            if found is None or turned is None or cosine < LEAST_COSINE:
                h /= 3.0
                continue
            length = float(np.linalg.norm((found - at) * scale))
            if length > 3.0 * h * np.sqrt(d):
                h /= 3.0
                continue
            if (at[-1] - 1.0) * (found[-1] - 1.0) < 0.0:
                share = (1.0 - at[-1]) / (found[-1] - at[-1])
                between = at[:-1] + share * (found - at)[:-1]
                x, left = newton(self.equation, between)
                if np.linalg.norm((x - between) / rms) > length or left > 100.0 * NEARLY:
                    h /= 3.0
                    continue
                # Upwards the determinant is positive, downwards negative: else this is another path.
                if sign(self.equation.jacobian(x)) != (1 if found[-1] > at[-1] else -1):
                    return
                yield x
            at, tangent = found, turned
            if cosine > STRAIGHT:
                h = min(2.0 * h, largest)
            elif cosine < TURNED:
                h /= 2.0

    def _bordered(self, at: Array, last: Array, scale: Array) -> Array:
        """Return the Jacobian of H in scaled variables with a further row."""
        x, s = at[:-1], at[-1]
        J = self.equation.jacobian(x)
        M = np.empty((len(at), len(at)))
        M[:-1, :-1] = s * J + (1.0 - s) * np.eye(len(x))
        M[:-1, -1] = self.equation.value(x) - x
        M[:-1] /= scale
        M[-1] = last
        return M

    def _tangent(self, at: Array, before: Array, scale: Array) -> Array:
        """Return the unit tangent on the side of another one, the last row of the bordered system."""
        unit = np.zeros(len(at))
        unit[-1] = 1.0
        try:
            tangent = np.linalg.solve(self._bordered(at, before, scale), unit)
        except np.linalg.LinAlgError:
            return -before
        return np.asarray(tangent / np.linalg.norm(tangent))

    def _corrected(self, at: Array, tangent: Array, scale: Array) -> Array | None:
        """Return the point of the path across from a predicted one; None where that does not converge."""
        size = float(np.linalg.norm(self.equation.y)) or 1.0
        for _ in range(MAX_CORRECTIONS):
            x, s = at[:-1], at[-1]
            r = np.r_[x + s * (self.equation.value(x) - x) - self.equation.y, 0.0]
            if not np.isfinite(r).all():
                return None
            if np.linalg.norm(r) <= CONVERGED * size:
                return at
            try:
                p = np.linalg.solve(self._bordered(at, tangent, scale), -r)
            except np.linalg.LinAlgError:
                return None
            at = at + p / scale
        return None


def follow(equation: Equation, most: int) -> tuple[list[Array], int]:
    """Return the first inputs on the path, at most so many, and the points it took.

    A path that jumped to another one is followed again in quarter steps.
    """
    points, found = 0, []
    for step in STEPS[: None if len(equation.y) <= WIDE else 1]:
        path = Path(equation, step)
        found = list(islice(path.crossings(), most))
        points += path.n_steps
        if found:
            break
    return found, points


def sign(J: Array) -> int:
    """Return the sign of the determinant by its factors, 0 where it vanishes."""
    return int(np.linalg.slogdet(J)[0])
