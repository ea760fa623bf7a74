"""Whether a minimum exists, against linear programmes, labels and fits of the remaining rows."""

import warnings

import numpy as np
import pytest
import scipy.optimize
from scipy.optimize import linprog
from sklearn.exceptions import ConvergenceWarning

import attnfit
from attnfit import SoftmaxRegressor, minimize, problems
from attnfit.objectives.recession import Frame, Signs, verify
from attnfit.solvers.separation import _is_strict, find_separation


def fit(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return minimize(problem, random_state=0, **options)


def no_direction(A, b, ids):
    """Whether the alternative of separation holds: a strictly positive combination of the free differences
    that vanishes modulo the fixed ones.
    """
    free, fixed = [], []
    for g in np.unique(ids):
        rows = np.flatnonzero(ids == g)
        first = rows[b[rows] > 0][0]
        for i in rows:
            if i != first:
                (fixed if b[i] > 0 else free).append(A[i] - A[first])
    if not free:
        return True
    F = np.array(free)
    E = np.array(fixed).reshape(-1, A.shape[1])
    equations = np.vstack([F, E]).T
    bounds = [(1.0, None)] * len(F) + [(None, None)] * len(E)
    return linprog(np.zeros(len(bounds)), A_eq=equations, b_eq=np.zeros(A.shape[1]), bounds=bounds).success


@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_separable_exactly_where_the_programme_says_so(n_groups, loss):
    seen = {True: 0, False: 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        d, size = int(rng.integers(1, 4)), int(rng.integers(3, 7))
        ids = np.repeat(np.arange(n_groups), size)
        A = rng.integers(-3, 4, (len(ids), d)).astype(float)
        b = rng.multinomial(4 - n_groups, np.full(size, 1 / size), n_groups).ravel().astype(float)
        result = fit(problems.Softmax(A, b, ids, loss=loss))
        varies = np.abs(A - A[np.searchsorted(ids, ids)]).any()
        exists = no_direction(A, b, ids) or not varies
        assert (result.status == "separable") is not exists, seed
        assert result.converged is exists, (seed, result.message)
        seen[exists] += 1
    assert min(seen.values()) > 5


def test_a_ridge_always_has_a_minimum():
    A = np.array([[0, 0, 0], [0, 4, 0], [-4, 57, 0], [0, 0, 59], [55, 43, 0.0]])
    result = fit(problems.Softmax(A, [7, 1, 0, 0, 0.0], loss="cross_entropy", ridge=1e-6))
    assert result.converged


def test_the_direction_the_rows_and_what_remains():
    A = np.array([[0, 0, 0], [0, 4, 0], [-4, 57, 0], [0, 0, 59], [55, 43, 0.0]])
    result = fit(problems.Softmax(A, [7, 1, 0, 0, 0.0], loss="cross_entropy"))
    assert result.status == "separable"
    separation = result.separation
    assert np.allclose(separation.direction, [0, 0, -1])
    assert separation.columns == [(2, -1.0)]
    assert separation.rows.tolist() == [3]
    assert separation.remaining.tolist() == [True, True, True, False, True]
    rest = fit(problems.Softmax(A[[0, 1, 2, 4]], [7, 1, 0, 0.0], loss="cross_entropy"))
    assert np.allclose(result.x[:2], rest.x[:2], atol=1e-6)
    assert result.x[2] == -np.inf
    assert np.isclose(result.value, rest.value)
    assert np.allclose(separation.fit().x[:2], rest.x[:2], atol=1e-6)
    certificate = result.certificate()
    assert not certificate.valid
    assert "no finite minimum" in certificate.reason


def choices(n=80, size=5):
    """Choices among five, of which the first is never taken."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(n), size)
    kind = np.arange(n * size) % size
    A = np.column_stack([rng.standard_normal((n * size, 2)), kind == 0, kind == 1])
    p = np.where(kind == 0, 0.0, np.exp(A[:, :2] @ [1.0, -0.5])).reshape(n, size)
    y = np.zeros((n, size))
    for i, row in enumerate(p):
        y[i, rng.choice(size, p=row / row.sum())] = 1.0
    return A, y.ravel(), ids, kind != 0


def test_an_estimator_says_which_coefficients_have_no_value():
    A, y, ids, kept = choices()
    with pytest.warns(ConvergenceWarning, match="separable"):
        model = SoftmaxRegressor(loss="cross_entropy").fit(A, y, groups=ids)
    rest = SoftmaxRegressor(loss="cross_entropy").fit(A[kept][:, [0, 1, 3]], y[kept], groups=ids[kept])
    assert model.coef_[2] == -np.inf
    assert np.isnan(model.standard_errors_[2])
    assert np.allclose(model.coef_[[0, 1, 3]], rest.coef_, atol=1e-6)
    assert np.allclose(model.standard_errors_[[0, 1, 3]], rest.standard_errors_, atol=1e-6)
    assert "no finite value: x2" in str(model.summary())
    shares = model.predict(A, groups=ids)
    assert not shares[~kept].any()
    assert np.allclose(shares[kept], rest.predict(A[kept][:, [0, 1, 3]], groups=ids[kept]), atol=1e-6)


def vanishing_dummy():
    """Exact shares with a dummy on every tenth row, none of which has a share."""
    rng = np.random.default_rng(0)
    A = np.column_stack([rng.standard_normal((400, 2)), np.arange(400) % 10 == 0])
    return A, np.exp(A[:, :2] @ [0.5, -0.3]) * (A[:, 2] == 0)


def check_vanishing_dummy(result):
    assert result.status == "separable"
    assert np.allclose(result.x[:2], [0.5, -0.3], atol=1e-7)
    assert result.x[2] == -np.inf
    assert result.separation.rows.tolist() == list(range(0, 400, 10))


def test_a_group_longer_than_a_block(monkeypatch):
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1 << 10)
    A, y = vanishing_dummy()
    problem = problems.Softmax(A, y, loss="cross_entropy")
    assert problem.rows.n_long == 1
    check_vanishing_dummy(fit(problem))


def test_rows_in_partitions():
    dask = pytest.importorskip("dask")
    array = pytest.importorskip("dask.array")
    A, y = vanishing_dummy()
    with dask.config.set(scheduler="synchronous"):
        parts = array.from_array(A, chunks=(100, 3)), array.from_array(y, chunks=100)
        check_vanishing_dummy(fit(problems.Softmax(*parts, loss="cross_entropy")))


def test_the_remaining_rows_agree_with_statsmodels():
    """Poisson counts with a dummy whose outcomes are all zero: the model of shares is the same."""
    import statsmodels.api as sm

    rng = np.random.default_rng(3)
    for _ in range(3):
        X = rng.standard_normal((120, 2))
        dummy = (np.arange(120) % 5 == 0) * 1.0
        y = rng.poisson(np.exp(0.5 + X @ [0.4, -0.2])) * (1.0 - dummy)
        result = fit(problems.Softmax(np.column_stack([X, dummy]), y, loss="cross_entropy"))
        assert result.status == "separable"
        assert result.separation.rows.tolist() == np.flatnonzero(dummy).tolist()
        kept = dummy == 0
        other = sm.GLM(y[kept], sm.add_constant(X[kept]), family=sm.families.Poisson()).fit(tol=1e-14)
        assert np.allclose(result.x[:2], other.params[1:], atol=1e-7)


@pytest.mark.parametrize("y", [np.zeros(20), np.concatenate([np.zeros(5), np.linspace(1, 2, 15)])])
def test_exponential_outcomes_that_are_all_zero(y):
    A = np.column_stack([np.ones(20), np.arange(20) < 5])
    result = fit(problems.Exponential(A[:, 1:] if y.any() else A[:, :1], y))
    assert result.status == "separable"
    assert not np.isfinite(result.x).any()
    assert set(result.separation.rows) == set(np.flatnonzero(y == 0)) if y.any() else True


def test_coefficients_that_go_to_infinity_together_have_no_sign():
    """One that does so alone has: its direction is the only one."""
    result = fit(problems.Exponential(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]), np.zeros(3)))
    assert result.status == "separable"
    assert np.isnan(result.x).all()
    for sign in (1.0, -1.0):
        result = fit(problems.Exponential(sign * np.array([[1.0, 0.0], [2.0, 0.0]]), np.zeros(2)))
        assert result.x.tolist() == [-sign * np.inf, 0.0]


def test_a_squared_loss_that_falls_for_ever():
    """A share that no finite logit gives, and that the loss wants smaller all the way."""
    A = np.column_stack([np.tile([0.0, 1.0, 2.0, 0.0], 3), np.tile([0.0, 0.0, 0.0, 1.0], 3)])
    b = np.tile([0.6, 0.36, 0.24, 0.0], 3)
    result = fit(problems.Softmax(A, b, np.repeat(np.arange(3), 4)))
    assert result.status == "no_minimum"
    assert not result.converged
    assert result.x[1] == -np.inf
    rest = fit(problems.Softmax(A[A[:, 1] == 0][:, :1], b[A[:, 1] == 0], np.repeat(np.arange(3), 3)))
    assert np.isclose(result.x[0], rest.x[0], atol=1e-6)
    assert np.isclose(result.value, rest.value)


def test_a_rescaled_loss_that_vanishes_at_infinity():
    rng = np.random.default_rng(3)
    A = np.column_stack([np.ones(30), rng.standard_normal((30, 2))])
    b, ids = rng.dirichlet(np.ones(10), 3).ravel(), np.repeat([0, 1, 2], 10)
    result = fit(problems.Rescaled(A, b, "exp", ids))
    assert result.status == "no_minimum"
    assert result.value == 0.0
    assert result.x[0] == -np.inf
    with pytest.raises(ValueError, match="no row remains"):
        result.separation.fit()
    A[:, 0] = ids == 1
    result = fit(problems.Rescaled(A, b, "exp", ids))
    assert result.separation.rows.tolist() == list(range(10, 20))


def test_a_direction_that_only_a_vanishing_row_tells_is_flat():
    """Two columns that differ in one row, whose share of 1e-18 is given: no curvature in float64 shows it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(40)
    A = np.column_stack([x, x])
    A[0, 1] += 1.0
    b = rng.dirichlet(np.ones(4), 10).ravel()
    b[0], offset = 1e-18, np.zeros(40)
    offset[0] = -42.0
    problem = problems.Softmax(A, b, np.repeat(np.arange(10), 4), loss="cross_entropy", offset=offset)
    result = fit(problem)
    assert result.status == "flat"
    assert result.n_flat == 1
    assert "column 0" in result.message
    assert "column 1" in result.message


@pytest.mark.parametrize(("apart", "is_one"), [(0.0, True), (1e-9, True), (1e-5, False), (0.1, False)])
def test_a_direction_keeps_fixed_rows_together(apart, is_one):
    """Whatever proposes it: every row is looked at along it."""
    problem = problems.Softmax([[0.0], [apart], [-1.0]], [0.5, 0.5, 0.0], loss="cross_entropy")
    frame = Frame(np.ones((1, 1)), np.ones(1), np.zeros((0, 1)))
    at = problem.evaluate(np.zeros(1))
    assert problem.rows.reduce(verify, at, frame, np.ones(1)).confirm(frame) is is_one


def test_a_direction_lets_no_free_row_rise():
    problem = problems.Softmax([[0.0], [0.5], [-1.0]], [1.0, 0.0, 0.0], loss="cross_entropy")
    frame = Frame(np.ones((1, 1)), np.ones(1), np.zeros((0, 1)))
    at = problem.evaluate(np.zeros(1))
    assert not problem.rows.reduce(verify, at, frame, np.ones(1)).confirm(frame)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("fall", "falls"), [(0.0, False), (0.5e-6, False), (2e-6, True), (0.1, True)])
def test_which_rows_fall_along_a_direction(size, fall, falls):
    """By more than a millionth of the largest change; the least and the largest fall are told."""
    A = size * np.array([[0.0], [-fall], [-1.0]])
    problem = problems.Softmax(A, [1.0, 0.0, 0.0], loss="cross_entropy")
    frame = Frame(np.ones((1, 1)), np.ones(1), np.zeros((0, 1)))
    signs = problem.rows.reduce(verify, problem.evaluate(np.zeros(1)), frame, np.ones(1))
    assert signs.confirm(frame)
    assert (signs.drop, signs.most) == (size * (fall if falls else 1.0), size)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("excess", "alike"), [(0.0, True), (0.5e-6, True), (2e-6, False), (0.2, False)])
def test_rows_fall_alike_to_a_millionth(size, excess, alike):
    """In any unit; the direction of the programme need not lower all rows alike."""
    signs = Signs(drop=size, most=(1.0 + excess) * size)
    assert _is_strict(signs, False) == alike
    assert _is_strict(signs, True)


def separable(size=1.0):
    """Cross entropy with a dummy whose outcomes are all zero, in units of any size."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 4)
    A = np.column_stack([rng.standard_normal((120, 2)), np.arange(120) % 12 == 5])
    b = np.where(A[:, 2] > 0.0, 0.0, rng.integers(1, 9, 120))
    return problems.Softmax(A * [1.0, 1.0, size], b, groups, loss="cross_entropy"), A, b, groups


def test_what_is_returned_of_separable_data():
    problem, A, b, groups = separable()
    kept = A[:, 2] == 0.0
    rest = minimize(problems.Softmax(A[kept, :2], b[kept], groups[kept], loss="cross_entropy"))
    with pytest.warns(ConvergenceWarning, match="separable"):
        warned = minimize(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dropped = minimize(problem, separation="drop")
    with pytest.warns(ConvergenceWarning, match="separable"):
        last = minimize(problem, separation="keep")
    assert (warned.status, dropped.status, last.status) == ("separable", "converged", "separable")
    assert "10 rows left out" in dropped.message
    for result in (warned, dropped):
        np.testing.assert_allclose(result.x, [*rest.x, -np.inf], atol=1e-6)
        assert result.value == pytest.approx(rest.value)
        assert list(result.separation.rows) == list(np.flatnonzero(~kept))
    assert np.isfinite(last.x).all()
    assert last.x[2] < -3.0
    with pytest.raises(ValueError, match="separation must be one of"):
        minimize(problem, separation="ignore")


@pytest.mark.parametrize("size", [1e-150, 1e-100, 1.0, 1e100, 1e155])
def test_the_unit_of_a_column_changes_nothing_of_a_separation(size):
    problem, *_ = separable(size)
    result, plain = fit(problem), fit(separable()[0])
    assert result.status == "separable"
    np.testing.assert_allclose(result.x, plain.x, atol=1e-6)
    assert [j for j, _ in result.separation.columns] == [2]
    assert result.separation.direction[2] == -1.0
    np.testing.assert_allclose(result.separation.fit().x, plain.separation.fit().x, atol=1e-6)
    # A point with the same outputs.
    np.testing.assert_allclose(
        problem.predict(result.separation.point), plain.problem.predict(plain.separation.point), atol=1e-9
    )


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e30])
def test_no_direction_hides_in_a_small_unit(size):
    """Of a column that tells fixed rows apart, whatever its size."""
    _, A, b, groups = separable()
    problem = problems.Softmax(A * [size, 1.0, 1.0], b, groups, loss="cross_entropy")
    found = find_separation(problem, problem.evaluate(np.zeros(3)))
    assert found.direction.tolist() == [0.0, 0.0, -1.0]
    assert found.rows.tolist() == np.flatnonzero(A[:, 2]).tolist()
    held = np.where(A[:, 2] > 0.0, 1.0, b)
    problem = problems.Softmax(A * [size, 1.0, 1.0], held, groups, loss="cross_entropy")
    assert find_separation(problem, problem.evaluate(np.zeros(3))) is None


@pytest.mark.parametrize("size", [1e-120, 1e100])
def test_standard_errors_have_the_unit_of_their_column(size):
    _, A, b, groups = separable()
    model = SoftmaxRegressor(loss="cross_entropy")
    for X in (A, A[:, :2]):
        units = np.array([1.0, size, 1.0])[: X.shape[1]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            plain = SoftmaxRegressor(loss="cross_entropy").fit(X, b, groups=groups)
            model.fit(X * units, b, groups=groups)
        np.testing.assert_allclose(model.standard_errors_ * units, plain.standard_errors_, rtol=1e-6)
        np.testing.assert_allclose(model.predict(X * units, groups=groups), plain.predict(X, groups=groups))


def test_pairs_of_maps_are_not_left_out():
    """Keys that no query attends to: nothing is fitted without them, and no entry has a value."""
    maps = np.array([[0.6, 0.4, 0.0], [0.3, 0.7, 0.0]])
    problem = problems.Attention(np.eye(2, 3), np.eye(3), maps, "cross_entropy")
    x = np.linspace(0.1, 0.9, 9)
    found = find_separation(problem, problem.evaluate(x))
    assert found.rows.tolist() == [2, 5]
    assert found.exact
    assert not found.has_rest
    assert np.isnan(found.value)
    with pytest.raises(ValueError, match="pairs of queries and keys cannot be left out"):
        found.fit()
    assert (problem.predict(found.point)[:, 2] == 0.0).all()
    moves = found.direction != 0.0
    assert moves.tolist() == [True] * 6 + [False] * 3
    np.testing.assert_array_equal(found.coefficients(x), np.where(moves, np.nan, x))
    np.testing.assert_array_equal(found.unit, np.ones(9))


def test_a_direction_in_the_users_unknowns():
    """Scaled to a largest entry of one, entries in the order of their size, those of rounding left out."""
    A = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.5, 0.5, 1.0]])
    problem = problems.Exponential(A, np.zeros(3))
    x = np.array([0.1, 0.2, 0.3])
    found = find_separation(problem, problem.evaluate(x))
    assert found.value == 0.0
    np.testing.assert_array_equal(found.point, x)
    v, scales = found.direction, np.array([0.5, 0.25, 4.0])
    np.testing.assert_allclose(v, [-1.0, -0.5, -0.25], rtol=1e-9)
    for size in (1.0, 1e-200, 1e200):
        lifted = found.lifted(problem, lambda u, size=size: u * scales * size, 0.0)
        largest = np.abs(v * scales).max()
        np.testing.assert_allclose(lifted.direction, v * scales / largest, rtol=1e-12)
        order = np.argsort(-np.abs(v * scales))
        assert [j for j, _ in lifted.columns] == order.tolist()
        np.testing.assert_allclose([c for _, c in lifted.columns], lifted.direction[order])
        np.testing.assert_allclose(lifted.unit, size * scales)
        np.testing.assert_allclose(lifted.point, size * scales * x)
        middle = np.sort(np.abs(lifted.direction))[1]
        for least, n in ((0.99 * middle, 2), (1.01 * middle, 1)):
            assert len(found.lifted(problem, lambda u: u * scales, least).columns) == n
    assert found.lifted(problem, np.zeros_like, 0.0).columns == []


def test_the_direction_is_the_shortest_along_which_all_rows_fall_alike():
    """However often a row occurs; where they cannot fall alike it is one along which they all fall."""
    A = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, -4.0]])
    for times in (1, [1, 5, 2]):
        problem = problems.Exponential(A.repeat(times, axis=0), np.zeros(np.sum(times * np.ones(3, int))))
        found = find_separation(problem, problem.evaluate(np.zeros(2)))
        np.testing.assert_allclose(found.direction, [-1.0, -0.5], rtol=1e-9)
    A = np.array([[1.0, 0.0], [3.0, 0.0], [3.0, -4.0]])
    problem = problems.Exponential(A, np.zeros(3))
    found = find_separation(problem, problem.evaluate(np.zeros(2)))
    assert (A @ found.direction < 0.0).all()


@pytest.mark.parametrize("separable", [False, True, "in part"])
def test_large_data_need_no_programme(separable, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a programme of thousands of rows takes minutes")

    rng = np.random.default_rng(5)
    n, d = 12_000, 40
    A = rng.standard_normal((n, d))
    A[:, -1] = np.arange(n) % 600 == 7
    z = A[:, :-1] @ rng.standard_normal(d - 1) / 3.0
    b = rng.multinomial(3_000, np.exp(z) / np.exp(z).sum()).astype(float)
    if separable:
        b[A[:, -1] > 0.0] = 0.0
    if separable is True:
        # The outcomes are all at one row: every other one falls along the way to it.
        b = np.where(np.arange(n) == np.argmax(z), 9.0, 0.0)
    monkeypatch.setattr(scipy.optimize, "linprog", refuse)
    problem = problems.Softmax(A, b, loss="cross_entropy")
    found = find_separation(problem, problem.evaluate(np.zeros(d)))
    assert (found is not None) == bool(separable)
    if found is not None:
        assert list(found.rows) == list(np.flatnonzero(b == 0.0 if separable is True else A[:, -1] > 0.0))


def test_estimators_leave_separated_rows_out(tmp_path):
    _, A, b, groups = separable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = SoftmaxRegressor("cross_entropy", separation="drop").fit(A, b, groups=groups)
    assert model.result_.converged
    assert model.coef_[2] == -np.inf
    assert np.isnan(model.standard_errors_[2])
    predicted = model.predict(A, groups=groups)
    assert (predicted[A[:, 2] > 0.0] == 0.0).all()
    model.save(tmp_path / "a.safetensors")
    again = attnfit.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again.coef_, model.coef_)
    np.testing.assert_array_equal(again.predict(A, groups=groups), predicted)


def test_estimators_take_a_number_of_starts():
    A, b = np.array([[0.6], [0.7], [-3.9], [0.6]]), np.array([0.01, 0.43, 0.08, 0.47])
    one, many = (SoftmaxRegressor(n_starts=n).fit(A, b).loss_value_ for n in (1, 10))
    assert many == pytest.approx(0.0574499999988518, rel=1e-9)
    assert one >= many


def test_what_a_separation_shows_of_itself_is_short():
    problem = separable()[0]
    shown = repr(find_separation(problem, problem.evaluate(np.zeros(3))))
    assert "direction=" in shown and "exact=True" in shown
    assert " _" not in shown
