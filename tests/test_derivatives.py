"""Value, gradient, Hessian and their products against automatic differentiation."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from conftest import shrink_blocks
from instances import ALL_LOSSES, COUPLED, SOFTMAX, Instance, covering, instance, relative, shares
from scipy import sparse

# With blocks of 64 rows the first, fourth and fifth group are long, the others share chunks.
SIZES = (150, 3, 1, 70, 130, 20)
D = 4
AXES = {
    "groups": ("none", "sorted", "strings", "offsets"),
    "weights": ("none", "rows", "groups"),
    "offset": (False, True),
    "row_penalty": ("none", "scalar", "vector"),
    "ridge": (0.0, 0.3),
    "storage": ("dense", "csr"),
    "blocks": ("large", "small"),
    "columns": ("even", "ill-scaled"),
}
TOLERANCE = 1e-11


CASES = [
    pytest.param(family, loss, case, id="-".join([family, loss, *map(str, case.values())]))
    for number, (family, loss) in enumerate(ALL_LOSSES)
    for case in covering(AXES, number)
]


def build(family, loss, case, seed=3):
    """An instance in the form that ``case`` describes, a point, and the scales of its columns."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(np.arange(len(SIZES)), SIZES)
    if case["groups"] == "none" or family == "Exponential":
        ids, groups = np.zeros_like(ids), None
    elif case["groups"] == "offsets":
        groups = np.append(0, np.cumsum(SIZES))
    elif case["groups"] == "sorted":
        groups = 10 * ids
    else:
        ids = rng.permutation(ids)
        groups = np.array([f"group {(7 * i) % 10}" for i in ids])
        # Groups are numbered by first appearance.
        _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
        ids = np.argsort(np.argsort(first))[inverse]
    n = len(ids)
    A = rng.standard_normal((n, D)) * (rng.random((n, D)) < 0.7)
    b = shares(rng, ids) + (0.5 * rng.standard_normal(n) if family == "Exponential" else 0.02)
    options = {"ridge": case["ridge"]}
    if case["weights"] == "rows" or (case["weights"] == "groups" and family == "Exponential"):
        options["weights"] = rng.integers(0, 4, n) / 2.0
    elif case["weights"] == "groups":
        options["weights"] = rng.random(ids.max() + 1) + 0.1
    if case["offset"]:
        options["offset"] = 0.5 * rng.standard_normal(n)
    if case["row_penalty"] != "none":
        options["row_penalty"] = 0.3 if case["row_penalty"] == "scalar" else rng.random(n)
    scales = np.array([1e-4, 1.0, 1e2, 1e4]) if case["columns"] == "ill-scaled" else np.ones(D)
    x = 0.6 * rng.standard_normal(D) / scales
    stored = sparse.csr_array(A * scales) if case["storage"] == "csr" else A * scales
    return Instance(family, loss, stored, b, ids, groups, options), x, scales


@pytest.mark.parametrize(("family", "loss", "case"), CASES)
def test_every_derivative(family, loss, case, monkeypatch):
    if case["blocks"] == "small":
        shrink_blocks(monkeypatch)
    inst, x, scales = build(family, loss, case)
    problem, exact = inst.problem(), inst.objective()
    v = np.random.default_rng(0).standard_normal(D) / scales
    hessian = exact.hessian(x)
    units = np.multiply.outer(scales, scales)
    assert relative(problem.value(x), exact.value(x)) < TOLERANCE
    assert relative(problem.gradient(x) / scales, exact.gradient(x) / scales) < TOLERANCE
    assert relative(problem.hessian(x) / units, hessian / units) < TOLERANCE
    assert relative(problem.hvp(x, v) / scales, hessian @ v / scales) < TOLERANCE
    value, gradient = problem.value_and_gradient(x)
    assert (value, gradient.tolist()) == (problem.value(x), problem.gradient(x).tolist())
    slope, point = problem.data_gradient(x)
    assert relative(np.multiply.outer(slope, point * scales), exact.data_gradient(x) * scales) < TOLERANCE
    # At zero the gradient may vanish by symmetry: rounding is relative to the one at x.
    error = (problem.evaluate(x, at_zero=True).gradient_at_zero - exact.gradient(0 * x)) / scales
    assert np.linalg.norm(error) < TOLERANCE * np.linalg.norm(exact.gradient(x) / scales) + 1e-13


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("storage", ["dense", "csr"])
def test_hessian_of_the_same_read_is_exact_for_short_groups(family, loss, storage):
    inst, x = instance(family, loss)
    problem = inst.problem(A=inst.A if storage == "dense" else sparse.csr_array(inst.A))
    at = problem.evaluate(x, hessian=True)
    assert relative(at.hessian, inst.objective().hessian(x)) < TOLERANCE


@pytest.mark.parametrize(("family", "loss"), COUPLED)
@pytest.mark.parametrize("near", [None, 1e-4, 0.03, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["at the fit", "off the fit"])
def test_hessian_of_the_same_read_is_good_or_absent_for_long_groups(family, loss, near, noise, small_blocks):
    # Columns with a large mean: a Hessian that is not centred at the right place is far off.
    inst, x = instance(family, loss, sizes=(400, 300), d=3, noise=noise, scale=0.5)
    inst = inst.replace(A=inst.A + (np.array([3.0, -2.0, 1.0]) if family == "Softmax" else 0.0))
    problem = inst.problem()
    at = problem.evaluate(x, None if near is None else problem.evaluate(x + near), hessian=True)
    exact = inst.objective().hessian(x)
    assert at.hessian is not None or near != 1e-4
    if at.hessian is not None:
        # Where weights of both signs cancel, to the size of what cancels.
        size = np.linalg.norm(problem.hessian_at(at, absolute=True))
        assert np.linalg.norm(at.hessian - exact) < 0.1 * size
    assert relative(problem.hessian_at(at), exact) < TOLERANCE


@pytest.mark.parametrize(("family", "loss"), COUPLED)
@pytest.mark.parametrize("distance", [0.1, 1.0, 5.0])
def test_a_bad_prediction_of_the_normaliser_costs_no_accuracy(family, loss, distance, small_blocks):
    inst, x = instance(family, loss, sizes=(300,), d=3)
    problem, exact = inst.problem(), inst.objective()
    start = x + distance * np.array([1.0, -1.0, 0.5])
    at = problem.evaluate(x, problem.evaluate(start))
    assert relative(at.value, exact.value(x)) < 1e-9
    assert relative(at.gradient, exact.gradient(x)) < 1e-9
    assert relative(problem.hessian_at(at), exact.hessian(x)) < 1e-9


@pytest.mark.parametrize(("family", "loss"), SOFTMAX)
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_large_logits(family, loss, blocks, monkeypatch):
    if blocks == "small":
        shrink_blocks(monkeypatch)
    inst, _ = instance(family, loss, sizes=(100, 200), d=3)
    x = np.array([1.0, -0.5, 0.2])
    x *= 1e4 / np.abs(inst.A @ x).max()
    problem, exact = inst.problem(), inst.objective()
    # All the mass sits on one row, where the gradient is rounding: compare with its size at zero.
    reference = np.linalg.norm(exact.gradient(0 * x)) + 1.0
    assert np.isclose(problem.value(x), exact.value(x), rtol=1e-12, atol=1e-12)
    assert np.linalg.norm(problem.gradient(x) - exact.gradient(x)) < 1e-10 * reference
    assert np.linalg.norm(problem.hessian(x) - exact.hessian(x)) < 1e-10 * reference
    assert np.isfinite(problem.predict(x)).all()
    assert np.isfinite(problem.data_gradient(x)[0]).all()


@pytest.mark.parametrize(("family", "loss"), [*COUPLED, ("Exponential", "exp")])
def test_predict_returns_the_users_order(family, loss):
    inst, x = instance(family, loss)
    order = np.random.default_rng(1).permutation(len(inst.b))
    if inst.groups is None:
        shuffled = inst.problem(A=inst.A[order])
    else:
        shuffled = inst.problem(A=inst.A[order], b=inst.b[order], groups=inst.groups[order])
    assert np.allclose(shuffled.predict(x), inst.problem().predict(x)[order], rtol=1e-13)


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_diagonal_majorises_the_hessian_of_one_group(family, loss):
    inst, x = instance(family, loss, sizes=(40,))
    problem = inst.problem()
    at = problem.evaluate(x)
    majorant = problem.hessian_at(at, absolute=True)
    exact = problem.hessian(x)
    assert np.linalg.eigvalsh(majorant - exact)[0] > -1e-10 * np.linalg.norm(majorant)
    assert np.linalg.eigvalsh(majorant + exact)[0] > -1e-10 * np.linalg.norm(majorant)
    assert (problem.diagonal_at(at) > 0).all()


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_the_natural_scale_does_not_see_what_rows_have_in_common(loss):
    """It is the Hessian's diagonal where rows have one centre and no negative weight; a column without
    variation keeps its own size, so that rounding is not scaled up.
    """
    inst, x = instance("Softmax", loss, sizes=(40,))
    constant = np.full((40, 1), 1e3)
    inst, x = inst.replace(A=np.hstack([inst.A + np.array([1e3, -50.0, 0.0]), constant])), np.append(x, 0.0)
    problem = inst.problem(ridge=0.5)
    diagonal = problem.diagonal_at(problem.evaluate(x))
    hessian = inst.replace(options={"ridge": 0.5}).objective().hessian(x)
    np.testing.assert_allclose(diagonal[:3], np.diag(hessian)[:3], rtol=1e-8)
    assert diagonal[3] > 1e5


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_gauss_newton_is_the_jacobian_of_the_residuals_squared(family, loss, grouped):
    inst, x = instance(family, loss, sizes=(5, 3, 4) if grouped else (12,))
    weights = np.random.default_rng(1).random(12) + 0.1
    problem = inst.replace(options={"weights": weights, "row_penalty": 0.3}).problem()
    exact = inst.objective()
    if loss in ("linear_cross_entropy", "entropy"):
        with pytest.raises(ValueError, match="no sum of squares"):
            problem.gauss_newton(x)
        return
    if loss in ("cross_entropy", "kl"):
        expected = problem.hessian(x)
    else:

        def residuals(point):
            return torch.sqrt(2.0 * exact.rows(as_tensor(inst.A) @ point)) * torch.sign(
                as_tensor(problem.predict(x) - inst.b)
            )

        J = torch.autograd.functional.jacobian(residuals, as_tensor(x)).numpy()
        expected = J.T @ (weights[:, None] * J) + 0.09 * inst.A.T @ inst.A
    v = np.array([0.3, -1.0, 0.5])
    assert relative(problem.gauss_newton(x), expected) < 1e-10
    assert relative(problem.gauss_newton_product(x, v), expected @ v) < 1e-10
