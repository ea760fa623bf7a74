"""Many fits at once: each against the fit of its own problem, and its verdict against its own derivatives."""

import warnings

import numpy as np
import pytest
from conftest import shrink_blocks
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from storages import STORAGES

from attnfit import losses, minimize, minimize_many, problems

G, SIZE, D = 40, 4, 3
N = G * SIZE
IDS = np.repeat(np.arange(G), SIZE)
KINDS = ("squared", "cross_entropy", "kl", "rescaled", "exponential", "poisson")


def data(seed=0, d=D, noise=0.3):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((N, d))
    u = np.exp(A @ (0.5 * rng.standard_normal(d))) * np.exp(noise * rng.standard_normal(N))
    return rng, A, u


def built(kind, A, u, weights=None, ridge=0.0, groups=IDS, **options):
    options |= {"weights": weights, "ridge": ridge}
    if kind == "exponential":
        return problems.Exponential(A, u, **options)
    if kind == "poisson":
        return problems.Poisson(A, u, **options)
    b = u / np.bincount(IDS, weights=u)[IDS]
    if kind == "rescaled":
        return problems.Rescaled(A, b, groups=groups, **options)
    return problems.Softmax(A, b, groups=groups, loss=kind, **options)


def grouped(kind):
    return kind not in ("exponential", "poisson")


def alone(kind, A, u, w, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return minimize(built(kind, A, u, w, **options), tol=1e-10, n_starts=1, random_state=0)


def bootstrap(rng, n, R=12):
    return rng.multinomial(n, np.full(n, 1.0 / n), size=R).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_every_fit_is_that_of_its_own_weights(kind, ridge):
    rng, A, u = data()
    base = rng.uniform(0.5, 2.0, N)
    W = bootstrap(rng, G if grouped(kind) else N)
    many = minimize_many(built(kind, A, u, base, ridge), W)
    assert many.x.shape == (12, D)
    assert many.converged.all()
    assert many.n_alone == 0
    assert many.n_rounds <= 12
    for r in range(W.shape[1]):
        w = base * (W[IDS, r] if grouped(kind) else W[:, r])
        own = built(kind, A, u, w, ridge)
        assert many.value[r] == pytest.approx(own.value(many.x[r]), rel=1e-10)
        # The next step of its own problem, from derivatives that the other tests hold against autodiff.
        step = np.linalg.solve(own.hessian(many.x[r]), own.gradient(many.x[r]))
        assert np.abs(A @ step).max() < 3e-8
        assert np.linalg.eigvalsh(own.hessian(many.x[r]))[0] > 0.0
        assert many.move[r] <= 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_far_replicates_have_a_hessian_of_their_own(kind):
    """Few units, so that fits end up to several logits from that of all the data."""
    rng, A, u = data(1, noise=1.5)
    clusters = rng.permuted(np.repeat(np.arange(8), N // 8)) if not grouped(kind) else IDS % 8
    W = bootstrap(rng, 8, R=30)
    many = minimize_many(built(kind, A, u), W, units=clusters)
    far = 0
    for r in np.flatnonzero(many.converged):
        own = built(kind, A, u, W[clusters, r].astype(float))
        step = np.linalg.solve(own.hessian(many.x[r]), own.gradient(many.x[r]))
        assert np.abs(A @ step).max() < 3e-8
        far += np.abs(A @ (many.x[r] - many.full.x)).max() > 0.25
    assert far >= 5
    assert many.converged.sum() >= 28


@pytest.mark.parametrize("storage", ["memory", "memmap", "npy", "zarr", "parquet", "shards"])
def test_every_storage(storage, tmp_path):
    rng, A, u = data(2)
    b = u / np.bincount(IDS, weights=u)[IDS]
    W = bootstrap(rng, G, R=4)
    expected = minimize_many(problems.Softmax(A, b, IDS, loss="kl"), W)
    stored = STORAGES[storage]({"A": A, "b": b, "groups": IDS}, (50, 50, 60), tmp_path)
    many = minimize_many(problems.Softmax(stored["A"], stored["b"], stored["groups"], loss="kl"), W)
    assert np.allclose(many.x, expected.x, atol=1e-9)
    assert many.n_alone == 0


def test_rows_in_any_order_with_offsets_and_sparse_columns():
    rng, A, u = data(3)
    order, offset = rng.permutation(N), 0.3 * rng.standard_normal(N)
    W = bootstrap(rng, G, R=5)
    plain = minimize_many(built("cross_entropy", A, u, offset=offset), W)
    labels = IDS[order]
    b = (u / np.bincount(IDS, weights=u)[IDS])[order]
    problem = problems.Softmax(
        sparse.csr_array(A[order]), b, labels, loss="cross_entropy", offset=offset[order]
    )
    # Weights of units go by the sorted labels, of groups by first appearance.
    assert np.allclose(minimize_many(problem, W, units=labels).x, plain.x, atol=1e-8)
    first = labels[np.sort(np.unique(labels, return_index=True)[1])]
    assert np.allclose(minimize_many(problem, W[first]).x, plain.x, atol=1e-8)


def test_dummies_have_the_fits_of_least_norm():
    rng, A, u = data(4)
    A = np.hstack([A, np.eye(SIZE)[np.tile(np.arange(SIZE), G)]])
    W = bootstrap(rng, G, R=6)
    many = minimize_many(built("cross_entropy", A, u), W)
    assert many.converged.all()
    assert many.n_alone == 0
    for r in range(6):
        assert np.allclose(many.x[r], alone("cross_entropy", A, u, W[IDS, r].astype(float)).x, atol=1e-6)


@pytest.mark.parametrize("unit", [1e-120, 1e-3, 1e120])
def test_units_of_columns(unit):
    rng, A, u = data(5)
    W, scale = bootstrap(rng, G, R=4), np.array([1.0, unit, 1.0])
    plain, other = (minimize_many(built("squared", A * s, u), W).x for s in (1.0, scale))
    assert np.allclose(other * scale, plain, atol=1e-7)


def test_folds_leave_their_rows_out():
    _, A, u = data(6)
    folds = IDS % 5
    many = minimize_many(built("kl", A, u), folds=folds)
    assert many.x.shape == (5, D)
    for k in range(5):
        kept = folds != k
        own = problems.Softmax(A[kept], (u / np.bincount(IDS, weights=u)[IDS])[kept], IDS[kept], loss="kl")
        assert np.allclose(many.x[k], minimize(own, tol=1e-10).x, atol=1e-8)


def test_penalties_and_folds_with_penalties():
    _, A, u = data(7)
    ridges = np.array([0.0, 1e-3, 0.1, 3.0, 100.0])
    many = minimize_many(built("cross_entropy", A, u, ridge=7.0), ridge=ridges)
    for x, ridge in zip(many.x, ridges, strict=True):
        assert np.allclose(x, alone("cross_entropy", A, u, None, ridge=ridge).x, atol=1e-7)
    both = minimize_many(built("cross_entropy", A, u), ridge=ridges[:2], folds=IDS % 3)
    assert both.x.shape == (6, D)
    for k in range(3):
        w = np.where(k == IDS % 3, 0.0, 1.0)
        for i in range(2):
            expected = alone("cross_entropy", A, u, w, ridge=ridges[i]).x
            assert np.allclose(both.x[2 * k + i], expected, atol=1e-7)


def test_a_replicate_without_a_minimum_says_so():
    """Column 1 is a dummy that is chosen in group 0 alone: without it the coefficient falls for ever."""
    rng, A, _ = data(8)
    b = np.zeros(N)
    b[np.arange(0, N, SIZE) + rng.integers(1, SIZE, G)] = 1.0
    b[:SIZE] = [1.0, 0.0, 0.0, 0.0]
    A[:, 1] = 0.0
    A[::SIZE, 1] = 1.0
    W = np.ones((G, 2))
    W[0, 0] = 0.0
    many = minimize_many(problems.Softmax(A, b, IDS, loss="cross_entropy"), W)
    assert list(many.status) == ["separable", "converged"]
    assert many.x[0, 1] == -np.inf
    assert np.isfinite(many.x[0, [0, 2]]).all()
    assert many.n_alone == 1
    assert "1 separable" in repr(many)


def test_where_all_the_data_have_no_minimum_every_fit_is_made_alone():
    _, A, _ = data(9)
    b = np.zeros(N)
    b[::SIZE] = 1.0
    A[:, 1] = b
    many = minimize_many(problems.Softmax(A, b, IDS, loss="cross_entropy"), np.ones((G, 2)))
    assert list(many.status) == ["separable", "separable"]
    assert minimize_many(problems.Softmax(A, b, IDS, loss="cross_entropy"), ridge=[1.0]).converged.all()


def test_groups_longer_than_a_block(monkeypatch):
    rng, A, u = data(10)
    W = bootstrap(rng, G // 20, R=3)
    W[:, 0] = 1
    ids = IDS // 20
    b = u / np.bincount(ids, weights=u)[ids]
    expected = minimize_many(problems.Softmax(A, b, ids, loss="cross_entropy"), W)
    shrink_blocks(monkeypatch)
    many = minimize_many(problems.Softmax(A, b, ids, loss="cross_entropy"), W)
    assert many.n_alone == 3
    assert np.allclose(many.x, expected.x, atol=1e-7)


def test_memory_is_split(monkeypatch):
    rng, A, u = data(11)
    W = bootstrap(rng, G, R=9)
    expected = minimize_many(built("squared", A, u), W)
    monkeypatch.setattr("attnfit.solvers.many.SHARED_BYTES", 8 * (3 * D * D + G) * 4)
    many = minimize_many(built("squared", A, u), W)
    assert np.allclose(many.x, expected.x, atol=1e-9)
    assert many.n_rounds > expected.n_rounds


def test_steps_that_do_not_descend_are_halved(monkeypatch):
    """With Hessians that are too small by ten, first steps are ten times too long."""
    from attnfit.solvers import many as module

    def too_long(H, unseen):
        inverse, firm = real(H, unseen)
        return 10.0 * inverse, firm

    real = module._inverses
    rng, A, u = data(12)
    W = bootstrap(rng, G, R=5)
    expected = minimize_many(built("cross_entropy", A, u), W)
    monkeypatch.setattr(module, "_inverses", too_long)
    plain, rises = module._Together._round, []

    def watched(self, state, target):
        after = plain(self, state, target)
        rises.append(float((after[0].value - state.value).max() / np.abs(state.value).max()))
        return after

    monkeypatch.setattr(module._Together, "_round", watched)
    many = minimize_many(built("cross_entropy", A, u), W)
    assert many.converged.all()
    assert np.allclose(many.x, expected.x, atol=1e-6)
    assert rises and max(rises) < 1e-9


def test_reads_are_shared():
    rng, A, u = data(13)
    W = bootstrap(rng, G, R=200)
    many = minimize_many(built("cross_entropy", A, u), W)
    assert many.n_passes <= many.full.n_passes + many.n_rounds + 12
    assert many.n_alone == 0


ERRORS = [
    ({}, "pass weights, ridge or folds"),
    ({"weights": np.ones((3, 2))}, r"weights must have shape \(40, R\), one row a group or row"),
    ({"weights": -np.ones((G, 2))}, "weights must be finite and >= 0, not -1.0 at row 0, column 0"),
    ({"weights": np.eye(G, 3) * [1, 0, 1]}, "column 1 of weights is zero"),
    ({"weights": np.ones((G, 2)), "ridge": [1.0, 2.0, 3.0]}, "ridge has 3 entries for 2 columns"),
    ({"ridge": [1.0, -2.0]}, "ridge must be finite and >= 0, not -2.0 at index 1"),
    ({"ridge": [[1.0]]}, r"ridge must be a number for each fit, not of shape \(1, 1\)"),
    ({"folds": IDS[:5]}, r"folds must have one label a row, shape \(160,\), not \(5,\)"),
    ({"folds": np.zeros(N)}, "folds has one label only"),
    ({"folds": np.arange(N) % 2}, "folds splits group 0"),
    ({"folds": np.where(np.arange(N) == 7, np.nan, 1.0)}, "folds has no label at index 7"),
    ({"folds": IDS % 2, "weights": np.ones((2, 2))}, "folds are weights of zero and one"),
    ({"units": IDS % 2, "ridge": [1.0]}, "units say what weights belong to"),
    ({"units": IDS % 2, "weights": np.ones((G, 1))}, r"weights must have shape \(2, R\), one row a unit"),
    ({"ridge": [1.0], "tol": 0.0}, "tol must be in"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_arguments(arguments, message):
    _, A, u = data()
    with pytest.raises(ValueError, match=message):
        minimize_many(built("squared", A, u), **arguments)


def test_what_cannot_be_fitted_together():
    import dask.array as da

    _, A, u = data()
    with pytest.raises(ValueError, match="row_penalty belongs to no unit"):
        minimize_many(built("squared", A, u, row_penalty=1.0), ridge=[1.0])
    with pytest.raises(TypeError, match="not TwoLayer"):
        minimize_many(problems.TwoLayer(A[:5], np.eye(5), np.zeros(5)), ridge=[1.0])
    with pytest.raises(TypeError, match=r"not Attention$"):
        minimize_many(problems.Attention(A[:6], A[:5], np.full((6, 5), 0.2)), ridge=[1.0])
    b = u / np.bincount(IDS, weights=u)[IDS]
    lazy = problems.Softmax(da.from_array(A, chunks=(80, D)), da.from_array(b, chunks=80), IDS)
    with pytest.raises(TypeError, match="compute"):
        minimize_many(lazy, ridge=[1.0])


def test_threads_change_no_bit(monkeypatch):
    shrink_blocks(monkeypatch)
    monkeypatch.setattr("attnfit.objectives.many.CHUNKS_A_RUN", 1)
    rng, A, u = data()
    W, found = bootstrap(rng, len(np.unique(IDS))), []
    for n_threads in (1, 4):
        for module in ("objectives.part", "data.store"):
            monkeypatch.setattr(f"attnfit.{module}.available_threads", lambda n=n_threads: n)
        problem = built("squared", A, u)
        assert len(problem.rows.chunks) >= 3
        many = minimize_many(problem, W, random_state=0)
        found.append((many.x, many.value, many.move, problem.n_passes))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


class ByTarget(losses.SeparableLoss):
    """Squares that weigh more where the target is large, told row by row."""

    def phi(self, f, b):
        return 0.5 * self._weights(f, b) * (f - b) ** 2

    def first(self, f, b):
        return self._weights(f, b) * (f - b)

    def second(self, f, b):
        return self._weights(f, b)

    def _weights(self, f, b):
        out = np.ones_like(f)
        out[b > 0.2] *= 2.0
        return out


def test_a_loss_of_ones_own_that_asks_for_rows():
    rng, A, u = data()
    b = u / np.bincount(IDS, weights=u)[IDS]
    W = bootstrap(rng, len(np.unique(IDS)), R=3)
    problem = problems.Softmax(A, b, groups=IDS, loss=ByTarget())
    many = minimize_many(problem, W, random_state=0)
    assert many.converged.all() and many.n_alone == 0
    for r in range(3):
        w = W[:, r][IDS].astype(float)
        own = minimize(
            problems.Softmax(A, b, groups=IDS, loss=ByTarget(), weights=w), tol=1e-10, x0=many.x[r]
        )
        np.testing.assert_allclose(many.x[r], own.x, atol=1e-6)
