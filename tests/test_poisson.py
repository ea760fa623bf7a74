"""Poisson regression against autodiff and statsmodels."""

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from sklearn.exceptions import ConvergenceWarning

from attnfit import PoissonRegressor, minimize, problems


def data(seed=0, n=300):
    rng = np.random.default_rng(seed)
    A = np.column_stack([np.ones(n), rng.standard_normal((n, 3))])
    offset = 0.5 * rng.standard_normal(n)
    b = rng.poisson(np.exp(A @ [0.5, 0.6, -0.3, 0.2] + offset)).astype(float)
    return A, b, rng.uniform(0.5, 2.0, n), offset


def test_derivatives():
    A, b, w, offset = data()
    problem = problems.Poisson(A, b, weights=w, offset=offset, row_penalty=0.3, ridge=0.2)
    A, b, w, offset = map(torch.tensor, (A, b, w, offset))

    def loss(x):
        z = A @ x
        eta = z + offset
        return (w * (eta.exp() - b * eta)).sum() + 0.5 * (0.3 * z).square().sum() + 0.1 * x.square().sum()

    x = torch.tensor([0.1, -0.4, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    here = x.detach().numpy()
    assert problem.value(here) == pytest.approx(float(loss(x.detach())), rel=1e-13)
    np.testing.assert_allclose(problem.gradient(here), torch.autograd.grad(loss(x), x)[0], rtol=1e-12)
    np.testing.assert_allclose(
        problem.hessian(here), torch.autograd.functional.hessian(loss, x.detach()), rtol=1e-12
    )


def test_coefficients_are_those_of_statsmodels():
    A, b, w, offset = data(1)
    theirs = sm.GLM(b, A, family=sm.families.Poisson(), offset=offset, freq_weights=w).fit(tol=1e-14)
    result = minimize(problems.Poisson(A, b, weights=w, offset=offset))
    assert result.converged
    assert result.n_passes <= 12
    np.testing.assert_allclose(result.x, theirs.params, atol=1e-9)
    assert result.certificate().radius < 1e-6


def test_targets_that_are_no_counts():
    A, b, *_ = data(2)
    b = b * 1e-7 + 1e-9 * np.abs(A[:, 1])
    theirs = sm.GLM(b * 1e7, A, family=sm.families.Poisson()).fit(tol=1e-14)
    result = minimize(problems.Poisson(A, b))
    shift = np.array([np.log(1e7), 0.0, 0.0, 0.0])
    np.testing.assert_allclose(result.x + shift, theirs.params, atol=1e-8)


def test_a_dummy_without_counts_is_separated():
    A, b, *_ = data(3)
    dummy = (np.arange(len(b)) % 20 == 4) * 1.0
    b = np.where(dummy > 0.0, 0.0, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = minimize(problems.Poisson(np.column_stack([A, dummy]), b))
    kept = dummy == 0.0
    theirs = sm.GLM(b[kept], A[kept], family=sm.families.Poisson()).fit(tol=1e-14)
    assert result.status == "separable"
    assert result.x[-1] == -np.inf
    np.testing.assert_allclose(result.x[:-1], theirs.params, atol=1e-7)


def test_negative_targets_are_refused():
    with pytest.raises(ValueError, match=r"b.*2"):
        problems.Poisson(np.ones((4, 1)), [1.0, 0.0, -2.0, 1.0])


def test_all_counts_zero():
    with pytest.warns(ConvergenceWarning, match="separable"):
        result = minimize(problems.Poisson(np.ones((4, 1)), np.zeros(4)))
    assert result.x[0] == -np.inf


def test_the_estimator_agrees_with_statsmodels():
    A, b, _, offset = data(4)
    theirs = sm.GLM(b, A, family=sm.families.Poisson(), offset=offset).fit(cov_type="HC0", tol=1e-14)
    model = PoissonRegressor().fit(A, b, offset=offset)
    np.testing.assert_allclose(model.coef_, theirs.params, atol=1e-8)
    raw = np.sqrt(np.diag(model.covariance("robust", correction=False)))
    np.testing.assert_allclose(raw, theirs.bse, rtol=1e-6)
    plain = sm.GLM(b, A, family=sm.families.Poisson()).fit(tol=1e-14)
    score = PoissonRegressor().fit(A, b).score(A, b)
    assert score == pytest.approx(1.0 - plain.deviance / plain.null_deviance, rel=1e-9)
    assert "PoissonRegressor" in str(model.summary())
