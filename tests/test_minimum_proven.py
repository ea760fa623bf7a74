"""Where a minimum is proven, and no programme is asked: never for data that have none."""

import numpy as np
import pytest
from test_separation import fit

from attnfit import problems
from attnfit.solvers.separation import Undecided, minimum_is_proven


def proven(problem, x):
    """By the exact Hessian and its Newton step, as a verdict takes them."""
    at = problem.evaluate(np.asarray(x, dtype=float))
    H = problem.hessian_at(at)
    scale = np.sqrt(np.maximum(np.diag(H), np.finfo(float).tiny))
    g = at.gradient / scale
    return minimum_is_proven(problem, at, H, float(g @ np.linalg.lstsq(H / scale / scale[:, None], g)[0]))


@pytest.mark.parametrize("kind", ["choices", "shares", "counts"])
@pytest.mark.parametrize("seed", range(12))
def test_no_minimum_is_proven_where_there_is_none(kind, seed):
    """From anywhere on the way to infinity, beyond the point where all that separates is rounding."""
    rng = np.random.default_rng(seed)
    n, size, d = 200, 4, 3
    A = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-3, 3, d)
    groups = np.repeat(np.arange(n // size), size)
    if kind == "counts":
        A[:, -1] = rng.random(n) < 0.1
        problem = problems.Poisson(A, rng.poisson(2.0, n) * (A[:, -1] == 0.0))
    else:
        b = rng.dirichlet(np.ones(size), n // size).ravel()
        if kind == "choices":
            b = (b.reshape(-1, size) == b.reshape(-1, size).max(axis=1, keepdims=True)).astype(float).ravel()
        # A column of rows that have no share.
        A[:, -1] = (b == 0.0) & (rng.random(n) < 0.2)
        hit = np.arange(n) % size == 0
        if kind == "shares":
            b[hit], A[:, -1] = 0.0, hit
            b /= np.repeat(b.reshape(-1, size).sum(axis=1), size)
        problem = problems.Softmax(A, b, groups, loss="cross_entropy")
    end = fit(problem)
    assert end.status == "separable"
    rest = np.where(np.isfinite(end.x), end.x, 0.0)
    for far in (5.0, 15.0, 25.0, 30.0, 34.0, 37.0, 45.0, 100.0):
        assert not proven(problem, rest + far * end.separation.direction)


def strong_effects(d):
    rng = np.random.default_rng(0)
    n, size = 20_000, 5
    A = rng.standard_normal((n, d))
    utility = A @ np.full(d, 5.0 / np.sqrt(d)) + rng.gumbel(size=n)
    b = utility.reshape(-1, size)
    b = (b == b.max(axis=1, keepdims=True)).astype(float).ravel()
    return problems.Softmax(A, b, np.repeat(np.arange(n // size), size), loss="cross_entropy"), A


@pytest.mark.parametrize("d", [3, 30])
def test_strong_effects_need_no_programme(d, monkeypatch):
    problem, A = strong_effects(d)
    x = fit(problem).x
    assert problem.moves(problem.evaluate(x), np.zeros((d, 1))).least < 1e-12
    monkeypatch.setattr("attnfit.solvers.separation.find_separation", None)
    assert fit(problem, x0=x).converged and proven(problem, x)
    # Half a logit off nothing is proven yet.
    assert not proven(problem, x + 0.5 / np.abs(A).max())


def test_what_no_programme_decides_is_not_called_converged(monkeypatch):
    problem, _ = strong_effects(3)
    x = fit(problem).x

    def late(*_):
        raise Undecided

    monkeypatch.setattr("attnfit.solvers.separation.minimum_is_proven", lambda *_: False)
    assert fit(problem, x0=x).converged
    monkeypatch.setattr("attnfit.solvers.separation.find_separation", late)
    end = fit(problem, x0=x)
    assert end.status == "precision" and "not decided" in end.message


def test_curvature_among_rounding_proves_nothing():
    """Even where the gradient is computed to be zero."""
    problem, _ = strong_effects(3)
    at = problem.evaluate(np.zeros(3))
    gram = problem.structure(at)[0]
    assert minimum_is_proven(problem, at, 1e-6 * gram, 0.0)
    assert not minimum_is_proven(problem, at, 1e-12 * gram, 0.0)
    # A row moves by 1e3 for a step of length one.
    assert not minimum_is_proven(problem, at, 1e-6 * gram, 0.2e-3**2)
    assert minimum_is_proven(problem, at, 1e-6 * gram, 0.5e-4**2)


def test_a_gram_among_rounding_proves_nothing():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((2000, 3))
    A[:, 2] = A[:, 1] + 1e-7 * A[:, 2]
    A -= A.reshape(500, 4, 3).mean(axis=1).repeat(4, axis=0)
    b = np.tile([1.0, 0.0, 0.0, 0.0], 500)
    problem = problems.Softmax(A, b, np.repeat(np.arange(500), 4), loss="cross_entropy")
    at = problem.evaluate(np.zeros(3))
    gram = problem.structure(at)[0]
    assert not any(minimum_is_proven(problem, at, c * gram, 0.0) for c in (1e-4, 1e-6, 1e-8))


def test_a_programme_that_was_late_before_says_nothing_of_the_end(monkeypatch):
    problem, _ = strong_effects(3)

    def late(*_):
        raise Undecided

    monkeypatch.setattr("attnfit.solvers.separation.find_separation", late)
    end = fit(problem)
    assert end.converged and "not decided" not in end.message
