"""Rows of zeros that are not written out: in compiled loops, at any scale, on separable data."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize
from attnfit.data import DenseDesign, Design
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
    monkeypatch.setattr("attnfit.data.matrix.DENSE_ENTRIES", 1)
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
    monkeypatch.setattr("attnfit.data.matrix.DENSE_ENTRIES", 1)
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


def only_zero_rows_see_the_constant():
    """A constant that the shares of each group, which sum to one, let grow for ever."""
    rng = np.random.default_rng(1)
    X = np.column_stack([rng.standard_normal((2 * N_GROUPS, 2)), np.ones(2 * N_GROUPS)])
    first = rng.random(N_GROUPS)
    return X, np.column_stack([first, 1.0 - first]).ravel(), np.repeat(np.arange(N_GROUPS), 2)


@pytest.mark.parametrize("where", ["memory", "partitions"])
def test_what_no_remaining_row_sees_is_found_again(where):
    X, y, groups = only_zero_rows_see_the_constant()
    A, b = np.vstack([X, np.zeros((N_GROUPS, 3))]), np.concatenate([y, np.zeros(N_GROUPS)])
    ids = np.concatenate([groups, np.arange(N_GROUPS)])
    order = np.argsort(ids, kind="stable")
    A, b, ids = A[order], b[order], ids[order]
    if where == "partitions":
        array = pytest.importorskip("dask.array")
        A, b, ids = (array.from_array(part, chunks=(12, *part.shape[1:])) for part in (A, b, ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = minimize(Softmax(A, b, ids, loss="cross_entropy"))
    assert (result.status, result.x[2]) == ("separable", np.inf)
    # Without the rows of zeros the constant is in all rows of each group, where it cancels.
    truth = minimize(Softmax(X[:, :2], y, groups, loss="cross_entropy")).x
    rest = result.separation.fit()
    assert rest.converged and rest.n_iter < 20
    np.testing.assert_allclose(rest.x, [*truth, 0.0], atol=1e-7)
    np.testing.assert_allclose(result.x[:2], truth, atol=1e-7)


def test_the_command_tells_rows_of_the_data_from_others(tmp_path):
    pytest.importorskip("typer")
    from test_cli import run, write_rows

    X, y, groups = only_zero_rows_see_the_constant()
    rows = np.column_stack([groups, X, y]).tolist()
    write_rows(tmp_path / "d.csv", ["g", "x", "z", "one", "y"], rows)
    words = ["fit", "softmax", tmp_path / "d.csv", "--target", "y", "--group", "g", "--outside-good"]
    stopped = run(*words)
    assert stopped.exit_code == 1
    assert "The outputs of the outside good in 12 groups go to zero" in stopped.stdout
    done = run(*words, "--separation", "drop")
    assert done.exit_code == 0
    assert "Dropped the outside good in 12 groups." in done.stdout and "24 rows in 12 groups" in done.stdout
