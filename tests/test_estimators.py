"""The estimators follow scikit-learn's conventions and give the published answers."""

import pickle
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import statsmodels.api as sm
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from attnfit import datasets
from attnfit.estimators import (
    ExponentialRegressor,
    PoissonRegressor,
    RescaledSoftmaxRegressor,
    SoftmaxRegressor,
)

CLASSES = [SoftmaxRegressor, ExponentialRegressor, PoissonRegressor, RescaledSoftmaxRegressor]


@parametrize_with_checks([*(cls() for cls in CLASSES), SoftmaxRegressor(loss="cross_entropy")])
def test_scikit_learn_conventions(estimator, check):
    # The checks fit arbitrary targets, whose best shares may lie at infinity: a warning is the right answer.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "y sums to .* pass groups")
        check(estimator)


REFERENCES = {
    "cars": (datasets.load_car_shares, 6e-7),
    "flows": (datasets.load_austrian_flows, 6e-7),
    "flows with dummies": (lambda: datasets.load_austrian_flows(dummies=True), 6e-8),
    "travel mode": (datasets.load_travel_mode, 6e-7),
}


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_answers(name, loss):
    load, rounding = REFERENCES[name]
    data = load()
    reference = data.references[loss]
    weights = data.weights if loss == "cross_entropy" else None
    # Published errors are inverse informations; the weights of flows count migrants.
    published = reference.standard_errors is not None
    kinds = {"covariance": "classic", "weight_type": "frequency"} if published else {}
    model = SoftmaxRegressor(loss=loss, **kinds)
    with warnings.catch_warnings():
        # Travel mode holds choices; that squared loss warns about them has a test of its own.
        warnings.simplefilter("ignore" if name == "travel mode" else "error")
        model.fit(data.A, data.b, groups=data.groups, sample_weight=weights)
    known = ~np.isnan(reference.coefficients)
    np.testing.assert_allclose(model.coef_[known], reference.coefficients[known], rtol=0, atol=rounding)
    f = model.predict(data.A, groups=data.groups)
    if reference.squared_error is not None:
        assert np.sum((f - data.b) ** 2) == pytest.approx(reference.squared_error, rel=3e-5)
        if loss == "squared":
            assert 2 * model.loss_value_ == pytest.approx(reference.squared_error, rel=2e-5)
    if reference.log_likelihood is not None:
        assert model.log_likelihood_ == pytest.approx(reference.log_likelihood, abs=1e-5)
    if reference.standard_errors is not None:
        np.testing.assert_allclose(model.standard_errors_, reference.standard_errors, rtol=2e-4)
        assert np.isnan(model.standard_errors_).tolist() == np.isnan(reference.standard_errors).tolist()
    assert model.r2_ == pytest.approx(model.score(data.A, data.b, groups=data.groups, sample_weight=weights))


def test_travel_mode_to_the_published_digits():
    data = datasets.load_travel_mode()
    model = SoftmaxRegressor("cross_entropy").fit(data.A, data.b, groups=data.groups)
    reference = data.references["cross_entropy"]
    digits = np.array([5e-7, 5e-7, 5e-7, 5e-8, 5e-8, 5e-7]) * 1.01
    assert (np.abs(model.coef_ - reference.coefficients) < digits).all()
    np.testing.assert_allclose(model.standard_errors_, reference.standard_errors, rtol=5e-6)
    peer = sm.ConditionalLogit(data.b, data.A, groups=data.groups).fit(disp=False)
    np.testing.assert_allclose(model.standard_errors_, peer.bse, rtol=1e-5)


def test_exponential_is_the_glm_with_log_link():
    data = sm.datasets.randhie.load_pandas()
    X, y = sm.add_constant(data.exog), data.endog
    model = ExponentialRegressor().fit(X, y)
    assert 2 * model.loss_value_ == pytest.approx(382140.071753, abs=1e-5)
    assert model.coef_[:2] == pytest.approx([0.750925, -0.046659], abs=1e-6)
    assert model.feature_names_in_[1] == "lncoins"
    glm = sm.GLM(y, X, family=sm.families.Gaussian(sm.families.links.Log()))
    information = -glm.hessian(model.coef_, scale=1.0, observed=True)
    scores = glm.score_obs(model.coef_, scale=1.0)
    bread = np.linalg.inv(information)
    np.testing.assert_allclose(
        model.covariance("robust", correction=False), bread @ (scores.T @ scores) @ bread, rtol=1e-6
    )


def make_shares(rng, n=60, d=3, n_groups=8):
    X = rng.standard_normal((n, d))
    groups = rng.integers(0, n_groups, n)
    u = np.exp(X @ rng.standard_normal(d)) * rng.uniform(0.5, 1.5, n)
    return X, u / np.bincount(groups, weights=u)[groups], groups


@pytest.mark.parametrize("model", [SoftmaxRegressor(), SoftmaxRegressor("kl"), RescaledSoftmaxRegressor()])
def test_input_formats_agree(model):
    X, y, groups = make_shares(np.random.default_rng(0))
    expected = clone(model).fit(X, y, groups=groups)
    names = ["a", "b", "c"]
    for table in (sparse.csr_matrix(X), sparse.csc_array(X), X.tolist(), np.asfortranarray(X)):
        other = clone(model).fit(table, list(y), groups=list(groups))
        np.testing.assert_allclose(other.coef_, expected.coef_, rtol=1e-6)
        np.testing.assert_allclose(
            other.predict(table, groups=groups), expected.predict(X, groups=groups), rtol=1e-6
        )
    for frame, series in ((pd.DataFrame, pd.Series), (pl.DataFrame, pl.Series)):
        table = frame(dict(zip(names, X.T, strict=True)))
        other = clone(model).fit(table, series(y), groups=series(groups))
        assert other.feature_names_in_.tolist() == names
        np.testing.assert_allclose(other.coef_, expected.coef_, rtol=1e-6)
        with pytest.raises(ValueError, match="feature names"):
            other.predict(table[["b", "a", "c"]], groups=groups)
    single = clone(model).fit(X.astype(np.float32), y, groups=groups)
    assert single.coef_.dtype == np.float64
    np.testing.assert_allclose(single.coef_, expected.coef_, rtol=1e-3)


def test_memory_map_is_fitted_in_place(tmp_path):
    X, y, groups = make_shares(np.random.default_rng(1))
    X.tofile(tmp_path / "X.bin")
    on_disk = np.memmap(tmp_path / "X.bin", dtype=np.float64, mode="r+", shape=X.shape)
    model = SoftmaxRegressor().fit(on_disk, y, groups=groups)
    assert model.result_.problem.design.on_disk
    np.testing.assert_allclose(model.coef_, SoftmaxRegressor().fit(X, y, groups=groups).coef_, rtol=1e-6)
    np.testing.assert_allclose(model.predict(on_disk, groups=groups), model.predict(X, groups=groups))
    outside = SoftmaxRegressor(outside_good=True)
    np.testing.assert_allclose(
        outside.fit(on_disk, 0.5 * y, groups=groups).coef_,
        outside.fit(X, 0.5 * y, groups=groups).coef_,
        rtol=1e-6,
    )
    on_disk[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"X contains NaN at row 3, column 1 \(.*X\.bin, block 0\)"):
        model.predict(on_disk, groups=groups)


def test_sources_are_features(tmp_path):
    from attnfit.data import open_source

    X, y, groups = make_shares(np.random.default_rng(1))
    np.save(tmp_path / "X.npy", X)
    expected = SoftmaxRegressor().fit(X, y, groups=groups)
    model = SoftmaxRegressor().fit(open_source(tmp_path / "X.npy"), y, groups=groups)
    np.testing.assert_allclose(model.coef_, expected.coef_, rtol=1e-6)
    assert model.n_features_in_ == X.shape[1]


def test_works_in_pipelines_and_cross_validation():
    X, y, groups = make_shares(np.random.default_rng(2))
    pipeline = make_pipeline(StandardScaler(), SoftmaxRegressor())
    pipeline.fit(X, y, softmaxregressor__groups=groups)
    direct = SoftmaxRegressor().fit(StandardScaler().fit_transform(X), y, groups=groups)
    np.testing.assert_allclose(pipeline[-1].coef_, direct.coef_)
    assert np.isfinite(cross_val_score(ExponentialRegressor(ridge=0.1), X, y, cv=3)).all()


def test_pickle_leaves_the_data_behind():
    X, y, groups = make_shares(np.random.default_rng(3), n=2000)
    model = SoftmaxRegressor().fit(X, y, groups=groups)
    blind = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(blind.predict(X, groups=groups), model.predict(X, groups=groups))
    with pytest.raises(AttributeError, match="read it before pickling"):
        _ = blind.standard_errors_
    assert np.isfinite(model.standard_errors_).all()
    seeing = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(seeing.standard_errors_, model.standard_errors_)
    assert len(pickle.dumps(model)) < X.nbytes / 2
    with pytest.raises(NotFittedError, match="call fit first"):
        _ = SoftmaxRegressor().standard_errors_


def test_refit_forgets_the_first_fit():
    X, y, groups = make_shares(np.random.default_rng(4))
    model = SoftmaxRegressor("cross_entropy").fit(X, y / y.sum())
    assert np.isfinite(
        [*model.standard_errors_, model.r2_, model.log_normaliser_, model.log_likelihood_]
    ).all()
    model.set_params(loss="squared").fit(X, y, groups=groups)
    fresh = SoftmaxRegressor().fit(X, y, groups=groups)
    np.testing.assert_array_equal(model.standard_errors_, fresh.standard_errors_)
    assert model.r2_ == fresh.r2_
    assert not hasattr(model, "log_normaliser_")
    assert not hasattr(model, "log_likelihood_")


def test_no_convergence_is_a_warning_with_the_remedy():
    X, y, groups = make_shares(np.random.default_rng(5))
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        model = SoftmaxRegressor(max_iter=1, tol=1e-12).fit(X, y, groups=groups)
    assert not model.result_.converged
    assert "raise max_iter" in str(model.summary())


def test_solver_reaches_the_problem():
    from attnfit.solvers import Newton

    X, y, groups = make_shares(np.random.default_rng(6))
    model = SoftmaxRegressor(solver=Newton(hessian="matrix_free"), random_state=3).fit(X, y, groups=groups)
    assert "matrix-free" in model.result_.solver
    np.testing.assert_allclose(model.coef_, SoftmaxRegressor().fit(X, y, groups=groups).coef_, rtol=1e-5)


def test_summary_table():
    data = datasets.load_travel_mode()
    frame = pd.DataFrame(data.A, columns=data.feature_names)
    model = SoftmaxRegressor("cross_entropy").fit(frame, data.b, groups=data.groups)
    summary = model.summary()
    text = str(summary)
    for part in ("cross_entropy", "840 rows in 210 groups", "-199.12837", "converged", "reads of the data",
                 "certificate", "inverse observed information", "air_hinc"):  # fmt: skip
        assert part in text
    table = pd.DataFrame(summary.columns())
    assert table["name"].tolist() == list(data.feature_names)
    np.testing.assert_allclose(table["z"], model.coef_ / model.standard_errors_)
    np.testing.assert_allclose((table["upper"] - table["lower"]) / 2, 1.959963985 * model.standard_errors_)
    dummies = datasets.load_austrian_flows(dummies=True)
    open_fit = SoftmaxRegressor().fit(dummies.A, 0.5 * dummies.b, groups=dummies.groups)
    assert "not identified by the data: x0, x2" in str(open_fit.summary())
    assert "the targets of 9 of 9 groups do not sum to one" in str(open_fit.summary())
    assert "unit row" in str(ExponentialRegressor().fit(data.A[:, 3:4], data.b).summary())
