"""Absorbed effects in Poisson models: against fits with dummies, published numbers and linear programmes."""

import warnings

import numpy as np
import pytest
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning

from attnfit import PoissonRegressor, minimize, problems
from attnfit.solvers import Newton
from benchmarks.effects_data import bipartite, dummies, gravity, matched, statsmodels_fit


def kept_rows(result, n):
    gone = np.zeros(n, bool)
    gone[result.absorbed.prepared.dropped.in_zero_levels] = True
    gone[result.dropped["separated"]] = True
    return ~gone


def test_coefficients_errors_and_reads_of_two_sets():
    X, y, sets = bipartite(200, 200, 40_000)
    assert y.sum() == 42_240
    model = PoissonRegressor(covariance="classic").fit(X, y, absorb=sets)
    assert model.result_.converged and model.result_.n_passes <= 6
    assert model.coef_[0] == pytest.approx(0.7047991037285, abs=1e-11)
    assert model.standard_errors_[0] == pytest.approx(0.0049811492, abs=1e-9)


def test_three_sets():
    X, y, sets = gravity(60, 10)
    model = PoissonRegressor(covariance="classic").fit(X, y, absorb=sets)
    assert model.result_.converged and model.result_.n_passes <= 6
    assert len(model.result_.absorbed.prepared.dropped.in_zero_levels) == 420
    np.testing.assert_allclose(model.coef_, [0.40305510248, -0.20471863911, 0.09452465255], atol=1e-10)
    np.testing.assert_allclose(model.standard_errors_, [0.0082407217, 0.0040064860, 0.0039353552], atol=2e-10)


def test_levels_that_are_hard_to_tell_apart():
    X, y, sets = matched(20_000, 2_000)
    assert y.sum() == 212_083
    model = PoissonRegressor(covariance="classic").fit(X, y, absorb=sets)
    result = model.result_
    assert result.converged and result.n_passes <= 8
    dropped = result.absorbed.prepared.dropped
    assert dropped.n_rows == 699 and len(result.dropped["separated"]) == 9
    np.testing.assert_allclose(model.coef_, [0.29587502090, -0.20334503260, 0.09836167608], atol=1e-10)
    np.testing.assert_allclose(model.standard_errors_, [0.0025431199, 0.0025097684, 0.0025166052], atol=2e-10)
    assert "699 rows left out" in result.message


@pytest.mark.parametrize("seed", [3, 4])
def test_everything_is_that_of_statsmodels_with_dummies(seed):
    X, y, sets = matched(60, 12, seed, reach=3, level=-1.0)
    rng = np.random.default_rng(seed)
    weights, offset = rng.integers(1, 4, len(y)).astype(float), 0.3 * rng.standard_normal(len(y))
    clusters = rng.integers(0, 40, len(y))
    model = PoissonRegressor(weight_type="frequency").fit(
        X, y, weights, offset, absorb=sets, clusters=clusters
    )
    kept = kept_rows(model.result_, len(y))
    assert 0 < (~kept).sum() < 150
    levels = [s[kept] for s in sets]
    theirs = statsmodels_fit(X[kept], y[kept], levels, weights=weights[kept], offset=offset[kept])
    np.testing.assert_allclose(model.coef_, theirs.params[:3], atol=1e-10)
    classic = np.sqrt(np.diag(model.covariance("classic")))
    np.testing.assert_allclose(classic, theirs.bse[:3], rtol=1e-8)
    np.testing.assert_allclose(model.predict(X, offset, absorb=sets)[kept], theirs.fittedvalues, rtol=1e-9)
    assert (model.predict(X, offset, absorb=sets)[~kept] == 0.0).all()
    statistics = model.fit_statistics()
    assert statistics.deviance == pytest.approx(theirs.deviance, rel=1e-10)
    assert statistics.n_parameters == theirs.df_model + 1 == 3 + model.result_.effects.rank


@pytest.mark.parametrize("sets_of", [lambda s: s, lambda s: [s[0]], lambda s: [*s, np.arange(300) % 7]])
def test_sandwiches_are_those_of_statsmodels_with_dummies(sets_of):
    X, y, sets = matched(60, 12, 3, reach=3)
    sets = sets_of(sets)
    clusters = np.random.default_rng(1).integers(0, 40, len(y))
    model = PoissonRegressor().fit(X, y, absorb=sets)
    kept = kept_rows(model.result_, len(y))
    levels = [s[kept] for s in sets]
    robust = statsmodels_fit(X[kept], y[kept], levels, cov_type="HC0")
    ours = np.sqrt(np.diag(model.covariance("robust", correction=False)))
    np.testing.assert_allclose(ours, robust.bse[:3], rtol=1e-8)
    n = kept.sum()
    factor = model.covariance("robust", correction="fixest") / model.covariance("robust", correction=False)
    np.testing.assert_allclose(factor, n / (n - 3 - dummies(levels).shape[1]), rtol=1e-12)
    grouped = {"groups": clusters[kept], "use_correction": False}
    by_cluster = statsmodels_fit(X[kept], y[kept], levels, cov_type="cluster", cov_kwds=grouped)
    ours = np.sqrt(np.diag(model.covariance("cluster", clusters=clusters, correction=False)))
    np.testing.assert_allclose(ours, by_cluster.bse[:3], rtol=1e-8)


def separated_by_programme(sets, y, X=None):
    """Return the rows that some direction lowers: the largest sum of falls, each at most one."""
    D = dummies_of_all(sets) if X is None else np.column_stack([X, dummies_of_all(sets)])
    zero = y == 0.0
    n_zero, width = int(zero.sum()), D.shape[1]
    # D v + fall <= 0 on rows without outcomes, D v = 0 on the others, 0 <= fall <= 1.
    upper = np.hstack([D[zero], np.eye(n_zero)])
    equal = np.hstack([D[~zero], np.zeros((int((~zero).sum()), n_zero))])
    found = linprog(
        np.concatenate([np.zeros(width), -np.ones(n_zero)]), upper, np.zeros(n_zero), equal,
        np.zeros(len(equal)), [(None, None)] * width + [(0, 1)] * n_zero, method="highs",
    )  # fmt: skip
    assert found.status == 0
    out = np.zeros(len(y), bool)
    out[zero] = found.x[width:] > 0.5
    return out


def dummies_of_all(sets):
    return np.column_stack([np.equal.outer(s, np.unique(s)) for s in sets]).astype(float)


def left_out(sets, y):
    from attnfit.effects.levels import read_sets
    from attnfit.effects.separation import leave_out

    kept, _ = leave_out(read_sets(sets), y, np.ones(len(y), bool), separable=True, drop_singletons=False)
    return ~kept


def test_rows_separated_by_two_sets_are_those_of_a_linear_programme():
    rng, n_separable = np.random.default_rng(0), 0
    for _ in range(250):
        n = rng.integers(5, 21)
        sets = [rng.integers(0, rng.integers(2, 6), n) for _ in range(2)]
        y = rng.integers(0, 2, n) * (rng.random(n) < rng.choice([0.3, 0.6, 0.9]))
        if not y.any():
            continue
        expected = separated_by_programme(sets, y)
        n_separable += expected.any()
        np.testing.assert_array_equal(left_out(sets, y.astype(float)), expected)
    assert n_separable > 100


def test_no_row_of_three_sets_is_called_separated_that_is_not():
    rng, n_found = np.random.default_rng(1), 0
    for _ in range(100):
        n = rng.integers(8, 21)
        sets = [rng.integers(0, rng.integers(2, 5), n) for _ in range(3)]
        y = rng.integers(0, 2, n).astype(float)
        if not y.any():
            continue
        found = left_out(sets, y)
        assert not (found & ~separated_by_programme(sets, y)).any()
        n_found += found.any()
    assert n_found > 20


def test_a_column_that_separates_is_infinite_and_the_others_are_those_of_the_rest():
    X, y, sets = matched(60, 12, 5, reach=3)
    dummy = (np.arange(len(y)) % 9 == 4) * 1.0
    y = np.where(dummy > 0.0, 0.0, y)
    with pytest.warns(ConvergenceWarning, match="separable"):
        result = minimize(problems.Poisson(np.column_stack([X, dummy]), y, absorb=sets))
    assert result.status == "separable" and result.x[3] == -np.inf
    expected = separated_by_programme(sets, y, dummy[:, None])
    np.testing.assert_array_equal(~kept_rows(result, len(y)), expected)
    rest = ~expected
    theirs = statsmodels_fit(X[rest], y[rest], [s[rest] for s in sets])
    np.testing.assert_allclose(result.x[:3], theirs.params[:3], atol=1e-9)


def test_columns_that_the_effects_explain():
    X, y, sets = matched(60, 12, 3, reach=3)
    of_firm, mixed = np.sin(sets[1]), X[:, 0] + np.cos(sets[0])
    model = PoissonRegressor().fit(np.column_stack([X, of_firm]), y, absorb=sets)
    plain = PoissonRegressor().fit(X, y, absorb=sets)
    assert model.result_.converged and "column 3 is collinear" in model.result_.message
    assert np.isnan(model.coef_[3]) and np.isnan(model.standard_errors_[3])
    np.testing.assert_allclose(model.coef_[:3], plain.coef_, atol=1e-9)
    np.testing.assert_allclose(model.standard_errors_[:3], plain.standard_errors_, rtol=1e-8)
    both = minimize(problems.Poisson(np.column_stack([X, mixed]), y, absorb=sets))
    np.testing.assert_array_equal(np.isnan(both.x), [True, False, False, True])
    np.testing.assert_allclose(both.x[1:3], plain.coef_[1:], atol=1e-9)


def test_profile_derivatives_and_another_solver():
    X, y, sets = matched(60, 12, 3, reach=3)
    problem = problems.Poisson(X, y, absorb=sets, ridge=2.0)
    x, h = np.array([0.1, 0.2, -0.1]), 1e-5
    ends = [(problem.value_and_gradient(x + h * e), problem.value_and_gradient(x - h * e)) for e in np.eye(3)]
    slopes = [(a[0] - b[0]) / (2 * h) for a, b in ends]
    np.testing.assert_allclose(problem.gradient(x), slopes, rtol=1e-6)
    curvature = [(a[1] - b[1]) / (2 * h) for a, b in ends]
    np.testing.assert_allclose(problem.hessian(x), curvature, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(problem.hvp(x, x), problem.hessian(x) @ x, rtol=1e-12)
    result = minimize(problem)
    other = minimize(problem, solver=Newton())
    assert result.converged and other.converged
    np.testing.assert_allclose(other.x, result.x, atol=1e-8)
    assert other.value == pytest.approx(result.value, rel=1e-12)
    np.testing.assert_allclose(problem.gradient(result.x), 0.0, atol=1e-6)
    assert not result.certificate().valid and "absorbed" in result.certificate().reason


def test_the_value_is_the_loss_of_the_outputs():
    X, y, sets = matched(60, 12, 3, reach=3)
    w = np.random.default_rng(0).uniform(0.5, 2.0, len(y))
    problem = problems.Poisson(X, y, absorb=sets, weights=w)
    result = minimize(problem)
    mu = problem.predict(result.x)
    told = np.sum(w * (mu - y * np.log(np.where(mu > 0.0, mu, 1.0))))
    assert result.value == pytest.approx(told, rel=1e-10)


def test_effects_and_components():
    X, y, (one, other) = bipartite(12, 9, 600, 2)
    X, y = np.vstack([X, X]), np.concatenate([y, y])
    sets = [np.concatenate([one, one + 20]), np.concatenate([other, other + 20])]
    result = minimize(problems.Poisson(X, y, absorb=sets))
    first, second = result.effects
    assert result.effects.n_components == 2 and result.effects.rank == 2 * (12 + 9 - 1)
    np.testing.assert_array_equal(first.labels, np.unique(sets[0]))
    assert first.identified.all() and set(first.component) == {0, 1}
    mu = problems.Poisson(X, y, absorb=sets).predict(result.x)
    for c in (0, 1):
        inside = second.component == c
        weight = [mu[sets[1] == label].sum() for label in second.labels[inside]]
        assert abs(np.dot(weight, second.values[inside])) < 1e-9 * np.sum(weight)
    eta = X @ result.x + first.values[np.searchsorted(first.labels, sets[0])]
    eta += second.values[np.searchsorted(second.labels, sets[1])]
    np.testing.assert_allclose(np.exp(eta), mu, rtol=1e-9)
    assert np.isnan(first.contrast(0, 20))
    assert first.contrast(0, 1) == pytest.approx(first.values[0] - first.values[1])
    np.testing.assert_allclose(first.contrast(0, 1), first.contrast(20, 21), atol=1e-9)
    with pytest.raises(KeyError, match="77"):
        first.contrast(0, 77)


def test_effects_of_three_sets_have_the_least_norm():
    X, y, sets = gravity(8, 3)
    result = minimize(problems.Poisson(X, y, absorb=sets))
    kept = kept_rows(result, len(y))
    mu = problems.Poisson(X, y, absorb=sets).predict(result.x)
    eta = np.log(mu[kept]) - X[kept] @ result.x
    of_first, of_rest = dummies_of_all([sets[0][kept]]), dummies_of_all([s[kept] for s in sets[1:]])
    centred = of_rest - of_first @ np.linalg.lstsq(of_first, of_rest, rcond=None)[0]
    expected = np.linalg.lstsq(
        centred, eta - of_first @ np.linalg.lstsq(of_first, eta, rcond=None)[0], rcond=1e-9
    )[0]
    ours = np.concatenate([e.values[e.identified] for e in result.effects[1:]])
    np.testing.assert_allclose(ours, expected, atol=1e-8)


def test_what_leaves_before_the_fit():
    X, y, (one, other) = bipartite(12, 9, 400, 2)
    one, y, w = one.copy(), y.copy(), np.ones(400)
    one[:3], y[:3], w[10:14] = 99, 0.0, 0.0
    other[5], y[5] = 50, 2.0

    result = minimize(problems.Poisson(X, y, absorb=[one, other], weights=w))
    assert result.converged
    assert result.dropped["zero weight"] == 4
    np.testing.assert_array_equal(result.dropped["all-zero level"]["absorb[0]"], [99])
    assert result.effects[0].values[-1] == -np.inf and not result.effects[0].identified[-1]
    assert "1 level of absorb[0] without outcomes" in result.message and "weight zero" in result.message
    rows = np.setdiff1d(np.arange(400), [0, 1, 2, 10, 11, 12, 13])
    rest = minimize(problems.Poisson(X[rows], y[rows], absorb=[one[rows], other[rows]]))
    np.testing.assert_allclose(result.x, rest.x, atol=1e-10)
    # The row with a level of its own says nothing, and may stay or go.
    assert result.dropped["singletons"] == {"absorb[1]": 1}
    alone = minimize(problems.Poisson(X, y, absorb=[one, other], weights=w, singletons="drop"))
    np.testing.assert_array_equal(alone.dropped["singleton rows"], [5])
    np.testing.assert_allclose(alone.x, result.x, atol=1e-10)
    assert alone.effects.rank == result.effects.rank - 1


def test_without_columns_and_one_set():
    _, y, sets = bipartite(12, 9, 400, 2)
    result = minimize(problems.Poisson(None, y, absorb=[sets[0]]))
    assert result.converged and result.x.shape == (0,)
    means = [y[sets[0] == k].mean() for k in range(12)]
    np.testing.assert_allclose(np.exp(result.effects[0].values), means, rtol=1e-12)
    both = minimize(problems.Poisson(np.zeros((400, 0)), y, absorb=sets))
    mu = problems.Poisson(None, y, absorb=sets).predict(both.x)
    for s in sets:
        np.testing.assert_allclose(np.bincount(s, mu), np.bincount(s, y), rtol=1e-8)


def test_start_steps_and_interruption():
    X, y, sets = bipartite(12, 9, 400, 2)
    problem = problems.Poisson(X, y, absorb=sets)
    result = minimize(problem)
    again = minimize(problem, x0=result.x)
    assert again.converged
    np.testing.assert_allclose(again.x, result.x, atol=1e-9)
    with pytest.warns(ConvergenceWarning, match="max_iter=1"):
        short = minimize(problem, max_iter=1)
    assert short.status == "max_iter" and short.n_iter == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stopped = minimize(problem, callback=lambda record: record.iteration == 1)
    assert stopped.status == "interrupted"
    assert [r.n_passes for r in result.history] == list(range(1, 1 + len(result.history)))
