"""Changes of basis of slow columns: their curvature against products with the Hessian, where a step along one
leads, and what both save.
"""

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.objectives import head_bases
from attnfit.objectives.head_bases import slow_columns
from attnfit.objectives.head_metric import mean_curvature
from attnfit.solvers import factors
from attnfit.solvers.factors import FactorLevenbergMarquardt, solve

D, H, N = 7, 6, 14
SLOW_ONES = {"half": [1, 2, 4, 5], "interleaved": [2, 3, 4, 5]}


def made(layout="half", frequencies=(1.0, 0.02, 0.005), n_heads=1, dtype=np.float64, **settings):
    """Return the problem of a random head over two texts, with the factors its maps come from."""
    rng = np.random.default_rng(3)
    rotary = problems.Rotary(frequencies=np.array(frequencies), layout=layout)
    A = [rng.standard_normal((n, D)) for n in (N, N - 3)]
    rest = {"rank": H, "rotary": rotary, "mask": "causal", "loss": "log_ratio"} | settings
    blank = [np.stack([np.tri(len(a))] * n_heads) if n_heads > 1 else np.tri(len(a)) for a in A]
    problem = problems.Attention(A, A, [b / b.sum(-1, keepdims=True) for b in blank], **rest)
    x = problem.initial_point(5).reshape(-1)
    B = [np.asarray(b, dtype=dtype) for b in problem.predict(x)]
    return problems.Attention(A, A, B, **rest), x


@pytest.mark.parametrize(
    "settings",
    [{}, {"layout": "interleaved"}, {"softcap": 3.0}, {"sink": True}, {"mask": None}, {"n_heads": 2},
     {"loss": "cross_entropy"}],
    ids=str,
)  # fmt: skip
def test_their_curvature_is_that_of_the_hessian(settings, monkeypatch):
    monkeypatch.setattr(head_bases, "AVERAGED_QUERIES", N)
    monkeypatch.setattr(head_bases, "MOST_PAIRS", 50)
    problem, truth = made(**settings)
    x = truth + 0.1 * np.random.default_rng(0).standard_normal(len(truth))
    point = problem.parts(x)
    bases = mean_curvature(problem, x, fine=True).bases
    m = len(bases.columns)
    steps = []
    for k in range(m * m):
        G = np.zeros((m, m))
        G.flat[k] = 1.0
        step = problem.parts(np.zeros_like(x))
        for W, own in zip(step.W_Q, point.W_Q, strict=True):
            W[:, bases.columns] = -own[:, bases.columns] @ G.T
        step.W_K[:, bases.columns] = point.W_K[:, bases.columns] @ G
        steps.append(problem.join(step))
    Z = np.array(steps).T
    product = problem.gauss_newton_operator(problem.evaluate(x))
    expected = Z.T @ np.array([product(z) for z in Z.T]).T
    # Products of 196 pairs at most in single precision.
    assert np.abs(bases.curvature - expected).max() < 200 * 2.0**-24 * np.abs(expected).max()
    # The second level is the inverse on these steps, but for the least curvature added.
    by_q, by_k = 0.3 * np.stack([np.eye(H)] * len(point.W_Q)), 0.7 * np.eye(H)
    damping = np.concatenate([0.3 * np.ones(point.W_Q.size), 0.7 * np.ones(point.W_K.size)])
    damping = np.concatenate([damping, np.zeros(len(x) - len(damping))])
    G = np.random.default_rng(1).standard_normal(m * m)
    pulled = problem.parts(np.array([product(z) for z in Z.T]).T @ G + damping * (Z @ G))
    found = problem.parts(np.zeros_like(x))
    step_q, step_k = bases.solver(by_q, by_k)(pulled.W_Q, pulled.W_K)
    found = problem.join(found._replace(W_Q=step_q, W_K=step_k))
    # Coefficients of features have a part in the gradient that changes of basis do not pull.
    assert np.linalg.norm(found - Z @ G) < 1e-3 * np.linalg.norm(Z @ G)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_their_curvature_has_the_range_of_the_weights(scale):
    _, x = made()
    found = []
    for one in (1.0, scale):
        problem, _ = made(weights=[one * np.ones(N), one * np.ones(N - 3)])
        metric = problem.metric(problem.evaluate(x + 0.1), fine=True)
        found.append(metric.bases.curvature)
        assert np.isfinite(metric.preconditioner(1e-8, 1e-8)(np.ones(len(x)))).all()
    np.testing.assert_allclose(found[1] / scale, found[0], rtol=1e-4, atol=1e-5 * np.abs(found[0]).max())


def test_a_curvature_that_rounding_left_indefinite_is_factorised_all_the_same():
    problem, x = made()
    metric = problem.metric(problem.evaluate(x + 0.1), fine=True)
    metric.bases.curvature -= 1e-3 * np.diag(np.diag(metric.bases.curvature))
    assert np.linalg.eigvalsh(metric.bases.curvature)[0] < 0.0
    assert np.isfinite(metric.preconditioner(1e-12, 1e-12)(np.ones(len(x)))).all()


def test_refused_steps_take_the_least_damping_to_one():
    assert factors.LEAST_DAMPING * factors.REFUSED**factors.REJECTIONS >= 1.0


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_slow_columns_are_those_that_turn_little(layout):
    problem, _ = made(layout)
    assert slow_columns(problem.read).tolist() == SLOW_ONES[layout]
    # The longest text turns by 13 positions: 3 radians at 0.231.
    for frequency, slow in ((0.23, True), (0.232, False)):
        problem, _ = made(layout, (frequency, 0.02, 0.005))
        assert (len(slow_columns(problem.read)) == H) is slow


def test_columns_that_nothing_turns_count_with_slow_ones_only():
    assert slow_columns(made(frequencies=(0.1, 1e-3))[0].read).tolist() == [0, 1, 2, 3, 4, 5]
    assert slow_columns(made(frequencies=(1.0, 2.0))[0].read).tolist() == []
    assert slow_columns(made(frequencies=(0.1, 1e-3), qk_norm=1e-6)[0].read).tolist() == []
    assert slow_columns(made(rotary=None, softcap=3.0)[0].read).tolist() == []


def test_of_many_the_slowest_are_taken(monkeypatch):
    monkeypatch.setattr(head_bases, "MOST_COLUMNS", 4)
    assert slow_columns(made(frequencies=(0.02, 0.1, 0.005))[0].read).tolist() == [0, 2, 3, 5]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_step_is_followed_to_first_order(layout):
    problem, x = made(layout, n_heads=2)
    step = np.random.default_rng(0).standard_normal(len(x))
    assert np.array_equal(problem.followed(x, 0.0 * step), x)
    for size in (1e-3, 1e-4):
        off = problem.followed(x, size * step) - x - size * step
        assert np.linalg.norm(off) < 30.0 * size**2 * np.linalg.norm(step) ** 2


def test_a_long_change_of_basis_leaves_maps_as_they_are():
    problem, x = made(frequencies=(1.0, 1e-9, 2e-9))
    columns, point = problem.slow, problem.parts(x)
    G = 0.8 * np.random.default_rng(2).standard_normal((4, 4))
    step = problem.parts(np.zeros_like(x))
    step.W_Q[0][:, columns] = -point.W_Q[0][:, columns] @ G.T
    step.W_K[:, columns] = point.W_K[:, columns] @ G
    v = problem.join(step)
    assert problem.relative_error(problem.followed(x, v)) < 1e-6
    assert problem.relative_error(x + v) > 0.1
    # Far beyond, there is no exponential to follow.
    far = 1e3 * v
    assert np.array_equal(problem.followed(x, far), x + far)


def test_conjugate_gradients_come_far_where_a_basis_can_change():
    problem, truth = made(frequencies=(1.0, 0.004, 0.002))
    at = problem.evaluate(truth + 0.01 * np.random.default_rng(0).standard_normal(len(truth)))
    product, off, lam = problem.gauss_newton_operator(at), [], 1e-6
    for fine in (False, True):
        metric = problem.metric(at, fine=fine)
        matrix = np.array([product(e) + metric.damped(e, lam, lam) for e in np.eye(len(truth))])
        exact = np.linalg.solve(matrix, -at.gradient)
        p, *_ = solve(lambda v, A=matrix: A @ v, metric.preconditioner(lam, lam), at.gradient, 0.0, 80)
        off.append(np.sqrt((p - exact) @ matrix @ (p - exact) / (exact @ matrix @ exact)))
    assert off[0] > 1e-3 and off[1] < 0.05 * off[0]


def test_a_fit_from_a_random_start_comes_to_its_end(monkeypatch):
    rng, n = np.random.default_rng(1), 80
    rest = {"rank": 16, "rotary": problems.Rotary(theta=1e5), "mask": "causal", "loss": "log_ratio"}
    A = [rng.standard_normal((n, 32)) for _ in range(3)]
    blank = problems.Attention(A, A, [np.tri(n) / np.tri(n).sum(axis=1, keepdims=True)] * 3, **rest)
    problem = problems.Attention(A, A, blank.predict(blank.initial_point(11)), **rest)
    result = minimize(problem, random_state=1, n_starts=1, max_iter=60)
    assert problem.relative_error(result.x) < 1e-10
    assert result.gradient_norm == result.history[-1].gradient_norm < 1e-8
    # Without a second level steps of as many products end far off.
    monkeypatch.setattr(head_bases, "SLOW", 0.0)
    again = problems.Attention(A, A, blank.predict(blank.initial_point(11)), **rest)
    with pytest.warns(ConvergenceWarning):
        result = minimize(again, random_state=1, n_starts=1, max_iter=20)
    assert again.relative_error(result.x) > 1e-5


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_a_head_with_slow_columns_is_fitted(dtype):
    problem, truth = made(frequencies=(1.0, 0.004, 0.002), dtype=dtype)
    start = truth + 0.1 * np.random.default_rng(0).standard_normal(len(truth))

    result = minimize(problem, start, solver=FactorLevenbergMarquardt(), max_iter=300)
    assert problem.relative_error(result.x) < (1e-9 if dtype is np.float64 else 2e-3)
