"""Attention outputs of several texts and heads: derivatives, and the minimum that many starts find."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.objectives.separable import Separable
from attnfit.solvers import Newton, VariableProjection

D1, D2, V, M = 3, 2, 2, 3


def texts(causal=True, heads=2, shifted=False, ridge=0.0, seed=0):
    """Two texts of different lengths, their loss in torch, and a point."""
    rng = np.random.default_rng(seed)
    n, k = (9, 8), (9, 10)
    A1, A2, A3, B = (
        [rng.standard_normal((rows, columns)) for rows in sizes]
        for sizes, columns in ((n, D1), (k, D2), (k, V), (n, M))
    )
    weights = [rng.random(rows) + 0.1 for rows in n]
    offset = [rng.standard_normal(shape) for shape in zip(n, k, strict=True)] if shifted else None
    problem = problems.FullAttention(
        A1, A2, A3, B, mask="causal" if causal else None, weights=weights, offset=offset, ridge=ridge,
        n_heads=heads,
    )  # fmt: skip

    def outputs(X, Y=None, first_order=False):
        """Outputs, or [P_1 A3 ... P_H A3], of all texts."""
        made = []
        for s, (a, b, c) in enumerate(zip(A1, A2, A3, strict=True)):
            seen = torch.tensor(np.tri(len(a), len(b), len(b) - len(a), dtype=bool) | (not causal))
            z = as_tensor(a) @ X @ as_tensor(b).T
            shift = as_tensor(offset[s]) if shifted else 0.0
            if first_order:
                U = torch.softmax(torch.where(seen, 0.0 * z + shift, -torch.inf), -1)
                P = U * (1.0 + z - (U * z).sum(-1, keepdim=True))
            else:
                P = torch.softmax(torch.where(seen, z + shift, -torch.inf), -1)
            made.append(torch.cat(list(P @ as_tensor(c)), 1) if Y is None else (P @ as_tensor(c) @ Y).sum(0))
        return torch.cat(made)

    def exact(x):
        X, Y = x[: heads * D1 * D2].reshape(heads, D1, D2), x[heads * D1 * D2 :].reshape(heads, V, M)
        C = outputs(X, Y) - as_tensor(np.concatenate(B))
        return 0.5 * (as_tensor(np.concatenate(weights)) * (C**2).sum(1)).sum() + 0.5 * ridge * (x @ x)

    return problem, exact, outputs, rng.standard_normal(problem.n_unknowns)


CASES = [{}, {"causal": False, "ridge": 0.3}, {"heads": 1, "shifted": True}, {"heads": 3, "shifted": True}]


@pytest.mark.parametrize("case", CASES)
def test_joint_derivatives(case):
    problem, exact, outputs, x = texts(**case)
    point = as_tensor(x).requires_grad_()
    gradient = torch.autograd.grad(exact(point), point)[0].numpy()
    H = torch.autograd.functional.hessian(exact, as_tensor(x)).numpy()
    v = np.random.default_rng(1).standard_normal(len(x))
    assert relative(problem.value(x), float(exact(as_tensor(x)))) < 1e-12
    assert relative(problem.gradient(x), gradient) < 1e-12
    assert relative(problem.hessian(x), H) < 1e-12
    assert relative(problem.hvp(x, v), H @ v) < 1e-12
    X, Y = problem.split(x)
    heads = () if problem.n_heads == 1 else (problem.n_heads,)
    assert (X.shape, Y.shape) == ((*heads, D1, D2), (*heads, V, M))
    assert np.array_equal(problem.join(X, Y), x)
    fitted = problem.predict(x)
    assert [f.shape for f in fitted] == [(9, M), (8, M)]
    reshaped = as_tensor(np.reshape(X, (-1, D1, D2))), as_tensor(np.reshape(Y, (-1, V, M)))
    assert relative(np.concatenate(fitted), outputs(*reshaped).numpy()) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_projected_derivatives(case):
    problem, exact, _, x = texts(**case)
    projected = problem.projected()
    X, _ = problem.split(x)
    full = as_tensor(problem.join(X, projected.values(X)))
    size = projected.n_unknowns
    point = full.clone().requires_grad_()
    gradient = torch.autograd.grad(exact(point), point)[0].numpy()
    H = torch.autograd.functional.hessian(exact, full).numpy()
    schur = H[:size, :size] - H[:size, size:] @ np.linalg.solve(H[size:, size:], H[size:, :size])
    assert np.linalg.norm(gradient[size:]) < 1e-9
    assert relative(projected.value(X), float(exact(full))) < 1e-12
    assert relative(projected.gradient(X).reshape(-1), gradient[:size]) < 1e-9
    assert relative(projected.hessian(X), schur) < 1e-8


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_normal_equations_of_several_points(case, first_order):
    problem, _, outputs, _ = texts(**case)
    projected = problem.projected()
    model = Separable(projected, first_order=first_order)
    X = np.random.default_rng(2).standard_normal((3, problem.n_heads, D1, D2))
    at = model.evaluate(X)
    gradients, normals = model.normal(at)
    root, ridge = as_tensor(model.root), float(np.max(problem.ridge))
    size = projected.n_unknowns

    def Z(flat):
        rows = root * outputs(flat.reshape(-1, D1, D2), first_order=first_order)
        return torch.cat([rows, np.sqrt(ridge) * torch.eye(rows.shape[1], dtype=rows.dtype)])

    B = as_tensor(np.concatenate([model.B, np.zeros((problem.n_heads * V, M))]))

    def phi(flat):
        z = Z(flat)
        C = z @ torch.linalg.solve(z.T @ z, z.T @ B) - B
        return 0.5 * (C**2).sum() + 0.5 * ridge * (flat @ flat)

    for s in range(3):
        flat = as_tensor(X[s].reshape(-1))
        point = flat.clone().requires_grad_()
        assert relative(at.values[s], float(phi(flat))) < 1e-9
        assert relative(gradients[s], torch.autograd.grad(phi(point), point)[0].numpy()) < 1e-7
        z = Z(flat)
        Y = torch.linalg.solve(z.T @ z, z.T @ B)
        Q = np.linalg.qr(z.numpy())[0]
        J = torch.autograd.functional.jacobian(lambda t, Y=Y: Z(t) @ Y, flat).numpy()
        J = np.einsum("in,nmd->imd", np.eye(len(Q)) - Q @ Q.T, J).reshape(-1, size)
        assert relative(normals[s], J.T @ J + ridge * np.eye(size)) < 1e-7


def test_texts_are_blocks_of_one_mask():
    rng = np.random.default_rng(3)
    A1, A2, A3, B = ([rng.standard_normal((rows, c)) for rows in (6, 7)] for c in (D1, D2, V, M))
    several = problems.FullAttention(A1, A2, A3, B, mask="causal", n_heads=2)
    mask = np.zeros((13, 13), dtype=bool)
    mask[:6, :6], mask[6:, 6:] = np.tri(6, dtype=bool), np.tri(7, dtype=bool)
    one = problems.FullAttention(*(np.concatenate(part) for part in (A1, A2, A3, B)), mask=mask, n_heads=2)
    x = rng.standard_normal(one.n_unknowns)
    assert relative(several.value(x), one.value(x)) < 1e-14
    assert relative(several.gradient(x), one.gradient(x)) < 1e-12
    assert relative(np.concatenate(several.predict(x)), one.predict(x)) < 1e-12


# ---- the minimum


def planted(seed, n, k, d, v, m, scale=None, deviation=None, count=1, causal=False, heads=1, noise=0.0):
    """A problem whose outputs are those of some X and Y but for noise, and these."""
    rng = np.random.default_rng(seed)
    A1, A2, A3 = [], [], []
    for _ in range(count):
        A1.append(rng.standard_normal((n, d)))
        A2.append(rng.standard_normal((k, d)))
        A3.append(rng.standard_normal((k, v)))
    X, Y = rng.standard_normal((heads, d, d)), rng.standard_normal((heads, v, m))
    X *= scale or deviation / np.std([a @ X @ b.T for a, b in zip(A1, A2, strict=True)])
    data = (A1[0], A2[0], A3[0]) if count == 1 else (A1, A2, A3)
    options = {"mask": "causal" if causal else None, "n_heads": heads}
    nothing = np.zeros((n, m)) if count == 1 else [np.zeros((n, m))] * count
    blank = problems.FullAttention(*data, nothing, **options)
    B = blank.predict(blank.join(X, Y))
    if noise:
        size = noise * float(np.std(B))
        noisy = [b + size * rng.standard_normal((n, m)) for b in ([B] if count == 1 else B)]
        B = noisy[0] if count == 1 else noisy
    return problems.FullAttention(*data, B, **options), X, Y


@pytest.mark.parametrize("scale", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_planted_outputs_come_back(scale, seed):
    # Version 0.1.0, with five starts, found 4, 2 and 1 of 8 of these.
    problem, X, Y = planted(seed, 40, 30, 5, 4, 3, scale=scale)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert "exact fit" in result.message
    fitted, values = problem.split(result.x)
    assert relative(problem.predict(result.x), problem.B) < 1e-9
    assert relative(fitted, X[0]) < 1e-7
    assert relative(values, Y[0]) < 1e-7


@pytest.mark.parametrize(
    ("count", "n", "causal", "heads"),
    [(4, 30, True, 1), (4, 30, False, 1), (1, 120, True, 2), (6, 20, False, 2)],
)
def test_several_texts_or_a_mask_need_few_starts(count, n, causal, heads):
    problem, X, _ = planted(1, n, n, 6, 4, 4, deviation=1.0, count=count, causal=causal, heads=heads)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert "exact fit" in result.message
    assert len(result.local_values) <= 16
    fitted = problem.split(result.x)[0].reshape(heads, 6, 6)
    # Heads are a set.
    for one in X:
        assert min(relative(other, one) for other in fitted) < 1e-6


def test_noisy_outputs_end_in_the_minimum_nearest_to_what_was_planted():
    for seed in range(3):
        problem, X, Y = planted(seed, 30, 30, 5, 3, 4, deviation=1.0, count=3, causal=True, noise=0.1)
        near = minimize(problem, x0=problem.join(X, Y))
        result = minimize(problem, random_state=0)
        assert result.value <= near.value * (1.0 + 1e-6)
        assert "exact fit" not in result.message
        assert "lowest of" in result.message


def test_what_is_said_of_the_lowest_value():
    problem, _, _ = planted(2, 40, 30, 5, 4, 3, scale=0.4, noise=0.1)
    result = minimize(problem, solver=VariableProjection(n_starts=1), random_state=0)
    assert result.message.startswith("converged: warning: reached by one of 1 start: a lower one may exist")
    result = minimize(problem, random_state=0)
    reached = sum(value <= result.value * (1 + 1e-6) for value in result.local_values.values())
    assert reached >= 4
    assert f"lowest of {len(result.local_values)} starts, reached {reached} times" in result.message
    # What is left beside two simpler models.
    B = problem.B
    models = {
        "what uniform attention leaves": np.tile(problem.A3.mean(axis=0), (40, 1)),
        "what an affine map of A1 leaves": np.column_stack([problem.A1, np.ones(40)]),
    }
    for name, model in models.items():
        left = B - model @ np.linalg.lstsq(model, B, rcond=None)[0]
        assert f"{2 * result.value / np.sum(left**2):.1e} of {name}" in result.message
    assert "global" not in result.message


def test_weak_attention_of_one_text_shows_a_product_only():
    problem, _, _ = planted(0, 40, 30, 4, 3, 3, scale=0.02, noise=0.0)
    noisy = problem.B + 0.01 * np.std(problem.B) * np.random.default_rng(0).standard_normal(problem.B.shape)
    weak = problems.FullAttention(problem.A1, problem.A2, problem.A3, noisy)
    result = minimize(weak, solver=VariableProjection(n_starts=20), random_state=0)
    spread = float(Separable(weak.projected()).spread(weak.split(result.x)[0][None, None]).max())
    assert ("X is determined only up to X C Y to first order" in result.message) == (spread < 0.5)


def test_a_zero_residual_of_too_few_equations_is_no_exact_fit():
    rng = np.random.default_rng(6)
    A1, A2, A3, B = (rng.standard_normal(s) for s in ((5, 3), (8, 3), (8, 3), (5, 2)))
    result = minimize(problems.FullAttention(A1, A2, A3, B), random_state=0)
    assert "exact fit" not in result.message
    if result.value < 1e-18:
        assert "10 equations for 15 unknowns leave room" in result.message


def test_a_start_of_ones_own_is_the_only_one():
    problem, X, Y = planted(0, 40, 30, 5, 4, 3, scale=0.4)
    result = minimize(problem, x0=problem.join(1.01 * X, Y))
    assert len(result.local_values) == 1
    assert relative(problem.split(result.x)[0], X[0]) < 1e-6


def test_a_callback_ends_the_search_with_the_best_point():
    problem, _, _ = planted(0, 40, 30, 5, 4, 3, scale=0.4, noise=0.0)
    seen = []
    result = minimize(
        problem, callback=lambda record: seen.append(record.value) or len(seen) == 5, random_state=0
    )
    assert result.status == "interrupted"
    assert len(seen) == 5
    assert relative(result.value, min(seen)) < 1e-9


def test_large_maps_are_fitted_by_newton():
    problem, _, _ = planted(0, 40, 30, 3, 2, 2, scale=0.4)
    large = problem.reduction().problem
    assert VariableProjection.suits(large)
    assert not VariableProjection.suits(problem)
    assert minimize(problem, solver=Newton(), random_state=0).solver.startswith("Newton")
    with pytest.raises(ValueError, match="VariableProjection takes FullAttention"):
        minimize(problems.Softmax(np.eye(3), np.ones(3) / 3), solver=VariableProjection())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A1": [np.ones((6, 3)), np.ones((7, 2))]}, r"A1\[1\] has 2 features but A1\[0\] has 3"),
        ({"A2": [np.ones((6, 2)), np.ones((7, 3))]}, r"A2\[1\] has 3 features but A2\[0\] has 2"),
        ({"A3": [np.ones((6, 2)), np.ones((7, 1))]}, r"A3\[1\] has 1 columns but A3\[0\] has 2"),
        ({"A3": [np.ones((6, 2)), np.ones((9, 2))]}, r"A3\[1\] has 9 rows but A2\[1\] has 7"),
        ({"B": [np.ones((6, 3)), np.ones((7, 4))]}, r"B\[1\] has 4 columns but B\[0\] has 3"),
        ({"B": [np.ones((6, 3))]}, "B has 1 sequences but A1 has 2"),
        ({"weights": np.ones(13)}, "weights must be a list of 2 vectors"),
        ({"weights": [np.ones(6), -np.ones(7)]}, r"weights\[1\] is negative at index 0"),
        ({"n_heads": 7}, "only 13 outputs but A3 has 2 columns in 7 heads"),
        ({"n_heads": 0}, "n_heads must be an integer >= 1, not 0"),
        ({"mask": [np.ones((6, 6)), np.zeros((7, 7))]}, r"mask\[1\] leaves query 0 without a key"),
    ],
)
def test_named_errors(changes, message):
    rng = np.random.default_rng(7)
    arguments = {
        name: [rng.standard_normal((rows, columns)) for rows in (6, 7)]
        for name, columns in (("A1", 3), ("A2", 2), ("A3", 2), ("B", 3))
    }
    with pytest.raises(ValueError, match=message):
        problems.FullAttention(**(arguments | changes))


@pytest.mark.parametrize("options", [{"n_starts": 0}, {"n_starts": 2.5}, {"n_starts": True}, {"seconds": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VariableProjection(**options)


def test_a_search_that_stops_short_says_what_it_found():
    problem, _, _ = planted(2, 40, 30, 5, 4, 3, scale=0.4, noise=0.1)
    with pytest.warns(ConvergenceWarning, match="from the best end: warning: reached by one of 2"):
        result = minimize(problem, solver=VariableProjection(n_starts=2), max_iter=2, random_state=0)
    assert result.status == "max_iter"
    assert "of what uniform attention leaves" in result.message
