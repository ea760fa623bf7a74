"""Attention outputs: joint and projected derivatives against automatic differentiation, and fits."""

import numpy as np
import pytest
import torch
from attention_reference import softmax_rows
from autodiff import as_tensor
from instances import relative

from attnfit import minimize, problems
from attnfit.solvers import VariableProjection

N, K, D1, D2, V, M = 9, 7, 3, 4, 3, 2
SIZE = D1 * D2


def build(masked=False, weighted=False, shifted=False, ridge=0.0, seed=0):
    rng = np.random.default_rng(seed)
    A1, A2, A3, B = (rng.standard_normal(s) for s in ((N, D1), (K, D2), (K, V), (N, M)))
    mask = rng.random((N, K)) < 0.6
    mask[:, 0] = True
    options = {
        "mask": mask if masked else None,
        "weights": rng.random(N) + 0.1 if weighted else None,
        "offset": rng.standard_normal((N, K)) if shifted else None,
        "ridge": ridge,
    }

    def exact(x):
        X, Y = x[:SIZE].reshape(D1, D2), x[SIZE:].reshape(V, M)
        z = as_tensor(A1) @ X @ as_tensor(A2).T
        z = z + (as_tensor(options["offset"]) if shifted else 0.0)
        z = torch.where(torch.tensor(mask), z, -torch.inf) if masked else z
        C = torch.softmax(z, 1) @ as_tensor(A3) @ Y - as_tensor(B)
        w = as_tensor(options["weights"]) if weighted else torch.ones(N)
        return 0.5 * (w * (C**2).sum(1)).sum() + 0.5 * ridge * (x @ x)

    return problems.FullAttention(A1, A2, A3, B, **options), exact, rng.standard_normal(SIZE + V * M)


CASES = [
    {},
    {"masked": True, "weighted": True},
    {"shifted": True, "ridge": 0.2},
    {"masked": True, "weighted": True, "shifted": True, "ridge": 0.1},
]


def derivatives(exact, x):
    point = as_tensor(x).requires_grad_()
    gradient = torch.autograd.grad(exact(point), point)[0].numpy()
    return gradient, torch.autograd.functional.hessian(exact, as_tensor(x)).numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_joint_derivatives(case, blocks, monkeypatch):
    if blocks == "small":
        monkeypatch.setattr("attnfit.objectives.projected.BLOCK_PAIRS", 1)
        monkeypatch.setattr("attnfit.objectives.full_attention.KEPT_PAIRS", 1)
    problem, exact, x = build(**case)
    gradient, hessian = derivatives(exact, x)
    v = np.random.default_rng(1).standard_normal(len(x))
    assert relative(problem.value(x), float(exact(as_tensor(x)))) < 1e-12
    assert relative(problem.gradient(x), gradient) < 1e-12
    assert relative(problem.hessian(x), hessian) < 1e-12
    assert relative(problem.hvp(x, v), hessian @ v) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_projected_derivatives(case):
    problem, exact, x = build(**case)
    projected = problem.projected()
    X, _ = problem.split(x)
    full = problem.join(X, projected.values(X))
    gradient, H = derivatives(exact, full)
    schur = H[:SIZE, :SIZE] - H[:SIZE, SIZE:] @ np.linalg.solve(H[SIZE:, SIZE:], H[SIZE:, :SIZE])
    v = np.random.default_rng(2).standard_normal((D1, D2))
    assert np.linalg.norm(gradient[SIZE:]) < 1e-9
    # The floor under Z^T Z moves Y by some 1e-13 of it.
    assert relative(projected.value(X), float(exact(as_tensor(full)))) < 1e-10
    assert relative(projected.gradient(X).reshape(-1), gradient[:SIZE]) < 1e-9
    assert relative(projected.hessian(X), schur) < 1e-9
    assert relative(projected.hvp(X, v).reshape(-1), schur @ v.reshape(-1)) < 1e-9


def test_kaufman_product_is_the_projected_jacobian():
    problem, _, x = build()
    projected = problem.projected()
    X, _ = problem.split(x)
    Y = as_tensor(projected.values(X))

    def Z(flat):
        z = as_tensor(problem.A1) @ flat.reshape(D1, D2) @ as_tensor(problem.A2).T
        return torch.softmax(z, 1) @ as_tensor(problem.A3)

    flat = as_tensor(X.reshape(-1))
    Q = np.linalg.qr(Z(flat).numpy())[0]
    J = torch.autograd.functional.jacobian(lambda t: Z(t) @ Y, flat).numpy().reshape(N, M, SIZE)
    J = np.einsum("in,nmd->imd", np.eye(N) - Q @ Q.T, J).reshape(N * M, SIZE)
    v = np.random.default_rng(3).standard_normal(SIZE)
    product = projected.gauss_newton_product(X, v).reshape(-1)
    assert relative(product, J.T @ (J @ v)) < 1e-10
    # Orthogonal to Z, the first part of the Jacobian gives the exact gradient.
    C = (Z(flat) @ Y).numpy() - problem.B
    assert relative(projected.gradient(X).reshape(-1), J.T @ C.reshape(-1)) < 1e-9


@pytest.mark.parametrize("causal", [False, True])
def test_fit_of_exact_outputs(causal):
    rng = np.random.default_rng(4)
    A, A3 = rng.standard_normal((60, 3)), rng.standard_normal((60, 2))
    X, Y = rng.standard_normal((3, 3)), rng.standard_normal((2, 4))
    z = A @ X @ A.T
    P = softmax_rows(np.where(np.tri(60, dtype=bool), z, -np.inf) if causal else z)
    problem = problems.FullAttention(A, A, A3, P @ A3 @ Y, mask="causal" if causal else None)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert result.message.endswith("Y eliminated")
    assert result.value < 1e-12
    assert relative(problem.predict(result.x), P @ A3 @ Y) < 1e-6
    fitted, values = problem.split(result.x)
    assert relative(fitted, X) < 1e-4
    assert relative(values, Y) < 1e-4


def test_all_local_minima_are_reported():
    rng = np.random.default_rng(5)
    A1, A2, A3, B = (rng.standard_normal(s) for s in ((40, 3), (30, 3), (30, 2), (40, 3)))
    solver = VariableProjection(n_starts=5)
    result = minimize(problems.FullAttention(A1, A2, A3, B, ridge=1e-3), solver=solver, random_state=0)
    assert len(result.local_values) == 5
    assert result.value <= min(result.local_values.values()) * (1 + 1e-9)


def test_dependent_values_need_a_ridge():
    rng = np.random.default_rng(6)
    A, A3, B = rng.standard_normal((20, 2)), rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    A3[:, 2] = A3[:, 0] - A3[:, 1]
    with pytest.raises(ValueError, match=r"A3 has rank 2 but A3 has 3 columns.*ridge > 0"):
        problems.FullAttention(A, A, A3, B)
    assert minimize(problems.FullAttention(A, A, A3, B, ridge=0.1), random_state=0).converged
    with pytest.raises(ValueError, match="only 2 outputs"):
        problems.FullAttention(A[:2], A, A3[:, :2] @ np.ones((2, 4)) + rng.standard_normal((20, 4)), B[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A3": np.ones((3, 2))}, "A3 has 3 rows but A2 has 20"),
        ({"B": np.ones((4, 2))}, "B has 4 rows but A1 has 20"),
        ({"B": np.full((20, 2), np.nan)}, "B contains NaN at row 0, column 0"),
        ({"weights": -np.ones(20)}, "weights is negative at index 0"),
        ({"ridge": np.inf}, "ridge must be a finite number"),
    ],
)
def test_named_errors(changes, message):
    rng = np.random.default_rng(7)
    arguments = {"A1": rng.standard_normal((20, 2)), "A2": rng.standard_normal((20, 2))}
    arguments |= {"A3": rng.standard_normal((20, 2)), "B": rng.standard_normal((20, 2))}
    with pytest.raises(ValueError, match=message):
        problems.FullAttention(**(arguments | changes))
