"""Levenberg-Marquardt on attention layers: planted inputs come back, and what it reports is true."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from layer_reference import layer, planted
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.solvers import LevenbergMarquardt, Newton
from attnfit.solvers.curvature import SampledJacobian


def fit(problem, **options):
    return minimize(problem, solver=LevenbergMarquardt(), random_state=0, **options)


@pytest.mark.parametrize("setting", ["self-dominant", "two outputs", "half known"])
@pytest.mark.parametrize("seed", range(4))
def test_planted_tokens_come_back(setting, seed):
    problem, X = planted(setting, n=16, d=8, scale=1.0, seed=seed)
    result = fit(problem)
    assert result.converged
    assert result.message.startswith("converged: zero residual")
    assert relative(result.x, X[:, problem.unknown]) < 1e-8
    assert result.value <= 1e-18 * np.sum(problem.B**2)


def test_starts_are_reported_and_the_search_ends_at_the_first_zero():
    problem, _ = planted("two outputs", n=8, d=4, scale=1.0, seed=1)
    result = fit(problem)
    assert min(result.local_values.values()) == result.value
    assert next(iter(result.history)).phase == "fit: B V^+"
    assert f"{len(result.local_values)} start" in result.solver
    assert len(result.local_values) < 10 or result.value < 1e-18


def test_start_of_the_user():
    problem, X = planted("self-dominant", n=8, d=4, scale=1.0, seed=0)
    result = fit(problem, x0=X + 0.01)
    assert list(result.local_values) == ["x0"]
    assert relative(result.x, X) < 1e-10


def test_conjugate_gradients_reach_the_same_point(monkeypatch):
    problem, X = planted("self-dominant", n=8, d=4, scale=1.0, seed=0)
    monkeypatch.setattr("attnfit.solvers.damped.MAX_DENSE", 10)
    monkeypatch.setattr("attnfit.solvers.damped.MAX_DENSE", 10)
    result = fit(problem)
    assert "conjugate gradients" in result.solver
    assert relative(result.x, X) < 1e-8


def test_starts_one_by_one_end_where_starts_together_do(monkeypatch):
    rng = np.random.default_rng(2)
    W, V, B = rng.standard_normal((3, 3)), rng.standard_normal((3, 3)), rng.standard_normal((5, 3))
    problem = problems.LayerInversion(W, V, B, gamma=0.1)
    together = fit(problem, max_iter=500)
    monkeypatch.setattr("attnfit.solvers.damped.BATCH_ENTRIES", 1)
    apart = fit(problem, max_iter=500)
    assert len(together.local_values) == len(apart.local_values) == 10
    for name, value in together.local_values.items():
        assert relative(value, apart.local_values[name]) < 1e-6


def test_a_residual_that_cannot_vanish_is_a_local_minimum():
    reference, _ = layer(n=4, d=2, m=3, seed=5)
    problem = reference.problem()
    result = fit(problem, max_iter=1000)
    assert result.converged
    assert "local minimum: relative residual" in result.message
    assert np.linalg.norm(problem.gradient(result.x)) < 1e-6
    assert np.linalg.eigvalsh(problem.hessian(result.x))[0] > -1e-8


def test_regularised_minimum_is_stationary():
    reference, _ = layer(n=4, d=3, gamma=0.5)
    problem = reference.problem()
    result = fit(problem, max_iter=1000, tol=1e-10)
    assert result.converged
    assert result.message.startswith("converged: relative gradient")
    assert np.linalg.norm(problem.gradient(result.x)) <= 1e-9 * np.linalg.norm(problem.gradient(np.zeros(12)))


def test_too_few_steps_warn():
    problem, _ = planted("base", n=8, d=4, scale=3.0, seed=0)
    with pytest.warns(ConvergenceWarning, match="no zero residual after max_iter steps from each of 10"):
        result = fit(problem, max_iter=2)
    assert not result.converged


def test_a_callback_ends_the_search():
    problem, _ = planted("base", n=8, d=4, scale=3.0, seed=0)
    result = fit(problem, callback=lambda record: record.iteration == 3)
    assert result.status == "interrupted"
    assert result.n_iter == 3


def test_second_derivative_along_a_direction():
    reference, x = layer(heads=2, mask="causal", bias=True, n_known=1)
    problem, v = reference.problem(), np.random.default_rng(0).standard_normal(len(x))

    def along(t):
        return reference.residuals(as_tensor(x) + t * as_tensor(v))

    def first(t):
        return torch.func.jvp(along, (t,), (torch.ones(()).double(),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    exact = torch.func.jvp(first, (zero,), (torch.ones((), dtype=torch.float64),))[1].numpy()
    ours = problem.bend(problem.layer.forward(problem.token_rows(x)), v)
    assert relative(ours, problem.jacobian_transpose_product(x, exact).reshape(-1)) < 1e-12


def test_starts_follow_the_units_of_the_tokens():
    problem, _ = planted("self-dominant", n=8, d=4, scale=1.0, seed=0)
    (head,) = problem.layer.heads
    smaller = problems.LayerInversion(1e6 * head.M, 1e3 * head.V, problem.B)
    one, other = (p.gaussian_starts(3, np.random.default_rng(0)) for p in (problem, smaller))
    assert relative(1e3 * other, one) < 1e-12


def test_bad_arguments():
    with pytest.raises(ValueError, match="n_restarts must be an integer >= 0"):
        LevenbergMarquardt(n_restarts=-1)
    with pytest.raises(ValueError, match="LevenbergMarquardt takes LayerInversion, not Softmax"):
        minimize(problems.Softmax(np.eye(3), np.ones(3) / 3), solver=LevenbergMarquardt())


CONTINUATION = tuple(10.0**-k for k in range(9))


def test_continuation_ends_without_bias():
    problem, X = planted("half known", n=8, d=4, scale=1.0, seed=0)
    result = minimize(problem, solver=LevenbergMarquardt(continuation=CONTINUATION), random_state=0)
    assert result.converged
    assert relative(result.x, X[:, problem.unknown]) < 1e-8
    biased = minimize(problem.with_gamma(0.01), solver=LevenbergMarquardt(), random_state=0)
    assert relative(biased.x, X[:, problem.unknown]) > 1e-3


def test_a_callback_ends_a_continuation():
    problem, _ = planted("half known", n=8, d=4, scale=1.0, seed=0)
    solver = LevenbergMarquardt(continuation=CONTINUATION)
    result = minimize(problem, solver=solver, callback=lambda record: record.iteration == 5, random_state=0)
    assert result.status == "interrupted"


def test_bad_continuation():
    with pytest.raises(ValueError, match=r"continuation\[1\] is -1.0"):
        LevenbergMarquardt(continuation=(1.0, -1.0))


@pytest.mark.parametrize("hessian", ["exact", "sampled", "matrix_free"])
def test_newton_inverts_a_layer_too(hessian):
    problem, X = planted("half known", n=8, d=4, scale=1.0, seed=0)
    result = minimize(problem, solver=Newton(hessian=hessian), random_state=0, max_iter=300)
    assert result.converged
    assert relative(result.x, X[:, problem.unknown]) < 1e-5


def test_regularised_newton_takes_every_step_near_the_minimum():
    problem, X = planted("self-dominant", n=8, d=4, scale=1.0, seed=1)
    problem = problem.with_gamma(1e-6)
    for hessian in ("exact", "sampled"):
        solver = Newton(hessian=hessian, globalisation="none")
        result = minimize(problem, X + 1e-3, solver=solver, random_state=0)
        assert result.converged
        assert np.linalg.norm(problem.gradient(result.x)) < 1e-6


def test_sampled_curvature_is_unbiased_and_keeps_the_residual_part():
    problem, X = planted("two outputs", n=8, d=3, scale=1.0, seed=0)
    x = X.reshape(-1) + 0.3
    at = problem.evaluate(x)
    exact = problem.hessian_at(at)
    rng = np.random.default_rng(0)

    def draw(budget):
        return SampledJacobian(budget, rng).curvature(problem, at)

    assert relative(draw(1e9), exact) < 1e-10
    mean = np.mean([draw(60.0) for _ in range(400)], axis=0)
    assert relative(mean, exact) < 0.1
    assert relative(draw(60.0), exact) > 0.01
