"""Bad input is refused with the argument, the place and the remedy named; none becomes a silent NaN."""

import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
from instances import ALL_LOSSES, COUPLED, instance
from scipy import sparse

from attnfit import minimize, problems

N, D = 12, 3


def data(seed=0):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((N, D))
    b = rng.gamma(1.0, size=N)
    ids = np.repeat(np.arange(4), 3)
    return A, b / np.bincount(ids, weights=b)[ids], ids


def softmax(**changes):
    A, b, ids = data()
    return problems.Softmax(**{"A": A, "b": b, "groups": ids, **changes})


def with_bad(values, where, bad):
    values = np.array(values, dtype=float)
    values[where] = bad
    return values


def refused(*words, error=ValueError):
    """Expect an error whose message contains all the words, in order."""
    return pytest.raises(error, match="(?si)" + ".*".join(map(re.escape, words)))


BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


# ---- not finite ----


@BAD
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_dense_matrix(bad, dtype):
    A = with_bad(data()[0], (7, 1), bad).astype(dtype)
    with refused("A", str(bad), "row 7", "column 1", "remove or impute"):
        softmax(A=A)


@BAD
@pytest.mark.parametrize(
    "storage",
    [
        sparse.csr_array,
        sparse.csc_array,
        sparse.coo_array,
        sparse.lil_array,
        sparse.dok_array,
        sparse.bsr_array,
        sparse.dia_array,
    ],
)
def test_sparse_matrix(bad, storage):
    A = with_bad(np.where(np.abs(data()[0]) > 0.7, data()[0], 0.0), (7, 1), bad)
    with refused("A", str(bad), "row 7", "column 1", "remove or impute"):
        softmax(A=storage(A))


@BAD
@pytest.mark.parametrize(
    "call", [lambda p: p.value(np.ones(D)), lambda p: p.gradient(np.zeros(D)), lambda p: minimize(p)]
)
@pytest.mark.parametrize("labels", ["sorted", "unsorted", "none"])
def test_memory_map_is_checked_when_it_is_read(bad, call, labels, tmp_path, small_blocks):
    np.save(tmp_path / "a.npy", with_bad(np.tile(data()[0], (20, 1)), (127, 1), bad))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    n = 20 * N
    groups = {"sorted": np.arange(n) // 3, "unsorted": (7 * np.arange(n)) % 80, "none": None}[labels]
    problem = problems.Softmax(mapped, np.full(n, 1 / 3), groups)
    with refused("A", str(bad), "row 127", "column 1", "remove or impute"):
        call(problem)


def test_memory_map_larger_than_the_sample(tmp_path):
    A = np.random.default_rng(0).standard_normal((30_000, 2))
    A[25_001, 1] = np.nan
    np.save(tmp_path / "a.npy", A)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for seed in range(3):
        with refused("A", "nan", "row 25001", "column 1"):
            minimize(
                problems.Softmax(mapped, np.full(30_000, 1 / 3), np.arange(30_000) // 3), random_state=seed
            )


@BAD
@pytest.mark.parametrize("name", ["b", "weights", "offset", "row_penalty"])
def test_vectors(bad, name):
    with refused(name, str(bad), "index 5", "remove or impute"):
        softmax(**{name: with_bad(np.ones(N), 5, bad)})


@BAD
def test_weights_of_groups(bad):
    with refused("weights", str(bad), "index 2"):
        softmax(weights=with_bad(np.ones(4), 2, bad))


@pytest.mark.parametrize("ridge", [np.nan, np.inf, -1.0, "much", None])
def test_ridge(ridge):
    with refused("ridge"):
        softmax(ridge=ridge)


@BAD
def test_points(bad):
    x = with_bad(np.zeros(D), 1, bad)
    with refused("x", str(bad), "1"):
        softmax().value(x)
    with refused("v", str(bad), "1"):
        softmax().hvp(np.zeros(D), x)
    with refused("x0", str(bad), "1"):
        minimize(softmax(), x)


# ---- shapes ----


@pytest.mark.parametrize("name", ["b", "weights", "offset", "row_penalty"])
@pytest.mark.parametrize("length", [0, N - 1, N + 1])
def test_wrong_length(name, length):
    with refused(name, f"({length},)", "12 rows", "(12,)"):
        softmax(**{name: np.ones(length)})


@pytest.mark.parametrize("name", ["b", "weights", "offset"])
def test_scalars_are_not_broadcast(name):
    with refused(name, "()", "12 rows"):
        softmax(**{name: 1.0})


def test_columns_are_accepted_as_vectors():
    assert np.array_equal(softmax(b=data()[1][:, None]).b, data()[1])


def test_wrong_dimensions():
    with refused("A", "two dimensions", "(12,)", "reshape(-1, 1)"):
        softmax(A=np.ones(N))
    with refused("A", "two dimensions"):
        softmax(A=np.ones((N, 2, 2)))
    with refused("groups", "one-dimensional", "(12, 1)"):
        softmax(groups=np.ones((N, 1)))


@pytest.mark.parametrize("storage", [sparse.csr_array, sparse.csc_array, sparse.bsr_array])
@pytest.mark.parametrize("index", [-1, 10**6])
def test_indices_that_point_outside(storage, index):
    """Products would read memory that is not theirs."""
    A = storage(np.ones((N, D)))
    A.indices[3] = index
    spare = len(A.data) + 5
    A.data, A.indices = np.resize(A.data, (spare, *A.data.shape[1:])), np.resize(A.indices, spare)
    with pytest.raises(ValueError, match=rf"A is not a valid {A.format} matrix.*entry 3 has index {index}"):
        problems.Softmax(A, np.ones(N) / N)
    assert len(A.data) == len(A.indices) == spare


def test_row_pointers_that_fall():
    A = sparse.csr_array(np.ones((N, D)))
    A.indptr[2], A.indptr[3] = A.indptr[3], A.indptr[2]
    with pytest.raises(ValueError, match="A is not a valid csr matrix"):
        problems.Softmax(A, np.ones(N) / N)


@pytest.mark.parametrize("shape", [(0, 3), (12, 0), (0, 0)])
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array])
def test_empty(shape, storage):
    with refused("A", "empty", str(shape)):
        problems.Softmax(storage(np.ones(shape)), np.ones(shape[0]))


@pytest.mark.parametrize("x", [np.zeros(D + 1), np.zeros((D, 1)), 0.0])
def test_points_of_the_wrong_shape(x):
    with refused("x", "(3,)"):
        softmax().value(x)
    with refused("x0", "(3,)"):
        minimize(softmax(), x)


# ---- groups ----


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([0, 3, 3, 12], ["group 1", "empty", "drop it"]),
        ([0, 6, 3, 12], ["group 1", "3"]),
        ([0, 6, 11], ["length 3", "12 rows", "start at 0 and end at 12"]),
        ([1, 6, 12], ["length 3", "start at 0"]),
        ([0.0, 6.0, 12.0], ["integer offsets"]),
        (np.arange(11), ["length 11", "one label a row"]),
        ([], ["length 0", "one label a row"]),
    ],
)
def test_offsets(groups, words):
    with refused("groups", *words):
        softmax(groups=groups)


@pytest.mark.parametrize(
    "labels",
    [
        [0.0, 0.0, np.nan, *[1.0] * 9],
        ["a", "b", None, *["a"] * 9],
        pd.Series(["a", "b", None, *["a"] * 9]),
        pd.Series(["a", "b", None, *["a"] * 9], dtype="category"),
        pd.Series(pd.to_datetime(["2020-01-01", "2020-01-02", None, *["2020-01-01"] * 9])),
        pl.Series(["a", "b", None, *["a"] * 9]),
    ],
    ids=["nan", "none", "pandas", "category", "datetime", "polars"],
)
def test_missing_labels(labels):
    with refused("groups", "index 2", "give every row a label"):
        softmax(groups=labels)


@pytest.mark.parametrize(
    "labels",
    [
        pd.Series(list("abcabcabcabc"), dtype="category"),
        pd.Series(pd.to_datetime([f"2020-01-0{i}" for i in [1, 2, 3] * 4])),
        pl.Series(list("abcabcabcabc")),
        list("abcabcabcabc"),
        np.array([1.5, 2.5, 3.5] * 4),
        np.array([True, False] * 6),
        ["a", 1, 2.5] * 4,
        [(1, 2), (1, 3), (2, 2)] * 4,
    ],
    ids=["category", "datetime", "polars", "list", "float", "bool", "mixed", "tuples"],
)
def test_labels_of_any_kind_group_or_are_refused(labels):
    A, b, _ = data()
    try:
        problem = problems.Softmax(A, b, labels)
    except ValueError as error:
        assert "groups" in str(error)
        return
    k = 2 if labels[0] is True or isinstance(labels[0], np.bool_) else 3
    expected = problems.Softmax(A, b, np.arange(N) % k)
    assert np.isclose(problem.value(np.ones(D)), expected.value(np.ones(D)))


def test_groups_of_one_row():
    ids = np.array([0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 6])
    result = minimize(softmax(groups=ids, b=np.full(N, 0.3)))
    assert result.converged
    assert np.isfinite(result.x).all()


# ---- weights ----


def test_negative_weights():
    with refused("weights", "negative", "index 3", "-2"):
        softmax(weights=with_bad(np.ones(N), 3, -2.0))
    with refused("weights", "negative", "index 1"):
        softmax(weights=[1.0, -1.0, 1.0, 1.0])


@pytest.mark.parametrize("length", [N, 4])
def test_all_zero_weights(length):
    with refused("weights", "all zero", "positive"):
        softmax(weights=np.zeros(length))


def test_few_rows_of_positive_weight():
    """A sample of the rows may hit none of them."""
    rng = np.random.default_rng(0)
    n = 30_000
    A, ids = rng.standard_normal((n, 2)), np.arange(n) // 3
    weights = np.zeros(n)
    weights[:6] = 1.0
    b = rng.gamma(1.0, size=n)
    for seed in range(3):
        result = minimize(
            problems.Softmax(A, b / np.bincount(ids, weights=b)[ids], ids, weights=weights), random_state=seed
        )
        alone = minimize(problems.Softmax(A[:6], (b / np.bincount(ids, weights=b)[ids])[:6], ids[:6]))
        assert result.converged
        assert np.isclose(result.value, alone.value, rtol=1e-5)


# ---- not numbers ----


@pytest.mark.parametrize(
    "A",
    [
        np.full((N, D), "x"),
        np.full((N, D), "1.5"),
        np.ones((N, D), dtype=object),
        np.ones((N, D), dtype=complex),
        np.full((N, D), "2020-01-01", dtype="datetime64[D]"),
        [["a", "b", "c"]] * N,
        sparse.csr_array(np.ones((N, D), dtype=complex)),
    ],
    ids=["words", "digits", "object", "complex", "dates", "list", "sparse complex"],
)
def test_matrices_that_are_not_numeric(A):
    with refused("A", "dtype", "real numbers"):
        softmax(A=A)


def test_ragged_rows():
    with refused("A"):
        softmax(A=[[1.0, 2.0]] * (N - 1) + [[1.0]])


@pytest.mark.parametrize("column", [["a"] * N, pd.to_datetime(["2020-01-01"] * N), pd.Categorical(["a"] * N)])
def test_columns_of_a_frame_that_are_not_numeric(column):
    with refused("column 'kind' of A", "encode it as numbers"):
        softmax(A=pd.DataFrame({"price": np.ones(N), "kind": column}))


def test_columns_of_a_polars_frame_that_are_not_numeric():
    with refused("column 'kind' of A", "encode it as numbers"):
        softmax(A=pl.DataFrame({"price": np.ones(N), "kind": ["a"] * N}))


@pytest.mark.parametrize(
    "frame",
    [
        pl.DataFrame({"price": [1.0] * 4 + [None] + [1.0] * 7}),
        pd.DataFrame({"price": pd.array([1] * 4 + [None] + [1] * 7, dtype="Int64")}),
        pd.DataFrame({"price": pd.array([1.0] * 4 + [None] + [1.0] * 7, dtype="Float64")}),
        pd.DataFrame({"price": [1.0] * 4 + [np.nan] + [1.0] * 7}),
    ],
    ids=["polars", "Int64", "Float64", "nan"],
)
def test_missing_entries_of_a_frame(frame):
    with refused("A", "row 4", "impute"):
        softmax(A=frame)


def test_an_empty_frame():
    with refused("A", "empty"):
        softmax(A=pd.DataFrame(index=range(N)))


def test_masked_entries_are_not_taken_for_data():
    A = np.ma.masked_array(data()[0], mask=np.zeros((N, D), dtype=bool))
    A[4, 2] = np.ma.masked
    with refused("A"):
        softmax(A=A)


@pytest.mark.parametrize("name", ["b", "weights", "offset", "row_penalty"])
@pytest.mark.parametrize(
    "values",
    [["a"] * N, [None] + [1.0] * (N - 1), np.ones(N, dtype=complex)],
    ids=["words", "none", "complex"],
)
def test_vectors_that_are_not_numeric(name, values):
    with refused(name, "dtype", "real numbers"):
        softmax(**{name: values})


@pytest.mark.parametrize(
    ("family", "option"), [("Softmax", "loss"), ("Exponential", "function"), ("Rescaled", "function")]
)
@pytest.mark.parametrize("value", ["absolute", None, 3])
def test_unknown_losses(family, option, value):
    A, b, _ = data()
    with refused(option, "must be one of"):
        getattr(problems, family)(A, b, **{option: value})


# ---- targets ----


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_negative_shares(loss):
    with refused("b", "negative", "index 6", loss, "squared"):
        softmax(b=with_bad(data()[1], 6, -0.1), loss=loss)


def test_negative_shares_are_named_in_the_users_order():
    order = np.random.default_rng(0).permutation(N)
    with refused("b", "negative", "index 6"):
        softmax(b=with_bad(data()[1], 6, -0.1), groups=data()[2][order], loss="kl")


@pytest.mark.parametrize(("family", "loss"), COUPLED)
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_targets_need_not_sum_to_one(family, loss, factor):
    inst, x = instance(family, loss)
    inst = inst.replace(b=factor * inst.b)
    problem = inst.problem(ridge=0.1)
    assert np.isclose(problem.value(x), inst.objective().value(x) + 0.05 * x @ x)
    if loss != "entropy":
        assert minimize(problem).converged


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_a_fit_to_targets_of_zero(family, loss):
    inst, x = instance(family, loss)
    problem = inst.problem(b=np.zeros(len(inst.b)), ridge=0.1)
    assert np.isfinite(problem.value(x))
    assert np.isfinite(problem.hessian(x)).all()
    assert np.isfinite(minimize(problem, random_state=0).x).all()


@pytest.mark.parametrize("dtype", [int, bool])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
def test_choices(dtype, loss):
    b = np.tile([1, 0, 0, 0, 1, 0], 2).astype(dtype)
    result = minimize(softmax(b=b, loss=loss, ridge=0.1))
    assert result.converged
    assert np.array_equal(result.x, minimize(softmax(b=b.astype(float), loss=loss, ridge=0.1)).x)
