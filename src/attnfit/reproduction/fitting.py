"""Fits that stop at rounding, or after one step, on purpose."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from attnfit.solvers import minimize

Array = NDArray[np.float64]


def fitted(problem: Any, x: Array, **options: Any) -> Array:
    """Return where a fit from x ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(minimize(problem, x, random_state=0, **options).x)


def one_step(problem: Any, x: Array, solver: Any, seed: int) -> Array:
    """Return the point after one step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(minimize(problem, x, solver=solver, max_iter=1, tol=1e-15, random_state=seed).x)


def run_of(problem: Any, x: Array, solver: Any, seed: int) -> Any:
    """Return the result of a solver from x, with its points."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return minimize(problem, x, solver=solver, random_state=seed, history="points")
