"""What a fit says of itself: rank deficiency, degenerate answers, local minima, reports, interruptions."""

import numpy as np
import pytest
from instances import SOFTMAX, instance, relative, softmax
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.solvers import GradientDescent, Newton

# ---- rank deficiency ----


def spans(directions, expected):
    expected = np.linalg.qr(np.asarray(expected, dtype=float).T)[0]
    assert directions.shape == expected.shape
    assert np.allclose(directions.T @ directions, np.eye(directions.shape[1]), atol=1e-10)
    assert np.allclose(expected @ (expected.T @ directions), directions, atol=1e-5)


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_duplicated_and_constant_columns(loss, storage, scale):
    """The minimum-norm answer, in the user's units, and the directions the data leave open."""
    inst, _ = instance("Softmax", loss, sizes=(9, 8, 7, 6), noise=0.2)
    A = np.column_stack([inst.A, scale * inst.A[:, 1], np.full(len(inst.b), 2.0)])
    reduced = minimize(inst.problem()).x
    result = minimize(inst.problem(A=storage(A)))
    null = [[0.0, scale, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    assert result.converged
    spans(result.unidentified, null)
    assert np.allclose(np.array(null) @ result.x / scale, 0.0, atol=1e-6)
    expected = np.array(
        [reduced[0], reduced[1] / (1 + scale**2), reduced[2], scale * reduced[1] / (1 + scale**2), 0.0]
    )
    assert relative(result.x, expected) < 1e-5


def test_dummies_that_sum_to_a_constant():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(12), 5)
    dummies = np.tile(np.eye(5), (12, 1))
    A = np.column_stack([dummies, rng.standard_normal(60)])
    b = softmax(A @ np.array([0.5, -0.2, 0.1, 0.0, 0.3, 1.0]) + 0.1 * rng.standard_normal(60), ids)
    result = minimize(problems.Softmax(A, b, ids))
    spans(result.unidentified, [[1, 1, 1, 1, 1, 0]])
    assert abs(result.x[:5].sum()) < 1e-6
    with_base = minimize(problems.Softmax(A[:, 1:], b, ids))
    assert with_base.unidentified.shape == (5, 0)
    assert np.allclose(result.x[1:5] - result.x[0], with_base.x[:4], atol=1e-5)


@pytest.mark.parametrize(
    "family, loss", [("Exponential", "exp"), ("Exponential", "sinh"), ("Rescaled", "exp")]
)
def test_rank_deficiency_without_a_softmax(family, loss):
    inst, _ = instance(family, loss, sizes=(20, 20), noise=0.2)
    A = np.column_stack([inst.A, inst.A.sum(axis=1)])
    result = minimize(inst.problem(A=A))
    null = np.array([[1.0, 1.0, 1.0, -1.0]])
    assert result.converged
    spans(result.unidentified, null)
    assert np.allclose(null @ result.x, 0.0, atol=1e-6)
    assert np.allclose(A @ result.x, inst.A @ minimize(inst.problem()).x, atol=1e-5)


def test_more_columns_than_rows():
    inst, _ = instance("Softmax", "squared", sizes=(6, 5), d=20, noise=0.2)
    result = minimize(inst.problem())
    assert result.converged
    # Two groups of 6 and 5 rows fix at most 5 + 4 directions.
    assert result.unidentified.shape == (20, 11)
    assert np.allclose(result.unidentified.T @ result.x, 0.0, atol=1e-6)
    assert np.allclose(inst.problem().predict(result.x), inst.b, atol=1e-5)


def test_a_ridge_identifies_everything():
    inst, _ = instance("Softmax", "squared", sizes=(9, 8, 7))
    A = np.column_stack([inst.A, inst.A[:, 0], np.ones(len(inst.b))])
    result = minimize(inst.problem(A=A, ridge=1e-3))
    assert result.converged
    assert result.unidentified.shape == (5, 0)
    assert np.isclose(result.x[0], result.x[3], atol=1e-6)


@pytest.mark.parametrize("hessian", ["exact", "sampled", "matrix_free"])
def test_rank_deficiency_with_every_strategy(hessian):
    inst, _ = instance("Softmax", "squared", sizes=[900, 300], noise=0.2)
    A = np.column_stack([inst.A, inst.A[:, 0], np.ones(len(inst.b))])
    result = minimize(inst.problem(A=A), solver=Newton(hessian=hessian, sample_rows=300), random_state=0)
    assert result.converged
    assert np.isclose(result.x[0], result.x[3], atol=1e-4)
    assert abs(result.x[4]) < 1e-4


# ---- degenerate answers ----


def test_uniform_targets_have_their_answer_at_zero():
    rng = np.random.default_rng(0)
    result = minimize(
        problems.Softmax(rng.standard_normal((30, 3)), np.full(30, 1 / 3), np.repeat(np.arange(10), 3))
    )
    assert result.converged
    assert np.allclose(result.x, 0.0, atol=1e-12)


def test_targets_that_are_uniform_but_for_rounding():
    """The gradient at zero is rounding of the targets already: the next step moves no logit by more."""
    A = np.random.default_rng(0).standard_normal((2000, 3))
    problem = problems.Softmax(A, np.full(2000, 1 / 2000, dtype=np.float32))
    result = minimize(problem, random_state=0, n_starts=1)
    assert result.converged
    assert np.allclose(result.x, 0.0, atol=1e-8)
    assert np.abs(result.x).max() < 1e-6
    assert result.n_passes < 50


def test_groups_of_one_row_leave_everything_open():
    result = minimize(problems.Softmax(np.eye(4)[:, :3], np.ones(4), np.arange(4), "cross_entropy"))
    assert result.converged
    assert np.array_equal(result.x, np.zeros(3))
    assert result.unidentified.shape == (3, 3)


def test_a_column_of_zeros():
    inst, _ = instance("Softmax", "squared", sizes=(9, 8, 7))
    A = np.insert(inst.A, 1, 0.0, axis=1)
    result = minimize(inst.problem(A=A))
    assert result.converged
    assert abs(result.x[1]) < 1e-12
    spans(result.unidentified, [[0.0, 1.0, 0.0, 0.0]])
    assert np.allclose(np.delete(result.x, 1), minimize(inst.problem()).x, atol=1e-6)


def test_cosh_leaves_its_saddle_at_zero():
    inst, _ = instance("Exponential", "cosh", sizes=(40,), noise=0.0, scale=1.0)
    result = minimize(inst.problem(), np.zeros(3), random_state=0)
    assert result.value < inst.problem().value(np.zeros(3)) or result.status != "converged"
    assert minimize(inst.problem(), random_state=0).value < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_entropy_is_not_stuck_at_uniform_outputs(seed):
    inst, _ = instance("Softmax", "entropy", sizes=(5, 6, 7), seed=seed)
    problem = inst.problem(ridge=0.3)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert result.value < problem.value(np.zeros(3)) - 1e-3


# ---- several minima ----


def two_minima():
    """Two groups of four that pull one unknown to different places."""
    rng = np.random.default_rng(230)
    A, b, ids = 3.0 * rng.standard_normal((8, 1)), rng.gamma(0.2, size=8), np.repeat([0, 1], 4)
    return problems.Softmax(A, b / np.bincount(ids, weights=b)[ids], ids)


def test_every_local_value_is_reported_and_the_best_returned():
    problem = two_minima()
    grid = np.linspace(-8.0, 8.0, 1601)
    values = np.array([problem.value([x]) for x in grid])
    lows = np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])) + 1
    assert len(lows) == 2
    result = minimize(problem)
    assert len(result.local_values) == 2
    assert np.allclose(sorted(result.local_values.values()), sorted(values[lows]), atol=1e-5)
    assert result.value == min(result.local_values.values())
    for low in lows:
        assert np.isclose(minimize(problem, [grid[low]]).value, values[low], atol=1e-5)
        assert set(minimize(problem, [grid[low]]).local_values) == {"x0"}


# ---- reports ----


def test_result_and_history():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    problem = inst.problem()
    result = minimize(problem)
    columns = result.history.columns()
    assert set(columns) == {
        "phase", "iteration", "value", "gradient_norm", "step_norm", "radius", "accepted", "n_passes",
        "seconds_model", "seconds_step", "seconds_evaluate",
    }  # fmt: skip
    assert {len(column) for column in columns.values()} == {len(result.history)}
    assert (np.diff(columns["n_passes"]) >= 0).all()
    assert columns["n_passes"][-1] <= result.n_passes
    assert result.history[-1].value in columns["value"]
    assert result.problem is problem
    assert result.x.shape == problem.shape
    assert result.seconds > 0
    assert result.gradient_norm <= 1e-8
    assert "Newton" in result.solver
    assert result.message
    table = str(result.history)
    assert len(table.splitlines()) == len(result.history) + 1
    assert "rel.grad" in table


@pytest.mark.parametrize("hessian", ["auto", "sampled", "matrix_free"])
def test_the_same_seed_gives_the_same_fit(hessian):
    inst, _ = instance("Softmax", "squared", sizes=[25_000, 4_000], d=5, noise=0.2)
    first, second = (
        minimize(inst.problem(), solver=Newton(hessian=hessian), random_state=7) for _ in range(2)
    )
    assert np.array_equal(first.x, second.x)
    assert first.history.columns()["value"] == second.history.columns()["value"]
    generator = minimize(
        inst.problem(), solver=Newton(hessian=hessian), random_state=np.random.default_rng(7)
    )
    assert np.array_equal(first.x, generator.x)


def test_x0_of_any_kind_and_the_answer_as_start():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    first = minimize(inst.problem())
    again = minimize(inst.problem(), list(first.x))
    assert again.converged
    assert again.n_iter <= 1
    assert np.allclose(again.x, first.x, atol=1e-8)


def test_too_few_iterations_warn_and_return_the_best_point():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        result = minimize(inst.problem(), np.full(3, 3.0), max_iter=3)
    assert result.n_iter == 3
    assert result.status == "max_iter"
    assert not result.converged
    assert result.value < inst.problem().value(np.full(3, 3.0))


def test_a_tolerance_beyond_float64_says_so():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    result = minimize(inst.problem(), tol=1e-25)
    assert result.converged
    assert "rounding of the data" in result.message
    assert 1e-25 < result.move < 1e-6


@pytest.mark.parametrize("arguments", [{"tol": 0.0}, {"tol": np.nan}, {"max_iter": -1}])
def test_bad_settings_are_named(arguments):
    inst, _ = instance("Softmax", "squared")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        minimize(inst.problem(), **arguments)


# ---- interruption ----


def hard():
    """A problem of many steps, and a start."""
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), d=4, noise=0.3)
    return inst.problem(), np.full(4, 4.0)


def best_recorded(result):
    return min(r.value for r in result.history if r.accepted and r.phase.startswith("fit"))


def interrupting(after, how):
    seen = []

    def callback(record):
        seen.append(record)
        if len(seen) == after:
            if how == "interrupt":
                raise KeyboardInterrupt
            return True
        return False

    return callback, seen


@pytest.mark.parametrize("how", ["interrupt", "return"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_fit_returns_its_best_point(how, after):
    problem, x0 = hard()
    assert len(minimize(problem, x0).history) > 4
    callback, seen = interrupting(after, how)
    result = minimize(problem, x0, callback=callback)
    assert result.status == "interrupted"
    assert not result.converged
    assert len(seen) == after == len(result.history)
    assert result.value == best_recorded(result)
    assert result.value == problem.value(result.x)


@pytest.mark.parametrize("how", ["interrupt", "return"])
@pytest.mark.parametrize("n", [40, 30_000])
def test_an_interruption_while_the_start_is_sought_ends_the_fit(how, n):
    inst, _ = instance("Softmax", "squared", sizes=(n,), noise=0.3)
    callback, seen = interrupting(1, how)
    result = minimize(inst.problem(), callback=callback, random_state=0)
    assert result.status == "interrupted"
    assert len(seen) == 1
    assert np.isfinite(result.x).all()
    assert np.isclose(result.value, inst.problem().value(result.x))


@pytest.mark.parametrize("how", ["interrupt", "return"])
def test_gradient_descent_can_be_interrupted(how):
    problem, x0 = hard()
    callback, seen = interrupting(3, how)
    result = minimize(problem, x0, GradientDescent(), callback=callback)
    assert result.status == "interrupted"
    assert len(seen) == 3
    assert result.value == best_recorded(result)


def test_a_callback_sees_every_record():
    problem, x0 = hard()
    seen = []
    result = minimize(problem, x0, callback=seen.append)
    assert seen == list(result.history)


def test_errors_in_a_callback_are_not_swallowed():
    problem, x0 = hard()

    def broken(record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize(problem, x0, callback=broken)


def test_every_softmax_loss_is_covered():
    assert len(SOFTMAX) == 5


def test_one_exact_hessian_is_tried_before_another_is_asked_for():
    rng = np.random.default_rng(1)
    A, groups = rng.standard_normal((200_000, 8)), np.repeat(np.arange(40_000), 5)
    z = (A @ rng.standard_normal(8) + rng.gumbel(size=len(A))).reshape(-1, 5)
    problem = problems.Softmax(
        A, (z == z.max(axis=1, keepdims=True)).astype(float).ravel(), groups, "cross_entropy"
    )
    plain, asked = problem.evaluate, []

    def evaluate(x, near=None, sampler=None, **wanted):
        asked.append(wanted.get("hessian", False))
        return plain(x, near, sampler, **wanted)

    problem.evaluate = evaluate
    result = minimize(problem, random_state=0)
    assert result.converged and sum(asked) == 1


@pytest.mark.parametrize("function", ["cosh", "sinh"])
def test_large_data_that_cannot_be_sampled_are_not_read_for_every_start(function):
    rng = np.random.default_rng(3)
    A = rng.standard_normal((8_000, 4)) * 0.3
    u = getattr(np, function)(A @ rng.standard_normal(4) + 0.5)
    problem = problems.Rescaled(A, u / u.sum() * np.exp(0.05 * rng.standard_normal(8_000)), function)
    one = minimize(problem, random_state=0, n_starts=9)
    two = minimize(problem, random_state=0)
    assert "from 2 starts" in two.message
    assert two.n_passes < 0.6 * one.n_passes
    assert two.value <= one.value * (1 + 1e-9)
