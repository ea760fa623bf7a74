"""Random instances within the papers' assumptions, as free arrays and the instance they stand for.

A family turns arrays of any size into an instance that meets the assumptions for a given R, by scaling:
search climbs in the arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.activations import Activation
from attnfit.theory.instances.facts import Facts
from attnfit.theory.instances.recovery import Recovery
from attnfit.theory.instances.regression import Regression
from attnfit.theory.instances.step import Step
from attnfit.theory.instances.two_layer import TwoLayer

Array = NDArray[np.float64]
Arrays = dict[str, Array]
AnyInstance = Regression | TwoLayer | Recovery | Step | Facts

# Moves are scaled to stay below the papers' 0.01.
STEP = 0.0099


def within(array: Array, limit: float) -> Array:
    """Return the array scaled down so that its largest spectral or Euclidean norm is at most ``limit``."""
    norm = np.linalg.norm(array, 2, axis=(-2, -1)) if array.ndim > 1 else np.linalg.norm(array)
    top = float(np.max(norm))
    return array if top <= limit else array * (limit / top * (1 - 1e-12))


@dataclass(frozen=True)
class Family(ABC):
    """Instances of one kind: ``arrays`` draws, ``build`` makes an instance for a given R."""

    n: int
    d: int

    @abstractmethod
    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Return free arrays of this scale."""

    @abstractmethod
    def build(self, arrays: Arrays, R: float) -> AnyInstance:
        """Return an instance within the assumptions for this R."""


@dataclass(frozen=True)
class Regressions(Family):
    """n rows in all, in equal groups."""

    groups: int = 1
    function: str = "exp"

    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Draw rows, target, x and both moves; half of the time with one row aligned with x."""
        shape = (self.groups, self.n // self.groups, self.d)
        A, x = scale * rng.standard_normal(shape), scale * rng.standard_normal(self.d)
        if rng.random() < 0.5:
            A[:, 1:] *= 0.1 * rng.random()
            A[:, 0] = scale * x / max(float(np.linalg.norm(x)), 1e-12)
        return {
            "A": A, "x": x, "b": rng.standard_normal(shape[:2]), "dx": rng.standard_normal(self.d),
            "dA": 10.0 ** rng.uniform(-4, 0) * rng.standard_normal(shape),
        }  # fmt: skip

    def build(self, arrays: Arrays, R: float) -> Regression:
        """Scale A, A', x, y and b within R, b within 1, and the moves of the logits below 0.01."""
        A, x = within(arrays["A"], R), within(arrays["x"], R)
        b = arrays["b"] / np.maximum(np.linalg.norm(arrays["b"], axis=1, keepdims=True), 1.0 / min(1.0, R))
        dx = arrays["dx"]
        dx = dx * min(
            1.0, STEP / max(float(np.abs(A @ dx).max()), 1e-300), R / max(float(np.linalg.norm(dx)), 1e-300)
        )
        y = x + dx
        shrink = min(1.0, R / max(float(np.linalg.norm(y)), 1e-300))
        x, y = shrink * x, shrink * y
        A_moved = A + arrays["dA"] * min(1.0, STEP / max(float(np.abs(arrays["dA"] @ x).max()), 1e-300))
        shrink = min(1.0, R / float(np.linalg.norm(A_moved, 2, axis=(1, 2)).max()))
        A, A_moved = shrink * A, shrink * A_moved
        return Regression(A, b, x, y, A_moved=A_moved, function=self.function, R=R)


@dataclass(frozen=True)
class Wave:
    """``h(y) = size sin(rate y + phase) + level``: any h, h', h'' at a point, with known bounds."""

    size: float
    rate: float
    phase: float
    level: float

    def activation(self) -> Activation:
        """Return it as an activation."""
        s, k = self.size, self.rate

        def jet(y: Array) -> tuple[Array, Array, Array]:
            t = k * y + self.phase
            return s * np.sin(t) + self.level, s * k * np.cos(t), -s * k * k * np.sin(t)

        a = abs(s)
        return Activation("wave", jet, None, a * abs(k), a * k * k, a * abs(k) ** 3, a + abs(self.level))


@dataclass(frozen=True)
class Layered(Family):
    """m outputs of n shares of d unknowns; with no activation named, a wave whose four numbers are free."""

    m: int = 2
    activation: str | None = "tanh"

    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Draw both matrices, target, x, the move and the wave."""
        return {
            "A1": scale * rng.standard_normal((self.n, self.d)), "A2": scale * rng.standard_normal((self.m,
            self.n)),
            "b": scale * rng.standard_normal(self.m), "x": scale * rng.standard_normal(self.d),
            "dx": 10.0 ** rng.uniform(-6, 0) * rng.standard_normal(self.d),
            "wave": rng.standard_normal(4) * np.array([1.0, 1.0, 3.0, 10.0 ** rng.uniform(-1, 1.5)]),
        }  # fmt: skip

    def build(self, arrays: Arrays, R: float) -> TwoLayer:
        """Scale everything within R; targets are not negative."""
        x = within(arrays["x"], R)
        y = within(x + arrays["dx"], R)
        h = Wave(*map(float, arrays["wave"])).activation() if self.activation is None else self.activation
        L_h = max(h.slope, h.curvature) if isinstance(h, Activation) else None
        if L_h is not None and L_h <= 0.0:
            L_h = 1e-12
        b = within(np.abs(arrays["b"]), R)
        return TwoLayer(within(arrays["A1"], R), within(arrays["A2"], R), b, x, y, h, R=R, L_h=L_h)


@dataclass(frozen=True)
class Recoveries(Family):
    """n tokens of d features."""

    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Draw the input, the form, the values, the output and the move."""
        d, n = self.d, self.n
        return {
            "X": scale * rng.standard_normal((d, n)), "W": scale * rng.standard_normal((d, d)),
            "V": scale * rng.standard_normal((d, d)), "B": scale**2 * rng.standard_normal((n, d)),
            "dX": 10.0 ** rng.uniform(-5, -1) * rng.standard_normal((d, n)),
        }  # fmt: skip

    def build(self, arrays: Arrays, R: float) -> Recovery:
        """Scale the matrices within R and the output within R^2."""
        X = within(arrays["X"], R)
        Y = within(X + arrays["dX"], R)
        B = arrays["B"] * min(1.0, R * R / max(float(np.abs(arrays["B"]).max()), 1e-300))
        return Recovery(X, within(arrays["W"], R), within(arrays["V"], R), B, Y, R=R)


@dataclass(frozen=True)
class Steps(Family):
    """d unknowns; ``accuracy`` is the spectral accuracy of the approximate Hessian."""

    accuracy: float = 0.01
    k: int = 10

    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Draw an orthogonal basis, eigenvalues over up to six decades, the error and the perturbation."""
        d = self.d
        return {
            "basis": rng.standard_normal((d, d)), "logs": rng.uniform(-6.0, 6.0, d) * rng.random(),
            "e": scale * rng.standard_normal(d), "E": rng.standard_normal((d, d)),
            "q": rng.standard_normal(d),
            "M": rng.random(1), "t": rng.random(1),
        }  # fmt: skip

    def build(self, arrays: Arrays, R: float) -> Step:
        """Scale E to the accuracy and M to ``M r = 0.1 l`` at most."""
        basis = np.linalg.qr(arrays["basis"])[0]
        values = np.exp(np.clip(arrays["logs"], -7.0, 7.0))
        H = (basis * values) @ basis.T
        H = 0.5 * (H + H.T)
        E = 0.5 * (arrays["E"] + arrays["E"].T)
        E = E * (self.accuracy / max(float(np.linalg.norm(E, 2)), 1e-300))
        spectrum = np.linalg.eigvalsh(H)
        r = max(float(np.linalg.norm(arrays["e"])), 1e-300)
        M = 0.1 * spectrum[0] / r * float(np.clip(arrays["M"][0], 0.0, 1.0))
        t = 1.999 / float(spectrum[0] + spectrum[-1]) * float(np.clip(arrays["t"][0], 1e-3, 1.0))
        return Step(H, arrays["e"], E, arrays["q"], M, t=t, k=self.k)


@dataclass(frozen=True)
class FactFamily(Family):
    """Vectors of n entries and matrices of order d."""

    def arrays(self, rng: np.random.Generator, scale: float) -> Arrays:
        """Draw two vectors and two matrices."""
        n, d = self.n, self.d
        return {
            "a": scale * rng.standard_normal(n), "b": scale * rng.standard_normal(n),
            "X": scale * rng.standard_normal((d, d)), "Y": scale * rng.standard_normal((d, d)),
        }  # fmt: skip

    def build(self, arrays: Arrays, R: float) -> Facts:
        """Scale the vectors within R and make Y positive definite."""
        Y = arrays["Y"] @ arrays["Y"].T + 1e-3 * np.eye(self.d)
        return Facts(within(arrays["a"], R), within(arrays["b"], R), arrays["X"], Y, R=R)


FAMILIES: dict[str, type[Family]] = {
    "regression": Regressions, "two_layer": Layered, "recovery": Recoveries, "newton": Steps,
    "facts": FactFamily,
}  # fmt: skip
KINDS: dict[type[object], str] = {
    Regression: "regression", TwoLayer: "two_layer", Recovery: "recovery", Step: "newton", Facts: "facts",
}  # fmt: skip
