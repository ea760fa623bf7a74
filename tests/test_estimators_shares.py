"""What groups, outside goods, weights, offsets and penalties mean to an estimator of shares."""

import numpy as np
import pytest
from scipy.special import softmax

from attnfit import datasets, minimize, problems
from attnfit.estimators import ExponentialRegressor, RescaledSoftmaxRegressor, SoftmaxRegressor

SHARES = [
    SoftmaxRegressor,
    RescaledSoftmaxRegressor,
]
LOSSES = ["squared", "cross_entropy", "kl", "linear_cross_entropy"]


def make(seed, n=40, d=3):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    y = rng.dirichlet(np.ones(n))
    return X, y, rng


def within(z, groups):
    out = np.empty_like(z)
    for g in np.unique(groups):
        out[groups == g] = softmax(z[groups == g])
    return out


def test_predict_without_groups_uses_the_training_normaliser():
    X, y, rng = make(0)
    offset = rng.standard_normal(len(X))
    model = SoftmaxRegressor().fit(X, y, offset=offset)
    shares = model.predict(X, offset=offset)
    np.testing.assert_allclose(shares, softmax(X @ model.coef_ + offset), rtol=1e-12)
    assert model.log_normaliser_ == pytest.approx(np.log(np.exp(X @ model.coef_ + offset).sum()))
    np.testing.assert_allclose(model.predict(X[5:9], offset=offset[5:9]), shares[5:9], rtol=1e-12)
    # A new row may outweigh the training data; a share stays a share, however far out.
    far = 1e4 * np.sign(model.coef_)[None, :]
    assert model.predict(far) == [1.0]
    assert model.predict(-far) == [0.0]


def test_predict_with_groups_is_a_softmax_within_them():
    X, y, rng = make(1)
    groups = rng.permutation(np.repeat(["a", "b", "c", "d"], 10))
    model = SoftmaxRegressor().fit(X, 4 * y, groups=groups)
    assert not hasattr(model, "log_normaliser_")
    np.testing.assert_allclose(model.predict(X, groups=groups), within(X @ model.coef_, groups), rtol=1e-12)
    one = model.predict(X, groups=np.zeros(len(X)))
    np.testing.assert_allclose(one, softmax(X @ model.coef_), rtol=1e-12)
    offsets = [0, 10, 25, 40]
    by_offsets = model.predict(X, groups=offsets)
    np.testing.assert_allclose(by_offsets, within(X @ model.coef_, np.repeat([0, 1, 2], [10, 15, 15])))
    shift = rng.standard_normal(40)
    np.testing.assert_allclose(
        model.predict(X, groups=groups, offset=shift), within(X @ model.coef_ + shift, groups)
    )
    assert model.predict(1e4 * X, groups=groups).max() == 1.0


@pytest.mark.parametrize("cls", SHARES)
@pytest.mark.parametrize("n_groups", [1, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_outside_good_is_a_row_of_zeros(cls, n_groups, weighted):
    X, y, rng = make(2)
    groups = rng.permutation(np.arange(40) % n_groups)
    y = 0.7 * y / np.bincount(groups, weights=y)[groups]
    weights = rng.uniform(1, 2, n_groups)[groups] if weighted else None
    model = cls(outside_good=True).fit(X, y, groups=groups, sample_weight=weights)
    X0 = np.vstack([X, np.zeros((n_groups, 3))])
    groups0 = np.concatenate([groups, np.arange(n_groups)])
    first = [np.flatnonzero(groups == g)[0] for g in range(n_groups)]
    weights0 = np.concatenate([weights, weights[first]]) if weighted else None
    y0 = np.concatenate([y, np.full(n_groups, 0.3)])
    by_hand = cls().fit(X0, y0, groups=groups0, sample_weight=weights0)
    np.testing.assert_allclose(model.coef_, by_hand.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(model.covariance_, by_hand.covariance_, rtol=1e-5, atol=1e-9)
    assert model.loss_value_ == pytest.approx(by_hand.loss_value_)
    shares = model.predict(X, groups=groups)
    np.testing.assert_allclose(shares, by_hand.predict(X0, groups=groups0)[:40], rtol=1e-6)
    assert (np.bincount(groups, weights=shares) < 1).all()
    assert model.n_unbalanced_groups_ == 0
    sparse_too = cls(outside_good=True).fit(_sparse(X), y, groups=groups, sample_weight=weights)
    np.testing.assert_allclose(sparse_too.coef_, model.coef_, rtol=1e-6)
    if n_groups == 1:
        np.testing.assert_allclose(model.predict(X), shares, rtol=1e-12)


def _sparse(X):
    from scipy import sparse

    return sparse.csr_array(X)


def test_outside_good_in_blocks(small_blocks):
    X, y, rng = make(3, n=400)
    groups = rng.permutation(np.arange(400) % 3)
    y = 0.5 * y / np.bincount(groups, weights=y)[groups]
    model = SoftmaxRegressor(outside_good=True).fit(X, y, groups=groups)
    X0, groups0 = np.vstack([X, np.zeros((3, 3))]), np.append(groups, [0, 1, 2])
    by_hand = SoftmaxRegressor().fit(X0, np.append(y, [0.5] * 3), groups=groups0)
    np.testing.assert_allclose(model.coef_, by_hand.coef_, rtol=1e-7)
    one = SoftmaxRegressor(outside_good=True).fit(X, y / 3)
    by_hand = SoftmaxRegressor().fit(X0[:401], np.append(y / 3, 0.5))
    np.testing.assert_allclose(one.coef_, by_hand.coef_, rtol=1e-7)


def test_car_shares_need_no_outside_rows():
    data = datasets.load_car_shares()
    inside = data.A[:, 0] == 1.0
    model = SoftmaxRegressor("cross_entropy", outside_good=True)
    model.fit(data.A[inside], data.b[inside], groups=data.groups[inside])
    np.testing.assert_allclose(model.coef_, data.references["cross_entropy"].coefficients, atol=6e-7)
    kl = SoftmaxRegressor("kl", outside_good=True).fit(
        data.A[inside], data.b[inside], groups=data.groups[inside]
    )
    assert kl.log_likelihood_ == pytest.approx(model.log_likelihood_)
    assert model.n_rows_ == 2217
    assert "20 groups with an outside good each" in str(model.summary())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("outside_good", [False, True])
def test_weights_repeat_rows_where_there_are_no_groups(loss, outside_good):
    X, y, rng = make(4, n=20)
    counts = rng.integers(0, 4, 20)
    counts[0] = 3
    offset, penalty = 0.3 * rng.standard_normal(20), rng.uniform(0, 0.1, 20)
    y = 0.2 * y
    often = np.repeat(np.arange(20), counts)
    options = {"outside_good": outside_good, "ridge": 1e-3, "weight_type": "frequency"}
    weighted = SoftmaxRegressor(loss, row_penalty=penalty, **options)
    repeated = SoftmaxRegressor(loss, row_penalty=penalty[often], **options)
    weighted.fit(X, y, sample_weight=counts, offset=offset)
    repeated.fit(X[often], y[often], offset=offset[often])
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-5)
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-5)
    assert weighted.loss_value_ == pytest.approx(repeated.loss_value_, rel=1e-6)
    assert weighted.r2_ == pytest.approx(repeated.r2_)
    assert weighted.n_unbalanced_groups_ == repeated.n_unbalanced_groups_
    if loss in ("cross_entropy", "kl"):
        assert weighted.log_likelihood_ == pytest.approx(repeated.log_likelihood_)
        np.testing.assert_allclose(weighted.standard_errors_, repeated.standard_errors_, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:y sums to .* pass groups")
def test_weights_repeat_rows_of_rescaled_and_exponential():
    X, y, rng = make(5, n=20)
    counts = rng.integers(0, 4, 20)
    penalty, often = rng.uniform(0, 0.1, 20), np.repeat(np.arange(20), counts)
    for cls in (RescaledSoftmaxRegressor, ExponentialRegressor):
        weighted = cls(row_penalty=penalty, ridge=1e-3).fit(X, y, sample_weight=counts)
        repeated = cls(row_penalty=penalty[often], ridge=1e-3).fit(X[often], y[often])
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-5, atol=1e-7)
        assert weighted.loss_value_ == pytest.approx(repeated.loss_value_, rel=1e-6)
        scalar = cls(row_penalty=0.1).fit(X, y, sample_weight=counts)
        np.testing.assert_allclose(
            scalar.coef_, cls(row_penalty=0.1).fit(X[often], y[often]).coef_, rtol=1e-5
        )


@pytest.mark.parametrize("model", [SoftmaxRegressor(), SoftmaxRegressor("kl"), RescaledSoftmaxRegressor()])
def test_weights_repeat_groups_where_there_are_some(model):
    X, y, rng = make(6)
    groups = np.repeat(np.arange(8), 5)
    counts = rng.integers(1, 4, 8)
    by_group = model.fit(X, 8 * y, groups=groups, sample_weight=counts).coef_
    by_row = model.fit(X, 8 * y, groups=groups, sample_weight=counts[groups]).coef_
    np.testing.assert_array_equal(by_group, by_row)
    score = model.score(X, y, groups=groups, sample_weight=counts)
    assert score == model.score(X, y, groups=groups, sample_weight=counts[groups])
    rows = np.concatenate([np.flatnonzero(groups == g) for g in np.repeat(np.arange(8), counts)])
    copies = np.repeat(np.arange(counts.sum()), 5)
    np.testing.assert_allclose(by_group, model.fit(X[rows], 8 * y[rows], groups=copies).coef_, rtol=1e-5)


def test_one_given_group_takes_weights_of_the_loss():
    X, y, rng = make(7)
    weights = rng.uniform(0, 2, 40)
    model = SoftmaxRegressor(tol=1e-10).fit(X, y, groups=np.zeros(40), sample_weight=weights)
    direct = minimize(problems.Softmax(X, y, weights=weights), tol=1e-10)
    np.testing.assert_allclose(model.coef_, direct.x, rtol=1e-6)


@pytest.mark.parametrize("loss", [*LOSSES, "entropy"])
def test_parameters_reach_the_problem(loss):
    X, y, rng = make(8)
    groups, offset, penalty = np.arange(40) // 8, rng.standard_normal(40), rng.uniform(0, 1, 40)
    model = SoftmaxRegressor(loss, ridge=0.5, row_penalty=penalty, tol=1e-10)
    model.fit(X, y, groups=groups, offset=offset)
    problem = problems.Softmax(X, y, groups, loss, offset=offset, row_penalty=penalty, ridge=0.5)
    direct = minimize(problem, tol=1e-10)
    np.testing.assert_allclose(model.coef_, direct.x, rtol=1e-7)
    assert model.result_.value == pytest.approx(direct.value)
    bare = problems.Softmax(X, y, groups, loss, offset=offset)
    assert model.loss_value_ == pytest.approx(bare.value(model.coef_))


@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
def test_functions(function):
    X = make(9)[0]
    u = {"exp": np.exp, "cosh": np.cosh, "sinh": np.sinh}[function]
    x = np.array([0.4, -0.3, 0.5])
    model = ExponentialRegressor(function).fit(X, u(X @ x))
    assert model.score(X, u(X @ x)) > 1 - 1e-8
    np.testing.assert_allclose(np.abs(model.coef_), np.abs(x), rtol=1e-4)
    target = u(X @ x) / u(X @ x).sum()
    # Without an offset sinh(0) = 0 fits any target.
    shares = RescaledSoftmaxRegressor(function, row_penalty=0.1).fit(X, target, offset=np.ones(40))
    z = u(X @ shares.coef_ + 1.0)
    np.testing.assert_allclose(shares.predict(X, offset=np.ones(40)), z / z.sum(), rtol=1e-10)
    assert shares.normaliser_ == pytest.approx(z.sum())


def test_sandwich_of_one_group():
    X, y, _ = make(10)
    model = SoftmaxRegressor().fit(X, y)
    problem = problems.Softmax(X, y)
    bread = np.linalg.inv(problem.hessian(model.coef_))
    f = problem.predict(model.coef_)
    scores = (f * (f - y))[:, None] * (X - f @ X)
    np.testing.assert_allclose(
        model.covariance("robust", correction=False), bread @ scores.T @ scores @ bread, rtol=1e-8
    )


def test_choices_with_squared_loss_are_pointed_to_cross_entropy():
    data = datasets.load_travel_mode()
    with pytest.warns(UserWarning, match="Brier score.*loss='cross_entropy'"):
        SoftmaxRegressor(ridge=1.0).fit(data.A, data.b, groups=data.groups)
    chosen = data.b[data.groups < 50], data.groups[data.groups < 50]
    with pytest.warns(UserWarning, match="Brier"):
        SoftmaxRegressor(ridge=1.0, outside_good=True).fit(
            data.A[data.groups < 50], chosen[0], groups=chosen[1]
        )
    SoftmaxRegressor(ridge=1.0).fit(data.A[:4], data.b[:4])
    SoftmaxRegressor(ridge=1.0).fit(data.A, 0.5 * data.b, groups=data.groups)
