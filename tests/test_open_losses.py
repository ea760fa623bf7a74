"""Losses of one's own: what the library promises of any of them, and what `check_loss` notices."""

import numpy as np
import pytest
from instances import relative
from scipy import sparse

from attnfit import losses, minimize, problems
from attnfit.losses import LOSSES, PointwiseLoss, SeparableLoss, check_loss, elementwise, find_loss, rescaled
from attnfit.solvers import CheckpointError

OURS = [
    *LOSSES.values(),
    losses.LogRatio(),
    elementwise.PoissonDeviance(),
    elementwise.Total(),
    elementwise.LeastSquares(),
    *(
        kind(u)
        for kind in (losses.SquaredExponential, rescaled.SquaredRescaled)
        for u in ("exp", "cosh", "sinh")
    ),
]


class Huber(SeparableLoss):
    def __init__(self, delta):
        self.delta = delta

    def phi(self, f, b):
        r = np.abs(f - b)
        return np.where(r <= self.delta, 0.5 * r * r, self.delta * (r - 0.5 * self.delta))

    def first(self, f, b):
        return np.clip(f - b, -self.delta, self.delta)

    def second(self, f, b):
        return (np.abs(f - b) <= self.delta) * 1.0


class Squares(SeparableLoss):
    """What the library's own squared loss must equal."""

    def phi(self, f, b):
        return 0.5 * (f - b) ** 2

    def first(self, f, b):
        return f - b

    def second(self, f, b):
        return np.ones_like(f)


class Logistic(PointwiseLoss):
    convex = True
    certifiable = True

    def phi(self, z, b):
        return np.logaddexp(0.0, z) - b * z

    def first(self, z, b):
        return 1.0 / (1.0 + np.exp(-z)) - b

    def second(self, z, b):
        return 1.0 / (2.0 + 2.0 * np.cosh(z))

    def output(self, z):
        return 1.0 / (1.0 + np.exp(-z))

    def third_derivative_bound(self, low, high, b, w):
        return w / (6.0 * np.sqrt(3.0))


@pytest.mark.parametrize(
    "loss", [*OURS, Squares(), Huber(2.0), Logistic()], ids=lambda loss: type(loss).__name__
)
def test_every_loss_keeps_its_word(loss):
    check_loss(loss)


def changed(kind, **members):
    return type("Changed", (kind,), members)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (changed(Squares, first=lambda self, f, b: 1.01 * (f - b))(), "slope"),
        (changed(Squares, second=lambda self, f, b: 1.01 + 0.0 * f)(), "gram_terms"),
        (changed(Squares, phi=lambda self, f, b: (f - b) ** 2)(), "slope"),
        (changed(Squares, importance=lambda self, z, b, w, state: 1e-3 + 0.0 * z)(), "importance"),
        (changed(Squares, convex=True)(), "convex"),
        (changed(Squares, one_pass=True)(), "in pieces"),
        (changed(Squares, fitted=lambda self, z, state: z[:-1])(), "fitted"),
        (changed(Logistic, shift_invariant=True, coupled=True)(), None),
        (changed(Logistic, compiled=True)(), "compiled"),
        (
            changed(Logistic, third_derivative_bound=lambda self, low, high, b, w: 0.05 * w)(),
            "third_derivative",
        ),
        (
            changed(Logistic, certifiable=True, third_derivative_bound=lambda self, *bounds: None)(),
            "certifiable",
        ),
        (changed(type(LOSSES["kl"]), slope=lambda self, z, b, w, state: 0.0 * z)(), "slope"),
        (changed(type(LOSSES["squared"]), merge_references=lambda self, a, b: a + b)(), "merge_references"),
    ],
)
def test_a_loss_that_breaks_its_word_is_named(loss, name):
    if name is None:
        with pytest.raises(Exception, match=r"."):
            check_loss(loss)
        return
    with pytest.raises(AssertionError, match=name):
        check_loss(loss)


def shares(sizes, d, seed=0):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    A, b = rng.standard_normal((len(groups), d)), rng.random(len(groups))
    return A, b / np.bincount(groups, weights=b)[groups], groups, rng


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("sizes", [(3, 5, 4) * 10, (4000,)], ids=["short", "long"])
def test_a_loss_of_ones_own_equals_ours(storage, sizes, monkeypatch):
    """Long groups take two passes, and blocks are small enough that there are some."""
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 8 * 3 * 500)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_ENTRIES", 3 * 500)
    A, b, groups, rng = shares(sizes, 3)
    w, x = rng.uniform(0.5, 2.0, len(b)), rng.standard_normal(3)
    options = {"groups": groups, "weights": w, "ridge": 0.1, "row_penalty": 0.01}
    ours = problems.Softmax(storage(A), b, **options)
    own = problems.Softmax(storage(A), b, loss=Squares(), **options)
    assert own.rows.n_long == ours.rows.n_long == (len(sizes) == 1)
    assert abs(own.value(x) - ours.value(x)) < 1e-12 * abs(ours.value(x))
    assert relative(own.gradient(x), ours.gradient(x)) < 1e-12
    assert relative(own.hessian(x), ours.hessian(x)) < 1e-12
    assert relative(own.hvp(x, x), ours.hvp(x, x)) < 1e-12
    assert relative(own.predict(x), ours.predict(x)) < 1e-13
    one, other = (minimize(p, random_state=0) for p in (own, ours))
    assert one.status == other.status == "converged"
    assert abs(A @ (one.x - other.x)).max() < 1e-7


def test_a_large_problem_is_read_by_its_formulas():
    """Compiled loops know the library's own formulas only."""
    A, b, groups, rng = shares((10,) * 40_000, 50)
    x = 0.1 * rng.standard_normal(50)
    own = problems.Softmax(A, b, groups, loss=Squares())
    assert own.design.storage == "rows"
    assert relative(own.gradient(x), problems.Softmax(A, b, groups).gradient(x)) < 1e-11


def test_a_pointwise_loss_is_fitted_and_certified():
    """Against the odds of two groups, which are the exact answer."""
    A = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    problem = problems.RowProblem(A, [0.0, 1.0, 1.0, 1.0, 0.0], loss=Logistic())
    result = minimize(problem)
    certificate = result.certificate()
    assert result.converged and certificate.valid
    assert np.linalg.norm(result.x - [0.0, np.log(2.0)]) <= certificate.radius + 1e-15
    assert np.allclose(problem.predict(result.x), [0.5, 0.5, 2 / 3, 2 / 3, 2 / 3])


def test_a_checkpoint_knows_the_fields_of_a_loss(tmp_path):
    """Not only its class: the data are the same, the fit is another one."""
    A, b, groups, _ = shares((5,) * 10, 3)
    kept = {"checkpoint": tmp_path / "fit.ckpt", "random_state": 0}
    minimize(problems.Softmax(A, b, groups, loss=Huber(0.5)), **kept)
    with pytest.raises(CheckpointError, match="it differs in loss"):
        minimize(problems.Softmax(A, b, groups, loss=Huber(0.4)), **kept)
    assert "resumed" in minimize(problems.Softmax(A, b, groups, loss=Huber(0.5)), **kept).message
    assert repr(Huber(0.5)) == "Huber(delta=0.5)"


def test_outliers_pull_less():
    A, b, groups, _ = shares((10,) * 40, 3)
    truth = np.array([1.0, -0.5, 0.2])
    f = np.exp(A @ truth)
    b = f / np.bincount(groups, weights=f)[groups]
    b[::50] += 0.5
    plain, robust = (
        minimize(problems.Softmax(A, b, groups, loss=loss)).x for loss in ("squared", Huber(0.02))
    )
    assert abs(robust - truth).max() < 0.1 * abs(plain - truth).max()


def test_losses_have_names(monkeypatch):
    class Entry:
        name = "huber"

        def load(self):
            return lambda: Huber(0.1)

    class Broken(Entry):
        name = "broken"

        def load(self):
            return lambda: 3

    monkeypatch.setattr("attnfit.losses.softmax.entry_points", lambda group: [Entry(), Broken()])
    assert find_loss("kl") is LOSSES["kl"]
    assert find_loss("huber").delta == 0.1
    assert problems.Softmax(np.eye(3), np.ones(3) / 3, loss="huber").loss.delta == 0.1
    with pytest.raises(ValueError, match=r"broken.*gives no"):
        find_loss("broken")
    with pytest.raises(ValueError, match="loss must be one of 'squared'"):
        problems.Softmax(np.eye(3), np.ones(3) / 3, loss="hubert")
    with pytest.raises(TypeError, match="abstract"):
        SeparableLoss()
