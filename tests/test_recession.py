"""Directions without a minimum and the rows that fall along them, row by row by linear programmes."""

from fractions import Fraction

import numpy as np
import pytest
from autodiff import Objective
from conftest import shrink_blocks
from scipy import sparse
from scipy.optimize import linprog

from attnfit import problems
from attnfit.objectives.recession import Frame, Free, Signs, free_rows
from attnfit.solvers.separation import find_separation

STORAGES = {"dense": np.asarray, "csr": sparse.csr_array}


def differences(A, fixed, free, ids):
    """Free rows and fixed rows relative to the first fixed one of their group; as they are without groups."""
    F, E, of = [], [], []
    for g in np.unique(ids):
        rows = np.flatnonzero(ids == g)
        held = rows[fixed[rows]]
        centre = A[held[0]] if len(held) else np.zeros(A.shape[1])
        E += [A[i] - centre for i in held]
        F += [A[i] - centre for i in rows[free[rows]]]
        of += list(rows[free[rows]])
    return np.reshape(F, (-1, A.shape[1])), np.reshape(E, (-1, A.shape[1])), np.array(of, dtype=int)


def falling_rows(A, fixed, free, ids):
    """The rows that some direction lowers which parts no fixed rows and raises no free one."""
    F, E, of = differences(A / np.maximum(np.abs(A).max(axis=0), 1e-9), fixed, free, ids)
    out = np.zeros(len(A), dtype=bool)
    for row, i in zip(F, of, strict=True):
        if row.any():
            equations = {"A_eq": E, "b_eq": np.zeros(len(E))} if len(E) else {}
            found = linprog(row, A_ub=F, b_ub=np.zeros(len(F)), bounds=(-1, 1), **equations)
            out[i] = found.fun < -1e-6
    return out


def check(found, A, fixed, free, ids):
    """The direction is one, all its rows are named, and no others."""
    falls = falling_rows(A, fixed, free, ids)
    assert (found is not None) == falls.any()
    if found is None:
        return False
    assert found.rows.tolist() == np.flatnonzero(falls).tolist()
    assert found.remaining.tolist() == (~falls).tolist()
    assert found.exact
    v = found.direction
    F, E, of = differences(A, fixed, free, ids)
    size = np.abs(A @ v).max()
    assert np.isclose(np.abs(v).max(), 1.0)
    np.testing.assert_allclose(E @ v, 0.0, atol=1e-9 * size)
    np.testing.assert_allclose(F[~falls[of]] @ v, 0.0, atol=1e-9 * size)
    assert (F[falls[of]] @ v < -1e-6 * size).all()
    assert dict(found.columns) == {j: v[j] for j in np.flatnonzero(v)}
    return True


def drawn(seed, n_groups=3):
    """A small problem of counts, many of them zero, and columns of different sizes."""
    rng = np.random.default_rng(seed)
    d, size = int(rng.integers(2, 6)), int(rng.integers(3, 6))
    ids = np.repeat(np.arange(n_groups), size)
    A = (
        rng.integers(-2, 3, (len(ids), d))
        * (rng.random((len(ids), d)) < 0.7)
        * 10.0 ** rng.integers(-3, 4, d)
    )
    b = rng.multinomial(int(rng.integers(1, 3)), np.full(size, 1 / size), n_groups).ravel().astype(float)
    return rng, A, b, ids


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_the_falling_rows_of_shares(storage, loss, monkeypatch):
    """Whatever the start and the storage; and from a point on the way with a few rows of the programme at a
    time, those that run away first.
    """
    n_separated = 0
    for seed in range(16):
        rng, A, b, ids = drawn(seed)
        problem = problems.Softmax(STORAGES[storage](A), b, ids, loss=loss)
        at = problem.evaluate(rng.standard_normal(A.shape[1]) / np.abs(A).max(axis=0, initial=1.0))
        found = find_separation(problem, at)
        n_separated += check(found, A, b > 0, b == 0, ids)
        if found is not None:
            on_the_way = problem.evaluate(at.x + 40.0 / found._drop * found.direction)
            with monkeypatch.context() as few:
                few.setattr("attnfit.solvers.separation.FIRST_ROWS", 2)
                few.setattr("attnfit.solvers.separation.MORE_ROWS", 1)
                check(find_separation(problem, on_the_way), A, b > 0, b == 0, ids)
    assert 3 <= n_separated <= 14


def test_rows_that_stay_do_not_crowd_out_rows_that_fall(monkeypatch):
    """More rows join the programme than those it has that no direction lowers."""
    monkeypatch.setattr("attnfit.solvers.separation.FIRST_ROWS", 3)
    monkeypatch.setattr("attnfit.solvers.separation.MORE_ROWS", 1)
    A = np.array([[0.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]])
    b, away = [1.0, 0, 0, 0, 0], np.array([0.0, -20, -20, -20, -1])
    problem = problems.Softmax(A, b, loss="cross_entropy", offset=away)
    found = find_separation(problem, problem.evaluate(np.zeros(3)))
    assert found.rows.tolist() == [3, 4]


def test_the_falling_rows_of_a_group_in_pieces(monkeypatch):
    """Copies of rows: the answer is that of the rows once."""
    shrink_blocks(monkeypatch)
    n_separated = 0
    for seed in range(12):
        _, A, b, ids = drawn(seed, 1)
        b[:3] = 1.0
        times = 200 // len(A) + 1
        # What all rows have in common changes nothing.
        problem = problems.Softmax(
            np.tile(A, (times, 1)) + 5.0 * np.abs(A).max(axis=0), np.tile(b, times), loss="cross_entropy"
        )
        assert problem.rows.n_long == 1
        found = find_separation(problem, problem.evaluate(np.zeros(A.shape[1])))
        falls = falling_rows(A, b > 0, b == 0, ids)
        assert (found is not None) == falls.any()
        if found is not None:
            assert found.rows.tolist() == np.flatnonzero(np.tile(falls, times)).tolist()
            n_separated += 1
    assert 0 < n_separated < 12


@pytest.mark.parametrize("storage", STORAGES)
def test_the_falling_rows_of_an_exponential(storage):
    """Rows with an outcome stay where they are, in absolute terms: beside a row of zeros that is held."""
    n_separated = 0
    for seed in range(24):
        rng, A, b, _ = drawn(seed)
        b *= rng.random(len(b)) < 0.4
        b[0] = 1.0
        A[0] = 0.0
        problem = problems.Exponential(STORAGES[storage](A), b)
        found = find_separation(problem, problem.evaluate(np.zeros(A.shape[1])))
        n_separated += check(found, A, b > 0, b == 0, np.zeros(len(A)))
    assert 3 <= n_separated <= 22


def test_rows_that_play_no_part_neither_hold_nor_fall():
    """A row of weight zero in an exponential; a group without a target in a share loss."""
    A = np.array([[1.0], [-1.0], [2.0]])
    problem = problems.Exponential(A, [0.0, 3.0, 0.0], weights=[1.0, 0.0, 1.0])
    found = find_separation(problem, problem.evaluate(np.zeros(1)))
    assert found.rows.tolist() == [0, 2]
    assert found.direction.tolist() == [-1.0]
    A, ids = np.array([[0.0], [1.0], [0.0], [-1.0]]), np.array([0, 0, 1, 1])
    problem = problems.Softmax(A, [1.0, 0.0, 0.0, 0.0], ids, loss="cross_entropy")
    found = find_separation(problem, problem.evaluate(np.zeros(1)))
    assert found.rows.tolist() == [1]
    assert found.direction.tolist() == [-1.0]


def test_a_penalty_holds_everything():
    A, b = np.array([[0.0], [1.0]]), [1.0, 0.0]
    for options in ({"ridge": 1e-9}, {"row_penalty": 1e-6}):
        problem = problems.Softmax(A, b, loss="cross_entropy", **options)
        assert find_separation(problem, problem.evaluate(np.zeros(1))) is None
    problem = problems.Softmax(A, b, loss="cross_entropy")
    assert find_separation(problem, problem.evaluate(np.zeros(1))) is not None
    for function in ("cosh", "sinh"):
        problem = problems.Exponential(A, b, function=function)
        assert find_separation(problem, problem.evaluate(np.zeros(1))) is None


def test_what_is_left_where_rows_have_gone():
    """The value there, a finite point that has it, and which coefficients still have one."""
    rng = np.random.default_rng(0)
    A = np.column_stack([rng.standard_normal((60, 2)), np.arange(60) % 6 == 0, np.arange(60) % 6 == 0])
    A[::6, 3] = 1.0 + np.arange(10)
    b, ids = rng.random(60) * (A[:, 2] == 0), np.arange(60) // 6
    problem = problems.Softmax(A, b, ids, loss="cross_entropy")
    found = find_separation(problem, problem.evaluate(np.zeros(4)))
    kept = A[:, 2] == 0
    rest = problems.Softmax(A[kept, :2], b[kept], ids[kept], loss="cross_entropy")
    best = problems.Softmax(A[kept, :2], b[kept], ids[kept], loss="cross_entropy")
    x = found.rest.x
    assert np.isclose(found.value, rest.value(x[:2]))
    np.testing.assert_allclose(best.gradient(x[:2]), 0.0, atol=1e-6)
    # In float64 the outputs of separated rows are zero there, and the loss is what it falls to.
    assert np.isfinite(found.point).all()
    assert np.isclose(problem.value(found.point), found.value, rtol=1e-12)
    fitted = problem.predict(found.point) if hasattr(problem, "predict") else None
    if fitted is not None:
        assert not np.asarray(fitted)[::6].any()
    # Two columns fall together, neither alone.
    answer = found.coefficients(x)
    np.testing.assert_allclose(answer[:2], x[:2])
    assert not np.isfinite(answer[2:]).any()


def test_the_point_of_an_exponential_overflows_nowhere():
    A = np.column_stack([np.ones(30), np.arange(30) < 10, np.linspace(0, 1, 30)])
    b = np.where(A[:, 1] == 1, 0.0, 1.0 + A[:, 2])
    problem = problems.Exponential(A, b)
    found = find_separation(problem, problem.evaluate(np.zeros(3)))
    assert found.rows.tolist() == list(range(10))
    u = np.exp(A @ found.point)
    assert u[:10].max() < 1e-12 * u[10:].min()
    assert np.isclose(problem.value(found.point), found.value, rtol=1e-9, atol=1e-20)
    answer = found.coefficients(found.rest.x)
    assert answer[1] == -np.inf
    assert np.isfinite(answer[[0, 2]]).all()


@pytest.mark.parametrize("c", [1e-4, 1.0, 1e4])
def test_a_direction_that_lasts_where_the_loss_is_not_convex(c):
    """Shares that no finite logit gives; none where the loss turns back on the way."""
    A = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    for b, falls in [([0.6, 0.4, -0.1], True), ([0.6, 0.4, 0.2], False)]:
        ahead = np.array([3.0, -7.0])
        problem = problems.Softmax(c * A, b, loss="squared", offset=A @ ahead)
        at = problem.evaluate((np.array([np.log(2 / 3), -12.0]) - ahead) / c)
        found = find_separation(problem, at)
        assert (found is not None) == falls
        if found is not None:
            assert found.rows.tolist() == [2]
            assert not found.exact
            assert found.direction.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("c", [1e-4, 1.0, 1e4])
def test_what_a_direction_does_at_its_end_decides(c):
    """A target of zero: where the others fit, the loss pulls at a share that is not yet zero."""
    A = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    problem = problems.Softmax(c * A, [0.6, 0.4, 0.0], loss="squared")
    found = find_separation(problem, problem.evaluate(np.array([np.log(0.45 / 0.55), -11.0]) / c))
    assert found.rows.tolist() == [2]
    assert np.isclose(found.value, 0.0, atol=1e-20)


@pytest.mark.parametrize(("beyond", "falls"), [(-1e-7, True), (0.0, True), (1e-7, False)])
@pytest.mark.parametrize("off", [0.3, 0.45])
@pytest.mark.parametrize("total", [1.0, 1.4])
def test_a_share_that_is_just_not_wanted_falls(beyond, falls, off, total):
    """Two rows that no unknown tells apart, and a third whose share is zero at the best fit: with a target of
    exactly so much first-order terms cancel, and only rounding says otherwise.
    """
    A = np.array([[0.0], [0.0], [1.0]])
    b = np.array([0.5 * total + off, 0.5 * total - off, 0.5 * total - 0.5 + beyond])
    problem = problems.Softmax(A, b, loss="squared")
    found = find_separation(problem, problem.evaluate(np.array([-40.0])))
    assert (found is not None) == falls
    # The definition: the loss at ever smaller shares against that at none.
    none, *larger = (squares(Fraction(f), b) for f in (0.0, 1e-12, 1e-10, 1e-8))
    assert all(other > none for other in larger) == falls


def squares(f, b):
    """About the targets, of two equal shares and a third of f: in rational numbers."""
    have = (1 - f) / 2, (1 - f) / 2, f
    return sum((one - Fraction(other)) ** 2 for one, other in zip(have, b, strict=True))


@pytest.mark.parametrize("c", [1e-4, 1.0, 1e4])
def test_rows_that_share_a_column_fall_on_balance(c):
    """One of two rows would rather rise; the sum decides, and which one is larger."""
    A = np.array([[0.0, 0], [1.0, 0], [0.0, 1], [0.0, 0], [1.0, 0], [0.0, 1]])
    ids = np.array([0, 0, 0, 1, 1, 1])
    for target, falls in [(-0.3, True), (0.3, False)]:
        b = np.array([0.6, 0.4, target, 0.6, 0.4, -0.1 * np.sign(target)])
        problem = problems.Softmax(c * A, b, ids, loss="squared")
        found = find_separation(problem, problem.evaluate(np.array([np.log(2 / 3), -12.0]) / c))
        assert (found is not None) == falls
        if found is not None:
            assert found.rows.tolist() == [2, 5]


@pytest.mark.parametrize(
    "M", [[[1.0, 5.0], [0.0, 1e3]], [[1e-3, 0.5], [2.0, 1.0]], [[1.0, 0.0], [-3.0, 0.1]]]
)
def test_what_falls_on_balance_does_so_in_any_unknowns(M):
    A = np.array([[0.0, 0], [1.0, 0], [0.0, 1], [0.0, 0], [1.0, 0], [0.0, 1]])
    ids, x, M = np.array([0, 0, 0, 1, 1, 1]), np.array([np.log(2 / 3), -12.0]), np.array(M)
    for target, falls in [(-0.3, True), (0.3, False)]:
        b = np.array([0.6, 0.4, target, 0.6, 0.4, -0.1 * np.sign(target)])
        problem = problems.Softmax(A @ M, b, ids, loss="squared")
        found = find_separation(problem, problem.evaluate(np.linalg.solve(M, x)))
        assert (found is not None) == falls
        if found is not None:
            assert found.rows.tolist() == [2, 5]
            moved = M @ found.direction
            assert abs(moved[0]) < 1e-6 * abs(moved[1])
            assert moved[1] < 0.0


@pytest.mark.parametrize(("other", "falls"), [(-0.03, True), (0.03, False)])
def test_each_of_two_columns_must_fall_by_itself(other, falls):
    """On balance the loss falls along both together; along the second alone it would rise."""
    A = np.tile([[0.0, 0, 0], [1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]], (2, 1))
    b = np.array([0.6, 0.4, -0.3, other, 0.6, 0.4, 0.1, -0.3 * other])
    problem = problems.Softmax(A, b, np.arange(8) // 4, loss="squared")
    at = problem.evaluate(np.array([np.log(2 / 3), -12.0, -12.0]))
    found = find_separation(problem, at)
    assert (found is not None) == falls
    # The truth: how the loss changes along each.
    slopes = Objective("Softmax", "squared", A, b, np.arange(8) // 4).gradient(at.x)[1:]
    assert slopes[0] > 0.0
    assert (slopes[1] > 0.0) == falls
    assert slopes.sum() > 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e30])
def test_what_fixed_rows_hold_in_a_small_unit_stays_held(size):
    """One free row would fall if the first column could move, which two fixed rows tell; another falls. What
    rounding leaves of the first column in a direction moves no row.
    """
    A = np.array([[0.0, 0, 0], [size, 0, 0], [0, 0, 1.0], [-size, 0, 0], [0, 1.0, 0]])
    problem = problems.Softmax(A, [1.0, 2.0, 3.0, 0.0, 0.0], loss="cross_entropy")
    found = find_separation(problem, problem.evaluate(np.zeros(3)))
    assert found.rows.tolist() == [4]
    assert found.direction.tolist() == [0.0, -1.0, 0.0]


def test_rows_of_every_block_hold(monkeypatch):
    """Of an exponential: an outcome in the last block, without which a column would be free."""
    shrink_blocks(monkeypatch)
    A = np.column_stack([np.ones(640), np.zeros(640)])
    A[-1, 1], A[5, 1] = 1.0, 1.0
    for last, falls in ((2.0, False), (0.0, True)):
        b = np.append(np.ones(639), last)
        b[5] = 0.0
        problem = problems.Exponential(A, b)
        assert len(problem.rows.chunks) > 2
        found = find_separation(problem, problem.evaluate(np.zeros(2)))
        assert (found is not None) == falls
        assert found is None or found.rows.tolist() == [5, 639]


@pytest.mark.parametrize(("part", "moves"), [(3e-10, False), (3e-9, True)])
def test_what_is_left_of_a_row_is_no_rounding_from_a_billionth_on(part, moves):
    """A free row that differs from the fixed one by so much of what both have in common."""
    problem = problems.Softmax([[1.0], [1.0 - part]], [1.0, 0.0], loss="cross_entropy")
    at = problem.evaluate(np.zeros(1))
    frame = Frame(np.ones((1, 1)), np.ones(1), np.zeros((0, 1)))
    found = problem.rows.reduce(free_rows, at, frame, None, 10)
    assert found.n_all == moves
    assert found.rows.tolist() == [[-1.0]] * moves


def test_what_two_parts_of_the_data_say_together():
    one, other = Signs(1.0, 0.1, 5.0, 2.0, 3.0), Signs(-3.0, 0.4, 1.0, 0.5, 7.0)
    for both in (one.merge(other), other.merge(one)):
        assert vars(both) == {"pull": -2.0, "parting": 0.4, "size": 5.0, "drop": 0.5, "most": 7.0}
    rows, sizes = np.arange(4.0)[:, None], np.array([0.5, 0.1, 0.3, 0.2])
    first, last = Free(rows[:2], sizes[:2], 3, 20), Free(rows[2:], sizes[2:], 3, 30)
    merged = first.merge(last)
    # Those that run away first, as many as are wanted.
    assert merged.rows[:, 0].tolist() == [1.0, 3.0, 2.0]
    assert merged.sizes.tolist() == [0.1, 0.2, 0.3]
    assert (merged.limit, merged.n_all) == (3, 50)
