"""Several ones in a group: the conditional logit that takes their number as given."""

from itertools import combinations

import numpy as np
import pytest
import statsmodels.api as sm

from attnfit.estimators import SoftmaxRegressor, load
from attnfit.inference.exact_ties import ExactTies
from attnfit.problems import Softmax

torch = pytest.importorskip("torch")


def sets(seed=0, n_groups=25, d=2):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(2, 7, n_groups)))
    X = rng.standard_normal((len(groups), d))
    y = (X @ [0.8, -0.5] + rng.logistic(size=len(groups)) > 0).astype(float)
    return X, y, groups, rng


def by_subsets(x, X, y, groups, weights, offset):
    """Return the loss by enumeration of all subsets, for automatic differentiation."""
    z = torch.tensor(X) @ x + torch.tensor(offset)
    loss = torch.zeros((), dtype=torch.float64)
    for g in np.unique(groups):
        rows = np.flatnonzero(groups == g)
        m = int(y[rows].sum())
        sums = torch.stack([z[list(s)].sum() for s in combinations(rows, m)])
        loss = loss - weights[g] * (z[rows][torch.tensor(y[rows] > 0)].sum() - torch.logsumexp(sums, 0))
    return loss


def test_derivatives_against_enumeration():
    X, y, groups, rng = sets()
    weights, offset = rng.uniform(1, 3, 25), 0.3 * rng.standard_normal(len(y))
    problem = ExactTies(
        Softmax(X, y, groups, loss="cross_entropy", weights=weights[groups], offset=offset, ridge=0.2)
    )
    x = np.array([0.7, -1.3])
    point = torch.tensor(x)
    arguments = (X, y, groups, weights, offset)
    by_hand = lambda p: by_subsets(p, *arguments) + 0.1 * (p * p).sum()  # noqa: E731
    assert problem.value(x) == pytest.approx(float(by_hand(point)), rel=1e-12)
    gradient = torch.autograd.functional.jacobian(by_hand, point).numpy()
    hessian = torch.autograd.functional.hessian(by_hand, point).numpy()
    np.testing.assert_allclose(problem.gradient(x), gradient, rtol=1e-10)
    np.testing.assert_allclose(problem.hessian(x), hessian, rtol=1e-10)
    far = problem.evaluate(1e3 * x)
    assert np.isfinite(far.value) and np.isfinite(far.gradient).all()


def test_statsmodels():
    X, y, groups, _ = sets(1, n_groups=60)
    ones, sizes = np.bincount(groups, weights=y), np.bincount(groups)
    kept = ((ones > 0) & (ones < sizes))[groups]
    X, y, groups = X[kept], y[kept], groups[kept]
    model = SoftmaxRegressor("cross_entropy", ties="exact").fit(X, y, groups=groups)
    peer = sm.ConditionalLogit(y, X, groups=groups)
    assert np.abs(peer.score(model.coef_)).max() < 1e-8
    assert model.log_likelihood_ == pytest.approx(peer.loglike(model.coef_), rel=1e-12)
    # Their Hessian is a numerical derivative at a looser optimum.
    np.testing.assert_allclose(model.standard_errors_, peer.fit(disp=False).bse, rtol=1e-3)
    assert model.covariance_kind_ == "classic" and "conditional likelihood" in str(model.summary())
    less = SoftmaxRegressor("cross_entropy", ties="exact").fit(X[:, :1], y, groups=groups)
    gain = peer.loglike(model.coef_) - sm.ConditionalLogit(y, X[:, :1], groups=groups).loglike(less.coef_)
    assert model.likelihood_ratio_test(less).statistic == pytest.approx(2 * gain, rel=1e-9)


def test_one_choice_a_group_is_the_softmax():
    X, _, groups, rng = sets(2)
    y = np.zeros(len(groups))
    for g in np.unique(groups):
        y[rng.choice(np.flatnonzero(groups == g))] = 1.0
    clusters = groups % 7
    exact, plain = (
        SoftmaxRegressor("cross_entropy", ties=ties).fit(X, y, groups=groups, clusters=clusters)
        for ties in ("exact", "counts")
    )
    np.testing.assert_allclose(exact.coef_, plain.coef_, rtol=1e-7)
    for kind in ("classic", "robust", "cluster"):
        np.testing.assert_allclose(exact.covariance(kind), plain.covariance(kind), rtol=1e-6)
    ours, theirs = exact.fit_statistics(), plain.fit_statistics()
    for name in ("log_likelihood", "log_likelihood_null", "aic", "bic"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9)


def test_several_ones_are_said(tmp_path):
    X, y, groups, _ = sets(3)
    with pytest.warns(
        UserWarning, match=r"several ones in \d+ groups, which are fitted as counts.*ties='exact'"
    ):
        counts = SoftmaxRegressor("cross_entropy").fit(X, y, groups=groups)
    silent = SoftmaxRegressor("cross_entropy", ties="counts").fit(X, y, groups=groups)
    np.testing.assert_array_equal(counts.coef_, silent.coef_)
    exact = SoftmaxRegressor("cross_entropy", ties="exact").fit(X, y, groups=groups)
    assert abs(exact.coef_[0]) > 1.2 * abs(counts.coef_[0])
    exact.summary()
    exact.save(tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.ties == "exact" and back.covariance_kind_ == "classic"


def test_refusals():
    X, y, groups, _ = sets(4)
    exact = SoftmaxRegressor("cross_entropy", ties="exact")
    for call, told in (
        (lambda: exact.fit(X, 0.5 * y, groups=groups), "takes targets 0 and 1; row .* has 0.5"),
        (lambda: SoftmaxRegressor(ties="exact").fit(X, y, groups=groups), "use loss='cross_entropy'"),
        (lambda: SoftmaxRegressor(ties="efron").fit(X, y, groups=groups), "ties must be one of"),
        (lambda: exact.fit(X, y, groups=groups).covariance("row"), "a score belongs to a group"),
        (lambda: exact.fit(X, y, groups=groups).covariance(clusters=np.arange(len(y)) % 2), "clusters split"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_stata():
    """The answer of Stata's clogit that statsmodels is tested on, and what the same data are as counts."""
    y = np.array([0, 1, 0, 1, 0, 1, 0, 1, 1, 1.0])
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    x = np.array([0, 1, 0, 0, 1, 1, 0, 0, 1, 0.0])[:, None]
    model = SoftmaxRegressor("cross_entropy", ties="exact").fit(x, y, groups=groups)
    assert (model.coef_[0], model.standard_errors_[0]) == pytest.approx((0.9272407, 1.295155), rel=1e-6)
    counts = SoftmaxRegressor("cross_entropy", ties="counts").fit(x, y, groups=groups)
    assert counts.coef_[0] == pytest.approx(0.4609, abs=5e-5)
