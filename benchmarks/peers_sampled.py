"""Peers that know what attnfit knows: a sample of 20,000 rows, its minimiser as the start, its Hessian.

Nobody ships these solvers; a careful user would write them. They answer the question that plain L-BFGS from
zero leaves open: what is gained beyond a good start and a good metric.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy import linalg, sparse

from benchmarks.data import Array, Case
from benchmarks.meter import Clock, Meter, Outcome, Stop
from benchmarks.objectives import Objective, scaled
from benchmarks.peers import LBFGS, scipy_run, zeros

SAMPLE_ROWS = 20_000
# Rows of a sketch for each unknown.
SKETCH = 10


def sampled(case: Case) -> Case:
    """Return about 20,000 rows, or whole choice sets: a problem with the same minimiser in expectation."""
    rng, n = np.random.default_rng(1), len(case.b)
    if case.starts is None:
        rows = np.sort(rng.choice(n, min(n, SAMPLE_ROWS), replace=False))
        # The shares of a sample of one group are larger than those among all its rows.
        factor = n / len(rows) if case.spec.family == "softmax" else 1.0
        return replace(case, A=case.A[rows], b=case.b[rows] * factor)
    ends = np.append(case.starts, n)
    kept = np.sort(rng.choice(len(case.starts), max(1, len(case.starts) * SAMPLE_ROWS // n), replace=False))
    rows = np.concatenate([np.arange(ends[g], ends[g + 1]) for g in kept])
    sizes = ends[kept + 1] - ends[kept]
    return replace(case, A=case.A[rows], b=case.b[rows], starts=np.cumsum(sizes) - sizes)


def hessian(objective: Objective, rows: Any) -> Array:
    """Return ``scale sum_i |w_i| (a_i - c_i)(a_i - c_i)^T`` at the last evaluated point, c_i the mean of the
    row's group, or zero.
    """
    weight, f = curvature(objective), getattr(objective, "_f", None)
    if f is None:
        H = rows.T @ (weight[:, None] * rows)
    elif sparse.issparse(rows):
        c, moment, total = f @ rows, weight @ rows, float(weight.sum())
        H = (rows.T @ (sparse.diags_array(weight) @ rows)).toarray()
        H += total * np.outer(c, c) - np.outer(c, moment) - np.outer(moment, c)
    else:
        mean = sparse.csr_array((f, np.arange(len(f)), np.append(objective.starts, len(f))))
        centred = rows - np.repeat(mean @ rows, objective.sizes, axis=0)
        H = centred.T @ (weight[:, None] * centred)
    H = np.asarray(objective.scale * H)
    H[np.diag_indices(len(H))] += 1e-12 * np.trace(H) / len(H)
    return H


def curvature(objective: Objective) -> Array:
    """Return the size of the weight of each row in the Hessian at the last evaluated point."""
    weight = getattr(objective, "_weight", None)
    return np.asarray(np.abs(objective._f if weight is None else weight))  # type: ignore[attr-defined]


def sample_start(case: Case, meter: Meter) -> tuple[Array, Array]:
    """Return the minimiser of a sample, by Newton's method, and a Cholesky factor of its Hessian there; the
    reads of the sample are booked as their share of all.
    """
    small = sampled(case)
    own = Meter(0.0, meter.limit)
    objective = scaled(small, own)
    rows = small.A
    x = zeros(case)
    value, gradient = objective(x)
    first = np.linalg.norm(gradient)
    for _ in range(50):
        H = hessian(objective, rows)
        own.spend(1)
        if np.linalg.norm(gradient) <= 1e-4 * first:
            break
        step, length = np.linalg.solve(H, gradient), 1.0
        while length > 1e-6:
            new_value, new_gradient = objective(x - length * step)
            if new_value <= value - 1e-4 * length * float(gradient @ step):
                break
            length *= 0.5
        else:
            break
        x, value, gradient = x - length * step, new_value, new_gradient
    meter.reads += own.reads * len(small.b) / len(case.b)
    return x, np.linalg.cholesky(H)


def lbfgs_sample(case: Case, tol: float, limit: float, *, method: str = "L-BFGS-B") -> Outcome:
    """Return what L-BFGS gives in variables in which the sample's Hessian is the identity, from its end."""
    objective = scaled(case, Meter(0.0, 10.0 * limit))
    return _in_sample_units(case, objective, tol, limit, method)


def newton_cg_sample(case: Case, tol: float, limit: float) -> Outcome:
    """Return what Newton-CG gives there: conjugate gradients preconditioned with the sample's Hessian."""
    return lbfgs_sample(case, tol, limit, method="Newton-CG")


def lbfgs_sample_ours(case: Case, tol: float, limit: float) -> Outcome:
    """Return what L-BFGS gives there with attnfit's compiled value and gradient, one read each."""
    from benchmarks.solvers import attnfit_problem

    objective = scaled(case, Meter(0.0, 10.0 * limit))
    problem = attnfit_problem(case)

    def evaluate(x: Array) -> tuple[float, Array]:
        objective.meter.spend(1)
        value, gradient = problem.value_and_gradient(x)
        value, gradient = objective.scale * value, objective.scale * gradient
        objective.meter.arrive(x, value, gradient)
        return value, gradient

    return _in_sample_units(case, objective, tol, limit, "L-BFGS-B", evaluate)


def _in_sample_units(
    case: Case, objective: Objective, tol: float, limit: float, method: str, evaluate: Any = None
) -> Outcome:
    evaluate = evaluate or objective
    objective.meter = relative_to_zero(case, objective, tol, limit)
    clock = Clock()
    try:
        start, factor = sample_start(case, objective.meter)
    except Stop:
        return clock.outcome(zeros(case), status=f"cap (on the sample, {limit:.0f} s)")

    def back(y: Array) -> Array:
        return start + linalg.solve_triangular(factor.T, y)

    def fun(y: Array) -> tuple[float, Array]:
        value, gradient = evaluate(back(y))
        return value, linalg.solve_triangular(factor, gradient, lower=True)

    def product(y: Array, v: Array) -> Array:
        along = linalg.solve_triangular(factor.T, v)
        return np.asarray(linalg.solve_triangular(factor, objective.hessp(back(y), along), lower=True))

    if method == "Newton-CG":
        call: dict[str, Any] = {"hessp": product, "options": {"xtol": 0.0, "maxiter": 2_000}}
    else:
        call = {"options": LBFGS | {"maxcor": 20}}
    out = scipy_run(objective, zeros(case), fun, method=method, **call)
    return clock.outcome(
        objective.meter.x,
        iterations=out.iterations,
        evaluations=out.evaluations,
        reads=out.reads,
        status=out.status,
    )


def relative_to_zero(case: Case, objective: Objective, tol: float, limit: float) -> Meter:
    """Return a meter that knows the gradient at zero, which is worked out off the clock."""
    objective.meter = Meter(0.0, limit)
    gradient = objective(zeros(case))[1]
    meter = Meter(tol, limit)
    meter.first = float(np.linalg.norm(gradient))
    return meter


def newton_sketch(case: Case, tol: float, limit: float) -> Outcome:
    """Newton sketch: a Hessian a step from a count sketch of the weighted, centred rows, from the sample's
    end.
    """
    objective = scaled(case, Meter(0.0, limit))
    objective.meter = meter = relative_to_zero(case, objective, tol, limit)
    clock, rng = Clock(), np.random.default_rng(2)
    x, _ = sample_start(case, meter)
    iterations, status = 0, ""
    try:
        value, gradient = objective(x)
        while True:
            step, length = np.linalg.solve(sketched(objective, rng), gradient), 1.0
            meter.spend(1)
            while True:
                new_value, new_gradient = objective(x - length * step)
                if new_value <= value - 1e-4 * length * float(gradient @ step) or length < 1e-6:
                    break
                length *= 0.5
            if length < 1e-6:
                status = "stopped: no step lowers the value"
                break
            x, value, gradient, iterations = x - length * step, new_value, new_gradient, iterations + 1
    except Stop:
        pass
    return clock.outcome(
        meter.x,
        iterations=iterations,
        evaluations=meter.evaluations,
        reads=meter.reads,
        status=meter.status or status,
    )


def sketched(objective: Objective, rng: np.random.Generator) -> Array:
    """Return the Hessian at the last evaluated point from a count sketch: each row goes, with a random sign,
    into one of ``10 d`` sums.
    """
    A, n, d = objective.A, *objective.A.shape
    root = np.sqrt(curvature(objective))
    signs = rng.choice([-1.0, 1.0], n) * root
    bins = rng.integers(0, SKETCH * d, n)
    S = sparse.csr_array((signs, (bins, np.arange(n))), shape=(SKETCH * d, n))
    rows = S @ A
    f = getattr(objective, "_f", None)
    if f is not None:
        groups = np.repeat(np.arange(len(objective.starts)), objective.sizes)
        means = sparse.csr_array((f, (groups, np.arange(n))), shape=(len(objective.starts), n)) @ A
        weights = sparse.csr_array((signs, (bins, groups)), shape=(SKETCH * d, len(objective.starts)))
        rows = rows - weights @ means
    rows = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    H = objective.scale * (rows.T @ rows)
    H[np.diag_indices(d)] += 1e-12 * np.trace(H) / d
    return np.asarray(H)
