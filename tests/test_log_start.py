"""Starts from the logarithm of the target, against least squares with a dummy for every group."""

import numpy as np
import pytest
from conftest import shrink_blocks
from scipy import sparse

from attnfit import problems
from attnfit.losses.elementwise import LeastSquares, PoissonDeviance, SquaredExponential
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES, LogRatio
from attnfit.objectives.beginning import log_start
from attnfit.objectives.convexity import has_weight, surrogate_rows, surrogate_targets
from attnfit.segments import Segments

SIZES = (9, 1, 6, 14, 5)
STORAGES = {"dense": np.asarray, "csr": sparse.csr_array}


class Data:
    """Rows in groups, some of weight zero, with an offset; the target is noise."""

    def __init__(self, seed=0, d=4, sizes=SIZES, zeros=0.0):
        rng = np.random.default_rng(seed)
        self.ids = np.repeat(np.arange(len(sizes)), sizes)
        n = len(self.ids)
        self.A = rng.standard_normal((n, d)) * 10.0 ** rng.uniform(-3, 3, d)
        self.b = np.exp(rng.standard_normal(n)) * (rng.random(n) >= zeros)
        self.w = rng.random(n) + 0.2
        self.offset = 0.5 * rng.standard_normal(n)
        self.d = d

    def spread(self, rows):
        return np.bincount(self.ids, weights=rows)[self.ids]


def weighted(A, z, t, ids=None):
    """Least squares with weights t, and a constant of its own for every group."""
    scale = np.abs(A).max(axis=0)
    columns = A / scale
    if ids is not None:
        columns = np.column_stack([columns, ids[:, None] == np.unique(ids)])
    root = np.sqrt(t)
    x = np.linalg.lstsq(columns * root[:, None], z * root, rcond=None)[0]
    return x[: A.shape[1]] / scale


def softmax_targets(loss, data):
    """Wanted logits and weights: the curvature of the loss at an exact fit."""
    f = data.b / data.spread(data.b)
    t = {
        "squared": data.w * f**2,
        "cross_entropy": data.spread(data.w * data.b) * f,
        "kl": data.spread(data.w * data.b) * f,
        "linear_cross_entropy": data.w * data.spread(data.b) * f,
    }[loss]
    return np.log(f), t


@pytest.fixture(params=["whole", "pieces", "no matrix", "no matrix, pieces"])
def way(request, monkeypatch):
    """In groups that are whole or in pieces, with a Gram or with products only."""
    if "pieces" in request.param:
        shrink_blocks(monkeypatch)
    if "matrix" in request.param:
        monkeypatch.setattr("attnfit.objectives.beginning.MAX_DENSE", 0)
        monkeypatch.setattr("attnfit.objectives.beginning.FORCING", 1e-12)
    return request.param


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl", "linear_cross_entropy"])
def test_shares(loss, storage, way):
    data = Data(sizes=(150, *SIZES))
    problem = problems.Softmax(
        STORAGES[storage](data.A), data.b, data.ids, loss=loss, weights=data.w, offset=data.offset
    )
    assert (problem.rows.n_long == 1) == ("pieces" in way)
    z, t = softmax_targets(loss, data)
    start = log_start(problem.rows)
    expected = weighted(data.A, z - data.offset, t, data.ids)
    np.testing.assert_allclose(start.x, expected, rtol=1e-7)
    assert start.share == 1.0


@pytest.mark.parametrize("storage", STORAGES)
def test_outcomes(storage, way):
    data = Data(1)
    for function in ("exp", "sinh", "cosh"):
        b = data.b if function == "exp" else (data.b - 1.0 if function == "sinh" else data.b)
        problem = problems.Exponential(
            STORAGES[storage](data.A), b, function=function, weights=data.w, offset=data.offset
        )
        z, t = {
            "exp": (np.log(data.b), data.w * data.b**2),
            "sinh": (np.arcsinh(b), data.w * (1.0 + b**2)),
            "cosh": (np.arccosh(np.maximum(b, 1.0)), data.w * np.maximum(b**2 - 1.0, 1e-3)),
        }[function]
        np.testing.assert_allclose(log_start(problem.rows).x, weighted(data.A, z - data.offset, t), rtol=1e-7)


@pytest.mark.parametrize("function", ["exp", "sinh", "cosh"])
def test_rescaled_outputs(function, way):
    """Known up to their sum: that of one a row, times ``normaliser``."""
    data = Data(2, sizes=(150, *SIZES))
    problem = problems.Rescaled(data.A, data.b, function, data.ids, weights=data.w)
    if function == "exp":
        f = data.b / data.spread(data.b)
        np.testing.assert_allclose(
            log_start(problem.rows).x, weighted(data.A, np.log(f), data.w * f**2, data.ids), rtol=1e-7
        )
        return
    for normaliser in (1.0, 2.5):
        b = data.b * normaliser * data.spread(np.ones(len(data.b)))
        z, t = {
            "sinh": (np.arcsinh(b), data.w * (1.0 + b**2)),
            "cosh": (np.arccosh(np.maximum(b, 1.0)), data.w * np.maximum(b**2 - 1.0, 1e-3)),
        }[function]
        np.testing.assert_allclose(log_start(problem.rows, normaliser).x, weighted(data.A, z, t), rtol=1e-7)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "linear_cross_entropy", "exponential"])
def test_targets_without_a_logarithm(loss, way):
    """Stand for half the smallest positive one of their group, per unit of the offset's exponential; a group
    without any plays no part, nor does a row without weight tell which is the smallest.
    """
    data = Data(3, sizes=(150, *SIZES), zeros=0.4)
    data.ids[data.ids == 6] = 5
    data.b[data.ids == 3] = 0.0
    data.w[np.flatnonzero((data.ids == 0) & (data.b > 0))[0]] = 0.0
    groups = np.zeros_like(data.ids) if loss == "exponential" else data.ids
    data.offset -= 3.0
    exposure = np.exp(data.offset)
    target = data.b.copy()
    for g in np.unique(groups):
        rows = groups == g
        positive = rows & (data.b > 0) & (data.w > 0)
        if positive.any():
            smallest = (data.b / exposure)[positive].min()
            target = np.where(rows & (data.b <= 0), 0.5 * smallest * exposure, target)
    counts = np.isin(groups, np.unique(groups[(data.b > 0) & (data.w > 0)])) & (data.w >= 0)
    if loss == "exponential":
        problem = problems.Exponential(data.A, data.b, weights=data.w, offset=data.offset)
        z, t, ids = np.log(target), data.w * target**2, None
    else:
        problem = problems.Softmax(data.A, data.b, data.ids, loss=loss, weights=data.w, offset=data.offset)
        with np.errstate(invalid="ignore", divide="ignore"):
            f = target / data.spread(target)
        ids = data.ids
        z = np.log(np.where(counts, f, 1.0))
        t = {
            "squared": data.w * f**2,
            "cross_entropy": data.spread(data.w * data.b) * f,
            "linear_cross_entropy": data.w * data.spread(target) * f,
        }[loss]
    t = np.where(counts, t, 0.0)
    start = log_start(problem.rows)
    np.testing.assert_allclose(start.x, weighted(data.A, z - data.offset, t, ids), rtol=1e-6)
    assert np.isclose(start.share, (data.b > 0)[t > 0].mean())


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "linear_cross_entropy"])
def test_an_exact_target_is_its_own_start(loss):
    data, x = Data(4), np.array([0.5, -1.0, 0.3, 2.0])
    x /= np.abs(data.A).max(axis=0)
    z = data.A @ x
    e = np.exp(z)
    problem = problems.Softmax(data.A, 1e-9 * e / data.spread(e), data.ids, loss=loss, weights=data.w)
    np.testing.assert_allclose(log_start(problem.rows).x, x, rtol=1e-8)
    problem = problems.Exponential(data.A, e)
    np.testing.assert_allclose(log_start(problem.rows).x, x, rtol=1e-8)


def test_columns_that_tell_nothing_have_no_part():
    """One that is constant in every group, and of two that are equal half each: the least norm."""
    data = Data(5)
    own = data.A[:, 0] / np.abs(data.A[:, 0]).max()
    A = np.column_stack([own, 1e3 + 7.0 * data.ids, own])
    problem = problems.Softmax(A, data.b, data.ids, loss="squared")
    z, t = np.log(data.b), (data.b / data.spread(data.b)) ** 2
    expected = weighted(own[:, None], z, t, data.ids)
    np.testing.assert_allclose(
        log_start(problem.rows).x, [expected[0] / 2, 0.0, expected[0] / 2], rtol=1e-7, atol=1e-12
    )


def test_losses_without_a_logarithm_have_no_start():
    data = Data()
    for problem in (
        problems.Softmax(data.A, data.b, data.ids, loss="entropy"),
        problems.Softmax(data.A, 0.0 * data.b, data.ids, loss="squared"),
    ):
        assert log_start(problem.rows) is None


def test_conjugate_gradients_go_as_far_as_a_start_needs(monkeypatch):
    data = Data(sizes=(40,) * 10, d=30)
    problem = problems.Softmax(data.A, data.b, data.ids, loss="squared", weights=data.w)
    z, t = softmax_targets("squared", data)
    exact = weighted(data.A, z, t, data.ids)
    monkeypatch.setattr("attnfit.objectives.beginning.MAX_DENSE", 0)
    error = np.linalg.norm((log_start(problem.rows).x - exact) * np.abs(data.A).max(axis=0))
    size = np.linalg.norm(exact * np.abs(data.A).max(axis=0))
    assert 1e-6 * size < error < 0.05 * size


# ---- the same data under a convex loss


def runs(sizes):
    return Segments(np.cumsum([0, *sizes[:-1]]), sum(sizes)), np.repeat(sizes, sizes)


@pytest.mark.parametrize("loss", ["squared", "kl", "linear_cross_entropy", "exp"])
def test_shares_become_choices_whose_best_fit_is_an_exact_target(loss):
    """Weights are those of a group, the mean over its targets; negative targets ask for nothing."""
    data, x = Data(6), np.array([0.5, -1.0, 0.3, 2.0])
    x /= np.abs(data.A).max(axis=0)
    e = np.exp(data.A @ x + data.offset)
    options = {"groups": data.ids, "weights": data.w, "offset": data.offset}
    if loss == "exp":
        problem = problems.Rescaled(data.A, e / data.spread(e), "exp", **options)
    else:
        problem = problems.Softmax(data.A, e / data.spread(e), loss=loss, **options)
    found = surrogate_rows(problem.rows)
    assert found.loss is LOSSES["cross_entropy"]
    other = problems.Softmax(
        data.A, found.b, data.ids, loss="cross_entropy", weights=found.weights, offset=data.offset
    )
    assert np.linalg.norm(other.gradient(x) * np.abs(x)) < 1e-12 * len(e)
    expected = data.spread(data.w * e) / data.spread(e)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-12)


def test_what_a_convex_loss_makes_of_targets():
    rng = np.random.default_rng(0)
    segments, sizes = runs((3, 2, 4))
    b, w = rng.standard_normal(9), rng.random(9) + 0.1
    b[3:5] = -1.0, 0.0
    loss, target, weights = surrogate_targets(LOSSES["squared"], b, w, segments, sizes)
    np.testing.assert_array_equal(target, np.maximum(b, 0.0))
    for run in (slice(0, 3), slice(5, 9)):
        np.testing.assert_allclose(weights[run], np.average(w[run], weights=target[run]))
    # A group without a target has no weight.
    assert not weights[3:5].any()
    assert surrogate_targets(LOSSES["squared"], b, None, segments, sizes)[2] is None
    # Rows that stand for several count as often.
    times = np.array([1, 3, 2, 1, 1, 4, 1, 2, 5])
    many, all_sizes = runs((6, 2, 12))
    whole = surrogate_targets(LOSSES["squared"], b.repeat(times), w.repeat(times), many, all_sizes)
    part = surrogate_targets(LOSSES["squared"], b, w, segments, sizes, times.astype(float))
    np.testing.assert_allclose(part[2].repeat(times), whole[2])
    loss, target, weights = surrogate_targets(SquaredExponential("exp"), b, w, segments, sizes)
    assert isinstance(loss, PoissonDeviance)
    np.testing.assert_array_equal(target, np.maximum(b, 0.0))
    assert weights is w
    # Nothing to ask for, and losses that are convex, or ask for no shares.
    for kind, targets in ((LOSSES["squared"], -np.abs(b)), (LOSSES["entropy"], b), (PoissonDeviance(), b)):
        assert surrogate_targets(kind, targets, w, segments, sizes) is None


@pytest.mark.parametrize("weights", [None, np.array([2.0, 0.5, 1.0, 3.0, 0.1])])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("function", ["sinh", "cosh"])
def test_hyperbolic_targets_become_logits(function, rescaled, weights):
    """With the curvature of the loss at an exact fit; what cosh cannot give asks for a logit of zero, and
    between minus one and one for little.
    """
    segments, sizes = runs((2, 3))
    b = np.array([1.5, 0.2, 4.0, -3.0, 1.0])
    loss = (SquaredRescaled if rescaled else SquaredExponential)(function)
    found, z, t = surrogate_targets(loss, b, weights, segments, sizes)
    assert isinstance(found, LeastSquares)
    b, w = b * sizes if rescaled else b, 1.0 if weights is None else weights
    given = b >= 1.0 if function == "cosh" else np.ones(5, dtype=bool)
    u, v = {"sinh": (np.sinh, np.cosh), "cosh": (np.cosh, np.sinh)}[function]
    np.testing.assert_allclose(u(z[given]), b[given], rtol=1e-12)
    np.testing.assert_allclose(t[given], np.maximum(w * v(z) ** 2, 1e-3 * w)[given], rtol=1e-9)
    assert not z[~given].any()
    little = np.abs(b) < 1.0
    assert (t >= 1e-3 * w).all()
    np.testing.assert_allclose(t[~given & little], (1e-3 * w * np.ones(5))[~given & little])


def test_rows_without_weight_have_no_convex_start():
    A, b = np.eye(3), np.array([0.5, 0.0, 0.0])
    assert surrogate_rows(problems.Softmax(A, b, weights=[0.0, 1.0, 1.0]).rows) is None
    assert surrogate_rows(problems.Softmax(A, b, weights=[1.0, 0.0, 0.0]).rows) is not None
    assert surrogate_rows(problems.Softmax(A, b).rows) is not None
    assert surrogate_rows(problems.Softmax(A, 0.0 * b).rows) is None
    assert has_weight(None)
    assert has_weight(np.array([0.0, 1.0]))
    assert not has_weight(np.zeros(2))
    assert surrogate_targets(LogRatio(), b, None, *runs((3,))) is None
