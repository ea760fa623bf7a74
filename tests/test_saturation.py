"""Boundary limits of layered problems: right on small problems by brute force, and cheap on large ones."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from scipy import sparse

from attnfit import minimize, problems
from attnfit.objectives import saturation

FINE = np.geomspace(1e-4, 0.5, 100)


def loss_of(A2, b, f):
    return 0.5 * np.sum((np.tanh(A2 @ f) - b) ** 2)


def falls(A2, b, vertex):
    """By how much the loss falls at most where one other output takes a share, relative to its size."""
    n = A2.shape[1]
    here = loss_of(A2, b, np.eye(n)[vertex])
    best = min(
        loss_of(A2, b, (1.0 - s) * np.eye(n)[vertex] + s * np.eye(n)[k])
        for k in range(n)
        if k != vertex
        for s in FINE
    )
    return (here - best) / max(here, 0.5 * np.sum(b**2))


@pytest.mark.parametrize("first", ["identity", "dense", "sparse"])
def test_every_vertex_of_small_problems(first):
    """All weight on one output: a false optimum where another output would lower the loss, and only there."""
    told = {True: 0, False: 0}
    for seed in range(36):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 7))
        A2 = rng.standard_normal((2, n))
        # Within the polytope of the outputs, at a vertex, or beyond one, where that is the answer.
        share = rng.dirichlet(np.full(n, 0.3)), np.eye(n)[0], 1.5 * np.eye(n)[0] - 0.5 / n
        b = np.tanh(A2 @ share[seed % 3])
        A1 = np.linalg.qr(rng.standard_normal((n, n)))[0]
        matrix = {"identity": None, "dense": A1, "sparse": sparse.csr_array(A1)}[first]
        problem = problems.TwoLayer(matrix, A2, b)
        for vertex in range(n):
            x = 800.0 * np.eye(n)[vertex]
            at = problem.evaluate(x if matrix is None else A1.T @ x)
            fall = falls(A2, b, vertex)
            if 1e-10 < fall < 1e-5:
                continue
            verdict = problem.false_optimum(at)
            assert (verdict is not None) == (fall > 0.0 and fall > 1e-10)
            told[verdict is not None] += 1
            for output, lower in problem.escapes(at).values():
                assert problem.value(lower) < at.value
                assert output != vertex
    assert min(told.values()) > 12


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
def test_many_outputs_that_are_not_left_out(kind):
    """More than a direction is sought against; one of the others, underflowed, is the target."""
    n, target = 1500, 1400
    logits = np.where(np.arange(n) < 1000, 0.0, -800.0)
    A2 = np.zeros((2, n))
    A2[0, target], A2[1, :1000] = 3.0, 0.5
    problem = problems.TwoLayer(kind(2.0 * np.eye(n)), A2, [0.9, 0.0])
    at = problem.evaluate(logits / 2.0)
    assert np.linalg.norm(at.gradient) < 1e-12
    ((output, lower),) = problem.escapes(at).values()
    assert output == target
    assert problem.value(lower) < 0.9 * at.value


def data(n, d=3, seed=0):
    rng = np.random.default_rng(seed)
    A1, A2 = rng.standard_normal((n, d)), rng.standard_normal((2, n))
    f = np.exp(A1 @ [0.5, -0.3, 0.2])
    return A1, A2, np.tanh(A2 @ (f / f.sum())) + 0.01


@pytest.mark.parametrize("n", [9_999, 100_001, 150_000])
def test_many_outputs_are_not_left_out_for_being_many(n):
    A1, A2, b = data(n)
    problem = problems.TwoLayer(A1, A2, b, "tanh", ridge=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = minimize(problem)
    assert result.converged
    assert problem.false_optimum(problem.evaluate(np.zeros(3))) is None


def test_an_output_of_many_that_underflowed_is_found():
    A1, A2, _ = data(30_000)
    A1[:, 0] = 0.0
    A1[17, 0] = -1.0
    A2 = 0.1 * A2
    A2[:, 17] = 1.0
    problem = problems.TwoLayer(A1, A2, np.tanh(0.5 * np.ones(2)))
    at = problem.evaluate(np.array([800.0, 0.0, 0.0]))
    ((output, lower),) = problem.escapes(at).values()
    assert output == 17
    assert problem.value(lower) < at.value


def test_the_look_costs_memory_in_proportion_to_the_data():
    """With half of the outputs left out, so that the look has much to look at."""
    n = 200_000
    A1, A2, b = data(n)
    A1[:, 0] = np.where(np.arange(n) < n // 2, 1.0, -1.0)
    problem = problems.TwoLayer(A1, A2, b)
    at = problem.evaluate(np.array([400.0, 0.0, 0.0]))
    tracemalloc.start()
    problem.false_optimum(at)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A few arrays of five trial points a row, and of the layers there.
    assert peak < 15 * (A1.nbytes + A2.nbytes + 8 * n)


def test_the_largest_come_first():
    values = np.random.default_rng(0).standard_normal(50)
    for count in (1, 8, 49, 50, 60):
        assert np.array_equal(saturation._largest(values, count), np.argsort(-values)[:count])
