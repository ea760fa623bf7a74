"""Squared losses with absorbed effects: against fits with a dummy for every level, and published numbers."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from attnfit import ExponentialRegressor, SoftmaxRegressor, minimize, problems
from attnfit.solvers import Newton
from benchmarks.effects_data import bipartite


def shares(*sizes, seed=0):
    X, y, (origin, destination) = bipartite(*sizes, seed)
    return X, y / np.bincount(origin, y)[origin], origin, destination


@pytest.mark.parametrize(
    ("sizes", "x", "value"),
    [((50, 40, 8_000), 0.70283363, 0.218637433269468), ((200, 200, 40_000), 0.71139919, 0.6130444591701)],
)
def test_published_numbers_of_the_squared_softmax(sizes, x, value):
    X, b, origin, destination = shares(*sizes)
    result = minimize(problems.Softmax(X, b, origin, absorb=[destination]))
    assert result.converged and result.n_iter <= 7
    assert result.x[0] == pytest.approx(x, abs=6e-9)
    assert result.value == pytest.approx(value, rel=1e-12)


def with_dummies(X, *sets):
    return np.column_stack([X, *(np.equal.outer(s, np.unique(s)[1:]).astype(float) for s in sets)])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_squared_softmax_is_that_with_dummies(weighted):
    X, b, origin, destination = shares(30, 12, 1_500, seed=4)
    year = np.random.default_rng(2).integers(0, 4, 1_500)
    w = np.random.default_rng(1).uniform(0.5, 2.0, 1_500) if weighted else None
    offset = 0.2 * np.sin(np.arange(1_500))
    ours = SoftmaxRegressor().fit(X, b, origin, w, offset, absorb=[destination, year])
    columns = with_dummies(X, destination, year)
    start = np.concatenate([ours.coef_, np.zeros(14)])
    plain = problems.Softmax(columns, b, origin, weights=w, offset=offset)
    theirs = minimize(plain, x0=start)
    np.testing.assert_allclose(ours.coef_, theirs.x[:1], atol=1e-9)
    assert ours.result_.value == pytest.approx(theirs.value, rel=1e-12)
    model = SoftmaxRegressor().fit(columns, b, origin, w, offset)
    np.testing.assert_allclose(model.coef_, theirs.x, atol=1e-8)
    for kind in ("robust", "row"):
        expected = model.covariance(kind, correction=False)[0, 0]
        assert ours.covariance(kind, correction=False)[0, 0] == pytest.approx(expected, rel=1e-6)
    predicted = ours.predict(X, origin, offset, absorb=[destination, year])
    np.testing.assert_allclose(predicted, model.predict(columns, origin, offset), rtol=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_squared_exponential_is_that_with_dummies(weighted):
    X, y, (one, other) = bipartite(30, 12, 1_500, 4)
    y = y + 0.3 * np.random.default_rng(0).standard_normal(1_500)
    w = np.random.default_rng(1).uniform(0.5, 2.0, 1_500) if weighted else np.ones(1_500)
    w[5] = 0.0 if weighted else 1.0
    ours = ExponentialRegressor().fit(X, y, w, absorb=[one, other])
    assert ours.result_.converged
    columns = np.column_stack([with_dummies(X, one, other), np.ones(1_500)])
    theirs = ExponentialRegressor().fit(columns, y, w)
    np.testing.assert_allclose(ours.coef_, theirs.coef_[:1], atol=1e-8)
    assert ours.loss_value_ == pytest.approx(theirs.loss_value_, rel=1e-10)
    robust = theirs.covariance("robust", correction=False)[0, 0]
    assert ours.covariance("robust", correction=False)[0, 0] == pytest.approx(robust, rel=1e-6)
    if not weighted:
        classic = theirs.covariance("classic")[0, 0]
        assert ours.covariance("classic")[0, 0] == pytest.approx(classic, rel=1e-7)
        scale = theirs.fit_statistics().residual_scale
        assert ours.fit_statistics().residual_scale == pytest.approx(scale, rel=1e-9)
    predicted = ours.predict(X, absorb=[one, other])
    np.testing.assert_allclose(predicted, theirs.predict(columns), rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "exponential"])
def test_profile_derivatives_and_another_solver(kind):
    X, b, origin, destination = shares(12, 6, 400, seed=4)
    X = np.column_stack([X, np.cos(np.arange(400))])
    problem = (
        problems.Softmax(X, b, origin, absorb=[destination], ridge=1e-4)
        if kind == "softmax"
        else problems.Exponential(X, 30 * b, absorb=[origin, destination], ridge=0.1)
    )
    x, h = np.array([0.4, 0.1]), 1e-5
    ends = [(problem.value_and_gradient(x + h * e), problem.value_and_gradient(x - h * e)) for e in np.eye(2)]
    np.testing.assert_allclose(problem.gradient(x), [(a[0] - b[0]) / (2 * h) for a, b in ends], rtol=1e-5)
    slopes = np.array([(a[1] - b[1]) / (2 * h) for a, b in ends])
    np.testing.assert_allclose(problem.hessian(x), slopes, rtol=1e-5, atol=1e-6 * np.abs(slopes).max())
    result, other = minimize(problem), minimize(problem, x0=x, solver=Newton())
    assert result.converged and other.converged
    np.testing.assert_allclose(other.x, result.x, atol=1e-7)


def test_a_level_whose_best_effect_is_minus_infinity():
    X, y, (one, other) = bipartite(12, 6, 400, 4)
    y[one == 3] = -1.0
    result = minimize(problems.Exponential(X, y, absorb=[one, other]))
    assert result.converged and result.effects[0].values[3] == -np.inf
    rest = one != 3
    expected = minimize(problems.Exponential(X[rest], y[rest], absorb=[one[rest], other[rest]]))
    np.testing.assert_allclose(result.x, expected.x, atol=1e-9)
    assert result.value == pytest.approx(expected.value + 0.5 * np.sum(~rest), rel=1e-10)


@pytest.mark.parametrize("kind", ["softmax", "exponential"])
@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_effects_that_fall_for_ever_are_no_minimum(kind, empty):
    """A level without outcomes: the coefficients are those of the fit without its rows, as far as rounding
    lets its outputs be told from zero; with outcomes the fit converges, and its next step is short.
    """
    rng = np.random.default_rng(0)
    n = 600
    one, other, x = rng.integers(0, 20, n), rng.integers(0, 15, n), rng.standard_normal((n, 2))
    y = rng.poisson(5.0 * np.exp(x @ [0.5, -0.2] + 0.3 * np.sin(one))) + 1.0
    y[other == 4] *= empty

    def fit(rows):
        if kind == "exponential":
            return minimize(problems.Exponential(x[rows], y[rows], absorb=[one[rows], other[rows]]))
        b = (y / np.bincount(one, weights=y)[one])[rows]
        return minimize(problems.Softmax(x[rows], b, one[rows], absorb=[other[rows]]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = fit(np.full(n, True))
    if empty == 0.0:
        assert found.status == "no_minimum" and "fall for ever" in found.message
        assert np.allclose(found.x, fit(other != 4).x, atol=1e-7)
    else:
        assert found.converged and found.move <= 1e-8
