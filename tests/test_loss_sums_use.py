"""Sums of losses in estimators."""

import numpy as np
import pytest
from instances import relative
from test_loss_sums import SUMS

from attnfit import AttentionRegressor, SoftmaxRegressor, load, minimize, problems


def test_estimators_take_sums_and_keep_them(tmp_path):
    rng = np.random.default_rng(0)
    A, groups = rng.standard_normal((60, 2)), np.repeat(np.arange(12), 5)
    shares = rng.dirichlet(np.ones(5), 12).reshape(-1)
    model = SoftmaxRegressor(loss=SUMS["three"], ridge=0.1).fit(A, shares, groups=groups)
    exact = minimize(problems.Softmax(A, shares, groups, SUMS["three"], ridge=0.1)).x
    assert relative(model.coef_, exact) < 1e-6
    assert (np.linalg.eigvalsh(model.covariance("robust")) > 0.0).all()
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    np.testing.assert_array_equal(again.coef_, model.coef_)
    assert [tuple(term) for term in again.loss] == SUMS["three"]
    with pytest.raises(ValueError, match="repeats rows"):
        SoftmaxRegressor(loss=SUMS["three"]).fit(A, shares, sample_weight=np.full(60, 2.0))
    maps = rng.dirichlet(np.ones(6), 6)
    tokens = rng.standard_normal((6, 2))
    head = AttentionRegressor(loss=SUMS["shares"], ridge=0.1).fit(tokens, maps)
    assert head.loss_ == SUMS["shares"] and head.result_.converged
    with pytest.raises(ValueError, match="loss"):
        AttentionRegressor(loss=SUMS["shares"], rank=2, sink=True).fit(tokens, maps)
