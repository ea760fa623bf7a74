"""Shifts of the target: the identities that define them, their accuracy, their bounds, the constructions."""

import numpy as np
import pytest
from instances import relative
from scipy.special import softmax

from attnfit import incontext, problems

U = {"exp": np.exp, "cosh": np.cosh, "sinh": np.sinh}


def regression(n=30, d=4, groups=3, seed=0, cls=problems.Softmax, **options):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, d))
    labels = rng.permutation(np.resize(np.arange(groups), n))
    b = rng.random(n)
    b /= np.bincount(labels, b)[labels]
    x, move = rng.standard_normal(d), 0.1 * rng.standard_normal(d)
    return cls(A, b, groups=labels, **options), A, b, labels, x, x + move


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_softmax_shift_makes_the_residuals_equal(loss):
    problem, _, b, _, x, y = regression(loss=loss)
    found = incontext.shift(problem, x, y)
    before, after = problem.predict(x), problem.predict(y)
    assert relative(after - b, before - found.target) < 1e-14
    assert relative(found.target, b - found.delta) == 0.0
    assert found.parts is not None
    assert relative(found.parts[0] + found.parts[1], found.delta) < 1e-12
    assert found.alpha_ok.all()


def test_parts_are_those_of_the_paper():
    problem, A, _, _, x, y = regression(groups=1)
    found = incontext.shift(problem, x, y)
    u, v = np.exp(A @ x), np.exp(A @ y)
    assert relative(found.parts[0], (1 / v.sum() - 1 / u.sum()) * v) < 1e-12
    assert relative(found.parts[1], (v - u) / u.sum()) < 1e-12


@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
def test_rescaled_shift_makes_the_residuals_equal(function):
    problem, A, b, labels, x, y = regression(cls=problems.Rescaled, function=function)
    found = incontext.shift(problem, x, y)
    u, v = U[function](A @ x), U[function](A @ y)
    alpha, beta = np.bincount(labels, u)[labels], np.bincount(labels, v)[labels]
    assert relative(v - beta * b, u - alpha * found.target) < 1e-12
    assert found.parts is None
    assert np.isfinite(found.sharp).all() == (function != "sinh")


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-12])
def test_small_moves_cost_no_digits(size):
    problem, _, _, _, x, y = regression()
    small = incontext.shift(problem, x, x + size * (y - x))
    assert relative(small.delta, small.first_order) < 10 * size + 1e-12
    rescaled, *_, x, y = regression(cls=problems.Rescaled)
    small = incontext.shift(rescaled, x, x + size * (y - x))
    assert relative(small.delta, small.first_order) < 10 * size + 1e-12


@pytest.mark.parametrize("cls", [problems.Softmax, problems.Rescaled])
def test_a_move_of_the_data_that_acts_like_one_of_the_unknowns(cls):
    problem, A, _, _, x, y = regression(cls=cls)
    A_new = A + np.outer(A @ (y - x), x) / (x @ x)
    by_data = incontext.data_shift(problem, x, A, A_new)
    by_weights = incontext.shift(problem, x, y)
    assert relative(by_data.delta, by_weights.delta) < 1e-12
    assert relative(by_data.first_order, by_weights.first_order) < 1e-12


@pytest.mark.parametrize("loss", ["squared", "rescaled"])
def test_attention_shifts(loss):
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((6, 3)), rng.standard_normal((5, 2))
    B = softmax(rng.standard_normal((6, 5)), axis=1)
    problem = problems.Attention(A1, A2, B, loss=loss)
    X, Y = 0.5 * rng.standard_normal((2, 3, 2))
    found = incontext.shift(problem, X, Y)
    assert found.delta.shape == (6, 5)
    if loss == "squared":
        assert relative(problem.predict(Y) - B, problem.predict(X) - found.target) < 1e-13
    else:
        u, v = np.exp(A1 @ X @ A2.T), np.exp(A1 @ Y @ A2.T)
        residual = u - u.sum(1, keepdims=True) * found.target
        assert relative(v - v.sum(1, keepdims=True) * B, residual) < 1e-13
    moved = A1 + 0.01 * rng.standard_normal(A1.shape)
    by_data = incontext.data_shift(problem, X, (A1, A2), (moved, A2))
    other = problems.Attention(moved, A2, B, loss=loss)
    if loss == "squared":
        assert relative(by_data.delta, other.predict(X) - problem.predict(X)) < 1e-10
    else:
        u, v = np.exp(A1 @ X @ A2.T), np.exp(moved @ X @ A2.T)
        residual = u - u.sum(1, keepdims=True) * by_data.target
        assert relative(v - v.sum(1, keepdims=True) * B, residual) < 1e-10


@pytest.mark.parametrize("cls", [problems.Softmax, problems.Rescaled])
@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold(cls, seed):
    problem, A, _, _, x, y = regression(seed=seed, groups=1, cls=cls)
    near = x + 1e-3 * (y - x)
    for found in (
        incontext.shift(problem, x, near),
        incontext.data_shift(problem, x, A, A + 1e-4 * np.sin(np.arange(A.size)).reshape(A.shape)),
    ):
        assert found.norm <= found.sharp[0] * (1 + 1e-12)
        assert np.log10(found.norm) < found.log10_printed


def test_a_normaliser_of_zero_is_reported_and_never_divided_by():
    A = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
    problem = problems.Rescaled(A, np.full(4, 0.5), "sinh", np.array([0, 0, 1, 1]))
    found = incontext.shift(problem, np.array([1.0, 1.0]), np.array([1.1, 1.0]))
    assert found.alpha_ok.tolist() == [False, True]
    assert np.isnan(found.delta[:2]).all()
    assert np.isfinite(found.delta[2:]).all()
    assert np.isfinite(found.norm)


def test_large_logits():
    rng = np.random.default_rng(0)
    A = 300.0 * rng.standard_normal((10, 2))
    problem = problems.Softmax(A, np.full(10, 0.1))
    found = incontext.shift(problem, np.array([1.0, 2.0]), np.array([1.0, 2.001]))
    assert np.isfinite(found.delta).all()
    assert np.isfinite(found.log10_printed)


def test_one_step_is_a_gradient_step_and_its_comparison():
    _, A, b, _, x, _ = regression(groups=1)
    problem = problems.Softmax(A, b)
    step = incontext.one_step(A, b, x, 0.1)
    assert relative(step.x_new, x - 0.1 * problem.gradient(x)) < 1e-12
    assert relative(step.weight.delta, problem.predict(step.x_new) - problem.predict(x)) < 1e-12
    assert step.losses[1] < step.losses[0] > step.losses[2]
    assert abs(step.relative_error - np.sqrt(1 - step.cosine**2)) < 1e-9


def test_steps_coincide_where_rows_are_orthogonal():
    rng = np.random.default_rng(1)
    A = 2.0 * np.linalg.qr(rng.standard_normal((6, 6)))[0]
    step = incontext.one_step(A, np.full(6, 1 / 6), rng.standard_normal(6), 0.3)
    assert relative(step.weight.delta, step.data.delta) < 1e-12
    assert abs(step.cosine - 1) < 1e-12


def test_linear_attention_equals_a_gradient_step_on_linear_regression():
    rng = np.random.default_rng(0)
    X, Y, W0 = rng.standard_normal((7, 3)), rng.standard_normal((7, 2)), rng.standard_normal((2, 3))
    dW = -(0.3 / 7) * (X @ W0.T - Y).T @ X
    layer = incontext.linear_regression_layer(X, Y, W0, 0.3)
    assert relative(layer.apply(), np.hstack([X, Y - X @ dW.T])) < 1e-14
    x = rng.standard_normal(3)
    after = layer.apply(np.concatenate([x, -W0 @ x])[None])[0]
    assert relative(-after[3:], (W0 + dW) @ x) < 1e-14


def test_linear_attention_equals_a_gradient_step_on_softmax_regression():
    _, A, b, _, x, _ = regression(groups=1)
    layer = incontext.softmax_regression_layer(A, b, x, 0.2)
    step = incontext.one_step(A, b, x, 0.2)
    after = layer.apply()
    assert relative(softmax(after[:, 4]), problems.Softmax(A, b).predict(step.x_new)) < 1e-13
    assert relative(after[:, :4], A) == 0.0


def test_bad_input():
    problem, A, b, _, x, y = regression()
    with pytest.raises(TypeError, match="no normaliser"):
        incontext.shift(problems.Exponential(A, b), x, y)
    with pytest.raises(TypeError, match="no normaliser"):
        incontext.shift(problems.TwoLayer(A, A.T, np.ones(4)), x, y)
    with pytest.raises(ValueError, match="A_new has shape"):
        incontext.data_shift(problem, x, A, A[:5])
    with pytest.raises(ValueError, match="x is zero"):
        incontext.one_step(A, b, np.zeros(4), 0.1)
    with pytest.raises(ValueError, match="do not fit"):
        incontext.linear_regression_layer(np.ones((3, 2)), np.ones((4, 1)), np.ones((1, 2)), 0.1)
    with pytest.raises(ValueError, match="index 1"):
        incontext.shift(problem, x, np.array([0.0, np.nan, 0.0, 0.0]))


def test_parts_of_large_moves_are_finite():
    found = incontext.shift(
        problems.Softmax(np.array([[1.0, 0.0], [1.0, 1.0]]), [0.5, 0.5]), [0, 0], [-800, 0]
    )
    one, other = found.parts
    assert np.isfinite(one).all()
    assert np.isfinite(other).all()
    np.testing.assert_allclose(one + other, found.delta)


def test_a_loss_without_normaliser_is_refused():
    A1, A2 = np.random.default_rng(0).standard_normal((2, 4, 2))
    with pytest.raises(TypeError, match="no bounds for Total"):
        incontext.shift(
            problems.Attention(A1, A2, np.ones((4, 4)), loss="sparse"), np.eye(2), np.zeros((2, 2))
        )
