"""Value, gradient and reference solution of a benchmark problem, sharing no code with any solver.

``python -m benchmarks.check`` compares the gradients here with finite differences.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import check_grad
from scipy.special import softmax

from benchmarks.data import Array, Case, Spec, blocks, draw


def value(case: Case, x: Array) -> float:
    """Objective in the convention of the library (squared losses with the factor one half)."""
    z = case.A @ x
    if case.starts is not None:
        return float(np.sum(log_normalisers(z, case.starts)) - case.b @ z)
    with np.errstate(over="ignore"):
        fit = np.exp(z) if case.spec.family == "exponential" else softmax(z)
        return float(0.5 * np.sum((fit - case.b) ** 2))


def gradient(case: Case, x: Array) -> Array:
    """Gradient of ``value``."""
    return np.asarray(case.A.T @ slope(case, x))


def slope(case: Case, x: Array) -> Array:
    """Derivative of the objective in the logits."""
    z = case.A @ x
    if case.starts is not None:
        return probabilities(z, case.starts) - case.b
    with np.errstate(over="ignore", invalid="ignore"):
        if case.spec.family == "exponential":
            u = np.exp(z)
            return np.asarray(u * (u - case.b))
        f = softmax(z)
        jacobian_times = f * (f - case.b)
        return np.asarray(jacobian_times - f * jacobian_times.sum())


def relative_gradient(case: Case, x: Array) -> float:
    """``||g(x)|| / ||g(0)||`` in the user's own variables."""
    return float(np.linalg.norm(gradient(case, x)) / np.linalg.norm(gradient(case, np.zeros_like(x))))


def log_normalisers(z: Array, starts: Array) -> Array:
    """Log of the sum of exponentials of every group."""
    top = np.maximum.reduceat(z, starts)
    shifted = np.exp(z - np.repeat(top, np.diff(starts, append=len(z))))
    return np.asarray(top + np.log(np.add.reduceat(shifted, starts)))


def probabilities(z: Array, starts: Array) -> Array:
    """Softmax within every group."""
    return np.asarray(np.exp(z - np.repeat(log_normalisers(z, starts), np.diff(starts, append=len(z)))))


def reference(case: Case, candidates: list[Array]) -> Array:
    """The best solution known: the lowest of the candidates and the truth, all polished if that is cheap.

    The lowest and not the one with the smallest gradient: squared losses have flat regions far away.
    Sparse and wide problems are not polished, since a dense Hessian would cost more than the race.
    """
    lowest = min(candidates, key=lambda x: value(case, x))
    if not isinstance(case.A, np.ndarray) or case.A.shape[1] > 256:
        return lowest
    return min((polish(case, x) for x in (lowest, case.x_true)), key=lambda x: value(case, x))


def polish(case: Case, x: Array, steps: int = 30) -> Array:
    """Newton steps with the exact Hessian made positive, each shortened until the objective falls."""
    g, low = gradient(case, x), value(case, x)
    for _ in range(steps):
        curvature, V = np.linalg.eigh(hessian(case, x))
        curvature = np.maximum(np.abs(curvature), 1e-14 * np.abs(curvature).max())
        direction = V @ ((V.T @ g) / curvature)
        trial, v_trial = x, np.inf
        for halvings in range(12):
            trial = x - 0.5**halvings * direction
            v_trial = value(case, trial)
            if v_trial <= low * (1 + 1e-12):
                break
        g_trial = gradient(case, trial)
        # Near the solution the objective is flat to rounding, and only the gradient tells progress.
        falls = v_trial < low * (1 - 1e-10) or np.linalg.norm(g_trial) < 0.9 * np.linalg.norm(g)
        if not (falls and v_trial <= low * (1 + 1e-12)):
            break
        x, g, low = trial, g_trial, min(low, v_trial)
    return x


def hessian(case: Case, x: Array) -> Array:
    """Dense Hessian: a weighted Gram of rows centred within their group."""
    A, b, z = case.A, case.b, case.A @ x
    if case.starts is not None:
        return choice_hessian(A, probabilities(z, case.starts), case.starts)
    if case.spec.family == "exponential":
        u = np.exp(z)
        weight, centre = u * (2 * u - b), np.zeros(A.shape[1])
    else:
        f = softmax(z)
        weight, centre = f**2 + f * (f - b) - f * (f @ (f - b)), A.T @ f
    H = np.zeros((A.shape[1],) * 2)
    for rows in blocks(len(b)):
        C = A[rows] - centre
        H += C.T @ (weight[rows, None] * C)
    return H


def choice_hessian(A: Array, f: Array, starts: Array) -> Array:
    """Sum over the groups of the covariance of their rows under ``f``."""
    H = np.zeros((A.shape[1],) * 2)
    ends = np.append(starts[1:], len(f))
    cuts = np.unique(np.searchsorted(ends, np.arange(0, len(f), 65_536)))
    for first, last in zip(cuts, np.append(cuts[1:], len(starts)), strict=True):
        rows = slice(starts[first], ends[last - 1])
        local = starts[first:last] - rows.start
        weighted = f[rows, None] * A[rows]
        centre = np.add.reduceat(weighted, local, axis=0)
        H += A[rows].T @ weighted - centre.T @ centre
    return H


def main() -> None:
    """Print the largest relative difference from finite differences, a line a family."""
    for spec in (
        Spec("softmax", 200, 4),
        Spec("softmax", 200, 40, nonzeros=5, variant="uniform"),
        Spec("exponential", 200, 4),
        Spec("choice", 200, 4, variant="half"),
    ):
        case = draw(spec)
        x = 0.3 * case.x_true
        error = check_grad(lambda y, c=case: value(c, y), lambda y, c=case: gradient(c, y), x)
        line = f"{spec.title}: gradient {error / np.linalg.norm(gradient(case, x)):.1e}"
        if not spec.nonzeros:
            v, h = case.x_true, 1e-5
            numeric = (gradient(case, x + h * v) - gradient(case, x - h * v)) / (2 * h)
            error = float(np.linalg.norm(hessian(case, x) @ v - numeric))
            line += f", Hessian {error / np.linalg.norm(numeric):.1e}"
        print(line)


if __name__ == "__main__":
    main()
