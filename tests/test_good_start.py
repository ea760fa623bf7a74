"""The papers' conditions on a start, for every problem that they are stated for."""

import importlib

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from scipy import sparse

from attnfit import certificates, minimize, problems, theory
from attnfit.objectives.attention import Attention
from attnfit.theory import instances

RNG = np.random.default_rng(0)


def attention(**options):
    A1, A2 = RNG.standard_normal((5, 2)), RNG.standard_normal((4, 3))
    return problems.Attention(A1, A2, RNG.dirichlet(np.ones(4), 5), ridge=0.05, **options)


def two_layer(columns=(), **options):
    A1, A2 = 0.5 * RNG.standard_normal((6, 3)), 0.5 * RNG.standard_normal((4, 6))
    return problems.TwoLayer(A1, A2, RNG.uniform(0.0, 0.5, (4, *columns)), "tanh", row_penalty=0.7, **options)


def inversion(**options):
    W, V = 0.3 * RNG.standard_normal((2, 2)), 0.5 * RNG.standard_normal((2, 3))
    return problems.LayerInversion(W, V, 0.3 * RNG.standard_normal((3, 3)), gamma=0.5, **options)


MADE = {
    "attention": attention, "attention, cross entropy": lambda: attention(loss="cross_entropy"),
    "two layers": two_layer, "two layers, offset": lambda: two_layer(offset=np.linspace(0, 1, 6)),
    "several targets": lambda: two_layer((2,)), "inversion": inversion,
    "known tokens": lambda: inversion(known=np.array([[np.nan, 0.3, np.nan], [np.nan, -0.2, np.nan]])),
}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def fitted(request):
    problem = MADE[request.param]()
    return problem, minimize(problem, tol=1e-12).x


def flat_hessian(problem, x):
    return np.asarray(problem.hessian(x)).reshape(problem.n_unknowns, problem.n_unknowns)


def test_near_is_good_and_far_is_not(fitted):
    problem, x = fitted
    near = certificates.good_start(problem, x + 1e-7, x)
    far = certificates.good_start(problem, x + 5.0, x)
    assert near.local and near.scaled
    assert not far.scaled and not far.local
    assert near.lambda_min > 0 and near.gradient_norm < 1e-6
    assert near.distance > 0 and np.isfinite(near.log10_printed_constant)
    assert "M = " in str(near) and near.definition in str(near)


def test_both_points_come_in_the_natural_shape_or_flat(fitted):
    problem, x = fitted
    natural, flat = (
        certificates.good_start(problem, (x + 1e-5).reshape(shape), x.reshape(shape))
        for shape in (problem.shape, -1)
    )
    assert natural == flat
    with pytest.raises(ValueError, match="x0 has shape"):
        certificates.good_start(problem, np.zeros(problem.n_unknowns + 1), x)


@pytest.mark.parametrize("seed", range(3))
def test_local_constants_bound_the_change_of_the_hessian(fitted, seed):
    """Between random points of the ball that reaches x0, in the user's and in the scaled variables."""
    problem, x = fitted
    rng = np.random.default_rng(seed)
    flat = x.reshape(-1)
    if len(problem.shape) == 2 and not isinstance(problem, Attention | problems.LayerInversion):
        return
    move = rng.standard_normal(flat.size)
    move *= 0.3 / np.linalg.norm(move)
    found = certificates.good_start(problem, flat + move, flat)
    H = flat_hessian(problem, x)
    assert found.lambda_min == pytest.approx(np.linalg.eigvalsh(H)[0], rel=1e-6)
    assert found.distance == pytest.approx(0.3)
    assert found.scaled_distance == pytest.approx(np.sqrt(move @ H @ move))
    values, vectors = np.linalg.eigh(H)
    for T, radius, constant in (
        (np.eye(flat.size), found.distance, found.local_constant),
        (vectors / np.sqrt(values), found.scaled_distance, found.scaled_constant),
    ):
        for _ in range(6):
            ends = rng.standard_normal((2, flat.size))
            ends *= radius * rng.random((2, 1)) / np.linalg.norm(ends, axis=1, keepdims=True)
            a, b = (flat_hessian(problem, (flat + T @ end).reshape(problem.shape)) for end in ends)
            change = np.linalg.norm(T.T @ (b - a) @ T, 2)
            assert change <= constant * np.linalg.norm(ends[1] - ends[0]) * (1 + 1e-6)


def test_verdicts_change_at_a_tenth_of_l(fitted):
    problem, x = fitted
    direction = np.random.default_rng(0).standard_normal(x.shape)
    seen = set()
    for size in np.geomspace(1e-5, 3.0, 60):
        found = certificates.good_start(problem, x + size * direction, x)
        assert found.local == (found.local_constant * found.distance <= 0.1 * found.lambda_min)
        assert found.scaled == (found.scaled_constant * found.scaled_distance <= 0.1)
        seen |= {("local", found.local), ("scaled", found.scaled)}
    assert len(seen) == 4


def test_the_printed_verdict_changes_at_a_tenth_of_l():
    problem = two_layer()
    zero = np.zeros(3)
    reach = certificates.good_start(problem, zero, zero)
    assert reach.printed and reach.distance == 0.0
    limit = 0.1 * reach.lambda_min / 10.0**reach.log10_printed_constant
    for factor, holds in ((0.99, True), (1.01, False)):
        start = np.array([factor * limit, 0.0, 0.0])
        assert certificates.good_start(problem, start, zero).printed == holds


@pytest.mark.parametrize("largest", ["nothing", "matrix", "start", "reference", "target"])
def test_the_constant_of_rows_is_the_printed_one(largest):
    """``n^4 e^{20 R^2}`` with R the largest of 4, ``|A|``, ``|b|`` and the sizes of both points."""
    A, b = np.linalg.qr(RNG.standard_normal((7, 3)))[0], 0.1 * RNG.random(7)
    x0, x = 0.1 * RNG.standard_normal((2, 3))
    A, b, x0, x = (
        v * (size if largest == name else 1.0)
        for v, size, name in (
            (A, 5.0, "matrix"), (b, 60.0 / np.linalg.norm(b) / 10.0, "target"),
            (x0, 7.0 / np.linalg.norm(x0), "start"), (x, 8.0 / np.linalg.norm(x), "reference"),
        )
    )  # fmt: skip
    R = {"nothing": 4.0, "matrix": 5.0, "start": 7.0, "reference": 8.0, "target": 6.0}[largest]
    found = certificates.good_start(problems.Exponential(A, b), x0, x)
    assert found.log10_printed_constant == pytest.approx(4 * np.log10(7) + 20 * R**2 * np.log10(np.e))


@pytest.mark.parametrize(("scale", "shifted"), [(1.0, False), (30.0, False), (1.0, True)])
def test_the_constant_of_two_layers_is_that_of_the_theory(scale, shifted):
    A1, A2 = 0.5 * RNG.standard_normal((6, 3)), 0.5 * RNG.standard_normal((4, 6))
    b, offset = scale * RNG.uniform(0.1, 0.5, 4), np.linspace(-2.0, 0.5, 6) if shifted else None
    x0, x = 0.1 * RNG.standard_normal((2, 3))
    problem = problems.TwoLayer(A1, A2, b, "tanh", offset=offset, row_penalty=1.0)
    found = certificates.good_start(problem, x0, x)
    if shifted:
        A1, x0, x = np.column_stack([A1, offset]), np.append(x0, 1.0), np.append(x, 1.0)
    check = theory.check("TL-5.2", instances.TwoLayer(A1, A2, b, x, x0, "tanh"))
    assert pytest.approx(max(4.0, np.linalg.norm(b))) == check.R and check.violated == ()
    assert found.log10_printed_constant == pytest.approx(
        check.log10_rhs - np.log10(np.linalg.norm(x0 - x)), rel=1e-12
    )
    assert found.definition.startswith("Definition 6.1")


@pytest.mark.parametrize("largest", ["A1", "A2", "b", "x0", "x"])
@pytest.mark.parametrize("storage", [np.array, sparse.csr_array])
def test_the_largest_of_all_sizes_is_in_the_constant_of_two_layers(largest, storage):
    """Of matrices the spectral norm, whatever their shape and their other singular values."""
    norms = dict.fromkeys(("A1", "A2", "b", "x0", "x"), 1.0) | {largest: 5.0}
    A1 = norms["A1"] * np.eye(6, 3) * [0.2, 1.0, 0.5]
    A2 = norms["A2"] * np.eye(4, 6) * [0.5, 0.2, 1.0, 0.1, 0.1, 0.1]
    b, x0, x = (norms[k] * v for k, v in (("b", np.eye(4)[0]), ("x0", np.eye(3)[1]), ("x", np.eye(3)[2])))
    found = certificates.good_start(
        problems.TwoLayer(storage(A1), storage(A2), b, "tanh", row_penalty=9.0), x0, x
    )
    check = theory.check("TL-5.2", instances.TwoLayer(A1, A2, b, x, x0, "tanh"))
    assert np.isclose(check.R, 5.0)
    assert found.log10_printed_constant == pytest.approx(
        check.log10_rhs - np.log10(np.linalg.norm(x0 - x)), rel=1e-12
    )


def test_the_table_says_what_holds():
    made = certificates.GoodStart(
        1e-9, 2.0, 0.1, 0.2, 123.4, 0.5, np.inf, printed=False, local=True, scaled=False,
        definition="Definition 5.1", formula="n^4",
    )  # fmt: skip
    lines = str(made).splitlines()
    assert lines[0] == "Definition 5.1, M = n^4"
    assert "gradient at x_ref 1e-09, smallest eigenvalue l = 2" in lines[1]
    told = {line.split()[0]: line for line in lines[3:]}
    assert "1e123.4" in told["printed"] and "fails" in told["printed"]
    assert "0.5" in told["local"] and "holds" in told["local"]
    assert "inf" in told["affine-scaled"] and "fails" in told["affine-scaled"]
    assert sum("holds" in line for line in lines) == 1


def test_of_several_targets_the_worst_is_returned():
    problem = two_layer((3,))
    x = minimize(problem, tol=1e-12).x
    move = np.zeros_like(x)
    move[:, 1] = 2.0
    move[:, [0, 2]] = 1e-9
    found = certificates.good_start(problem, x + move, x)
    alone = [
        certificates.good_start(problem.columns(np.array([j])), (x + move)[:, [j]], x[:, [j]])
        for j in range(3)
    ]
    assert [one.scaled for one in alone] == [True, False, True]
    assert found == alone[1]


def test_the_condition_of_the_layer_is_that_of_theorem_4_4():
    """M |X0 - X*|_F <= n d R^8, M = n^3 d^3 R^10, of the sum of squares: a limit of its own."""
    problem = inversion()
    x = minimize(problem, tol=1e-12).x
    large = problems.LayerInversion(0.3 * np.eye(2), np.eye(2), np.full((2, 2), 7.0), gamma=1.0)
    found = certificates.good_start(large, np.zeros((2, 2)), np.zeros((2, 2)))
    assert found.log10_printed_constant == pytest.approx(np.log10(4**3 * 7.0**10 / 2))
    below = problems.LayerInversion(0.3 * np.eye(2), np.eye(2), np.full((2, 2), -7.0), gamma=1.0)
    other = certificates.good_start(below, np.zeros((2, 2)), np.zeros((2, 2)))
    assert other.log10_printed_constant == found.log10_printed_constant
    n, d = 3, 3
    R = max(
        1.0, np.linalg.norm(problem.layer.heads[0].M), np.linalg.norm(problem.layer.heads[0].V),
        np.linalg.norm(x), np.abs(problem.B).max(),
    )  # fmt: skip
    step = 1.0 / (n**2 * d**2 * R**2)
    for factor, holds in ((0.9, True), (1.1, False)):
        move = np.full(x.shape, factor * step / np.sqrt(x.size))
        move *= -np.sign(x)
        found = certificates.good_start(problem, x + move, x)
        assert found.printed == holds
    assert found.log10_printed_constant == pytest.approx(np.log10(n**3 * d**3 * R**10 / 2))
    # The loss of the paper is twice the one here: so are its Hessian and its constant.
    W, V, B = (as_tensor(v) for v in (problem.layer.heads[0].M, problem.layer.heads[0].V, problem.B))

    def paper(flat):
        X = flat.reshape(x.shape)
        return ((torch.softmax(X.T @ W @ X, 1) @ X.T @ V - B) ** 2).sum() + 0.5 * (X**2).sum()

    H = torch.autograd.functional.hessian(paper, as_tensor(x.reshape(-1))).numpy()
    assert np.linalg.eigvalsh(H)[0] == pytest.approx(2 * found.lambda_min, rel=1e-6)


def test_attention_is_the_regression_on_its_pairs():
    problem = attention()
    x = minimize(problem, tol=1e-12).x
    a = certificates.good_start(problem, x + 1e-3, x)
    b = certificates.good_start(problem.dense(), (x + 1e-3).reshape(-1), x.reshape(-1))
    assert a == b


def test_what_is_not_stated_or_too_large_is_refused(monkeypatch):
    square = np.eye(3)
    full = problems.FullAttention(square, square, square, square)
    for problem in (full, problems.ReluSoftmax(square, square, np.ones(3))):
        zero = np.zeros(problem.shape)
        with pytest.raises(ValueError, match=f"no condition for {type(problem).__name__}"):
            certificates.good_start(problem, zero, zero)
    own = problems.TwoLayer(square, square, np.ones(3), (np.sin, np.cos, lambda y: -np.sin(y)))
    with pytest.raises(ValueError, match="bounds of the activation's derivatives are not known"):
        certificates.good_start(own, np.zeros(3), np.zeros(3))
    module = importlib.import_module("attnfit.certificates.good_start")
    monkeypatch.setattr(module, "DENSE_ENTRIES", 5 * 4 * 6 - 1)
    with pytest.raises(ValueError, match="pass fewer queries"):
        certificates.good_start(attention(), np.zeros((2, 3)), np.zeros((2, 3)))
    monkeypatch.setattr(module, "MAX_DENSE", 2)
    with pytest.raises(ValueError, match="give known tokens"):
        certificates.good_start(inversion(), np.zeros((2, 3)), np.zeros((2, 3)))


def test_no_curvature_is_no_good_start():
    flat = problems.TwoLayer(np.zeros((3, 2)), np.ones((2, 3)), np.zeros(2), "tanh")
    found = certificates.good_start(flat, np.zeros(2), np.zeros(2))
    assert not (found.printed or found.local or found.scaled)
    assert found.distance == 0.0


@pytest.mark.parametrize("x", [0.034885, 0.2])
def test_where_the_loss_overflows_no_condition_is_judged(x):
    """Or an entry of its Hessian alone."""
    problem = problems.Exponential(np.array([[1e4, 0.0], [0.5e4, 1.0]]), np.ones(2))
    with pytest.raises((ValueError, OverflowError), match="overflow"):
        certificates.good_start(problem, np.zeros(2), np.array([x, 0.0]))
