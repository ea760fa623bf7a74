"""Kernel regression against dense solutions and autodiff, and what it says where there is none."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from scipy import linalg
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.solvers import ConjugateGradients, Newton, solve_even_power, solve_odd_power

PENALTIES = ("function", "coefficients")


def tokens(n, d, seed=0, scale=0.5):
    return scale * np.random.default_rng(seed).standard_normal((n, d)) / d**0.25


def kernel(A, temperature=1.0, normalise=False):
    """G as its definition has it, from the n x n matrix, in extended precision."""
    A = np.asarray(A, dtype=np.longdouble)
    K = np.exp(A @ A.T / temperature)
    s = np.sqrt(K.sum(axis=1)) if normalise else np.exp(np.sum(A * A, axis=1) / (2 * temperature))
    return np.asarray(K / np.multiply.outer(s, s), dtype=float), np.asarray(s, dtype=float)


def dense_solution(A, b, ridge, penalty, temperature=1.0, normalise=False):
    G, s = kernel(A, temperature, normalise)
    right = (b.T * (s if normalise else 1.0 / s)).T
    if penalty == "function":
        return linalg.solve(G + ridge * np.eye(len(G)), right, assume_a="pos")
    return linalg.solve(G @ G + ridge * np.eye(len(G)), G @ right, assume_a="pos")


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("normalise", [False, True])
def test_value_gradient_and_hessian_are_those_of_the_definition(penalty, normalise):
    A, b = tokens(30, 3, scale=1.0), np.random.default_rng(1).standard_normal(30)
    problem = problems.KernelRegression(
        A, b, temperature=0.7, ridge=0.3, penalty=penalty, normalise=normalise
    )
    G, s = kernel(A, 0.7, normalise)
    right = as_tensor(b * s if normalise else b / s)

    def objective(y):
        fitted = as_tensor(G) @ y
        if penalty == "function":
            return 0.5 * (y @ fitted) + 0.5 * 0.3 * (y @ y) - right @ y
        return 0.5 * ((fitted - right) ** 2).sum() + 0.5 * 0.3 * (y @ y)

    y = np.random.default_rng(2).standard_normal(30)
    assert relative(problem.value(y), float(objective(as_tensor(y)))) < 1e-13
    assert relative(problem.gradient(y), torch.func.grad(objective)(as_tensor(y)).numpy()) < 1e-12
    hessian = torch.func.hessian(objective)(as_tensor(y)).numpy()
    assert relative(problem.hessian(y), hessian) < 1e-12
    assert relative(problem.hvp(y, b), hessian @ b) < 1e-12
    at = problem.evaluate(y, at_zero=True)
    assert relative(problem.diagonal_at(at), np.diag(hessian)) < 1e-12
    zero = torch.func.grad(objective)(as_tensor(0.0 * y)).numpy()
    assert relative(at.gradient_at_zero, zero) < 1e-12


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("rank", [None, 0, 40, 1000])
def test_the_answer_is_that_of_the_dense_system(penalty, normalise, rank):
    A, b = tokens(150, 4), np.random.default_rng(1).standard_normal((150, 3))
    problem = problems.KernelRegression(
        A, b, temperature=1.5, ridge=1e-2, penalty=penalty, normalise=normalise
    )
    result = minimize(problem, solver=ConjugateGradients(rank), tol=1e-10, max_iter=2000, random_state=0)
    assert result.status == "converged"
    exact = dense_solution(A, b, 1e-2, penalty, 1.5, normalise)
    # The error is at most the residual's norm over the ridge, in either system.
    G, s = kernel(A, 1.5, normalise)
    right = b * s[:, None] if normalise else b / s[:, None]
    right = right if penalty == "function" else G @ right
    assert (np.linalg.norm(result.x - exact, axis=0) <= 1.1e-8 * np.linalg.norm(right, axis=0)).all()
    fitted = G @ result.x * (1.0 / s if normalise else s)[:, None]
    assert relative(problem.predict(result.x), fitted) < 1e-10
    assert relative(problem.coefficients(result.x), result.x / s[:, None]) < 1e-12
    assert relative(result.value, problem.value(result.x)) < 1e-12
    # The values along the way are those of the objective.
    assert abs(result.history[-1].value - result.value) <= 1e-9 * abs(result.value)


def test_predictions_are_those_of_the_published_kernel():
    """``K x`` of the coefficients, and ``D^-1 K x`` of the normalised form, without any scaling."""
    A, b = tokens(40, 3, scale=1.0), np.random.default_rng(1).standard_normal(40)
    K = np.exp(A @ A.T)
    for normalise in (False, True):
        problem = problems.KernelRegression(A, b, ridge=0.1, normalise=normalise)
        y = np.random.default_rng(2).standard_normal(40)
        own = K / K.sum(axis=1, keepdims=True) if normalise else K
        assert relative(problem.predict(y), own @ problem.coefficients(y)) < 1e-12


def test_the_softmax_form_solves_the_softmax_problem():
    """Distinct tokens far apart, no penalty: D^-1 K x = b, which is K x = D b."""
    A = np.random.default_rng(0).standard_normal((40, 3))
    A *= 4.0 / np.linalg.norm(A, axis=1, keepdims=True)
    b = np.random.default_rng(1).standard_normal(40)
    problem = problems.KernelRegression(A, b, ridge=0.0, normalise=True)
    result = minimize(problem, tol=1e-10, max_iter=500)
    assert result.converged
    K = np.exp(A @ A.T)
    np.testing.assert_allclose(
        (K / K.sum(axis=1, keepdims=True)) @ problem.coefficients(result.x), b, atol=1e-6
    )


@pytest.mark.parametrize("penalty", PENALTIES)
def test_right_sides_are_independent_and_share_the_products(penalty):
    A, B = tokens(200, 4), np.random.default_rng(1).standard_normal((200, 5))
    B[:, 2] = 0.0
    together = problems.KernelRegression(A, B, ridge=1e-2, penalty=penalty)
    result = minimize(together, random_state=0)
    assert result.converged and result.x.shape == (200, 5)
    assert not result.x[:, 2].any()
    before = 0
    for j in range(5):
        one = minimize(problems.KernelRegression(A, B[:, j], ridge=1e-2, penalty=penalty), random_state=0)
        before = max(before, one.n_iter)
        assert np.abs(one.x - result.x[:, j]).max() <= 1e-5 * max(np.abs(one.x).max(), 1.0)
    assert result.n_iter <= before + 1


def test_a_preconditioner_saves_most_products():
    """The counts of the table in docs/kernels.md, at a quarter of its size."""
    A, b = tokens(500, 6), np.random.default_rng(1).standard_normal(500)
    counts = {}
    for rank in (0, 200):
        problem = problems.KernelRegression(A, b, ridge=1e-2)
        result = minimize(problem, solver=ConjugateGradients(rank), tol=1e-10, max_iter=2000, random_state=0)
        assert result.converged
        counts[rank] = result.n_iter
    assert counts[200] * 10 <= counts[0]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_preconditioner_is_the_inverse_that_it_is_called(penalty):
    A = tokens(60, 3)
    problem = problems.KernelRegression(A, A[:, 0], ridge=0.05, penalty=penalty)
    found = problem.preconditioner(20, np.random.default_rng(0))
    assert found.rank == 20
    low = found.F @ found.F.T
    left = np.linalg.eigvalsh(kernel(A)[0] - low)
    assert left[0] > -1e-12
    own = low if penalty == "function" else low @ low
    V = np.random.default_rng(1).standard_normal((60, 2))
    np.testing.assert_allclose(found((own + 0.05 * np.eye(60)) @ V), V, atol=1e-10)
    assert found.effective_rank == int((np.linalg.eigvalsh(own) > 0.05).sum())
    # With as many pivots as tokens it is the kernel.
    whole = problem.preconditioner(60, np.random.default_rng(0)).F
    np.testing.assert_allclose(whole @ whole.T, kernel(A)[0], atol=1e-11)


def test_the_effective_rank_is_told():
    A = tokens(300, 4)
    problem = problems.KernelRegression(A, A[:, 0], ridge=1e-1)
    exact = int((np.linalg.eigvalsh(kernel(A)[0]) > 1e-1).sum())
    result = minimize(problem, random_state=0)
    # Those of the factor are no larger than those of the kernel.
    assert exact - 3 <= int(result.message.split("effective rank ")[1]) <= exact
    short = minimize(problem, solver=ConjugateGradients(exact - 10), random_state=0)
    assert f"effective rank at least {exact - 10}" in short.message


def test_no_square_of_the_number_of_tokens_is_held():
    n, rank = 3000, 60
    A, b = tokens(n, 4), np.random.default_rng(1).standard_normal(n)
    with pytest.warns(UserWarning):
        # What is imported on the way counts too.
        minimize(problems.KernelRegression(A[:100], b[:100], ridge=1e-9), max_iter=1)
    tracemalloc.start()
    try:
        problem = problems.KernelRegression(A, b, ridge=1e-2)
        problem.block_rows = 20
        minimize(problem, solver=ConjugateGradients(rank), max_iter=4, random_state=0)
        peak = tracemalloc.get_traced_memory()[1]
    except UserWarning:
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The factor, one block, and some vectors.
    assert peak <= 8 * n * (rank + 20 + 30)


def test_the_memory_of_a_hundred_thousand_tokens(monkeypatch):
    """What is allocated: the factor, of the usual rank, one block of the kernel and the method's vectors.

    A penalty beside which nothing is left of the kernel ends the factor at once, and one block stands for
    all: the arrays are those of a fit, their numbers are not formed.
    """
    n = 100_000
    A, b = tokens(n, 16), np.random.default_rng(1).standard_normal(n)
    problem = problems.KernelRegression(A, b, ridge=2.0 * n)
    blocks = problem._blocks
    monkeypatch.setattr(problem, "_blocks", lambda: [next(blocks())])
    tracemalloc.start()
    try:
        inverse = problem.preconditioner(None, np.random.default_rng(0))
        R = problem.right_sides.copy()
        P = inverse(R)
        # What stands in the rows of blocks that were not formed is whatever was there before.
        with np.errstate(all="ignore"):
            Y = R + P + 0.0 * problem.operator(P)
            inverse(Y)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rank = 632
    assert peak >= 8 * n * rank
    assert peak <= 1.1 * (rank + problem.block_rows / 1000) * n * 8


# ---- ends


def test_a_fit_that_was_cut_short_says_so():
    A, b = tokens(300, 6), np.random.default_rng(1).standard_normal(300)
    problem = problems.KernelRegression(A, b, ridge=1e-4)
    with pytest.warns(UserWarning, match="raise max_iter"):
        result = minimize(problem, solver=ConjugateGradients(0), max_iter=5)
    assert result.status == "max_iter" and result.n_iter == 5


def test_a_residual_that_float64_does_not_allow_is_not_claimed():
    A, b = tokens(300, 2), np.random.default_rng(1).standard_normal(300)
    problem = problems.KernelRegression(A, b, ridge=1e-12)
    with pytest.warns(UserWarning, match="float64|max_iter"):
        result = minimize(problem, tol=1e-14, max_iter=300)
    assert result.status in ("precision", "max_iter")
    told = float(result.message.split("relative residual ")[1].split(",")[0])
    right = problem.right_sides
    true = np.linalg.norm(right - problem.operator(result.x[:, None])) / np.linalg.norm(right)
    assert abs(told - true) <= 0.1 * true
    assert told > 1e-14


def test_a_callback_ends_the_fit_with_what_there_is():
    A, b = tokens(300, 6), np.random.default_rng(1).standard_normal(300)
    problem = problems.KernelRegression(A, b, ridge=1e-3)
    seen = []
    result = minimize(problem, callback=lambda record: seen.append(record) or len(seen) == 4)
    assert result.status == "interrupted"
    assert problem.value(result.x) < problem.value(np.zeros(300))
    again = minimize(problem, result.x)
    assert again.converged
    assert abs(again.history[0].value - result.value) <= 1e-9 * abs(result.value)


def test_a_start_at_the_answer_needs_no_product():
    A, b = tokens(100, 3), np.random.default_rng(1).standard_normal(100)
    problem = problems.KernelRegression(A, b, ridge=1e-1)
    found = minimize(problem, tol=1e-10)
    assert minimize(problem, found.x, tol=1e-8).n_iter == 0


def test_kernel_ridge_regression_is_what_the_dual_solves():
    """The answer minimises ``|G y - b'|^2 + ridge y^T G y`` too: no point near is lower."""
    A, b = tokens(40, 2), np.random.default_rng(1).standard_normal(40)
    y = minimize(problems.KernelRegression(A, b, ridge=1e-2), tol=1e-12).x
    G, s = kernel(A)
    primal = lambda y: np.sum((G @ y - b / s) ** 2) + 1e-2 * y @ G @ y  # noqa: E731
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert primal(y + 1e-3 * rng.standard_normal(40)) >= primal(y)


def test_newtons_method_finds_the_same_point():
    A, b = tokens(60, 3), np.random.default_rng(1).standard_normal(60)
    problem = problems.KernelRegression(A, b, ridge=1e-1)
    found = minimize(problem, solver=Newton())
    assert relative(found.x, minimize(problem, tol=1e-10).x) < 1e-6


# ---- edges


@pytest.mark.parametrize("penalty", PENALTIES)
def test_one_token_and_tokens_that_occur_twice(penalty):
    one = minimize(problems.KernelRegression([[2.0, 1.0]], [3.0], ridge=0.0, penalty=penalty))
    assert one.converged
    np.testing.assert_allclose(one.x, 3.0 * np.exp(-2.5))
    A = np.vstack([tokens(30, 3), tokens(30, 3)])
    b = np.random.default_rng(1).standard_normal(60)
    with pytest.raises(ValueError, match="occur twice"):
        problems.KernelRegression(A, b, ridge=0.0, penalty=penalty)
    result = minimize(problems.KernelRegression(A, b, ridge=1e-2, penalty=penalty), tol=1e-10)
    assert result.converged
    assert np.abs(result.x - dense_solution(A, b, 1e-2, penalty)).max() < 1e-6


@pytest.mark.parametrize("n", [150, 400])
def test_without_a_penalty_only_regular_kernels_are_taken(n):
    """By eigenvalues, and by Lanczos steps."""
    b = np.random.default_rng(1).standard_normal(n)
    far = np.random.default_rng(0).standard_normal((n, 6))
    # Of one length: a long row among short ones asks for more digits than float64 has.
    far *= 12.0 / np.linalg.norm(far, axis=1, keepdims=True)
    result = minimize(problems.KernelRegression(far, b, ridge=0.0, temperature=1.0), tol=1e-10)
    assert result.converged
    assert relative(result.x, dense_solution(far, b, 0.0, "function")) < 1e-8
    with pytest.raises(ValueError, match="singular in float64"):
        problems.KernelRegression(tokens(n, 2), b, ridge=0.0)


def test_long_tokens_are_refused_before_their_targets_vanish():
    A = np.array([[1.0, 0.0], [40.0, 0.0]])
    with pytest.raises(ValueError, match="row 1 of A is so long"):
        problems.KernelRegression(A, [1.0, 1.0], ridge=0.1)
    # A target of zero vanishes without loss, but nobody knows the output of its row, e^800 times a rounding.
    # A higher temperature keeps any.
    with pytest.warns(ConvergenceWarning, match="scale A where its rows are long"):
        assert minimize(problems.KernelRegression(A, [1.0, 0.0], ridge=0.1)).status == "precision"
    assert minimize(problems.KernelRegression(A, [1.0, 1.0], ridge=0.1, temperature=100.0)).converged
    with pytest.raises(ValueError, match="row 1 of A is so long"):
        problems.KernelRegression(A, [1.0, 1.0], ridge=0.1, normalise=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"A": np.zeros((0, 2)), "b": []}, "A"),
        ({"A": [[1.0, np.nan], [0.0, 1.0]]}, "A"),
        ({"b": [1.0, np.inf]}, "b"),
        ({"b": [1.0, 2.0, 3.0]}, "b has shape"),
        ({"ridge": -1.0}, "ridge"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"temperature": np.inf}, "temperature must be a positive number"),
        ({"penalty": "both"}, "penalty"),
    ],
)
def test_what_is_not_usable_is_named(options, message):
    given = {"A": [[1.0, 0.0], [0.0, 1.0]], "b": [1.0, 2.0], "ridge": 0.1} | options
    with pytest.raises(ValueError, match=message):
        problems.KernelRegression(**given)


def test_other_problems_and_other_solvers_are_kept_apart():
    with pytest.raises(ValueError, match="solves KernelRegression"):
        minimize(problems.Softmax(np.eye(3, 2), np.full(3, 1 / 3)), solver=ConjugateGradients())
    with pytest.raises(ValueError, match="rank must not be negative"):
        ConjugateGradients(-1)
    problem = problems.KernelRegression(np.eye(2), [1.0, 2.0], ridge=0.1)
    assert "residual's norm over ridge" in minimize(problem).certificate().reason


# ---- powers of A^T A


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_powers_of_the_gram_matrix(power, ridge):
    """Against least squares on the matrices themselves."""
    rng = np.random.default_rng(0)
    A, right, b = rng.standard_normal((20, 4)), rng.standard_normal(20), rng.standard_normal(4)
    G = np.linalg.matrix_power(A.T @ A, power)
    below = np.sqrt(ridge) * np.eye(4)
    even = np.linalg.lstsq(np.vstack([G, below]), np.append(b, np.zeros(4)))[0]
    odd = np.linalg.lstsq(np.vstack([A @ G, below]), np.append(right, np.zeros(4)))[0]
    assert relative(solve_even_power(A, b, power, ridge=ridge), even) < 1e-9
    assert relative(solve_odd_power(A, right, power, ridge=ridge), odd) < 1e-9
    plain = np.linalg.lstsq(np.vstack([A, below]), np.append(right, np.zeros(4)))[0]
    assert relative(solve_odd_power(A, right, 0, ridge=ridge), plain) < 1e-12


def test_dependent_columns_need_a_ridge():
    A = np.random.default_rng(0).standard_normal((20, 3))
    A = np.column_stack([A, A[:, 0] + A[:, 1]])
    for solve, b in ((solve_even_power, np.ones(4)), (solve_odd_power, np.ones(20))):
        with pytest.raises(ValueError, match="4 columns, of which only 3 are independent"):
            solve(A, b)
        assert np.isfinite(solve(A, b, ridge=1e-3)).all()
        with pytest.raises(ValueError, match="power must be a whole number"):
            solve(A, b, -1)
        with pytest.raises(ValueError, match="power must be a whole number"):
            solve(A, b, 1.5)
    with pytest.raises(ValueError, match="independent"):
        solve_even_power(np.ones((2, 3)), np.ones(3))
    with pytest.raises(ValueError, match="at least 1"):
        solve_even_power(np.eye(2), np.ones(2), 0)


def true_error(problem, y):
    """The largest error of an output relative to the largest target, against a solution refined in extended
    precision.
    """
    n = len(problem.A)
    a = np.asarray(problem.A, dtype=np.longdouble)
    s = np.asarray(problem.s, dtype=np.longdouble)
    G = np.exp(a @ a.T - s[:, None] - s)
    M = (G if problem.penalty == "function" else G @ G) + problem.ridge * np.eye(n, dtype=np.longdouble)
    right = np.exp(problem.sign * s)[:, None] * problem.b
    target = right if problem.penalty == "function" else G @ right
    factor = linalg.cho_factor(np.asarray(M, dtype=float))
    exact = np.zeros_like(right)
    for _ in range(60):
        exact = exact + linalg.cho_solve(factor, np.asarray(target - M @ exact, dtype=float))
    off = np.exp(-problem.sign * s)[:, None] * (G @ (exact - y.reshape(right.shape)))
    return float((np.abs(off).max(axis=0) / np.abs(problem.b).max(axis=0)).max())


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("ridge", [1e-2, 1e-4])
def test_an_end_that_is_called_converged_gives_the_outputs(penalty, normalise, scale, ridge):
    """Long rows multiply what is left of the residual by exp(|a|^2 / 2); targets of any size, twice the same
    row.
    """
    rng = np.random.default_rng(int(10 * scale))
    A = scale * rng.standard_normal((80, 4))
    A[7] = A[3]
    B = np.column_stack([1.0 + np.sin(A[:, 0]), 1e-9 * rng.standard_normal(80)])
    problem = problems.KernelRegression(A, B, ridge=ridge, penalty=penalty, normalise=normalise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        result = minimize(problem, max_iter=3000, random_state=0)
    assert result.status in ("converged", "precision")
    assert true_error(problem, result.x) <= result.move
    if result.converged:
        assert result.move <= 2e-5
    else:
        assert "off by at most" in result.message and result.move > 1e-5
    # Ordinary rows are no reason for doubt.
    assert result.converged or scale > 1.0


def test_a_step_is_measured_in_the_outputs():
    A = 2.0 * np.random.default_rng(0).standard_normal((30, 3))
    problem = problems.KernelRegression(A, np.ones(30), ridge=0.1)
    y, p = np.zeros(30), np.random.default_rng(1).standard_normal(30)
    moved = problem.moves(problem.evaluate(y), p[:, None]).largest
    assert moved == pytest.approx([np.abs(problem.predict(p)).max()], rel=1e-12)


def test_a_residual_below_rounding_is_not_followed():
    """Rows so unequal that float64 cannot hold their outputs: said after a few products, not after all."""
    A = 6.0 * np.random.default_rng(0).standard_normal((150, 6))
    b = np.random.default_rng(1).standard_normal(150)
    with pytest.warns(ConvergenceWarning, match="no smaller residual is possible in float64"):
        result = minimize(problems.KernelRegression(A, b, ridge=0.1), random_state=0, max_iter=1000)
    assert result.status == "precision" and result.n_iter < 200
