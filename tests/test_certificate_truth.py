"""Property 21: the error to 60 digits is within the radius, over all losses and hard data."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from instances import ALL_LOSSES, instance

from attnfit import certificates, minimize
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, scaled_error_of, stationarity

DRAWS = 22


def draw(family, loss, seed):
    """Columns collinear to 1e-4 and of scales apart, groups shifted, weights, offsets, ridge."""
    rng = np.random.default_rng(seed)
    sizes = tuple(rng.integers(3, 7, int(rng.integers(1, 3))))
    inst, _ = instance(family, loss, sizes=sizes, d=int(rng.integers(1, 4)), noise=0.1, seed=seed)
    A = inst.A.copy()
    if A.shape[1] > 1 and rng.random() < 0.5:
        A[:, 1] = A[:, 0] + A[:, 1] * 10.0 ** -rng.uniform(0, 4)
    if family == "Softmax" and rng.random() < 0.3:
        A[:, 0] += 10.0 ** rng.uniform(2, 7) * rng.standard_normal(len(sizes))[inst.ids]
    if rng.random() < 0.4:
        A = A * 10.0 ** rng.uniform(-4, 4, A.shape[1])
    options = {}
    if rng.random() < 0.3:
        options["weights"] = rng.uniform(0.2, 3.0, len(A))
    if rng.random() < 0.3:
        options["offset"] = 0.5 * rng.standard_normal(len(A))
    if (loss in ("entropy", "linear_cross_entropy") or rng.random() < 0.2) or (family, loss) == (
        "Rescaled",
        "exp",
    ):
        options["ridge"] = 0.3 * float(np.mean(A**2))
    problem = inst.problem(A=A, **options)
    exact = stationarity(family, loss, A, inst.b, inst.ids, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem, exact, minimize(problem, tol=1e-10, random_state=0).x, rng


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_the_true_error_is_within_the_radius(family, loss):
    certified = 0
    for seed in range(DRAWS):
        problem, exact, x, rng = draw(family, loss, seed)
        # As fitted, and a little off, where the ball is of its own size and not of rounding.
        step = np.linalg.pinv(problem.hessian(x)) @ rng.standard_normal(len(x))
        for point in (x, x + 1e-4 * step / max(np.linalg.norm(step), 1e-300) * np.linalg.norm(x)):
            proof = certificates.certify(problem, point)
            if not proof.valid:
                assert proof.reason
                continue
            certified += 1
            with mpmath.workdps(DIGITS):
                answer, hessian = exact_answer(exact, point)
                error, each = error_of(point, answer)
                assert error <= proof.radius
                assert (each <= proof.coefficient_radius).all()
                assert scaled_error_of(point, answer, hessian) <= proof.scaled_radius * (1 + 1e-6)
    assert certified >= DRAWS // 2
