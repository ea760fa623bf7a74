"""Real problems of the rescaled page meet the assumption of Lemma 5.3, by autodiff."""

import numpy as np
import pytest

from attnfit.reproduction.real_data import car_sales
from attnfit.reproduction.rescaled_hyperbolic import negative_part, real_problems

torch = pytest.importorskip("torch")


def diagonal_part(A, b, x):
    """The Hessian in the logits of ``0.5 |u - <u, 1> b|^2``, without its low-rank part, u = exp."""
    b = torch.from_numpy(b)

    def loss(z):
        u = torch.exp(z)
        return 0.5 * ((u - u.sum() * b) ** 2).sum()

    z = torch.from_numpy(A @ x)
    u, H = torch.exp(z), torch.autograd.functional.hessian(loss, z)
    low_rank = (b @ b) * torch.outer(u, u) - torch.outer(u * b, u) - torch.outer(u, u * b)
    return (H - low_rank).numpy()


def test_the_penalty_that_makes_the_diagonal_positive():
    rng = np.random.default_rng(0)
    A, x, b = rng.standard_normal((7, 2)), rng.standard_normal(2), rng.random(7)
    b /= b.sum()
    D = diagonal_part(A, b, x)
    assert np.abs(D - np.diag(np.diag(D))).max() < 1e-10 * np.abs(D).max()
    assert negative_part(A, b, x) == pytest.approx(-np.diag(D).min(), rel=1e-10)
    assert negative_part(A, np.full(7, 1 / 7), np.zeros(2)) == 0.0


def test_car_sales_meet_it():
    A, b = car_sales()
    problem, best = real_problems()["car sales (read whole)"]
    square = float(np.max(np.square(problem.penalty)))
    assert square > negative_part(A, b, best) > 0.0
    assert np.linalg.norm(problem.gradient(best)) < 1e-6 * np.linalg.norm(problem.gradient(np.zeros(5)))
