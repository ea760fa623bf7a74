"""One suite for every storage: the same numbers from one piece, from many and from unequal ones."""

import numpy as np
import pytest
from instances import ALL_LOSSES, covering, instance, relative
from storages import PIECES, STORAGES

from attnfit import minimize, problems
from attnfit.certificates import certify
from attnfit.certificates.certification import RowBall
from attnfit.solvers import GradientDescent, Newton

SIZES = {
    "one group": (400,),
    "straddling": (7, 120, 1, 3, 2, 60, 9, 1, 130, 4, 63),
    "short": tuple(1 + (7 * k) % 5 for k in range(133)),
}


def built(case, at):
    """The problem in memory and in a storage, and a point."""
    family, loss = case["loss"]
    inst, x = instance(family, loss, sizes=SIZES[case["groups"]], d=4, seed=3)
    n, rng = len(inst.b), np.random.default_rng(5)
    columns = {"A": inst.A, "b": inst.b}
    if inst.groups is not None:
        columns["groups"] = inst.groups.astype(float) if case["storage"] == "zarr" else inst.groups
    if case["extras"]:
        columns["weights"] = rng.uniform(0.5, 2.0, n)
        columns["offset"] = 0.3 * rng.standard_normal(n)
        columns["row_penalty"] = rng.uniform(0.0, 0.3, n)
    kind, option = (
        (problems.Softmax, {"loss": loss})
        if family == "Softmax"
        else (getattr(problems, family), {"function": loss})
    )
    option = option | {"ridge": 0.1}
    pieces = PIECES[case["pieces"]](n)
    stored = STORAGES[case["storage"]](columns, pieces, at)
    return kind(**columns, **option), kind(**stored, **option), x


def everything(problem, x):
    at = problem.evaluate(x, at_zero=True)
    near = problem.evaluate(1.01 * x, at)
    v = np.arange(1.0, len(x) + 1.0)
    yield "value", problem.value(x)
    yield "gradient", problem.gradient(x)
    # Zero for entropy.
    yield "origin", at.gradient_at_zero + 1e-3 * at.gradient
    yield "warm", near.gradient
    yield "hessian", problem.hessian(x)
    yield "hvp", problem.hvp(x, v)
    yield "operator", problem.hessian_operator(at)(v)
    yield "diagonal", problem.diagonal_at(at)
    yield "slopes", problem.data_gradient(x)[0]
    moved, exact, along = problem.look_along(at, v, np.diag(v))
    yield "moves", np.append(problem.moves(at, np.diag(v)).largest, moved.largest)
    yield "curvature", np.append(exact, along)
    yield (
        "its diagonal",
        np.append(np.diag(problem.hessian(x)), v * v * np.diag(problem.hessian(x))) / exact.max(),
    )
    yield "fitted", problem.predict(x)
    ball = RowBall(problem, at, np.eye(len(x)))
    yield "rounding", ball.rounding()
    yield "lipschitz", ball.lipschitz(0.05)
    rounding, cheap = ball.glance(0.05)
    yield "glance", np.array([rounding, cheap if np.isfinite(cheap) else 0.0])


CASES = list(
    covering(
        {
            "loss": ALL_LOSSES,
            "storage": list(STORAGES),
            "pieces": list(PIECES),
            "groups": list(SIZES),
            "extras": [False, True],
        },
        seed=1,
    )
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_the_storage_does_not_matter(case, tmp_path, small_blocks):
    reference, problem, x = built(case, tmp_path)
    pairs = zip(everything(reference, x), everything(problem, x), strict=True)
    for (name, theirs), (_, ours) in pairs:
        assert relative(ours, theirs) < 1e-10, name
    parts = dict(everything(problem, x))
    assert relative(parts["curvature"], parts["its diagonal"] * parts["curvature"][: len(x)].max()) < 1e-10
    assert problem.n_rows == reference.n_rows
    assert problem.n_groups == reference.n_groups


SOLVERS = {
    "default": None,
    "exact": Newton(hessian="exact"),
    "sampled": Newton(hessian="sampled", sample_rows=300),
    "matrix_free": Newton(hessian="matrix_free", sample_rows=300),
    "gradient": GradientDescent(),
}


@pytest.mark.parametrize(
    "case",
    list(
        covering(
            {
                "solver": list(SOLVERS),
                "storage": list(STORAGES),
                "loss": [
                    ("Softmax", "squared"),
                    ("Softmax", "cross_entropy"),
                    ("Rescaled", "exp"),
                    ("Exponential", "exp"),
                ],
                "pieces": list(PIECES),
                "groups": list(SIZES),
                "extras": [True, False],
            },
            seed=2,
        )
    ),
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_every_solver_finds_the_same_point(case, tmp_path, small_blocks):
    reference, problem, _ = built(case, tmp_path)
    solver = SOLVERS[case["solver"]]
    options = {"random_state": 0, "tol": 1e-6 if case["solver"] == "gradient" else 1e-10, "max_iter": 2000}
    expected = minimize(reference, **options | {"tol": 1e-10})
    found = minimize(problem, solver=solver, **options)
    assert found.status == "converged"
    assert relative(found.x, expected.x) < (1e-3 if case["solver"] == "gradient" else 1e-7)
    assert found.value == pytest.approx(expected.value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("storage", ["npy", "zarr", "parquet", "dask_array"])
def test_a_missing_number_is_named(storage, tmp_path, small_blocks):
    A = np.ones((400, 3))
    A[217, 2] = np.nan
    stored = STORAGES[storage]({"A": A, "b": np.full(400, 1 / 400)}, PIECES["many"](400), tmp_path)
    place = {"npy": "A.npy, block 0", "zarr": "A.zarr", "parquet": "part-1.parquet, row group 0"}
    row = 17 if storage == "dask_array" else 217
    with pytest.raises(ValueError, match=f"A contains NaN at row {row}, column 2") as error:
        problems.Softmax(**stored).value(np.zeros(3))
    assert place.get(storage, "partition 4") in str(error.value)


@pytest.mark.parametrize("storage", ["npy", "zarr", "parquet", "dask_array"])
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("b", np.nan, "b contains NaN at index"),
        ("b", -1.0, "b is negative at index"),
        ("weights", -1.0, "weights is negative at index"),
        ("offset", np.inf, "offset contains inf at index"),
    ],
)
def test_bad_columns_are_named(storage, name, values, message, tmp_path):
    columns = {name: np.full(400, 1 / 400) for name in ("b", "weights", "offset")} | {"A": np.ones((400, 3))}
    columns[name][217] = values
    with pytest.raises(ValueError, match=message):
        problems.Softmax(**STORAGES[storage](columns, PIECES["many"](400), tmp_path), loss="kl")


@pytest.mark.parametrize("storage", ["npy", "dask_array"])
def test_separable_data_are_found_out(storage, tmp_path, small_blocks):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 4)
    A = rng.standard_normal((400, 2))
    z = A @ [1.0, -2.0]
    b = (z == np.maximum.reduceat(z, np.arange(0, 400, 4))[labels]).astype(float)
    stored = STORAGES[storage]({"A": A, "b": b, "groups": labels}, PIECES["unequal"](400), tmp_path)
    with pytest.warns(Warning, match="separable"):
        assert minimize(problems.Softmax(**stored, loss="cross_entropy")).status == "separable"


@pytest.mark.parametrize("storage", ["npy", "dask_array"])
def test_certificates(storage, tmp_path, small_blocks):
    case = {"loss": ("Softmax", "squared"), "storage": storage, "pieces": "many", "groups": "straddling"}
    reference, problem, _ = built(case | {"extras": True}, tmp_path)
    x = minimize(reference, random_state=0).x + 1e-6
    expected, found = certify(reference, x), certify(problem, x)
    assert found.valid
    assert found.radius == pytest.approx(expected.radius, rel=1e-8)
