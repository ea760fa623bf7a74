"""Activations of all outputs together: ``h: R^m -> R^m``, such as a softmax or a normalisation of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.activations import Activation, as_activation

Array = NDArray[np.float64]

# Derivatives are compared with central differences at so many points, with this step, to this share.
N_PROBES, STEP, TOLERANCE = 3, 1e-5, 1e-6


@dataclass(frozen=True)
class VectorActivation:
    """A function of vectors with m entries, and its derivatives.

    Attributes
    ----------
    name : str
    value : callable
        y, shape (m,), to h(y), shape (m,).
    jacobian : callable
        y to ``Jh(y)``, shape (m, m).
    bend : callable, optional
        (y, c) to ``sum_k c_k Hess h_k(y)``, shape (m, m) and symmetric. Without it second derivatives of h
        are left out of the Hessian: Gauss-Newton in h.
    slope, curvature, jerk : float
        Bounds of the norms of the first three derivatives, as multilinear maps; NaN where unknown.

    Notes
    -----
    With ``J = diag(f) - f f^T``, ``y = A2 f``, ``c = h(y) - b`` and ``q = A2^T Jh^T (w c)`` the gradient of
    ``0.5 sum w c^2`` in the logits is ``f (q - <f, q>)`` and the Hessian
    ``J A2^T (Jh^T diag(w) Jh + K(y, w c)) A2 J`` and the part of `attnfit.problems.TwoLayer` that q gives.
    """

    name: str
    value: Callable[[Array], Array]
    jacobian: Callable[[Array], Array]
    bend: Callable[[Array, Array], Array] | None = None
    slope: float = float("nan")
    curvature: float = float("nan")
    jerk: float = float("nan")

    kink = None

    @property
    def bounds_known(self) -> bool:
        """Whether the three derivatives have known bounds, and are all there."""
        return self.bend is not None and bool(np.isfinite([self.slope, self.curvature, self.jerk]).all())

    def __call__(self, y: Array) -> Array:
        """Return h of each column, shape (m, k)."""
        return np.stack([np.asarray(self.value(column), dtype=np.float64) for column in y.T], axis=1)

    def derivatives(self, y: Array, b: Array, w: Array | None) -> tuple[Array, Array, Array, Array]:
        """Return ``c = h(y) - b`` and the gradient of ``0.5 sum w c^2`` in y, shape (m, k) each, and ``Jh^T
        diag(w) Jh`` and the second derivative, shape (k, m, m) each.
        """
        residual = self(y) - b
        weighted = residual if w is None else w * residual
        slope = np.empty_like(residual)
        gauss = np.empty((y.shape[1], len(y), len(y)))
        curvature = gauss if self.bend is None else np.empty_like(gauss)
        for j, column in enumerate(y.T):
            Jh = np.asarray(self.jacobian(column), dtype=np.float64)
            slope[:, j] = Jh.T @ weighted[:, j]
            gauss[j] = Jh.T @ (Jh if w is None else w[:, min(j, w.shape[1] - 1), None] * Jh)
            if self.bend is not None:
                curvature[j] = gauss[j] + np.asarray(self.bend(column, weighted[:, j]), dtype=np.float64)
        return residual, slope, gauss, curvature


AnyActivation = Activation | VectorActivation


def read_activation(activation: Any, n_outputs: int) -> AnyActivation:
    """Return an activation: entrywise as `as_activation` has it, or of all outputs together.

    Parameters
    ----------
    activation : str, Activation, VectorActivation or tuple of callables
        A pair ``(h, Jh)`` or a triple ``(h, Jh, K)`` whose second function returns a matrix is one of
        vectors; bounds may follow as for entrywise ones.
    n_outputs : int
        m, the number of rows of the last matrix.

    Raises
    ------
    ValueError
        As `as_activation`; if Jh or K differs from central differences, naming the worst entry.
    """
    if isinstance(activation, VectorActivation):
        _require_derivatives(activation, n_outputs)
        return activation
    if not isinstance(activation, list | tuple):
        return as_activation(activation)
    functions, bounds = list(activation), {}
    if functions and isinstance(functions[-1], Mapping):
        bounds = dict(functions.pop())
    if len(functions) not in (2, 3) or not all(map(callable, functions)):
        return as_activation(activation)
    probe = np.asarray(functions[1](np.linspace(-0.5, 0.5, n_outputs)))
    if probe.ndim != 2:
        return as_activation(activation)
    unknown = sorted(set(bounds) - {"slope", "curvature", "jerk"})
    if unknown:
        raise ValueError(f"activation states {unknown[0]!r}; bounds are slope, curvature and jerk")
    found = VectorActivation("custom", *functions, **bounds)
    _require_derivatives(found, n_outputs)
    return found


def _require_derivatives(h: VectorActivation, m: int) -> None:
    """Compare Jh and K with central differences."""
    rng, eye = np.random.default_rng(0), STEP * np.eye(m)
    for _ in range(N_PROBES):
        y, c = rng.standard_normal((2, m))
        value, Jh = np.asarray(h.value(y)), np.asarray(h.jacobian(y))
        for name, found, shape in (("h", value, (m,)), ("Jh", Jh, (m, m))):
            if found.shape != shape or not np.isfinite(found).all():
                raise ValueError(f"{name} of activation gave shape {found.shape}; expected finite {shape}")
        _compare("Jh", Jh, np.stack([h.value(y + e) - h.value(y - e) for e in eye], axis=1) / (2 * STEP))
        if h.bend is None:
            continue
        K = np.asarray(h.bend(y, c))
        if K.shape != (m, m) or not np.isfinite(K).all():
            raise ValueError(f"K of activation gave shape {K.shape}; expected finite {(m, m)}")
        rows = [(h.jacobian(y + e) - h.jacobian(y - e)).T @ c for e in eye]
        _compare("K", K, np.stack(rows, axis=1) / (2 * STEP))


def _compare(name: str, given: Array, measured: Array) -> None:
    errors = np.abs(given - measured)
    i, j = np.unravel_index(int(np.argmax(errors)), errors.shape)
    if errors[i, j] > TOLERANCE * max(float(np.abs(measured).max()), 1e-3):
        raise ValueError(
            f"{name} of activation is not what differences give: entry ({i}, {j}) is {given[i, j]:.6g}, "
            f"differences give {measured[i, j]:.6g}; correct {name}"
        )
