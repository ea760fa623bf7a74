"""Rows of zeros that are not written out: in compiled loops, at any scale, on separable data."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from attnfit.designs import DenseDesign, Design
from attnfit.estimators import RescaledSoftmaxRegressor, SoftmaxRegressor
from attnfit.estimators.outside import ZeroRowsBelow
from attnfit.problems import Softmax

N_GROUPS, N_ROWS = 12, 3
GROUPS = np.repeat(np.arange(N_GROUPS), N_ROWS)


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((N_GROUPS * N_ROWS, 3)), 0.3 * rng.random(N_GROUPS * N_ROWS)


def written_out(X, y):
    """The same with the rows of zeros as data."""
    rest = 1.0 - np.bincount(GROUPS, y)
    return np.vstack([X, np.zeros((N_GROUPS, X.shape[1]))]), np.concatenate([y, rest])


ALL_GROUPS = np.concatenate([GROUPS, np.arange(N_GROUPS)])


def test_a_design_that_lacks_something_cannot_be_made():
    class Half(Design):
        def _fetch(self, rows):
            return np.zeros((1, 1))

    with pytest.raises(TypeError, match=r"abstract.*block_rows.*parts.*storage"):
        Half((1, 1))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
def test_compiled_loops_read_zero_rows(monkeypatch, order, dtype):
    monkeypatch.setattr("attnfit.designs.dense.COMPILED_ENTRIES", 1)
    X = np.asarray(data()[0], dtype=dtype, order=order)
    design = ZeroRowsBelow(DenseDesign(X), N_GROUPS)
    assert design.storage == {"C": "rows", "F": "columns"}[order]
    whole = np.vstack([X, np.zeros((N_GROUPS, 3), dtype)])
    n = len(X)
    for rows in (slice(0, n), slice(5, n + 2), slice(n + 1, n + 4), np.array([n, 0, 3, n + 5])):
        block, first = design.parts(rows)
        count = len(range(*rows.indices(len(whole)))) if isinstance(rows, slice) else len(rows)
        assert block.dtype == dtype
        np.testing.assert_array_equal(block[first : first + count], whole[rows])
    assert X.all(), "the data are as they were"


@pytest.mark.parametrize("cls", [SoftmaxRegressor, RescaledSoftmaxRegressor])
def test_a_compiled_fit_is_the_fit_of_written_rows(monkeypatch, cls):
    X, y = data()
    rows, shares = written_out(X, y)
    expected = cls().fit(rows, shares, groups=ALL_GROUPS).coef_
    read = []
    plain = ZeroRowsBelow.parts
    monkeypatch.setattr("attnfit.designs.dense.COMPILED_ENTRIES", 1)
    monkeypatch.setattr(ZeroRowsBelow, "parts", lambda self, rows: read.append(1) or plain(self, rows))
    model = cls(outside_good=True).fit(X, y, groups=GROUPS)
    assert read, "the compiled loops were used"
    # Both stop where the next step moves no logit by 1e-8.
    np.testing.assert_allclose(model.coef_, expected, atol=1e-7)


def test_columns_of_any_size():
    """Columns are scaled by powers of two, which leaves the logits as they are."""
    X, y = data()
    y = np.full_like(y, 0.2)
    y[::3] = 0.4
    sizes = np.array([2.0**520, 1.0, 2.0**-520])
    plain = SoftmaxRegressor("cross_entropy", outside_good=True).fit(X, y, groups=GROUPS)
    scaled = SoftmaxRegressor("cross_entropy", outside_good=True).fit(X * sizes, y, groups=GROUPS)
    np.testing.assert_allclose(scaled.coef_ * sizes, plain.coef_, rtol=1e-6)


def test_separable_data():
    X, y = data()
    X[:, 2] = np.tile([0.0, 0.0, 1.0], N_GROUPS)
    y[2::3] = 0.0
    with pytest.warns(ConvergenceWarning, match="go to zero"):
        model = SoftmaxRegressor("cross_entropy", outside_good=True).fit(X, y, groups=GROUPS)
    assert model.result_.status == "separable"
    assert model.coef_[2] == -np.inf
    kept = X[:, 2] == 0.0
    rows, shares = written_out(X, y)
    there = np.concatenate([kept, np.ones(N_GROUPS, dtype=bool)])
    truth = SoftmaxRegressor("cross_entropy").fit(rows[there, :2], shares[there], groups=ALL_GROUPS[there])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = model.result_.separation.fit()
    np.testing.assert_allclose(rest.x[:2], truth.coef_, atol=1e-7)
    np.testing.assert_allclose(model.coef_[:2], truth.coef_, atol=1e-7)


def test_rows_at_hand():
    """What looks at some rows sees those of zeros, and where nothing is in memory nothing."""
    X, _ = data()
    design = ZeroRowsBelow(DenseDesign(X), 2)
    np.testing.assert_array_equal(design.peek(slice(len(X) - 1, len(X) + 1)), [X[-1], np.zeros(3)])
    np.testing.assert_array_equal(design.column_sizes(), np.abs(X).max(axis=0))
    problem = Softmax(design.take(np.array([0, len(X)])), [0.5, 0.5])
    assert problem.value(np.zeros(3)) == 0.0
