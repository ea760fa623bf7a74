"""Ridge by cross-validation, and scores that route groups."""

import numpy as np
import pytest
import sklearn
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate

from attnfit import datasets, metrics, scorers
from attnfit.estimators import SoftmaxRegressor, load
from attnfit.model_selection import SoftmaxRegressorCV
from benchmarks import inference_data

TRAVEL = datasets.load_travel_mode()


def test_swissmetro_path():
    d = inference_data.swissmetro()
    columns = ["asc_train", "asc_car", "time", "cost"]
    fold = d.person % 5
    splits = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(5)]
    model = SoftmaxRegressorCV([0, 1, 10, 100, 1000], cv=splits).fit(d[columns], d.choice, groups=d.case)
    expected = [0.838648840, 0.793941945, 0.792374209, 0.792577498, 0.792607411]
    # The mean over choices: folds differ in size.
    sizes = np.array([d.case[test].nunique() for _, test in splits])
    np.testing.assert_allclose(model.scores_ @ sizes / sizes.sum(), expected, rtol=1e-7)
    assert model.ridge_ == 10.0
    plain = SoftmaxRegressor("cross_entropy", ridge=10.0).fit(d[columns], d.choice, groups=d.case)
    np.testing.assert_allclose(model.coef_, plain.coef_, rtol=1e-7)


def test_default_path(tmp_path):
    scaled = TRAVEL.A / TRAVEL.A.std(axis=0)
    model = SoftmaxRegressorCV(cv=4).fit(scaled, TRAVEL.b, groups=TRAVEL.groups, clusters=TRAVEL.groups // 3)
    assert model.scores_.shape == (21, 4) and model.ridges_[-1] == 0.0
    problem = SoftmaxRegressor("cross_entropy").fit(scaled, TRAVEL.b, groups=TRAVEL.groups).result_.problem
    assert model.ridges_[0] == pytest.approx(np.diag(problem.hessian(np.zeros(6))).max())
    assert model.scores_.mean(axis=1).argmin() == np.flatnonzero(model.ridges_ == model.ridge_)[0]
    model.set_params(one_standard_error=True).fit(scaled, TRAVEL.b, groups=TRAVEL.groups)
    error = model.scores_.std(axis=1, ddof=1) / 2
    means = model.scores_.mean(axis=1)
    assert (means[model.ridges_ > model.ridge_] > means.min() + error[means.argmin()]).all()
    model.save(tmp_path / "m")
    back = load(tmp_path / "m")
    assert type(back) is SoftmaxRegressor and back.ridge == model.ridge_
    np.testing.assert_array_equal(back.coef_, model.coef_)
    # A flat direction has no answer without a ridge.
    twice = SoftmaxRegressorCV(cv=3).fit(np.c_[scaled, scaled[:, 0]], TRAVEL.b, groups=TRAVEL.groups)
    assert len(twice.ridges_) == 20


def test_cross_validation_refusals():
    X, y, groups = TRAVEL.A / TRAVEL.A.std(axis=0), TRAVEL.b, TRAVEL.groups
    for model, options, told in (
        (SoftmaxRegressorCV([1.0]), {}, "pass groups with at least two"),
        (SoftmaxRegressorCV([1.0], cv=300), {"groups": groups}, "cv=300 folds need at least as many"),
        (SoftmaxRegressorCV([-1.0]), {"groups": groups}, "ridges must be finite numbers >= 0"),
        (SoftmaxRegressorCV([1.0], scoring="r2"), {"groups": groups}, "scoring must be one of"),
        (
            SoftmaxRegressorCV([1.0], cv=[(np.arange(2), np.arange(2, 840))]),
            {"groups": groups},
            "rows of group 0 into training and test",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            model.fit(X, y, **options)
    with pytest.warns(UserWarning, match="differ by more than 100"):
        SoftmaxRegressorCV([1.0], cv=2).fit(X * [1, 1, 1, 1, 1, 1e3], y, groups=groups)


def test_metrics_against_scikit_learn():
    rng = np.random.default_rng(0)
    f = rng.dirichlet(np.ones(3), size=20)
    picks = rng.integers(0, 3, 20)
    y, groups, w = np.eye(3)[picks].ravel(), np.repeat(np.arange(20), 3), rng.uniform(1, 2, 20)
    ours = metrics.log_loss(y, f.ravel(), groups, w)
    assert ours == pytest.approx(sklearn_log_loss(picks, f, sample_weight=w, labels=[0, 1, 2]))
    assert metrics.log_loss(y, f.ravel(), groups, w[groups]) == pytest.approx(ours)
    brier = np.average(((f - np.eye(3)[picks]) ** 2).sum(axis=1), weights=w)
    assert metrics.brier(y, f.ravel(), groups, w) == pytest.approx(brier)
    inside = np.arange(60) % 3 < 2
    assert metrics.log_loss(
        y[inside], f.ravel()[inside], groups[inside], w, outside_good=True
    ) == pytest.approx(ours)
    with pytest.warns(UserWarning, match="row 1 has a share of zero and was chosen"):
        assert metrics.log_loss([0.0, 1.0], [1.0, 0.0]) == np.inf
    assert metrics.log_loss([0.0, 1.0], [0.0, 1.0]) == 0.0
    with pytest.raises(ValueError, match="nothing was chosen"):
        metrics.log_loss([0.0, 0.0], [0.5, 0.5])


def test_scorers_route_groups():
    both = {"log_loss": scorers.log_loss, "brier": scorers.brier}
    with sklearn.config_context(enable_metadata_routing=True):
        model = SoftmaxRegressor("cross_entropy").set_fit_request(groups=True)
        options = {"params": {"groups": TRAVEL.groups}, "cv": GroupKFold(5)}
        found = cross_validate(model, TRAVEL.A, TRAVEL.b, scoring=both, **options)
        search = GridSearchCV(
            model,
            {"ridge": [0.1, 1.0]},
            scoring=both,
            refit="log_loss",
            cv=GroupKFold(5),
            error_score="raise",
        )
        search.fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups)
    by_hand = []
    for train, test in GroupKFold(5).split(TRAVEL.A, groups=TRAVEL.groups):
        one = SoftmaxRegressor("cross_entropy").fit(
            TRAVEL.A[train], TRAVEL.b[train], groups=TRAVEL.groups[train]
        )
        shares = one.predict(TRAVEL.A[test], groups=TRAVEL.groups[test])
        by_hand.append(-metrics.log_loss(TRAVEL.b[test], shares, TRAVEL.groups[test]))
    np.testing.assert_allclose(found["test_log_loss"], by_hand)
    assert set(search.cv_results_) >= {"mean_test_log_loss", "mean_test_brier"}
    assert scorers.log_loss(search.best_estimator_, TRAVEL.A, TRAVEL.b, TRAVEL.groups) > -1.0
