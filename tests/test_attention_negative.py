"""Maps with negative entries: what the vector form takes, attention takes, and it is the same problem."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnfit import AttentionRegressor, minimize, problems

SOFTMAX = ("squared", "linear_cross_entropy")
FUNCTIONS = ("exp", "cosh", "sinh")
LOSSES = [
    *((loss, "exp") for loss in SOFTMAX),
    *(("rescaled", function) for function in FUNCTIONS),
    *(("exponential", function) for function in FUNCTIONS),
]


def drawn(seed, scale=0.5, weighted=True):
    """Queries, keys, maps of both signs, weights, offset and a mask that leaves every query a key."""
    rng = np.random.default_rng(seed)
    n1, n2, d1, d2 = rng.integers(2, 6, 4)
    A1, A2 = scale * rng.standard_normal((n1, d1)), scale * rng.standard_normal((n2, d2))
    B = rng.standard_normal((n1, n2)) * 10.0 ** rng.uniform(-2, 1)
    B[rng.random((n1, n2)) < 0.2] = 0.0
    mask = rng.random((n1, n2)) < 0.7
    mask[np.arange(n1), rng.integers(0, n2, n1)] = True
    options = {"weights": rng.random((n1, n2)) + 0.1, "offset": 0.3 * rng.standard_normal((n1, n2))}
    return A1, A2, B, mask if weighted else None, options if weighted else {}


def dense(A1, A2, B, loss, function, mask, options, **penalties):
    """The vector problem on the rows of the Kronecker product."""
    seen = np.ones(B.shape, bool) if mask is None else mask
    rows, groups = np.kron(A1, A2)[seen.ravel()], np.repeat(np.arange(len(A1)), seen.sum(1))
    flat = {name: values[seen] for name, values in options.items()} | penalties
    if loss == "exponential":
        return problems.Exponential(rows, B[seen], function, **flat)
    if loss == "rescaled":
        return problems.Rescaled(rows, B[seen], function, groups=groups, **flat)
    return problems.Softmax(rows, B[seen], groups=groups, loss=loss, **flat)


@pytest.mark.parametrize(("loss", "function"), LOSSES)
@given(seed=st.integers(0, 10**6), weighted=st.booleans())
def test_attention_is_the_vector_problem_on_kronecker_rows(loss, function, seed, weighted):
    A1, A2, B, mask, options = drawn(seed, weighted=weighted)
    ours = problems.Attention(A1, A2, B, loss, mask, function=function, ridge=0.1, **options)
    theirs = dense(A1, A2, B, loss, function, mask, options, ridge=0.1)
    x = np.random.default_rng(seed + 1).standard_normal(ours.shape)
    flat = x.reshape(-1)
    scale = max(1.0, abs(theirs.value(flat)), np.abs(theirs.hessian(flat)).max())
    assert ours.value(x) == pytest.approx(theirs.value(flat), rel=1e-10, abs=1e-12 * scale)
    gradient = ours.gradient(x).reshape(-1)
    np.testing.assert_allclose(gradient, theirs.gradient(flat), rtol=1e-8, atol=1e-11 * scale)
    np.testing.assert_allclose(ours.hessian(x), theirs.hessian(flat), rtol=1e-8, atol=1e-11 * scale)


@pytest.mark.parametrize("loss", ["squared", "rescaled"])
@pytest.mark.parametrize("seed", range(4))
def test_fits_reach_what_the_vector_form_reaches(loss, seed):
    A1, A2, B, mask, options = drawn(seed)
    ours = minimize(problems.Attention(A1, A2, B, loss, mask, ridge=1.0, **options), random_state=0)
    theirs = minimize(dense(A1, A2, B, loss, "exp", mask, options, ridge=1.0), random_state=0)
    assert ours.converged and theirs.converged
    assert ours.value == pytest.approx(theirs.value, rel=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "log_ratio"])
def test_losses_with_logarithms_refuse_them(loss):
    A1, A2, B, _, _ = drawn(0)
    B[0, 1] = -0.5
    with pytest.raises(ValueError, match=f"B is negative at row 0, column 1 .*loss '{loss}' takes shares"):
        problems.Attention(A1, A2, np.abs(B) * np.where(B == -0.5, -1, 1), loss)


def test_negative_entries_are_no_rounded_shares_and_have_no_logarithm():
    A1, A2, B, _, _ = drawn(1)
    B = np.abs(B) + 0.1
    assert problems.Attention(A1, A2, B).zeros_are_rounded()
    assert "closed form" in problems.Attention(A1, A2, B).starts(np.random.default_rng(0))
    B[0, 0] = -1e-3
    B[0, 1] = 1e-310
    problem = problems.Attention(A1, A2, B)
    assert not problem.zeros_are_rounded()
    assert "closed form" not in problem.starts(np.random.default_rng(0))


def test_low_rank_and_the_estimator_take_them_too():
    rng = np.random.default_rng(2)
    A1, A2 = rng.standard_normal((12, 3)), rng.standard_normal((8, 3))
    B = rng.dirichlet(np.ones(8), 12) + 0.02 * rng.standard_normal((12, 8))
    assert (B < 0).any()
    full = minimize(problems.Attention(A1, A2, B, ridge=0.1))
    assert full.converged
    assert np.isfinite(minimize(problems.Attention(A1, A2, B, rank=1, ridge=0.1), random_state=0).value)
    # Rows with noise added to them do not sum to one, which an estimator of maps mentions.
    with pytest.warns(UserWarning, match="12 of 12 rows sum to"):
        found = AttentionRegressor(loss="squared", ridge=0.1).fit(A1, B, A2)
    np.testing.assert_allclose(found.coef_, full.x, atol=1e-6)
