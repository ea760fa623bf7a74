"""The linear algebra behind absorbed effects: against dense matrices, autodiff and exact solutions."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.effects import laplacian, schur, squared
from attnfit.effects.levels import sort_into_cells
from benchmarks.effects_data import gravity, matched


def graph(seed=0, n=400, sizes=(30, 12), spread=1.0):
    """Return cells with weights, R by cell and D_0 by cell."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, size, n).astype(np.int32) for size in sizes]
    for column, size in zip(codes, sizes, strict=True):
        column[:size] = np.arange(size)
    cells = sort_into_cells(codes, list(sizes))
    W = np.exp(spread * rng.standard_normal(cells.n_cells))
    owner = np.repeat(np.arange(cells.n_first), np.diff(cells.level_starts))
    D = np.eye(cells.n_first)[owner]
    R = np.zeros((cells.n_cells, cells.n_rest))
    for s in range(cells.rest.shape[1]):
        R[np.arange(cells.n_cells), cells.rest[:, s]] = 1.0
    return cells, W, D, R


@pytest.mark.parametrize("sizes", [(30, 12), (30, 12, 5), (30,)])
def test_products_with_the_schur_complement(sizes):
    cells, W, D, R = graph(sizes=sizes)
    d = D.T @ W
    expected = R.T @ (W[:, None] * R) - R.T @ (W[:, None] * D) @ (D.T @ (W[:, None] * R) / d[:, None])
    made = schur.Schur(cells, W, d)
    V = np.random.default_rng(1).standard_normal((cells.n_rest, 3))
    np.testing.assert_allclose(made.product(V), expected @ V, atol=1e-11)
    np.testing.assert_allclose(made.diagonal, np.diag(expected), atol=1e-11)
    np.testing.assert_allclose(made.dense(), expected, atol=1e-11)
    np.testing.assert_allclose(made.average(V), D.T @ (W[:, None] * (R @ V)) / d[:, None], atol=1e-12)
    Y = np.random.default_rng(2).standard_normal((cells.n_first, 3))
    np.testing.assert_allclose(
        made.eliminate(Y, V), V - R.T @ (W[:, None] * (D @ (Y / d[:, None]))), atol=1e-11
    )


def test_rows_are_sorted_into_cells():
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, k, 500).astype(np.int32) for k in (9, 7, 3)]
    cells = sort_into_cells(codes, [9, 7, 3])
    table = np.column_stack(codes)
    np.testing.assert_array_equal(cells.order, np.lexsort(table.T[::-1]))
    distinct, counts = np.unique(table, axis=0, return_counts=True)
    np.testing.assert_array_equal(np.diff(cells.row_starts), counts)
    np.testing.assert_array_equal(cells.rest, distinct[:, 1:] + [0, 7])
    owner = np.repeat(np.arange(9), np.diff(cells.level_starts))
    np.testing.assert_array_equal(owner, distinct[:, 0])


def test_the_curvature_of_the_squared_softmax_is_that_of_autodiff():
    rng = np.random.default_rng(0)
    cells, _, D, R = graph(n=60, sizes=(8, 5, 3))
    b, w = rng.random(cells.n_cells), rng.uniform(0.5, 2.0, cells.n_cells)
    a0 = torch.tensor(rng.standard_normal(cells.n_rest))
    Dt, Rt, bt, wt = map(torch.tensor, (D, R, b, w))

    def loss(a):
        e = torch.exp(Rt @ a)
        f = e / (Dt @ (Dt.T @ e))
        return 0.5 * (wt * (f - bt) ** 2).sum()

    expected = torch.autograd.functional.hessian(loss, a0).numpy()
    e = np.exp(R @ a0.numpy())
    f = e / (D @ (D.T @ e))
    p = w * (f - b)
    t = w * f**2 + p * f - (D @ (D.T @ (p * f))) * f
    made = schur.SoftmaxSchur(cells, t, np.ones(cells.n_first), f, D.T @ t)
    np.testing.assert_allclose(made.product(np.eye(cells.n_rest)), expected, atol=1e-12)


def test_an_approximate_factor_is_close_to_the_laplacian():
    cells, W, D, _ = graph(n=3_000, sizes=(600, 60), spread=1.5)
    made = schur.Schur(cells, W, D.T @ W)
    factor = laplacian.factorise(cells, W, made.d)
    inverse = factor.solve(np.eye(60))
    np.testing.assert_allclose(inverse, inverse.T, rtol=1e-9)
    values = np.sort(np.linalg.eigvals(inverse @ made.dense()).real)
    # One direction is tied to the ground alone.
    assert abs(values[0]) < 1e-5 and values[1] > 0.3 and values[-1] < 3.0
    again = laplacian.factorise(cells, W, made.d)
    np.testing.assert_array_equal(again.solve(np.eye(60)), inverse)


def test_small_cliques_are_eliminated_exactly():
    cells, W, D, _ = graph(n=30, sizes=(12, 5))
    made = schur.Schur(cells, W, D.T @ W)
    factor = laplacian.factorise(cells, W, made.d)
    right = made.product(np.random.default_rng(0).standard_normal((5, 2)))
    np.testing.assert_allclose(
        made.product(factor.solve(right)), right, rtol=1e-6, atol=1e-7 * np.abs(right).max()
    )


def test_elimination_gives_up_where_it_would_take_too_much_memory(monkeypatch):
    cells, W, D, _ = graph(n=3_000, sizes=(100, 60))
    monkeypatch.setattr(laplacian, "MOST_EDGES", 0)
    assert laplacian.factorise(cells, W, D.T @ W) is None


@pytest.mark.parametrize("sizes", [(30, 12), (30, 12, 5)])
def test_conjugate_gradients_of_several_columns(sizes):
    cells, W, D, _ = graph(sizes=sizes)
    made = schur.Schur(cells, W, D.T @ W)
    A = made.dense()
    B = A @ np.random.default_rng(0).standard_normal((cells.n_rest, 3)) * [1.0, 1e-6, 0.0]
    plain = schur.jacobi(made.diagonal)
    found = schur.conjugate_gradients(made, plain, B, None, 1e-10, np.zeros(3))
    assert found.arrived and not found.bent
    assert (np.abs(A @ found.x - B).max(axis=0) <= 1e-8 * np.abs(B).max(axis=0)).all()
    np.testing.assert_allclose(found.residual, B - A @ found.x, atol=1e-12)
    loose = schur.conjugate_gradients(made, plain, B, None, 1e-2, np.zeros(3))
    assert loose.n_iter < found.n_iter
    assert schur.conjugate_gradients(made, plain, B, None, 1e-10, np.full(3, 1e9)).n_iter == 0
    short = schur.conjugate_gradients(made, plain, B, None, 1e-10, np.zeros(3), 2)
    assert short.n_iter == 2 and not short.arrived
    warm = schur.conjugate_gradients(made, plain, B, found.x, 1e-6, np.zeros(3))
    assert warm.n_iter == 0
    indefinite = schur.Schur(cells, -W, -made.d)
    assert schur.conjugate_gradients(indefinite, plain, B, None, 1e-10, np.zeros(3)).bent


@pytest.mark.parametrize("data", [lambda: matched(800, 60, 1, 0.05, 3), lambda: gravity(14, 3)])
@pytest.mark.parametrize("kind", ["dense", "Laplacian"])
def test_all_preconditioners_lead_to_the_same_fit(monkeypatch, data, kind):
    X, y, sets = data()
    monkeypatch.setattr(schur, "MAX_ITERATIONS", 10_000)
    monkeypatch.setattr(schur, "DIAGONAL_ITERATIONS", 10_000)
    expected = minimize(problems.Poisson(X, y, absorb=sets))
    monkeypatch.setattr(schur, "DIAGONAL_ITERATIONS", 2)
    monkeypatch.setattr(schur, "DENSE_LEVELS", 4_000 if kind == "dense" else 10)
    result = minimize(problems.Poisson(X, y, absorb=sets))
    factors = result.absorbed.fit.factors
    assert result.converged and factors.kind == kind
    assert max(factors.n_iter[1:]) <= (20 if kind == "Laplacian" else 12)
    np.testing.assert_allclose(result.x, expected.x, atol=1e-9)


@pytest.mark.parametrize("dense_levels", [4_000, 10])
def test_three_sets_whose_levels_are_hard_to_tell_apart(monkeypatch, dense_levels):
    monkeypatch.setattr(schur, "DENSE_LEVELS", dense_levels)
    X, y, (worker, firm) = matched(3_000, 400, 0, 0.05, 5)
    clusters = firm // 3 + np.tile(np.arange(5), 3_000) * 200
    result = minimize(problems.Poisson(X, y, absorb=[worker, firm, clusters]))
    assert result.converged and result.n_passes <= 9
    # What a set holds of another changes nothing but the count of parameters.
    assert result.effects.rank < sum(len(levels) for levels in result.absorbed.prepared.levels)


def test_steihaug_solves_the_subproblem():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    H, g, M = Q * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] @ Q.T, rng.standard_normal(6), rng.uniform(0.5, 2.0, 6)

    def path(H, radius):
        return squared.steihaug(lambda v: H @ v, lambda r: r / M, g, radius, 1e9)

    inside = path(H, 1e3)
    np.testing.assert_allclose(inside.p, -np.linalg.solve(H, g), atol=1e-6)
    assert not inside.bounded and inside.length == pytest.approx(np.sqrt(inside.p @ (M * inside.p)))
    assert inside.promise == pytest.approx(-g @ inside.p - 0.5 * inside.p @ H @ inside.p)
    for matrix in (H, H - 4.5 * np.eye(6)):
        cut = path(matrix, 0.3)
        assert cut.bounded and np.sqrt(cut.p @ (M * cut.p)) == pytest.approx(0.3)
        assert cut.promise > 0.0
    assert path(H - 4.5 * np.eye(6), np.inf).bounded


@pytest.mark.parametrize("tol", [1e-4, 1e-8])
def test_what_is_called_converged_moves_no_logit_by_more_than_the_tolerance(tol):
    moves = []
    for seed in range(8):
        X, y, sets = matched(40, 8, seed, reach=3)
        result = minimize(problems.Poisson(X, y, absorb=sets), tol=tol)
        assert result.converged and result.move <= tol
        exact = minimize(problems.Poisson(X, y, absorb=sets), tol=1e-11)
        assert np.abs(result.x - exact.x).max() <= tol
        moves.append(result.move)
    assert len(set(moves)) == 8


# Fits that do not get to an end, and say so.
REFUSED = {
    ("of a column", 1e-8, "squared shares"),
    ("of the effects", 0.0, "exponential"),
    ("of the effects", 1e-4, "poisson"),
    ("of the effects", 1e-4, "shares"),
}


@pytest.mark.parametrize("kind", ["poisson", "exponential", "shares", "squared shares"])
@pytest.mark.parametrize("gap", [0.0, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("twin", ["of a column", "of the effects"])
def test_a_column_that_rows_hardly_tell_apart_is_not_called_collinear(kind, gap, twin):
    """Exact relations leave out a column, hardly seen ones end as "flat", and what can be told is fitted as
    well as a column of ordinary size in its place.
    """
    rng = np.random.default_rng(0)
    n = 600
    one, other = rng.integers(0, 20, n), rng.integers(0, 15, n)
    x, z = rng.standard_normal((2, n))
    eta = 0.5 * x + 0.2 * z + 0.3 * np.sin(one) + 0.2 * np.cos(other)
    y = rng.poisson(5.0 * np.exp(eta)) + 1.0
    like = x if twin == "of a column" else np.sin(one) + np.cos(other)

    def fit(X):
        if kind == "poisson":
            return minimize(problems.Poisson(X, y, absorb=[one, other]))
        if kind == "exponential":
            return minimize(problems.Exponential(X, y, absorb=[one, other]))
        b = y / np.bincount(one, weights=y)[one]
        loss = "squared" if kind == "squared shares" else "cross_entropy"
        return minimize(problems.Softmax(X, b, one, loss=loss, absorb=[other]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = fit(np.column_stack([x, like + gap * z]))
    if (twin, gap, kind) in REFUSED:
        assert found.status in ("max_iter", "precision")
    elif gap == 0.0:
        assert found.status == "converged" and "collinear with the effects" in found.message
    elif gap < 1e-5:
        assert found.status == "flat" and "collinear" not in found.message
        assert np.isnan(found.x[1])
    else:
        plain = fit(np.column_stack([x, z]))
        assert found.status == plain.status == "converged"
        assert found.x[1] * gap == pytest.approx(plain.x[1], rel=1e-5)
