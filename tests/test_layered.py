"""Layered problems: every derivative against automatic differentiation, and what is built on them."""

import numpy as np
import pytest
from autodiff import as_tensor
from instances import covering, relative
from layered_instances import ACTIVATIONS, LayeredInstance
from scipy import sparse

from attnfit.losses import activations
from attnfit.objectives import layer_curvature as curvature
from attnfit.objectives import layered

TOLERANCE = 1e-10
AXES = {
    "weights": ("none", "rows", "entries"),
    "offset": ("none", "rows", "large"),
    "row_penalty": ("none", "scalar", "vector"),
    "ridge": (0.0, 0.3),
    "batch": (None, 1, 3),
    "A1": ("dense", "sparse", "identity"),
    "A2": ("dense", "sparse"),
    "columns": ("even", "ill-scaled"),
    "blocks": ("large", "small"),
}


CASES = [
    pytest.param(activation, case, id="-".join([activation, *map(str, case.values())]))
    for number, activation in enumerate(ACTIVATIONS)
    for case in covering(AXES, number)
]


def build(activation, case):
    rng = np.random.default_rng(5)
    n, m, k = 7, 5, case["batch"]
    d = n if case["A1"] == "identity" else 4
    A1 = np.eye(n) if case["A1"] == "identity" else rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.7)
    A2 = rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.8)
    ill_scaled = case["columns"] == "ill-scaled" and case["A1"] != "identity"
    scales = np.logspace(-3, 3, d) if ill_scaled else np.ones(d)
    shape = (m,) if k is None else (m, k)
    options = {"ridge": case["ridge"]}
    if case["weights"] != "none":
        options["weights"] = rng.integers(0, 4, m if case["weights"] == "rows" else shape) / 2.0 + 0.1
    if case["offset"] != "none":
        options["offset"] = rng.standard_normal(n) + (900.0 if case["offset"] == "large" else 0.0)
    if case["row_penalty"] != "none":
        options["row_penalty"] = 0.3 if case["row_penalty"] == "scalar" else rng.random(n)
    first = sparse.csr_array(A1 * scales) if case["A1"] == "sparse" else A1 * scales
    second = sparse.csc_matrix(A2) if case["A2"] == "sparse" else A2
    inst = LayeredInstance("TwoLayer", (first, second), rng.standard_normal(shape), activation, options)
    units = scales if k is None else np.repeat(scales, k).reshape(d, k)
    return inst, rng.standard_normal(units.shape) / units, units


@pytest.mark.parametrize(("activation", "case"), CASES)
def test_every_derivative(activation, case, monkeypatch):
    if case["blocks"] == "small":
        monkeypatch.setattr(layered, "CHUNK_ENTRIES", 20)
        monkeypatch.setattr(curvature, "BLOCK_ENTRIES", 20)
    inst, x, units = build(activation, case)
    problem = inst.problem()
    v = np.random.default_rng(0).standard_normal(x.shape) / units
    hessian = inst.hessian(x)
    both = np.multiply.outer(units.reshape(-1), units.reshape(-1))
    assert problem.shape == x.shape
    assert relative(problem.value(x), inst.objective(as_tensor(x)).item()) < TOLERANCE
    assert relative(problem.gradient(x) / units, inst.gradient(x) / units) < TOLERANCE
    assert relative(problem.hessian(x) / both, hessian / both) < TOLERANCE
    product = (hessian @ v.reshape(-1)).reshape(x.shape)
    assert relative(problem.hvp(x, v) / units, product / units) < TOLERANCE
    gauss_newton = problem.gauss_newton(x)
    product = (gauss_newton @ v.reshape(-1)).reshape(x.shape)
    assert relative(problem.gauss_newton_product(x, v) / units, product / units) < TOLERANCE
    assert np.linalg.eigvalsh(gauss_newton / both)[0] > -1e-9
    for name, reference in zip(("A1", "A2"), inst.data_gradient(x), strict=True):
        assert relative(problem.data_gradient(x)[name], reference) < TOLERANCE
    at = problem.evaluate(x.reshape(-1), at_zero=True)
    assert relative(at.gradient_at_zero, inst.gradient(0 * x).reshape(-1)) < TOLERANCE
    majorant = problem.hessian_at(at, absolute=True) / both
    assert np.linalg.eigvalsh(majorant)[0] > -1e-9
    assert np.linalg.eigvalsh(majorant - hessian / both)[0] > -1e-9 * np.linalg.norm(majorant)
    # Several columns at once centre at their own means: the diagonal is that of the majorant.
    assert relative(problem.diagonal_at(at) / units.reshape(-1) ** 2, np.diag(majorant)) < TOLERANCE


@pytest.mark.parametrize("storage", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("family", "activation"), [("ReluSoftmax", "identity"), *(("ThreeLayer", h) for h in ACTIVATIONS)]
)
def test_relu_derivatives_away_from_kinks(family, activation, storage):
    rng = np.random.default_rng(2)
    sizes = [(9, 4), (6, 9)] + ([(5, 6)] if family == "ThreeLayer" else [])
    matrices = [rng.standard_normal(size) for size in sizes]
    options = {"weights": rng.random(sizes[-1][0]) + 0.1, "ridge": 0.2}
    if family == "ThreeLayer":
        options |= {"offset": rng.standard_normal(6) + 900.0, "row_penalty": rng.random(6)}
    stored = tuple(sparse.csr_array(A) if storage == "sparse" else A for A in matrices)
    inst = LayeredInstance(family, stored, rng.random(sizes[-1][0]), activation, options)
    problem = inst.problem()
    x, v = rng.standard_normal((2, 4))
    assert np.abs(matrices[0] @ x).min() > 1e-3
    assert relative(problem.value(x), inst.objective(as_tensor(x)).item()) < TOLERANCE
    assert relative(problem.gradient(x), inst.gradient(x)) < TOLERANCE
    hessian = inst.hessian(x)
    assert relative(problem.hessian(x), hessian) < TOLERANCE
    assert relative(problem.hvp(x, v), hessian @ v) < TOLERANCE
    gauss_newton = problem.gauss_newton(x)
    assert relative(problem.gauss_newton_product(x, v), gauss_newton @ v) < TOLERANCE


@pytest.mark.parametrize("name", [n for n, h in activations.ACTIVATIONS.items() if h.kink is None])
def test_constants_bound_the_activation(name):
    activation = activations.ACTIVATIONS[name]
    y = np.linspace(-30, 30, 600_001)
    h, dh, d2h = activation.jet(y)
    for values, bound in (
        (dh, activation.slope),
        (d2h, activation.curvature),
        (activation.third(y), activation.jerk),
    ):
        assert np.abs(values).max() <= bound * (1 + 1e-12)
        assert np.abs(values).max() >= bound * (1 - 1e-5)
    assert np.abs(h).max() <= activation.size
    for function, derivative in (
        (lambda y: activation.jet(y)[1], d2h),
        (lambda y: activation.jet(y)[2], activation.third(y)),
    ):
        measured = (function(y + 1e-5) - function(y - 1e-5)) / 2e-5
        np.testing.assert_allclose(derivative, measured, atol=1e-9)
    with np.errstate(over="raise", invalid="raise"):
        assert all(np.isfinite(part).all() for part in activation.jet(np.array([-1e4, -800.0, 800.0, 1e4])))
