"""Value, gradient, Hessian and products of attention problems against automatic differentiation."""

import numpy as np
import pytest
from attention_reference import LOSSES, Reference, sequence
from instances import covering, relative

AXES = {
    "mask": ("none", "causal", "random"),
    "weights": ("none", "rows", "cells"),
    "offset": (False, True),
    "penalty": (False, True),
    "ridge": (0.0, 0.3),
    "features": (0, 2),
    "sequences": (1, 3),
    "columns": ("even", "ill-scaled"),
    "blocks": ("large", "small"),
}
TOLERANCE = 1e-11
SIZES = ((5, 7), (4, 4), (2, 9))


CASES = [
    pytest.param(loss, function, case, id="-".join([loss, function, *map(str, case.values())]))
    for number, (loss, function) in enumerate(LOSSES)
    for case in covering(AXES, number)
]


def build(loss, function, case, rank=None, seed=5):
    rng = np.random.default_rng(seed)
    parts = [sequence(rng, n1, n2, 3, 4, case) for n1, n2 in SIZES[: case["sequences"]]]
    # One scale of columns for all sequences.
    scales = np.abs(parts[0].A1).max(axis=0)
    parts = [type(p)(**{**vars(p), "A1": p.A1 / np.abs(p.A1).max(axis=0) * scales}) for p in parts]
    X = 0.4 * rng.standard_normal((3, 4)) / scales[:, None]
    x = np.concatenate([X.reshape(-1), 0.3 * rng.standard_normal(case["features"])])
    units = np.concatenate([np.repeat(scales, 4), np.ones(case["features"])])
    return Reference(parts, loss, function, case["ridge"], rank), x, units


@pytest.mark.parametrize(("loss", "function", "case"), CASES)
def test_every_derivative(loss, function, case, monkeypatch):
    if case["blocks"] == "small":
        monkeypatch.setattr("attnfit.data.pairs.BLOCK_PAIRS", 1)
        monkeypatch.setattr("attnfit.data.pairs.KEPT_SQUARES", 1)
    exact, x, units = build(loss, function, case)
    problem = exact.problem()
    v = np.random.default_rng(0).standard_normal(len(x)) / units
    hessian = exact.hessian(x) / np.multiply.outer(units, units)
    assert problem.shape == ((3, 4) if case["features"] == 0 else (12 + case["features"],))
    assert problem.gradient(x).shape == problem.shape
    assert relative(problem.value(x), exact.value(x)) < TOLERANCE
    assert relative(problem.gradient(x).reshape(-1) / units, exact.gradient(x) / units) < TOLERANCE
    assert relative(problem.hessian(x) / np.multiply.outer(units, units), hessian) < TOLERANCE
    assert relative(problem.hvp(x, v).reshape(-1) / units, hessian @ (v * units)) < TOLERANCE
    origin = problem.evaluate(x, at_zero=True).gradient_at_zero / units
    size = np.linalg.norm(exact.gradient(x) / units)
    assert np.linalg.norm(origin - exact.gradient(0 * x) / units) < TOLERANCE * size + 1e-12


@pytest.mark.parametrize("columns", ["even", "ill-scaled"])
@pytest.mark.parametrize(("loss", "function"), LOSSES)
def test_derivatives_in_the_data(loss, function, columns):
    case = {name: values[-1] for name, values in AXES.items()} | {
        "sequences": 1,
        "columns": columns,
        "ridge": 0.0,
    }
    exact, x, _ = build(loss, function, case)
    queries, keys = exact.problem().data_gradient(x)
    by_query, by_key = exact.data_gradient(x)
    assert relative(queries, by_query) < TOLERANCE
    assert relative(keys, by_key) < TOLERANCE


RANKED = [{name: values[k % len(values)] for name, values in AXES.items()} for k in range(6)]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("case", RANKED, ids=range(len(RANKED)))
@pytest.mark.parametrize(("loss", "function"), LOSSES)
def test_low_rank(loss, function, case, rank):
    exact, _, scales = build(loss, function, case, rank)
    rng = np.random.default_rng(rank)
    units = np.concatenate([np.repeat(scales[:12:4], rank), np.ones(4 * rank + case["features"])])
    x, v = (size * rng.standard_normal(len(units)) / units for size in (0.5, 1.0))
    problem = exact.problem()
    hessian = exact.hessian(x) / np.multiply.outer(units, units)
    assert problem.n_unknowns == len(x)
    assert relative(problem.value(x), exact.value(x)) < TOLERANCE
    assert relative(problem.gradient(x).reshape(-1) / units, exact.gradient(x) / units) < TOLERANCE
    assert relative(problem.hessian(x) / np.multiply.outer(units, units), hessian) < TOLERANCE
    assert relative(problem.hvp(x, v).reshape(-1) / units, hessian @ (v * units)) < TOLERANCE


def test_khatri_rao_hessian_is_the_dense_kronecker_one():
    rng = np.random.default_rng(1)
    case = {name: values[0] for name, values in AXES.items()}
    maps = sequence(rng, 40, 30, 5, 6, case)
    problem = Reference([maps], "squared").problem()
    X = 0.5 * rng.standard_normal((5, 6))
    A = np.kron(maps.A1, maps.A2)
    f = problem.predict(X)
    p = f - maps.B
    gamma = np.sum(p * f, axis=1, keepdims=True)
    t = f * (f + p - gamma)
    centred = (A.reshape(40, 30, 30) - np.einsum("ik,ikd->id", f, A.reshape(40, 30, 30))[:, None]).reshape(
        -1, 30
    )
    dense = centred.T @ (t.reshape(-1)[:, None] * centred)
    assert relative(problem.hessian(X), dense) < 1e-12


@pytest.mark.parametrize("common", [0.0, 1e3, 1e6])
def test_a_common_part_of_all_keys_costs_no_accuracy(common):
    rng = np.random.default_rng(2)
    case = {name: values[0] for name, values in AXES.items()}
    maps = sequence(rng, 20, 25, 3, 4, case)
    reference = Reference([maps], "squared")
    shifted = reference.problem(A2=maps.A2 + common)
    X = 0.5 * rng.standard_normal((3, 4))
    # The shift itself rounds the keys: compare with what they became.
    exact = reference.problem(A2=(maps.A2 + common) - common)
    # Logits of the shift's size have lost its digits; squares of it must not be lost.
    assert relative(shifted.hessian(X), exact.hessian(X)) < 1e-13 * (1.0 + 10.0 * common)


def test_half_precision_maps_are_not_copied():
    rng = np.random.default_rng(3)
    B = rng.random((30, 40)).astype(np.float16)
    from attnfit import problems

    problem = problems.Attention(rng.standard_normal((30, 3)), rng.standard_normal((40, 3)), B)
    assert np.shares_memory(problem.b, B)
    assert problem.b.dtype == np.float16
