"""Inversion of an attention layer: derivatives against automatic differentiation, the papers' cases."""

import itertools

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from layer_reference import layer

from attnfit import problems
from attnfit.objectives.inverse_cases import case_number

GRID = [
    {"heads": h, "mask": k, "n_known": u, "m": m, "convention": c, "gamma": g}
    for h, k, u, m, c, g in itertools.product(
        (1, 2), ("none", "causal", "random"), (0, 2), (3, 2, 5), ("rows", "columns"), (0.0, 0.3)
    )
]
SOME = [*GRID[::23], {"bias": True, "heads": 2}, {"bias": True, "convention": "columns", "mask": "causal"}]


def name(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", [*GRID, *SOME[-2:]], ids=name)
def test_every_derivative(case):
    reference, x = layer(**case)
    problem, point = reference.problem(), as_tensor(x)
    v, u = np.random.default_rng(1).standard_normal((2, len(x)))
    gradient = torch.autograd.functional.jacobian(reference, point).numpy()
    hessian = torch.autograd.functional.hessian(reference, point).numpy()
    J = torch.autograd.functional.jacobian(reference.residuals, point).numpy().reshape(-1, len(x))
    C = reference.residuals(point).numpy()
    shape = problem.shape
    assert relative(problem.value(x), float(reference(point))) < 1e-13
    assert relative(problem.residuals(x), C) < 1e-13
    assert relative(problem.gradient(x), gradient.reshape(shape)) < 1e-12
    assert relative(problem.jacobian(x), J) < 1e-12
    assert relative(problem.jacobian_product(x, v).reshape(-1), J @ v) < 1e-12
    assert relative(problem.jacobian_transpose_product(x, C), (J.T @ C.reshape(-1)).reshape(shape)) < 1e-12
    gauss_newton = J.T @ J + case.get("gamma", 0.0) * np.eye(len(x))
    assert relative(problem.gauss_newton(x), gauss_newton) < 1e-12
    assert relative(problem.gauss_newton_product(x, v).reshape(-1), gauss_newton @ v) < 1e-12
    assert relative(problem.hessian(x), hessian) < 1e-12
    assert relative(problem.hvp(x.reshape(shape), u).reshape(-1), hessian @ u) < 1e-12
    assert (problem.diagonal_at(problem.evaluate(x)) >= np.diag(gauss_newton) * (1 - 1e-12)).all()


def test_diagonal_of_one_head_is_exact():
    reference, x = layer(mask="causal", n_known=2, gamma=0.2)
    problem = reference.problem()
    exact = np.diag(problem.gauss_newton(x))
    assert relative(problem.diagonal_at(problem.evaluate(x)), exact) < 1e-12


@pytest.mark.parametrize("case", SOME, ids=name)
def test_five_cases_are_the_hessians_of_the_residuals(case):
    reference, x = layer(**case)
    problem = reference.problem()
    n, d = problem.n, problem.d
    unknown = problem.unknown
    for i0, j0 in itertools.product(range(n), range(problem.m)):
        exact = torch.autograd.functional.hessian(
            lambda t, i=i0, j=j0: reference.residuals(t)[i, j], as_tensor(x)
        )
        ours = problem.hessian_blocks(i0, j0, x)[np.ix_(unknown, unknown)].transpose(2, 0, 3, 1)
        # Under a causal mask the first token's own Hessian is zero.
        assert np.abs(ours.reshape(exact.shape) - exact.numpy()).max() < 1e-13 * (1.0 + exact.abs().max())
    cases = {case_number(i, j, k) for i, j, k in itertools.product(range(n), repeat=3)}
    assert cases == {1, 2, 3, 4, 5}
    assert d == len(problem.tokens(x))


def test_both_conventions_are_one_with_the_form_transposed():
    reference, x = layer(heads=2)
    rows = reference.problem()
    W = [matrix.T for matrix in reference.W]
    columns = problems.LayerInversion(W, reference.V, reference.B, convention="columns")
    assert relative(rows.hessian(x), columns.hessian(x)) < 1e-15


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_projections_are_those_of_torch(separate, mixed):
    torch.manual_seed(0)
    n, d, heads = 5, 6, 2
    module = torch.nn.MultiheadAttention(d, heads, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(module.in_proj_bias)
    torch.nn.init.normal_(module.out_proj.bias)
    if not mixed:
        torch.nn.init.eye_(module.out_proj.weight)
        torch.nn.init.zeros_(module.out_proj.bias)
    T = torch.randn(1, n, d, dtype=torch.float64)
    B = module(T, T, T, need_weights=False)[0][0].detach().numpy()
    W_Q, W_K, W_V = (w.detach().numpy().T for w in module.in_proj_weight.chunk(3))
    b_Q, _, b_V = (b.detach().numpy() for b in module.in_proj_bias.chunk(3))
    W_O, b_O = module.out_proj.weight.detach().numpy().T, module.out_proj.bias.detach().numpy()
    if separate:
        W_Q, W_K, W_V = (np.split(w, heads, axis=1) for w in (W_Q, W_K, W_V))
    problem = problems.LayerInversion.from_projections(
        W_Q, W_K, W_V, W_O if mixed else None, B, n_heads=heads, b_Q=b_Q, b_V=b_V, b_O=b_O if mixed else None
    )
    assert np.abs(problem.residuals(T[0].numpy().T)).max() < 1e-13


def test_tokens_far_from_zero_cost_no_digits():
    reference, x = layer(n=6, d=4, m=4)
    far = x.reshape(4, 6) + 900.0
    problem = reference.problem()
    # Logits near 1e5 would overflow an unshifted exponential. Moving the keys back is exact.
    C = problem.residuals(far)
    near = problem.residuals(x)
    assert np.isfinite(C).all()
    assert np.isfinite(near).all()
    hessian = problem.hessian(far)
    exact = torch.autograd.functional.hessian(reference, as_tensor(far.reshape(-1))).numpy()
    assert relative(hessian, exact) < 1e-7
    assert relative(hessian, hessian.T) < 1e-15


def test_an_overflowing_loss_says_so():
    reference, x = layer()
    problem = reference.problem()
    assert problem.evaluate(1e200 * x).value == np.inf
    with pytest.raises(OverflowError, match="move x towards zero"):
        problem.gradient(1e200 * x)


def test_start_is_exact_where_tokens_attend_to_themselves():
    rng = np.random.default_rng(0)
    X, V = rng.standard_normal((3, 4)), rng.standard_normal((3, 5))
    problem = problems.LayerInversion(200.0 * np.eye(3), V, X.T @ V, mask=np.eye(4, dtype=bool))
    assert relative(problem.initial_point(), X) < 1e-12


def test_known_tokens_as_columns_and_as_a_mapping():
    reference, x = layer(n_known=2)
    columns = np.flatnonzero(~np.isnan(reference.known[0]))
    mapping = {int(k): reference.known[:, k] for k in columns}
    problem = problems.LayerInversion(reference.W, reference.V, reference.B, known=mapping)
    assert relative(problem.hessian(x), reference.problem().hessian(x)) == 0.0
    assert problem.shape == (3, 3)
    np.testing.assert_array_equal(problem.tokens(x)[:, columns], reference.known[:, columns])


def test_independent_inputs_as_one_array():
    reference, _ = layer(heads=2, mask="causal", n_known=1)
    problem = reference.problem()
    points = np.random.default_rng(3).standard_normal((4, problem.n_unknowns))
    at = problem.layer.forward(problem.token_rows(points))
    C = at.output - problem.B
    gradients = problem.columns(problem.layer.pull_back(at, C))
    jacobians = problem.layer.jacobian(at, problem.unknown)
    for k, x in enumerate(points):
        assert relative(C[k], problem.residuals(x)) < 1e-13
        assert relative(gradients[k], problem.gradient(x)) < 1e-13
        assert relative(jacobians[k], problem.jacobian(x)) < 1e-13


GOOD = {"W": np.eye(2), "V": np.ones((2, 3)), "B": np.ones((4, 3))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": np.ones((2, 3))}, r"W has shape \(2, 3\) in head 0; expected \(2, 2\)"),
        ({"V": np.ones((3, 3))}, r"V has shape \(3, 3\) in head 0; expected \(2, 3\)"),
        ({"B": np.ones((4, 2))}, "B has 2 columns but V has 3"),
        ({"W": [np.eye(2)] * 2}, "W has 2 heads but V has 1"),
        (
            {"W": [np.eye(2)] * 2, "V": [np.ones((2, 3)), np.full((2, 3), np.nan)]},
            r"V\[1\] contains NaN at row 0",
        ),
        ({"W": np.ones(2)}, r"W has shape \(2,\); pass a matrix"),
        ({"B": [["a"]]}, "B has dtype"),
        ({"B": [[1.0], [1.0, 2.0]]}, "B cannot be read as a matrix"),
        ({"gamma": -1.0}, "gamma must be a finite number >= 0"),
        ({"gamma": "a"}, "gamma must be a finite number >= 0"),
        ({"mask": "full"}, "mask must be 'causal'"),
        ({"mask": np.ones((2, 2))}, r"mask has shape \(2, 2\); expected \(4, 4\)"),
        ({"mask": np.full((4, 4), 0.5)}, "mask must hold only True"),
        ({"mask": np.diag([1, 1, 0, 1])}, "mask hides every key from query 2"),
        ({"known": np.ones((2, 4))}, "known holds every token"),
        ({"known": np.ones((4, 2))}, r"known has shape \(4, 2\); expected \(d, n\) = \(2, 4\)"),
        ({"known": [[1.0, np.nan, 1.0, np.nan], [1.0] * 4]}, "known holds part of column 1"),
        ({"known": [[np.inf] + [np.nan] * 3] * 2}, "known is infinite in column 0"),
        ({"known": {4: np.ones(2)}}, "known has token 4; use positions 0 to 3"),
        ({"known": {0: np.ones(3)}}, r"known\[0\] must hold 2 finite numbers"),
        ({"convention": "row"}, "convention must be one of 'rows', 'columns'"),
        ({"key_bias": np.ones(3)}, r"key_bias has shape \(1, 3\); expected \(heads, d\) = \(1, 2\)"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        problems.LayerInversion(**(GOOD | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_K": np.ones((4, 2))}, r"W_K has shape \(4, 1\) in head 0; expected \(4, 2\)"),
        ({"W_V": np.ones((3, 2))}, r"W_V has shape \(3, 1\) in head 0; expected \(4, 1\)"),
        ({"W_O": np.ones((6, 4))}, r"W_O has shape \(3, 4\) in head 0; expected \(2, 4\)"),
        ({"n_heads": 3}, r"W_Q has 1 matrices, the first of shape \(4, 4\), which does not make n_heads=3"),
        ({"n_heads": 0}, "n_heads must be a positive integer"),
        ({"b_Q": np.ones(3)}, r"b_Q has shape \(3,\) but the projection has 4 rows"),
    ],
)
def test_bad_projections(changes, message):
    square = np.ones((4, 4))
    good = {"W_Q": square, "W_K": square, "W_V": square, "W_O": square, "B": np.ones((5, 4)), "n_heads": 2}
    with pytest.raises(ValueError, match=message):
        problems.LayerInversion.from_projections(**(good | changes))


def test_residuals_out_of_range():
    reference, x = layer()
    with pytest.raises(ValueError, match="i0 is 5; residuals are numbered from 0 to 4"):
        reference.problem().hessian_blocks(5, 0, x)
