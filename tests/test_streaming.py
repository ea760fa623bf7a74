"""Storage and blocks do not change the answer, and each evaluation is one read."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import shrink_blocks
from instances import ALL_LOSSES, COUPLED, SOFTMAX, instance, relative, softmax
from scipy import sparse

from attnfit import problems
from attnfit.data import DenseDesign, SparseDesign
from attnfit.losses.elementwise import PoissonDeviance
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.softmax import LOSSES

LONG = (500, 3, 2, 300)


def everything(problem, x):
    v = np.arange(1.0, len(x) + 1.0)
    return [
        problem.value(x),
        problem.gradient(x),
        problem.hessian(x),
        problem.hvp(x, v),
        problem.data_gradient(x)[0],
        problem.predict(x),
    ]


def assert_same(problem, other, x, tolerance=1e-12):
    for ours, theirs in zip(everything(problem, x), everything(other, x), strict=True):
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("size", [1, 8 * 3 * 100, 8 * 3 * 250])
def test_block_size_does_not_matter(family, loss, storage, size, monkeypatch):
    inst, x = instance(family, loss, sizes=LONG)
    whole = inst.problem(A=storage(inst.A))
    shrink_blocks(monkeypatch, size)
    cut = inst.problem(A=storage(inst.A))
    assert len(cut.rows.chunks) > 3 or storage is sparse.csr_array
    assert_same(cut, whole, x)


@pytest.mark.parametrize("size", [1, 8 * 3 * 250])
def test_unsorted_rows_of_long_groups(size, monkeypatch):
    inst, x = instance("Softmax", "squared", sizes=LONG)
    order = np.random.default_rng(0).permutation(len(inst.b))
    whole = inst.problem()
    shrink_blocks(monkeypatch, size)
    shuffled = inst.problem(A=inst.A[order], b=inst.b[order], groups=inst.groups[order])
    for ours, theirs in zip(everything(shuffled, x), everything(whole, x), strict=True):
        theirs = theirs[order] if np.shape(theirs) == order.shape else theirs
        assert relative(ours, theirs) < 1e-12


def read_only(A):
    A = A.copy()
    A.flags.writeable = False
    return A


# Every entry is a small integer, so that each conversion is exact.
CONVERSIONS = {
    "fortran": np.asfortranarray,
    "strided": lambda A: np.repeat(np.repeat(A, 2, axis=0), 3, axis=1)[::2, ::3],
    "reversed": lambda A: A[::-1].copy()[::-1],
    "float32": lambda A: A.astype(np.float32),
    "float32 fortran": lambda A: np.asfortranarray(A, dtype=np.float32),
    "float16": lambda A: A.astype(np.float16),
    "int64": lambda A: A.astype(np.int64),
    "int8": lambda A: A.astype(np.int8),
    "big endian": lambda A: A.astype(">f8"),
    "read-only": read_only,
    "list": lambda A: A.tolist(),
    "csr": sparse.csr_array,
    "csc": sparse.csc_array,
    "coo": sparse.coo_array,
    "csr_matrix": sparse.csr_matrix,
    "lil": sparse.lil_array,
    "csr float32": lambda A: sparse.csr_array(A.astype(np.float32)),
    "csr int": lambda A: sparse.csr_array(A.astype(np.int32)),
    "csr int64 indices": lambda A: with_wide_indices(sparse.csr_array(A)),
    "csr unsorted": lambda A: unsorted(sparse.csr_array(A)),
    "csr duplicates": lambda A: with_duplicates(sparse.csr_array(A)),
    "pandas": lambda A: pd.DataFrame(A, columns=list("abc")),
    "pandas mixed": lambda A: pd.DataFrame({"a": A[:, 0].astype(int), "b": A[:, 1], "c": A[:, 2] * 1.0}),
    "pandas nullable": lambda A: pd.DataFrame(
        A.astype(int), columns=list("abc"), index=-np.arange(len(A))
    ).astype("Int64"),
    "polars": lambda A: pl.DataFrame(A, schema=list("abc")),
    "polars mixed": lambda A: pl.DataFrame(
        {"a": A[:, 0].astype(int), "b": A[:, 1], "c": A[:, 2].astype(np.float32)}
    ),
    "pyarrow": lambda A: pytest.importorskip("pyarrow").table({k: A[:, j] for j, k in enumerate("abc")}),
}


def with_wide_indices(A):
    A.indices, A.indptr = A.indices.astype(np.int64), A.indptr.astype(np.int64)
    return A


def unsorted(A):
    flipped = np.concatenate(
        [np.arange(b - 1, a - 1, -1) for a, b in zip(A.indptr[:-1], A.indptr[1:], strict=True)]
    )
    return sparse.csr_array((A.data[flipped], A.indices[flipped], A.indptr), shape=A.shape)


def with_duplicates(A):
    """Store every entry as the sum of two."""
    return sparse.csr_array((np.repeat(A.data / 2, 2), np.repeat(A.indices, 2), 2 * A.indptr), shape=A.shape)


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("family, loss", [("Softmax", "squared"), ("Rescaled", "exp")])
def test_storage_does_not_matter(name, family, loss, small_blocks):
    inst, x = instance(family, loss, sizes=(100, 4, 70))
    A = np.round(2.0 * inst.A)
    problem = inst.problem(A=CONVERSIONS[name](A))
    assert_same(problem, inst.problem(A=A), 0.5 * x)
    diagonal = problem.diagonal_at(problem.evaluate(0.5 * x))
    reference = inst.problem(A=A)
    assert relative(diagonal, reference.diagonal_at(reference.evaluate(0.5 * x))) < 1e-12


def test_boolean_columns():
    inst, x = instance("Softmax", "cross_entropy")
    assert_same(inst.problem(A=inst.A > 0), inst.problem(A=(inst.A > 0).astype(float)), x)


def test_float32_equals_its_float64_copy(small_blocks):
    inst, x = instance("Softmax", "squared", sizes=(100, 4, 70))
    A = inst.A.astype(np.float32)
    assert_same(inst.problem(A=A), inst.problem(A=A.astype(np.float64)), x, 1e-15)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_memory_map(dtype, tmp_path, small_blocks):
    inst, x = instance("Softmax", "squared", sizes=LONG)
    A = inst.A.astype(dtype)
    np.save(tmp_path / "a.npy", A)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    problem = inst.problem(A=mapped)
    assert problem.design.on_disk
    assert_same(problem, inst.problem(A=A), x, 1e-15)


@pytest.mark.parametrize("kind", ["pandas", "polars", "list"])
def test_vectors_of_any_kind(kind):
    inst, x = instance("Softmax", "squared")
    convert = {"pandas": lambda v: pd.Series(v, index=-np.arange(len(v))), "polars": pl.Series, "list": list}[
        kind
    ]
    weights = np.arange(1.0, len(inst.b) + 1)
    given = {"b": inst.b, "groups": inst.groups, "weights": weights, "offset": 0.1 * weights}
    assert_same(inst.problem(**{k: convert(v) for k, v in given.items()}), inst.problem(**given), x, 1e-15)


def test_the_users_data_are_left_alone(small_blocks):
    inst, x = instance("Softmax", "squared", sizes=LONG)
    copies = {name: np.copy(getattr(inst, name)) for name in ("A", "b", "groups")}
    everything(inst.problem(weights=np.ones(len(inst.b)), offset=inst.b), x)
    for name, copy in copies.items():
        assert np.array_equal(copy, getattr(inst, name))


# ---- cancellation ----


def near_fit(family, loss, size, seed=0):
    """One group whose target is the model up to a relative residual, and the point."""
    inst, x = instance(family, loss, sizes=(2000,), seed=seed, noise=0.0)
    residual = 1.0 + size * np.random.default_rng(9).standard_normal(len(inst.b))
    return inst.replace(b=inst.b * residual), x


@pytest.mark.parametrize(
    ("family", "loss"), [("Softmax", "squared"), ("Rescaled", "exp"), ("Rescaled", "sinh")]
)
def test_gradient_keeps_its_digits_near_a_perfect_fit(family, loss, small_blocks):
    inst, x = near_fit(family, loss, 1e-9)
    problem = inst.problem()
    assert len(problem.rows.long_groups) == 1
    exact = extended_gradient(inst, x)
    assert relative(problem.gradient(x), exact) < 1e-5
    # A reference that was predicted from a point nearby does as well.
    assert relative(problem.evaluate(x, problem.evaluate(x + 1e-5)).gradient, exact) < 1e-5


def extended_gradient(inst, x):
    """The textbook gradient in extended precision."""
    A, b, z = inst.A.astype(np.longdouble), inst.b.astype(np.longdouble), None
    z = A @ x.astype(np.longdouble)
    if inst.family == "Softmax":
        f = np.exp(z - z.max())
        f /= f.sum()
        return (A.T @ (f * (f - b - np.sum(f * (f - b))))).astype(float)
    u, v = {"exp": (np.exp, np.exp), "sinh": (np.sinh, np.cosh)}[inst.loss]
    c = u(z) - u(z).sum() * b
    return (A.T @ (v(z) * (c - np.sum(b * c)))).astype(float)


@pytest.mark.parametrize(("family", "loss"), SOFTMAX)
def test_a_common_shift_of_huge_logits_costs_nothing(family, loss, small_blocks):
    inst, x = instance(family, loss, sizes=(300,))
    shifted = inst.problem(offset=np.full(300, 1e4))
    assert relative(shifted.value(x), inst.problem().value(x)) < 1e-9
    assert relative(shifted.gradient(x), inst.problem().gradient(x)) < 1e-8


def test_hessian_of_columns_with_a_large_mean(small_blocks):
    """Rows are centred before the product: a mean of 1e5 does not drown a spread of one."""
    inst, x = instance("Softmax", "squared", sizes=(300,))
    mean = np.array([1e5, -1e5, 3e4])
    moved = inst.problem(A=inst.A + mean, offset=np.full(300, -mean @ x))
    assert relative(moved.hessian(x), inst.problem().hessian(x)) < 1e-6


# ---- reads ----


def reads(problem, work):
    before = problem.n_passes
    work()
    return problem.n_passes - before


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize(("family", "loss"), [*COUPLED, ("Exponential", "exp")])
def test_number_of_reads(family, loss, storage, monkeypatch):
    inst, x = instance(family, loss, sizes=(300, 250))
    short = inst.problem(A=storage(inst.A))
    assert reads(short, lambda: short.value_and_gradient(x)) == 1.0
    assert reads(short, lambda: short.evaluate(x, at_zero=True, hessian=True)) == 1.0
    assert reads(short, lambda: short.hessian(x)) == 2.0
    assert reads(short, lambda: short.hvp(x, x)) == 2.0
    shrink_blocks(monkeypatch)
    long = inst.problem(A=storage(inst.A))
    cold = 1.0 if family == "Exponential" else 2.0
    assert reads(long, lambda: long.value_and_gradient(x)) == cold
    near = long.evaluate(x)
    assert reads(long, lambda: long.evaluate(x + 0.01, near, at_zero=True, hessian=True)) == 1.0
    assert reads(long, lambda: long.hessian_at(near)) == 1.0
    assert reads(long, lambda: long.hvp_at(near, x)) == 1.0


def test_a_useless_prediction_costs_two_more_reads(small_blocks):
    inst, x = instance("Softmax", "squared", sizes=(300,))
    problem = inst.problem()
    far = problem.evaluate(-100.0 * x)
    assert reads(problem, lambda: problem.evaluate(x, far)) == 3.0


# ---- designs ----


@pytest.mark.parametrize(
    "design", [DenseDesign, lambda A: SparseDesign(sparse.csr_array(A))], ids=["dense", "csr"]
)
def test_designs_are_linear_operators(design, small_blocks):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((200, 5)) * (rng.random((200, 5)) < 0.5)
    operator = design(A)
    assert np.allclose(operator @ np.eye(5), A)
    assert np.allclose(operator @ np.arange(5.0), A @ np.arange(5.0))
    assert np.allclose(operator.T @ np.arange(200.0), A.T @ np.arange(200.0))
    assert np.allclose(operator.rmatmat(A), A.T @ A)
    assert operator.rows_read == 4 * 200
    block = operator.block(np.array([5, 3, 150]))
    assert np.allclose(block.toarray() if sparse.issparse(block) else block, A[[5, 3, 150]])


def test_every_loss_of_the_table_is_tested():
    assert {name for _, name in SOFTMAX} == set(LOSSES)


def test_softmax_helper_agrees_with_predict():
    inst, x = instance("Softmax", "squared")
    assert np.allclose(
        problems.Softmax(inst.A, inst.b, inst.groups).predict(x), softmax(inst.A @ x, inst.ids)
    )


def test_rows_of_entropy_are_drawn_uniformly():
    """Else the offsets of the draw would be part of the loss."""
    from attnfit.objectives.subsample import draw_rows

    rng = np.random.default_rng(0)
    problem = problems.Softmax(rng.standard_normal((30_000, 3)), rng.random(30_000) ** 8, loss="entropy")
    drawn = draw_rows(problem.rows, 3000, rng)
    # Two rows of a long group are certain.
    assert len(np.unique(drawn.inclusion)) == 2


def test_which_predictions_of_a_normaliser_fail():
    for name in ("squared", "cross_entropy", "kl", "linear_cross_entropy", "entropy"):
        loss, true = LOSSES[name], np.array([[1.0, -2.0, 8.0]])
        for off, failed in [
            (4.0, False),
            (-4.0, False),
            (6.0, True),
            (-6.0, True),
            (60.0, True),
            (np.nan, True),
        ]:
            assert loss.reference_failed(true[0] + np.array([0.0, off, 0.0]), true) == failed
    loss, true = SquaredRescaled("sinh"), np.array([[1.0, -2.0]])
    for reference, failed in [
        ((9.0, -2.0), False),
        ((12.0, -2.0), True),
        ((1.0, 17.0), False),
        ((1.0, 19.0), True),
    ]:
        assert loss.reference_failed(np.array(reference), true) == failed
    assert loss.reference_failed(np.ones(1), np.zeros((1, 1)))
    assert not PoissonDeviance().reference_failed(np.zeros(1), np.ones((1, 1)))
