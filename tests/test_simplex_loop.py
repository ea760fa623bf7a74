"""The compiled loop over mixtures: against the conditions of optimality, scipy, and the method by faces."""

import numpy as np
import pytest
from scipy.optimize import nnls

from attnfit import minimize, problems
from attnfit.solvers import simplex, simplex_loop
from attnfit.solvers.simplex_loop import over_simplex


def quadratics(seed, m=30, n=12, k=40, noise=0.05):
    rng = np.random.default_rng(seed)
    A = rng.random((m, n))
    shares = rng.dirichlet(np.full(n, 0.3), size=k)
    B = shares @ A.T + noise * rng.standard_normal((k, m))
    return A, B, A.T @ A, B @ A


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(30, 12), (8, 12), (200, 3), (5, 1)])
def test_answers_are_optimal(seed, shape):
    """Karush, Kuhn and Tucker: the slope is least, and the same, where there is weight."""
    m, n = shape
    _, _, G, c = quadratics(seed, m, n)
    f, changes = over_simplex(G[None], c, np.full(40, 1e-13), 1000)
    # With fewer numbers than signatures a right-hand side among them has many answers.
    assert (changes >= 0).all() or m < n
    assert (changes >= 0).mean() > 0.2
    f, c = f[changes >= 0], c[changes >= 0]
    assert (f >= 0.0).all()
    assert np.allclose(f.sum(axis=1), 1.0, atol=1e-14)
    g = f @ G - c
    assert (np.sum(f * g, axis=1) - g.min(axis=1)).max() <= 2e-12 * np.abs(G).max()


def test_answers_are_those_of_nnls_with_a_heavy_sum():
    A, B, G, c = quadratics(7)
    f, _ = over_simplex(G[None], c, np.full(40, 1e-14), 1000)
    # The weight h of the sum leaves an error of 1 / h^2, and h^2 of the rounding.
    heavy = 1e4
    stacked = np.vstack([A, np.full((1, 12), heavy)])
    for b, found in zip(B, f, strict=True):
        assert np.allclose(found, nnls(stacked, np.append(b, heavy))[0], atol=1e-6)


def test_a_quadratic_of_its_own_for_each():
    rng = np.random.default_rng(8)
    A, B, _, _ = quadratics(8)
    w = rng.uniform(0.1, 3.0, B.shape)
    grams, c = np.einsum("mi,km,mj->kij", A, w, A), (w * B) @ A
    f, _ = over_simplex(grams, c, np.full(40, 1e-14), 1000)
    for k in range(40):
        assert np.allclose(f[k], over_simplex(grams[k : k + 1], c[k : k + 1], np.full(1, 1e-14), 1000)[0][0])
        g = grams[k] @ f[k] - c[k]
        assert f[k] @ g - g.min() < 1e-11


def test_vertices_leave_in_any_order():
    """Also the one from which the others are differences."""
    left_first = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        A, b = rng.standard_normal((6, 5)), rng.standard_normal(6)
        G, c = A.T @ A, A.T @ b
        f, changes = over_simplex(G[None], c[None], np.full(1, 1e-13), 1000)
        assert changes[0] >= 0
        g = G @ f[0] - c
        assert f[0] @ g - g.min() < 1e-11
        left_first += f[0][np.argmin(0.5 * np.diag(G) - c)] == 0.0
    assert left_first >= 3


def test_signatures_that_depend_on_one_another_are_left_to_the_method_by_faces():
    rng = np.random.default_rng(9)
    A = rng.random((30, 6))
    A = np.column_stack([A, 0.5 * A[:, 0] + 0.5 * A[:, 1], A[:, 2]])
    B = rng.dirichlet(np.full(8, 0.5), size=50) @ A.T + 0.01 * rng.standard_normal((50, 30))
    G, c, tolerance = A.T @ A, B @ A, np.full(50, 1e-12)
    _, changes = over_simplex(G[None], c, tolerance, 1000)
    assert (changes < 0).any()
    both = []
    for size in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simplex, "COMPILED", size)
            both.append(simplex.minimise_over_simplex(G, c, tolerance)[0])
    values = [0.5 * np.einsum("ki,ij,kj->k", f, G, f) - np.sum(c * f, axis=1) for f in both]
    assert np.allclose(*values, atol=1e-11)
    # Equal signatures have equal shares, either way.
    assert np.allclose(*both, atol=1e-6)
    assert np.allclose(both[0][:, 2], both[0][:, 7], atol=1e-3)
    assert np.allclose(both[0].sum(axis=1), 1.0)


def test_a_hardly_independent_signature_is_solved_or_left():
    """As far apart as the square root of the threshold, one is solved and the other is not."""
    rng = np.random.default_rng(10)
    A = rng.random((40, 4))
    for gap, solved in ((1e-4, True), (1e-7, False)):
        near = np.column_stack([A, A[:, 0] + A[:, 1] - A[:, 2] + gap * rng.standard_normal(40)])
        b = near @ np.array([0.2, 0.2, 0.1, 0.2, 0.3])
        shifted = near - near[:, [3]]
        G, c = shifted.T @ shifted, shifted.T @ (b - near[:, 3])
        _, changes = over_simplex(G[None], c[None], np.full(1, 1e-16), 1000)
        assert (changes[0] >= 0) == solved


def test_the_limit_of_changes():
    _, _, G, c = quadratics(11)
    _, changes = over_simplex(G[None], c, np.full(40, 1e-13), 1000)
    most = int(changes.max())
    assert (over_simplex(G[None], c, np.full(40, 1e-13), most)[1] >= 0).all()
    assert (over_simplex(G[None], c, np.full(40, 1e-13), most - 1)[1] < 0).any()


@pytest.mark.parametrize("weights", [None, "own"])
def test_a_fit_is_the_same_either_way(weights, monkeypatch):
    rng = np.random.default_rng(12)
    A, B, _, _ = quadratics(12, k=30)
    w = None if weights is None else rng.uniform(0.5, 2.0, B.T.shape)
    asked = []
    plain = simplex_loop.loop()
    monkeypatch.setattr(simplex_loop, "loop", lambda: asked.append(1) or plain)
    results = []
    for size in (10**9, 0):
        monkeypatch.setattr(simplex, "COMPILED", size)
        results.append(minimize(problems.TwoLayer(None, A, B.T, "identity", weights=w)))
    assert asked == [1]
    assert results[0].converged and results[1].converged
    f = [r.problem.proportions(r.x) for r in results]
    assert np.allclose(*f, atol=1e-9)
