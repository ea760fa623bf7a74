"""What `minimize` makes of attention maps: exact, rounded, masked, rank deficient, low rank."""

import warnings

import numpy as np
import pytest
from attention_reference import softmax_rows
from instances import relative
from sklearn.exceptions import ConvergenceWarning

from attnfit import AttentionRegressor, minimize, problems
from attnfit.solvers import GradientDescent, Newton


def maps_of(A1, A2, X, offset=0.0):
    return softmax_rows(A1 @ X @ A2.T + offset)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    A1, A2 = rng.standard_normal((60, 4)), rng.standard_normal((50, 5))
    X = rng.standard_normal((4, 5))
    X /= np.std(A1 @ X @ A2.T)
    return A1, A2, X


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl", "log_ratio", "rescaled"])
def test_exact_maps_are_solved_at_once(data, loss):
    A1, A2, X = data
    result = minimize(problems.Attention(A1, A2, maps_of(A1, A2, X), loss))
    assert result.converged
    assert result.n_iter <= 1
    assert relative(result.x, X) < 1e-11


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "log_ratio"])
@pytest.mark.parametrize("mask", ["causal", "random"])
def test_exact_masked_maps(data, loss, mask):
    A1, A2, X = data
    rng = np.random.default_rng(1)
    seen = np.tri(60, 50, dtype=bool) if mask == "causal" else rng.random((60, 50)) < 0.5
    seen[:, 0] = True
    Z = np.where(seen, A1 @ X @ A2.T, -np.inf)
    result = minimize(problems.Attention(A1, A2, softmax_rows(Z), loss, mask=seen))
    assert result.converged
    assert relative(result.x, X) < 1e-8


def test_sequences_share_one_matrix(data):
    A1, A2, X = data
    parts = [(slice(0, 30), slice(0, 20)), (slice(30, 60), slice(20, 50)), (slice(5, 9), slice(3, 9))]
    lists = [
        [A1[q] for q, _ in parts],
        [A2[k] for _, k in parts],
        [maps_of(A1[q], A2[k], X) for q, k in parts],
    ]
    problem = problems.Attention(*lists, "cross_entropy")
    result = minimize(problem)
    assert relative(result.x, X) < 1e-7
    fitted = problem.predict(result.x)
    assert [f.shape for f in fitted] == [(30, 20), (30, 30), (4, 6)]
    assert problem.relative_error(result.x) < 1e-7


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_weights_are_repeated_queries(data, loss):
    A1, A2, X = data
    rng = np.random.default_rng(2)
    B = maps_of(A1, A2, X) * np.exp(0.2 * rng.standard_normal((60, 50)))
    B /= B.sum(axis=1, keepdims=True)
    counts = rng.integers(0, 4, 60)
    weighted = minimize(problems.Attention(A1, A2, B, loss, weights=counts.astype(float)))
    repeated = minimize(problems.Attention(np.repeat(A1, counts, 0), A2, np.repeat(B, counts, 0), loss))
    assert relative(weighted.x, repeated.x) < 1e-6


def test_what_softmax_does_not_see_is_left_at_zero(data):
    A1, A2, X = data
    # A constant among the keys, a repeated and an empty column: what they could explain is not identified.
    wide1 = np.column_stack([A1, A1[:, :1], np.zeros(60)])
    wide2 = np.column_stack([A2, np.ones(50)])
    problem = problems.Attention(wide1, wide2, maps_of(A1, A2, X))
    result = minimize(problem)
    assert result.converged
    assert problem.relative_error(result.x) < 1e-12
    space = problem.identified()
    assert space.queries.shape == (6, 4)
    assert space.keys.shape == (6, 5)
    assert "4 of 6 directions of the queries and 5 of 6 of the keys" in result.message
    outside = result.x - space.queries @ space.queries.T @ result.x @ space.keys @ space.keys.T
    assert np.linalg.norm(outside) < 1e-12 * np.linalg.norm(result.x)
    assert np.abs(result.x[:, 5]).max() < 1e-12
    assert relative(result.x[0], result.x[4]) < 1e-12


def test_a_ridge_means_the_same_in_any_variables(data):
    A1, A2, X = data
    rng = np.random.default_rng(3)
    B = maps_of(A1, A2, X) * np.exp(0.2 * rng.standard_normal((60, 50)))
    problem = problems.Attention(A1, A2, B / B.sum(1, keepdims=True), "cross_entropy", ridge=2.0)
    result = minimize(problem)
    assert np.linalg.norm(problem.gradient(result.x)) < 1e-7 * np.linalg.norm(problem.gradient(0 * X))


@pytest.mark.parametrize("hessian", ["exact", "matrix_free", "auto"])
@pytest.mark.parametrize("columns", [1.0, 1e4])
def test_every_strategy_finds_the_same_minimum(data, hessian, columns):
    A1, A2, X = data
    rng = np.random.default_rng(4)
    scales = np.geomspace(1.0, columns, 4)
    B = maps_of(A1, A2, X) * np.exp(0.3 * rng.standard_normal((60, 50)))
    B /= B.sum(axis=1, keepdims=True)
    plain = minimize(problems.Attention(A1, A2, B), tol=1e-11)
    result = minimize(problems.Attention(A1 * scales, A2, B), solver=Newton(hessian=hessian), tol=1e-10)
    assert result.converged
    assert relative(scales[:, None] * result.x, plain.x) < 1e-7


def test_sampled_hessians_are_refused(data):
    A1, A2, X = data
    with pytest.raises(ValueError, match="draws rows, which Attention does not offer; use 'auto'"):
        minimize(problems.Attention(A1, A2, maps_of(A1, A2, X)), solver=Newton(hessian="sampled"))


def test_gradient_descent_gets_there_too(data):
    A1, A2, X = data
    B = maps_of(A1, A2, X)
    result = minimize(
        problems.Attention(A1, A2, B, "cross_entropy"), solver=GradientDescent(), tol=1e-6, max_iter=3000
    )
    assert relative(result.x, X) < 1e-3


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "log_ratio"])
def test_low_rank_maps(loss):
    rng = np.random.default_rng(5)
    A = rng.standard_normal((80, 12))
    X = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 12))
    X *= 1.5 / np.std(A @ X @ A.T)
    B = maps_of(A, A, X)
    exact = problems.Attention(A, A, B, loss, rank=3)
    result = minimize(exact)
    assert result.converged
    assert relative(exact.split(result.x)[0], X) < 1e-8
    half = problems.Attention(A, A, B.astype(np.float16), loss, rank=3)
    rounded = minimize(half)
    assert rounded.converged
    assert relative(half.split(rounded.x)[0], X) < 3e-3
    U, V, _ = half.factors(rounded.x)
    assert U.shape == (12, 3)
    assert np.linalg.matrix_rank(U @ V.T) == 3


def test_low_rank_lies_between_full_and_nothing():
    rng = np.random.default_rng(6)
    A = rng.standard_normal((40, 6))
    X = rng.standard_normal((6, 6))
    X /= np.std(A @ X @ A.T)
    B = maps_of(A, A, X) * np.exp(0.3 * rng.standard_normal((40, 40)))
    B /= B.sum(axis=1, keepdims=True)
    values = [minimize(problems.Attention(A, A, B, rank=r)).value for r in (1, 2, 4, 6)]
    full = minimize(problems.Attention(A, A, B)).value
    assert all(np.diff(values) < 0)
    assert np.isclose(values[-1], full, rtol=1e-10)


def test_rounding_is_told_from_data():
    rng = np.random.default_rng(7)
    A = rng.standard_normal((40, 3))
    sharp = maps_of(A, A, 4.0 * np.eye(3))
    assert problems.Attention(A, A, sharp.astype(np.float16)).zeros_are_rounded()
    assert (sharp.astype(np.float16) == 0).any()
    choices = np.eye(40)[rng.integers(0, 40, 40)]
    assert not problems.Attention(A, A, choices).zeros_are_rounded()
    assert AttentionRegressor().fit(A, sharp.astype(np.float16)).loss_ == "log_ratio"
    soft = 0.5 * choices + 0.5 * np.roll(choices, 1, axis=1)
    assert AttentionRegressor(max_iter=300, ridge=1e-3).fit(A, soft).loss_ == "cross_entropy"


def test_estimator_scores_held_out_maps():
    rng = np.random.default_rng(8)
    A, new = rng.standard_normal((90, 5)), rng.standard_normal((30, 5))
    X = rng.standard_normal((5, 5)) * 0.6
    seen = np.tri(90, dtype=bool)
    B = softmax_rows(np.where(seen, A @ X @ A.T, -np.inf))
    model = AttentionRegressor(mask="causal").fit(A, B)
    assert model.n_identified_ == (5, 5)
    new_maps = softmax_rows(np.where(np.tri(30, dtype=bool), new @ X @ new.T, -np.inf))
    assert model.relative_error(new, new_maps) < 1e-8
    assert np.allclose(model.predict(new), new_maps, atol=1e-8)
    assert np.isclose(model.score(new, new_maps), 1.0)
    with pytest.raises(ValueError, match="queries have 4 features"):
        model.predict(new[:, :4])


def test_pair_features_and_offsets(data):
    A1, A2, X = data
    rng = np.random.default_rng(9)
    distance, offset = rng.random((60, 50)), 0.3 * rng.standard_normal((60, 50))
    B = maps_of(A1, A2, X, offset - 2.0 * distance)
    model = AttentionRegressor().fit(A1, B, A2, pair_features=[distance], offset=offset)
    assert relative(model.coef_, X) < 1e-7
    assert np.allclose(model.feature_coef_, -2.0)
    assert np.allclose(model.predict(A1, A2, pair_features=[distance], offset=offset), B)


def test_blocks_of_queries_do_not_change_a_fit(data, monkeypatch):
    A1, A2, X = data
    rng = np.random.default_rng(10)
    B = maps_of(A1, A2, X) * np.exp(0.2 * rng.standard_normal((60, 50)))
    B /= B.sum(axis=1, keepdims=True)
    whole = minimize(problems.Attention(A1, A2, B))
    monkeypatch.setattr("attnfit.data.pairs.BLOCK_PAIRS", 100)
    problem = problems.Attention(A1, A2, B)
    assert len(problem.rows.chunks) == 8
    assert relative(minimize(problem).x, whole.x) < 1e-9


def test_sparse_and_entropy_need_no_target(data):
    A1, A2, _ = data
    assert minimize(problems.Attention(A1, A2, loss="sparse", ridge=1.0)).converged
    result = minimize(problems.Attention(A1, A2, loss="entropy", ridge=0.1), random_state=0)
    assert result.converged


def test_a_second_fit_does_not_depend_on_the_first(data):
    A1, A2, X = data
    rng = np.random.default_rng(11)
    B = maps_of(A1, A2, X) * np.exp(0.2 * rng.standard_normal((60, 50)))
    problem = problems.Attention(A1, A2, B / B.sum(1, keepdims=True))
    first, second = minimize(problem), minimize(problem)
    assert np.array_equal(first.x, second.x)
    assert first.n_passes == second.n_passes
    again = minimize(problem, x0=first.x)
    assert again.converged
    assert again.n_iter <= 1


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "log_ratio", "rescaled", "sparse"])
def test_the_certificate_holds_a_sharper_fit(data, loss):
    A1, A2, X = data
    rng = np.random.default_rng(12)
    B = maps_of(A1, A2, X) * np.exp(0.1 * rng.standard_normal((60, 50)))
    problem = problems.Attention(
        A1, A2, B / B.sum(1, keepdims=True), loss, ridge=0.01 if loss == "sparse" else 0
    )
    rough, sharp = minimize(problem, tol=1e-5), minimize(problem, tol=1e-12)
    certificate = rough.certificate()
    assert certificate.valid, certificate.reason
    assert np.linalg.norm(rough.x - sharp.x) <= certificate.radius < 0.1


def test_certificates_refuse_with_a_reason():
    rng = np.random.default_rng(13)
    A = rng.standard_normal((300, 50))
    B = maps_of(A, A, 0.1 * np.eye(50))
    certificate = minimize(problems.Attention(A, A, B)).certificate()
    assert not certificate.valid
    assert "90,000 x 2,500 matrix of all pairs" in certificate.reason
    ranked = minimize(problems.Attention(A[:, :5], A[:, :5], B, "cross_entropy", rank=2)).certificate()
    assert not ranked.valid
    assert "factors are not unique" in ranked.reason


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes(seed):
    """One query, one key, masks, zeros, constants, no information: an answer, never a NaN."""
    rng = np.random.default_rng(seed)
    n1, n2 = rng.integers(1, 10, 2)
    A1 = rng.standard_normal((n1, rng.integers(1, 5))) * 10.0 ** rng.uniform(-3, 3) * (rng.random() > 0.2)
    A2 = rng.standard_normal((n2, rng.integers(1, 5))) if rng.random() > 0.2 else np.ones((n2, 2))
    targets = (
        rng.dirichlet(np.ones(n2), n1),
        np.eye(n2)[rng.integers(0, n2, n1)],
        np.zeros((n1, n2)),
        rng.dirichlet(np.full(n2, 0.05), n1).astype(np.float16),
    )
    seen = rng.random((n1, n2)) < 0.6
    seen[np.arange(n1), rng.integers(0, n2, n1)] = True
    options = {"mask": seen if seed % 2 else None, "ridge": 1e-3 * (seed % 5)}
    options["rank"] = 1 if seed % 3 == 0 else None
    for loss in ("squared", "cross_entropy", "entropy", "log_ratio", "sparse"):
        problem = problems.Attention(A1, A2, targets[seed % 4], loss, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            result = minimize(problem, max_iter=50, random_state=0)
        assert np.isfinite(result.x).all()
        assert np.isfinite(result.value)


def test_separable_maps_are_named_in_the_users_unknowns():
    # One-hot maps of orthogonal tokens: the larger the diagonal of X, the better.
    tokens = np.diag([1.0, 2.0, 4.0])
    with pytest.warns(ConvergenceWarning, match=r"separable.*entry \(\d, \d\)"):
        result = minimize(problems.Attention(tokens, tokens, np.eye(3), "cross_entropy"))
    assert result.status == "separable"


def test_one_key_identifies_nothing():
    rng = np.random.default_rng(14)
    A = rng.standard_normal((1, 3))
    problem = problems.Attention(A, A, np.ones((1, 1)))
    assert problem.identified().keys.shape == (3, 0)
    result = minimize(problem)
    assert "0 of 3 of the keys" in result.message
    assert not result.x.any()
