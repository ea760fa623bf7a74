"""Bootstrap and jackknife: against fits one by one, closed forms and statsmodels."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from attnfit import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor, datasets
from attnfit.inference import resampling


@pytest.fixture(scope="module")
def travel():
    data = datasets.load_travel_mode()
    return data, SoftmaxRegressor("cross_entropy").fit(data.A, data.b, groups=data.groups)


def counts(seed=0, n=300):
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(n), rng.standard_normal((n, 2))])
    return rng, X, rng.poisson(np.exp(X @ [0.5, 0.3, -0.2])).astype(float)


def test_bootstrap_fits_are_those_of_the_draws(travel):
    data, model = travel
    drawn = model.bootstrap(20, random_state=3)
    W = np.random.default_rng(3).multinomial(210, np.full(210, 1 / 210), size=20)
    for k in (0, 7, 19):
        w = W[k][data.groups - data.groups.min()].astype(float)
        own = SoftmaxRegressor("cross_entropy", tol=1e-10).fit(
            data.A, data.b, groups=data.groups, sample_weight=w
        )
        assert np.allclose(drawn.coefs[k], own.coef_, atol=1e-6)
    assert drawn.n_units == 210
    assert np.allclose(drawn.covariance(), np.cov(drawn.coefs.T))
    assert np.allclose(drawn.standard_errors, drawn.coefs.std(axis=0, ddof=1))
    low, high = np.quantile(drawn.coefs, [0.05, 0.95], axis=0)
    assert np.allclose(drawn.interval(0.9), np.column_stack([low, high]))
    assert repr(drawn) == "20 bootstrap fits of 210 units: 20 converged"


def test_the_same_seed_draws_the_same_whatever_the_memory(travel, monkeypatch):
    _, model = travel
    first = model.bootstrap(9, random_state=1)
    monkeypatch.setattr(resampling, "DRAWN_BYTES", 8 * 210 * 4)
    assert np.allclose(model.bootstrap(9, random_state=1).coefs, first.coefs, atol=1e-7)
    assert np.allclose(model.jackknife().coefs[:9], jackknife_by_hand(*travel, 9), atol=1e-6)


def jackknife_by_hand(data, model, n):
    out = []
    for g in np.unique(data.groups)[:n]:
        kept = data.groups != g
        own = SoftmaxRegressor("cross_entropy", tol=1e-10)
        out.append(own.fit(data.A[kept], data.b[kept], groups=data.groups[kept]).coef_)
    return np.array(out)


def test_errors_agree_with_the_sandwich(travel):
    """Of 210 travellers, to first order: within the noise of 1,000 draws and 1 / sqrt(210)."""
    _, model = travel
    robust = np.sqrt(np.diag(model.covariance("robust")))
    drawn, left_out = model.bootstrap(1000, random_state=0), model.jackknife()
    assert drawn.usable.all()
    assert np.allclose(drawn.standard_errors / robust, 1.0, atol=0.15)
    assert np.allclose(left_out.standard_errors / robust, 1.0, atol=0.1)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """A Poisson model of a constant fits the mean m, and the error of log m is that of m over m, to first
    order; of m itself the jackknife is exact.
    """
    _, _, y = counts()
    drawn = PoissonRegressor().fit(np.ones((len(y), 1)), y).jackknife()
    means = np.exp(drawn.coefs[:, 0])
    assert np.allclose(means, (y.sum() - y) / (len(y) - 1))
    assert np.sqrt(np.sum((means - means.mean()) ** 2) * (len(y) - 1) / len(y)) == pytest.approx(stats.sem(y))
    n = len(y)
    expected = np.sqrt(np.sum((drawn.coefs - drawn.coefs.mean()) ** 2) * (n - 1) / n)
    assert drawn.standard_errors[0] == pytest.approx(expected, rel=1e-10)
    half = stats.t.ppf(0.95, n - 1) * drawn.standard_errors[0]
    center = np.log(y.mean())
    assert drawn.interval(0.9)[0] == pytest.approx([center - half, center + half], rel=1e-6)


def test_rows_are_the_units_of_outcomes():
    _, X, y = counts(1)
    model = PoissonRegressor().fit(X, y)
    drawn = model.bootstrap(6, random_state=5)
    W = np.random.default_rng(5).multinomial(300, np.full(300, 1 / 300), size=6)
    for k in range(6):
        glm = sm.GLM(y, X, family=sm.families.Poisson(), freq_weights=W[k]).fit(tol=1e-12)
        assert np.allclose(drawn.coefs[k], glm.params, atol=1e-7)
    assert ExponentialRegressor().fit(X, np.exp(X[:, 1])).bootstrap(3, random_state=0).coefs.shape == (3, 3)


def test_clusters_are_drawn_as_one(travel):
    data, model = travel
    parties = data.groups // 30
    drawn = model.bootstrap(8, clusters=parties, random_state=2)
    n = len(np.unique(parties))
    assert drawn.n_units == n
    W = np.random.default_rng(2).multinomial(n, np.full(n, 1 / n), size=8)
    w = W[5][np.unique(parties, return_inverse=True)[1]].astype(float)
    own = SoftmaxRegressor("cross_entropy", tol=1e-10)
    own.fit(data.A, data.b, groups=data.groups, sample_weight=w)
    assert np.allclose(drawn.coefs[5], own.coef_, atol=1e-6)
    given = SoftmaxRegressor("cross_entropy").fit(data.A, data.b, groups=data.groups, clusters=parties)
    assert np.allclose(given.bootstrap(8, random_state=2).coefs, drawn.coefs, atol=1e-7)


def test_frequency_weights_are_drawn_copy_by_copy():
    rng, X, y = counts(2, 60)
    copies = rng.integers(0, 4, 60)
    model = PoissonRegressor(weight_type="frequency").fit(X, y, sample_weight=copies)
    drawn = model.bootstrap(400, random_state=0)
    repeated = PoissonRegressor().fit(np.repeat(X, copies, axis=0), np.repeat(y, copies))
    other = repeated.bootstrap(400, random_state=1)
    # Two samples of 400 errors each, of which the relative noise is 1 / sqrt(800).
    assert np.allclose(drawn.standard_errors / other.standard_errors, 1.0, atol=0.2)
    with pytest.raises(ValueError, match="leaves out units, not copies"):
        model.jackknife()
    with pytest.raises(ValueError, match="repeat the rows"):
        model.bootstrap(3, clusters=np.arange(60) % 5)


def test_samples_without_a_minimum_are_left_out():
    """One group alone chooses the dummied alternative: a third of the samples miss it."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((120, 2)), np.zeros(120)
    b[np.arange(0, 120, 3) + rng.integers(1, 3, 40)] = 1.0
    b[:3] = [1.0, 0.0, 0.0]
    A[:, 1] = 0.0
    A[::3, 1] = 1.0
    model = SoftmaxRegressor("cross_entropy").fit(A, b, groups=np.repeat(np.arange(40), 3))
    drawn = model.bootstrap(30, random_state=0)
    lost = drawn.status == "separable"
    assert 3 <= lost.sum() <= 20
    assert np.isneginf(drawn.coefs[lost, 1]).all()
    assert np.isfinite(drawn.standard_errors).all()
    with pytest.raises(ValueError, match="39 of 40 jackknife fits converged"):
        model.jackknife().covariance()


def test_what_cannot_be_drawn(travel):
    data, model = travel
    for n in (1, 2.5, True):
        with pytest.raises(ValueError, match="n must be a whole number of fits"):
            model.bootstrap(n)
    with pytest.raises(ValueError, match="one set of labels"):
        model.bootstrap(3, clusters=np.column_stack([data.groups, data.groups // 2]))
    with pytest.raises(ValueError, match="units splits group"):
        model.bootstrap(3, clusters=np.arange(len(data.b)))
    alone = SoftmaxRegressor().fit(data.A[:9], np.full(9, 1 / 9))
    with pytest.raises(ValueError, match="one unit only"):
        alone.bootstrap(3)
    with pytest.raises(ValueError, match="level must lie between"):
        model.bootstrap(3, random_state=0).interval(95)


def test_outside_goods_and_labels_in_any_order():
    cars = datasets.load_car_shares()
    rng = np.random.default_rng(0)
    frame, inside = pd.DataFrame(cars.A), 0.9 * cars.b
    plain = SoftmaxRegressor("cross_entropy", outside_good=True).fit(frame, inside, groups=cars.groups)
    order = rng.permutation(len(cars.b))
    mixed = SoftmaxRegressor("cross_entropy", outside_good=True)
    mixed.fit(frame.iloc[order], inside[order], groups=cars.groups[order])
    labels = pd.Series(cars.groups)
    first = plain.bootstrap(5, clusters=labels, random_state=4)
    second = mixed.bootstrap(5, clusters=labels.iloc[order], random_state=4)
    assert np.allclose(first.coefs, second.coefs, atol=1e-6)


def test_absorbed_effects_are_refused():
    rng = np.random.default_rng(0)
    x, origin, other = rng.standard_normal((400, 1)), rng.integers(0, 20, 400), rng.integers(0, 10, 400)
    y = rng.poisson(np.exp(0.3 * x[:, 0] + 0.1 * origin))
    model = PoissonRegressor().fit(x, y, absorb=[origin, other])
    for draw in (lambda: model.bootstrap(3), model.jackknife):
        with pytest.raises(ValueError, match="absorbed effects have effects of their own"):
            draw()
