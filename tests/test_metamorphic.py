"""What a change of the data must do to a fit, over losses, storages and solvers: no reference is needed."""

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instances import covering
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from storages import PIECES, STORAGES

from attnfit import minimize, problems
from attnfit.solvers import GradientDescent, Newton

N_GROUPS, SIZE, D = 40, 5, 3
LOSSES = ("squared", "cross_entropy", "kl", "linear_cross_entropy", "exp", "poisson", "rescaled")
UNCOUPLED = ("exp", "poisson")

SOLVERS = {
    "default": None,
    "exact": Newton(hessian="exact"),
    "sampled": Newton(hessian="sampled", sample_rows=150),
    "gradient": GradientDescent(),
}


def data(loss, seed):
    """Rows with a constant column for losses that see one, and a target near a model's output."""
    rng = np.random.default_rng(seed)
    n = N_GROUPS * SIZE
    A = rng.standard_normal((n, D))
    groups = np.repeat(np.arange(N_GROUPS), SIZE)
    offset = 0.3 * rng.standard_normal(n)
    if loss in (*UNCOUPLED, "rescaled"):
        A[:, 0] = 1.0
    z = A @ rng.standard_normal(D) * 0.7 + offset
    u = np.exp(z)
    share = u if loss in UNCOUPLED else u / np.bincount(groups, u)[groups]
    b = share * np.exp(0.1 * rng.standard_normal(n))
    return {"A": A, "b": b, "groups": groups, "weights": rng.uniform(0.5, 2.0, n), "offset": offset}


def problem(loss, columns, ridge=0.0):
    columns = {name: values for name, values in columns.items() if values is not None}
    if loss == "linear_cross_entropy":
        ridge = ridge or 0.05
    if loss in UNCOUPLED:
        columns.pop("groups", None)
        return {"exp": problems.Exponential, "poisson": problems.Poisson}[loss](**columns, ridge=ridge)
    if loss == "rescaled":
        return problems.Rescaled(**columns, ridge=ridge or 1e-6)
    return problems.Softmax(**columns, loss=loss, ridge=ridge)


def fit(loss, columns, ridge=0.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return minimize(problem(loss, columns, ridge), random_state=0, **options)


# Each takes the columns and returns those of the changed problem, and what x becomes: None where the
# property says nothing of a loss.


def unit_of_the_target(loss, c, rng):
    factor = 10.0 ** rng.uniform(-12, 12)
    if loss in UNCOUPLED:
        # The constant takes it up.
        return c | {"b": c["b"] * factor}, lambda x: x + np.log(factor) * np.eye(D)[0]
    if loss in ("cross_entropy", "kl"):
        return c | {"b": c["b"] * factor}, lambda x: x
    return None


def unit_of_the_weights(loss, c, rng):
    if loss in ("linear_cross_entropy", "rescaled"):
        # Their ridge has a unit too.
        return None
    return c | {"weights": c["weights"] * 10.0 ** rng.uniform(-9, 9)}, lambda x: x


def powers_of_ten(loss, c, rng):
    if loss in ("linear_cross_entropy", "rescaled"):
        return None
    size = 10.0 ** rng.integers(-6, 7, D)
    return c | {"A": c["A"] * size}, lambda x: x / size


def change_of_basis(loss, c, rng):
    if loss in ("linear_cross_entropy", "rescaled"):
        return None
    Q = np.linalg.qr(rng.standard_normal((D, D)))[0] * np.exp(rng.uniform(0, 2, D))
    return c | {"A": c["A"] @ Q}, lambda x: np.linalg.solve(Q, x)


def shift_of_groups(loss, c, rng):
    if loss in (*UNCOUPLED, "rescaled"):
        return None
    return c | {"A": c["A"] + 3.0 * rng.standard_normal((N_GROUPS, D))[c["groups"]]}, lambda x: x


def every_group_twice(loss, c, rng):
    twice = {name: np.concatenate([v, v]) for name, v in c.items()}
    twice["groups"] = np.concatenate([c["groups"], c["groups"] + N_GROUPS])
    if loss in ("linear_cross_entropy", "rescaled"):
        twice["weights"] = 0.5 * twice["weights"]
    return twice, lambda x: x


def permuted(loss, c, rng):
    order = rng.permutation(N_GROUPS)
    rows = (SIZE * order[:, None] + np.array([rng.permutation(SIZE) for _ in order])).ravel()
    moved = {name: v[rows] for name, v in c.items()}
    return moved | {"groups": np.repeat(np.arange(N_GROUPS), SIZE)}, lambda x: x


def rows_without_weight(loss, c, rng):
    """Whole groups: a row without weight in a softmax still takes part in its normaliser."""
    extra = {name: v[:SIZE] for name, v in c.items()}
    extra["A"], extra["groups"] = rng.standard_normal((SIZE, D)), np.full(SIZE, N_GROUPS)
    extra["weights"] = np.zeros(SIZE)
    return {name: np.concatenate([v, extra[name]]) for name, v in c.items()}, lambda x: x


def a_group_of_one_row(loss, c, rng):
    if loss in (*UNCOUPLED, "rescaled"):
        return None
    extra = {name: v[:1] for name, v in c.items()} | {"groups": np.array([N_GROUPS])}
    return {name: np.concatenate([v, extra[name]]) for name, v in c.items()}, lambda x: x


def an_offset_along_a_direction(loss, c, rng):
    if loss in ("linear_cross_entropy", "rescaled"):
        return None
    v = rng.standard_normal(D)
    return c | {"offset": c["offset"] + c["A"] @ v}, lambda x: x - v


def a_constant_column(loss, c, rng):
    if loss in (*UNCOUPLED, "rescaled"):
        return None
    return c | {"A": np.column_stack([c["A"], np.ones(len(c["b"]))])}, lambda x: np.append(x, 0.0)


def nothing(loss, c, rng):
    return c, lambda x: x


PROPERTIES = {
    f.__name__: f
    for f in (
        nothing,
        unit_of_the_target,
        unit_of_the_weights,
        powers_of_ten,
        change_of_basis,
        shift_of_groups,
        every_group_twice,
        permuted,
        rows_without_weight,
        a_group_of_one_row,
        an_offset_along_a_direction,
        a_constant_column,
    )
}
AXES = {
    "change": list(PROPERTIES),
    "loss": list(LOSSES),
    "storage": list(STORAGES),
    "solver": list(SOLVERS),
    "pieces": list(PIECES),
}
CASES = [
    case
    for case in covering(AXES, seed=7)
    if PROPERTIES[case["change"]](case["loss"], data(case["loss"], 0), np.random.default_rng(0)) is not None
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_a_change_of_the_data_changes_the_answer_as_it_must(case, tmp_path, small_blocks):
    check(case, CASES.index(case), tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.fixed_dictionaries({k: st.sampled_from(v) for k, v in AXES.items()}), seed=st.integers(0, 10**9)
)
def test_so_it_does_whatever_the_numbers(small_blocks, case, seed):
    """Over all combinations of the axes, of which the cases above have all pairs."""
    if PROPERTIES[case["change"]](case["loss"], data(case["loss"], 0), np.random.default_rng(0)) is not None:
        with TemporaryDirectory() as directory:
            check(case, seed, Path(directory))


def check(case, seed, directory):
    """Fit the data and the changed data, and compare."""
    rng, loss = np.random.default_rng(1_000 + seed), case["loss"]
    columns = data(loss, seed)
    after, expected = PROPERTIES[case["change"]](loss, columns, rng)
    stored = STORAGES[case["storage"]](after, PIECES[case["pieces"]](len(after["b"])), directory)
    reference = fit(loss, columns, max_iter=1_000)
    first_order = case["solver"] == "gradient"
    found = fit(
        loss,
        stored,
        solver=SOLVERS[case["solver"]],
        max_iter=100 if not first_order else 300 if "dask" in case["storage"] else 3_000,
        tol=1e-6 if first_order else 1e-8,
    )
    assert reference.converged
    if first_order and not found.converged:
        # Gradient descent may take longer than anyone waits; it must not say otherwise.
        assert found.status in ("max_iter", "precision")
        return
    assert found.converged, found.message
    step = found.x - expected(reference.x)
    logits = after["A"] @ step
    if loss not in (*UNCOUPLED, "rescaled"):
        starts = np.flatnonzero(np.diff(after["groups"], prepend=-1))
        logits = logits - np.repeat(logits[starts], np.diff(starts, append=len(logits)))
    assert np.abs(logits).max() < (1e-3 if first_order else 1e-6)
    if not first_order:
        assert np.abs(step * np.abs(after["A"]).max(axis=0)).max() < 1e-5


@pytest.mark.parametrize("storage", ["npy", "zarr", "parquet", "shards", "dask_array", "dask_frame"])
@pytest.mark.parametrize("sort", [True, False])
def test_the_rest_of_separable_rows_is_fitted_where_they_are(storage, sort, tmp_path, small_blocks):
    if "dask" in storage and not sort:
        pytest.skip("partitions hold groups in order")
    c = data("cross_entropy", 3)
    dummy = np.zeros(len(c["b"]))
    dummy[7::50] = 1.0
    c["A"], c["b"] = np.column_stack([c["A"], dummy]), np.where(dummy > 0.0, 0.0, c["b"])
    if not sort:
        rows = np.random.default_rng(0).permutation(len(dummy))
        c = {name: v[rows] for name, v in c.items()}
    stored = STORAGES[storage](c, PIECES["unequal"](len(c["b"])), tmp_path)
    kept = c["A"][:, -1] == 0.0
    trimmed = {name: v[kept] for name, v in c.items()} | {"A": c["A"][kept, :-1]}
    found, expected = fit("cross_entropy", stored), fit("cross_entropy", trimmed)
    assert found.status == "separable"
    assert (found.x[-1], list(found.separation.rows)) == (-np.inf, list(np.flatnonzero(~kept)))
    np.testing.assert_allclose(found.x[:-1], expected.x, atol=1e-6)
    again = found.separation.fit()
    assert again.converged
    assert again.value == pytest.approx(expected.value, rel=1e-10)


def test_sparse_rows_on_disk_can_be_left_out_too(tmp_path):
    c = data("exp", 5)
    c.pop("groups")
    dummy = (np.arange(len(c["b"])) % 25 == 3) * 1.0
    c["A"], c["b"] = np.column_stack([c["A"], dummy]), np.where(dummy > 0.0, 0.0, c["b"])
    stored = STORAGES["shards"](c, PIECES["many"](len(c["b"])), tmp_path)
    found = fit("exp", stored)
    there = fit("exp", c | {"A": sparse.csr_array(c["A"])})
    assert (found.status, found.x[-1]) == (there.status, -np.inf)
    np.testing.assert_allclose(found.x[:-1], there.x[:-1], atol=1e-6)
