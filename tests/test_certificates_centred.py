"""Columns with a large part common to a group: certificates see the differences, wherever the rows are."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from instances import instance
from scipy import sparse

from attnfit import certificates, minimize, problems
from attnfit.data.centred import GroupReference
from attnfit.data.gram import centre_rows
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, stationarity

SHIFT = 1e7


def shifted(seed=1, sizes=(3, 3, 3, 3), d=2):
    """Rows whose last column is shifted by some 1e7 a group, targets, groups."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    A = rng.standard_normal((len(ids), d))
    A[:, -1] += SHIFT + SHIFT * rng.standard_normal(len(sizes))[ids]
    b = rng.gamma(1.0, size=len(ids))
    return A, b / np.bincount(ids, weights=b)[ids], ids


def quietly(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minimize(problem, **options)


def by_group(A, ids):
    """The same rows less the first of their group."""
    return A - A[np.unique(ids, return_index=True)[1]][ids]


@pytest.mark.parametrize("loss", ["cross_entropy", "squared", "kl"])
@pytest.mark.parametrize("seed", range(4))
def test_a_fit_of_shifted_columns_is_covered_or_refused(loss, seed):
    """Whatever the fit of the raw columns arrives at, the radius holds; at the fit of the centred ones it is
    as small as if nothing had been shifted.
    """
    A, b, ids = shifted(seed)
    problem = problems.Softmax(A, b, ids, loss=loss)
    good = quietly(problems.Softmax(by_group(A, ids), b, ids, loss=loss), tol=1e-12).x
    with mpmath.workdps(DIGITS):
        answer, _ = exact_answer(stationarity("Softmax", loss, A, b, ids), good)
        for x in (quietly(problem).x, good, good + 1e-6):
            proof = certificates.certify(problem, x)
            if proof.valid:
                error, each = error_of(x, answer)
                assert error <= proof.radius
                assert (each <= proof.coefficient_radius).all()
        assert certificates.certify(problem, good).radius < 1e-9


def test_shifts_change_no_certificate():
    """Of exact shifts, to the last digit."""
    rng = np.random.default_rng(0)
    A, b, ids = shifted(0, sizes=(5, 4, 6), d=3)
    A = np.round(by_group(A, ids) * 1024) / 1024
    moved = A + np.round(SHIFT * rng.standard_normal((3, 3)))[ids]
    x = quietly(problems.Softmax(A, b, ids, loss="cross_entropy")).x
    plain, far = (
        certificates.certify(problems.Softmax(M, b, ids, loss="cross_entropy"), x) for M in (A, moved)
    )
    assert plain.valid
    assert plain.radius == far.radius
    assert plain.lipschitz == far.lipschitz
    assert np.array_equal(plain.coefficient_radius, far.coefficient_radius)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("order", ["by group", "mixed"])
def test_long_groups_of_shifted_columns(monkeypatch, kind, order):
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_ENTRIES", 1)
    A, b, ids = shifted(2, sizes=(150, 7, 90), d=3)
    A[::3, 0] = 0.0
    x = quietly(problems.Softmax(by_group(A, ids), b, ids, loss="cross_entropy"), tol=1e-12).x
    rows = np.random.default_rng(0).permutation(len(b)) if order == "mixed" else np.arange(len(b))
    problem = problems.Softmax(kind(A[rows]), b[rows], ids[rows], loss="cross_entropy")
    assert problem.rows.n_long == 2
    whole = certificates.certify(problems.Softmax(by_group(A, ids), b, ids, loss="cross_entropy"), x)
    split = certificates.certify(problem, x)
    assert whole.valid and split.valid
    assert np.isclose(split.lipschitz, whole.lipschitz, rtol=1e-6)
    assert split.radius < 10 * whole.radius < 1e-7


@pytest.mark.parametrize("pieces", [(100, 100, 47), (150, 7, 90)])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
def test_shifted_columns_in_several_places(pieces, kind):
    """Groups that go on in the next partition share one reference row."""
    da = pytest.importorskip("dask.array")
    A, b, ids = shifted(2, sizes=(150, 7, 90), d=3)
    x = quietly(problems.Softmax(by_group(A, ids), b, ids, loss="cross_entropy"), tol=1e-12).x
    rows = da.from_array(A, chunks=(pieces, 3))
    if kind is sparse.csr_array:
        rows = rows.map_blocks(kind, dtype=float, meta=kind((0, 0)))
    vectors = [da.from_array(v, chunks=(pieces,)) for v in (b, ids)]
    problem = problems.Softmax(rows, *vectors, loss="cross_entropy")
    here = certificates.certify(problems.Softmax(A, b, ids, loss="cross_entropy"), x)
    there = certificates.certify(problem, x)
    assert here.valid and there.valid
    assert np.isclose(there.lipschitz, here.lipschitz, rtol=1e-6)
    assert there.radius < 10 * here.radius < 1e-7


def test_shifted_columns_on_disk(tmp_path):
    A, b, ids = shifted(3, sizes=(40, 7, 30), d=3)
    x = quietly(problems.Softmax(by_group(A, ids), b, ids, loss="cross_entropy"), tol=1e-12).x
    np.save(tmp_path / "A.npy", A)
    stored = problems.Softmax(np.load(tmp_path / "A.npy", mmap_mode="r"), b, ids, loss="cross_entropy")
    here = certificates.certify(problems.Softmax(A, b, ids, loss="cross_entropy"), x)
    there = certificates.certify(stored, x)
    assert there.valid
    assert np.isclose(there.radius, here.radius, rtol=1e-9)


def test_a_layer_of_shifted_columns():
    rng = np.random.default_rng(4)
    A1 = np.round(1024 * rng.standard_normal((30, 3))) / 1024
    A2 = rng.standard_normal((8, 30))
    b = np.tanh(A2 @ np.full(30, 1 / 30)) + 0.05 * rng.standard_normal(8)
    near, far = (problems.TwoLayer(M, A2, b, "tanh", ridge=0.1) for M in (A1, A1 + 2.0**24))
    # The target of a ridge is not shifted: only what no softmax can tell is.
    x = quietly(near).x
    one, other = certificates.certify(near, x), certificates.certify(far, x)
    assert one.valid
    assert one.radius == other.radius


def test_only_what_the_loss_ignores_is_subtracted():
    """Exponentials and row penalties tell rows from shifted ones."""
    inst, _ = instance("Softmax", "cross_entropy", sizes=(9, 8), d=3, noise=0.1)
    layer = problems.TwoLayer(inst.A + 3.0, np.eye(17), inst.b, row_penalty=0.5)
    for problem in (inst.problem(row_penalty=0.5), problems.Exponential(inst.A, inst.b + 1.0), layer):
        result = quietly(problem, tol=1e-12)
        near = result.x + 1e-4
        proof = certificates.certify(problem, near)
        assert proof.valid
        assert np.linalg.norm(result.x - near) <= proof.radius < 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_sparse_rows_are_centred_where_that_fills_nothing_in(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 7)
    starts = np.cumsum(sizes) - sizes
    A = rng.standard_normal((sizes.sum(), 4)) * (rng.random((sizes.sum(), 4)) < 0.7)
    A[:, 3] = 5.0 + np.arange(len(A))
    block = sparse.csr_array(A)
    centred = centre_rows(block, starts).toarray()
    assert np.array_equal(block.toarray(), A)
    for first, size in zip(starts, sizes, strict=True):
        group = slice(first, first + size)
        full = (A[group] != 0.0).all(axis=0)
        assert np.array_equal(centred[group], A[group] - np.where(full, A[first], 0.0))
    assert np.array_equal(centre_rows(A, starts), A - np.repeat(A[starts], sizes, axis=0))


def test_pieces_of_a_group_agree_on_what_is_subtracted():
    A = np.array([[5.0, 0.0, 2.0], [6.0, 1.0, 2.0], [7.0, 3.0, 0.0]])
    for pieces, row in ((A, A[0]), (sparse.csr_array(A), [5.0, 0.0, 0.0])):
        merged = GroupReference.of(pieces[:2]).merge(GroupReference.of(pieces[2:]))
        assert np.array_equal(merged.row, row)
        start = np.zeros(1, dtype=int)
        parts = [centre_rows(part, start, {0: merged.row}) for part in (pieces[:2], pieces[2:])]
        parts = [part.toarray() if sparse.issparse(part) else part for part in parts]
        assert np.array_equal(np.concatenate(parts), A - row)


def test_an_entry_stored_twice_is_one_entry():
    twice = sparse.csr_array(
        (np.array([1.0, 2.0, 4.0]), np.array([0, 0, 0]), np.array([0, 2, 3])), shape=(2, 2)
    )
    start = np.zeros(1, dtype=int)
    assert np.array_equal(centre_rows(twice, start).toarray(), [[0.0, 0.0], [1.0, 0.0]])
    assert np.array_equal(GroupReference.of(twice).row, [3.0, 0.0])


# ---- columns that a fit centres itself


def column(common, n_groups=4, size=3):
    """A column of 0 and 1 on top of what its groups have in common, beside an ordinary one."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(n_groups), size)
    A = np.column_stack([rng.standard_normal(len(ids)), common + np.arange(len(ids)) % 2])
    return A, rng.dirichlet(np.ones(size), n_groups).ravel(), ids


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("order", ["by group", "mixed"])
@pytest.mark.parametrize(
    ("common", "shifted"), [(99_999.0, False), (100_001.0, True), (-100_002.0, True), (-99_998.0, False)]
)
def test_columns_are_centred_from_a_hundred_thousand_times_their_spread_on(kind, order, common, shifted):
    A, b, ids = column(common)
    rows = np.random.default_rng(1).permutation(len(b)) if order == "mixed" else np.arange(len(b))
    found = problems.Softmax(kind(A[rows]), b[rows], ids[rows], loss="cross_entropy").reduction()
    assert (found is not None) == shifted


def test_what_is_not_centred():
    """Constants, whatever a penalty or a loss sees, and what only later rows would show."""
    A, b, ids = column(1e7)
    assert problems.Softmax(A, b, ids).reduction() is not None
    constant = np.column_stack([A[:, 0], np.full(len(b), 1e7)])
    assert problems.Softmax(constant, b, ids).reduction() is None
    assert problems.Softmax(A, b, ids, row_penalty=0.1).reduction() is None
    assert problems.Exponential(A, b).reduction() is None
    assert problems.Rescaled(A, b, "exp", ids).reduction() is None
    A, b, ids = column(1e7, n_groups=400)
    late = np.arange(1200) >= 1002
    for rows, shifted in ((late, True), (~late, False)):
        varied = A.copy()
        varied[rows, 1] = np.arange(rows.sum())
        assert (problems.Softmax(varied, b, ids).reduction() is not None) == shifted


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_a_fit_of_a_shifted_column_is_that_of_the_centred_one(loss):
    A, b, ids = column(2.0**27)
    far, near = (quietly(problems.Softmax(M, b, ids, loss=loss)) for M in (A, A - [0.0, 2.0**27]))
    assert far.converged and near.converged
    np.testing.assert_allclose(far.x, near.x, rtol=1e-6)


# ---- columns of extreme size


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize(
    ("size", "extreme"),
    [(0.9e60, False), (1.1e60, True), (1.1e-60, False), (0.9e-60, True), (0.0, False), (1e155, True)],
)
def test_one_column_of_extreme_size_is_scaled(kind, size, extreme):
    """Beside an ordinary one and one of zeros: to entries below two and not below one, by a power of two."""
    A, b, _ = column(0.0)
    A = np.column_stack([A[:, 0], np.zeros(12), size * np.linspace(1.0, -0.5, 12)])
    for ridge in (0.0, 0.3):
        problem = problems.Exponential(kind(A), b, ridge=ridge)
        found = problem.reduction()
        assert (found is not None) == extreme
        if not extreme:
            continue
        inner, x = found.problem, np.array([0.5, -0.25, 0.75 / size])
        assert inner.reduction() is None
        np.testing.assert_array_equal(found.lift(found.restrict(x)), x)
        assert np.isclose(inner.value(found.restrict(x)), problem.value(x), rtol=1e-15)
        # Of the unknowns: that of a column is the inverse.
        units = 1.0 / found.restrict(np.ones(3))
        assert (np.frexp(units)[0] == 0.5).all()
        assert units[1] == 1.0
        assert ((np.abs(A).max(axis=0) * units)[[0, 2]] >= 1.0).all()
        assert ((np.abs(A).max(axis=0) * units)[[0, 2]] < 2.0).all()
        assert found.keeps_unknowns


def test_a_penalty_on_a_tiny_column_is_as_large_as_can_be():
    A = np.column_stack([np.ones(3), 1e-250 * np.arange(3.0)])
    inner = problems.Exponential(A, np.ones(3), ridge=1.0).reduction().problem
    assert np.isfinite(inner.ridge).all()
    assert inner.ridge[0] == 1.0
    assert inner.ridge[1] > 1e300
    # A ridge of zero stays.
    assert not np.any(problems.Exponential(A, np.ones(3)).reduction().problem.ridge)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([1.0, 5.0, -1e155], "row 2, column 1, beside entries such as 1:"),
        ([0.0, 7.0, 1e155], "row 2, column 1, beside entries such as 7:"),
        ([1e155, 0.9e105, 2e154], "row 0, column 1, beside entries such as 9e"),
        ([1e155, 1.1e105, 2e154], None),
        ([1e155, -3e154, 0.0], None),
        ([0.9e150, 1.0, 2.0], None),
    ],
)
def test_a_code_beside_ordinary_entries_is_refused(entries, told):
    problem = problems.Exponential(np.column_stack([np.ones(3), entries]), np.ones(3))
    if told is None:
        assert problem.reduction() is not None
        return
    with pytest.raises(ValueError, match="missing value") as error:
        problem.reduction()
    assert told in str(error.value)


def test_rows_elsewhere_are_left_in_their_units(tmp_path):
    A, b, ids = column(1e7)
    np.save(tmp_path / "A.npy", A * [1.0, 1e70])
    stored = np.load(tmp_path / "A.npy", mmap_mode="r")
    assert problems.Softmax(stored, b, ids).reduction() is None
    assert problems.Softmax(np.array(stored), b, ids).reduction() is not None


@pytest.mark.parametrize("n_groups", [1, 700])
@pytest.mark.parametrize("first", [0, 900, 6_000])
def test_what_groups_share_is_found_wherever_it_begins(n_groups, first):
    """A year that is stored from some row on: rounding counts differences only."""
    rng = np.random.default_rng(0)
    n = 7_000
    A, groups = rng.standard_normal((n, 3)), np.repeat(np.arange(n_groups), n // n_groups)
    b = np.exp(A @ [0.3, -0.2, 0.1])
    b /= np.bincount(groups, weights=b)[groups]
    shifted = A.copy()
    # A group has a column with the year or without it.
    shifted[groups >= groups[first], 1] += 2.0**20
    plain, year = (
        minimize(problems.Softmax(X, b, groups, loss="cross_entropy"), random_state=0, tol=1e-10)
        for X in (A, shifted)
    )
    found = year.certificate()
    assert found.valid
    assert found.radius < 1e3 * max(plain.certificate().radius, 1e-13)
