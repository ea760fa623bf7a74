"""What a verdict may not depend on, and what it must be true of: properties over every loss.

The problems are those of `benchmarks.verdict_problems`; differences are measured in logits.
"""

import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.solvers import GradientDescent, Newton
from benchmarks.verdict_problems import LIST, Reference, make
from benchmarks.verdicts import certificate_of

LOSSES = ("squared", "cross_entropy", "kl", "linear_cross_entropy")
# Of these problems the exact next step at an accepted point moves no logit by more.
FALSE = 1e-5


def fit(problem, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return minimize(problem, random_state=0, **options)


def softmax(loss, seed=0, n_groups=8, size=5, d=3, noise=0.1, **options):
    rng = np.random.default_rng(seed)
    n = n_groups * size
    A, ids = rng.standard_normal((n, d)), np.repeat(np.arange(n_groups), size)
    u = np.exp(A @ rng.standard_normal(d)) * np.exp(noise * rng.standard_normal(n))
    b = u / np.bincount(ids, weights=u)[ids]
    ridge = 1e-3 if loss == "linear_cross_entropy" else 0.0
    return A, b, ids, {"loss": loss, "ridge": ridge} | options


def exponential(seed=0, n=60, d=2, noise=0.1):
    rng = np.random.default_rng(seed)
    A = np.column_stack([np.ones(n), rng.standard_normal((n, d))])
    return A, np.exp(A @ rng.standard_normal(d + 1)) * np.exp(noise * rng.standard_normal(n))


def by_group(values, ids):
    return values - (np.bincount(ids, weights=values) / np.bincount(ids))[ids]


# ---- a verdict against 80 bits


@pytest.mark.parametrize("family", range(len(LIST)), ids=lambda k: "-".join(LIST[k]) + f"{k}")
def test_an_accepted_point_is_one_and_an_optimum_is_accepted(family):
    refused = at_optimum = 0
    for seed in range(family + 10 * len(LIST), family + 18 * len(LIST), len(LIST)):
        problem, reference, _ = make(seed)
        result = fit(problem)
        if not np.isfinite(result.x).all():
            continue
        with np.errstate(all="ignore"):
            step = reference.step(result.x)
        if result.converged:
            assert step <= FALSE, (seed, step)
            assert result.move <= 1e-6
        at_optimum += step <= 1e-7
        refused += step <= 1e-7 and not result.converged
    assert refused <= 1


@pytest.mark.parametrize("seed", [70261, 71322, 91013])
def test_ends_that_rounding_hides(seed):
    """Found by the `verdicts` benchmark: two columns alike but for 1e-7, a value of 3e7 with a curvature of
    1e-6, and a direction with a share of 6e-15 of the curvature.
    """
    problem, reference, _ = make(seed)
    result = fit(problem, n_starts=1)
    assert not result.converged or reference.step(result.x) <= 1e-6


# ---- what an answer may not depend on


@pytest.mark.parametrize("c", [1e-12, 1e-5, 1e12])
def test_the_unit_of_the_target_shifts_the_constant(c):
    A, y = exponential()
    first, other = (fit(problems.Exponential(A, target), n_starts=1) for target in (y, c * y))
    assert first.status == other.status == "converged"
    assert np.allclose(other.x - first.x, [np.log(c), 0, 0], atol=1e-6)
    assert abs(len(first.history) - len(other.history)) <= 2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("c", [1e-9, 1e6])
def test_the_scale_of_weights_changes_nothing(loss, c):
    A, b, ids, options = softmax(loss)
    first = fit(problems.Softmax(A, b, ids, **options))
    options["ridge"] *= c
    other = fit(problems.Softmax(A, b, ids, weights=np.full(len(b), c), **options))
    assert first.status == other.status == "converged"
    assert np.allclose(first.x, other.x, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
def test_columns_times_powers_of_two_change_no_bit(loss):
    A, b, ids, options = softmax(loss)
    factors = np.ldexp(1.0, [40, -37, 3])
    first = fit(problems.Softmax(A, b, ids, **options))
    other = fit(problems.Softmax(A * factors, b, ids, **options))
    assert first.status == other.status == "converged"
    np.testing.assert_array_equal(other.x * factors, first.x)


@pytest.mark.parametrize("size", [1e-160, 1e-100, 1e100, 1e155])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_columns_of_any_size_are_ordinary(size, loss):
    A, b, ids, options = softmax(loss)
    factors = np.array([size, 1.0, 1.0])
    first, other = (fit(problems.Softmax(M, b, ids, **options)) for M in (A, A * factors))
    assert other.status == "converged"
    assert np.allclose(other.x * factors, first.x, atol=1e-6)


def test_a_code_for_missing_values_is_refused_by_name():
    with pytest.raises(ValueError, match=r"1e\+160 at row 0, column 0.*missing"):
        minimize(problems.Softmax([[1e160], [1.0], [0.0]], [0.5, 0.3, 0.2]))


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_change_of_basis_changes_no_logit(loss):
    A, b, ids, options = softmax(loss)
    B = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, -1.0], [0.5, 0.0, 1.0]])
    first, other = (fit(problems.Softmax(M, b, ids, **options)) for M in (A, A @ B))
    assert first.status == other.status == "converged"
    assert np.allclose(A @ first.x, A @ B @ other.x, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_group_has_in_common_changes_nothing(loss):
    A, b, ids, options = softmax(loss)
    shift = np.random.default_rng(1).standard_normal((8, 3))[ids]
    first, other = (fit(problems.Softmax(M, b, ids, **options)) for M in (A, A + 3.0 * shift))
    assert first.status == other.status == "converged"
    assert first.unidentified.shape == other.unidentified.shape
    assert np.allclose(first.x, other.x, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
@pytest.mark.parametrize("in_csr", [False, True])
def test_years_and_time_stamps_keep_their_digits(loss, in_csr):
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(12), 5)
    A = rng.standard_normal((60, 3))
    f = np.exp(A @ [0.5, -1.0, 0.3])
    b = f / np.bincount(groups, f)[groups] * np.exp(0.1 * rng.standard_normal(60))
    shifted = A.copy()
    shifted[:, 1] += 1e7 * rng.standard_normal(12)[groups] + 1e7
    shifted[:, 2] += 1e7
    reference = Reference(loss, "", shifted, b, groups, np.ones(60), 0.0)
    rows = sparse.csr_array(shifted) if in_csr else shifted
    result = fit(problems.Softmax(rows, b, groups, loss=loss))
    assert result.converged
    assert reference.step(result.x) < 1e-7
    # The data themselves are rounded at 1e-9.
    np.testing.assert_allclose(result.x, fit(problems.Softmax(A, b, groups, loss=loss)).x, atol=1e-7)
    assert result.unidentified.shape == (3, 0)
    assert result.certificate().valid


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
def test_groups_twice_rows_weighted_and_permuted(loss):
    A, b, ids, options = softmax(loss)
    first = fit(problems.Softmax(A, b, ids, **options))
    doubled = np.tile(A, (2, 1)), np.tile(b, 2), np.concatenate([ids, ids + 8])
    twice = fit(problems.Softmax(*doubled, **options))
    order = np.random.default_rng(2).permutation(len(b))
    mixed = fit(problems.Softmax(A[order], b[order], ids[order], **options))
    for other in (twice, mixed):
        assert other.status == "converged"
        assert np.allclose(first.x, other.x, atol=1e-6)
    assert np.isclose(twice.value, 2.0 * first.value, rtol=1e-10)


def test_a_weight_of_two_is_a_row_twice_and_of_zero_none():
    A, y = exponential()
    w = np.ones(len(y))
    w[:10] = 2.0
    weighted = fit(problems.Exponential(A, y, weights=w))
    repeated = fit(problems.Exponential(np.vstack([A, A[:10]]), np.concatenate([y, y[:10]])))
    assert np.allclose(weighted.x, repeated.x, atol=1e-6)
    w = np.append(np.ones(len(y)), 0.0)
    more = fit(problems.Exponential(np.vstack([A, [1.0, 9.0, -9.0]]), np.append(y, 1e9), weights=w))
    assert np.allclose(more.x, fit(problems.Exponential(A, y)).x, atol=1e-9)
    assert more.converged


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_an_offset_along_a_direction_moves_the_answer(loss):
    A, b, ids, options = softmax(loss)
    v = np.array([0.5, -1.0, 0.25])
    first, other = fit(problems.Softmax(A, b, ids, **options)), None
    other = fit(problems.Softmax(A, b, ids, offset=A @ v, **options))
    assert np.allclose(other.x, first.x - v, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
def test_a_constant_column_is_open_and_the_others_stay(loss):
    A, b, ids, options = softmax(loss)
    first = fit(problems.Softmax(A, b, ids, **options))
    more = fit(problems.Softmax(np.column_stack([A, np.full(len(b), 7.0)]), b, ids, **options))
    assert more.converged
    assert more.n_flat == 1
    assert np.allclose(more.x, np.append(first.x, 0.0), atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
def test_dense_and_sparse_agree(loss):
    A, b, ids, options = softmax(loss)
    dense, csr = (fit(problems.Softmax(M, b, ids, **options)) for M in (A, sparse.csr_array(A)))
    assert dense.status == csr.status == "converged"
    assert np.allclose(dense.x, csr.x, atol=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1.0, 20.0])
def test_a_convex_answer_does_not_depend_on_the_start(distance):
    A, b, ids, options = softmax("cross_entropy")
    first = fit(problems.Softmax(A, b, ids, **options))
    other = fit(problems.Softmax(A, b, ids, **options), x0=first.x + distance * np.array([1.0, -1.0, 0.5]))
    assert other.converged
    assert np.allclose(first.x, other.x, atol=1e-6)
    if not distance:
        assert other.n_iter <= 1


@pytest.mark.parametrize("solver", [Newton("exact"), Newton("matrix_free"), GradientDescent()])
def test_every_solver_is_judged_alike(solver):
    A, b, ids, options = softmax("cross_entropy")
    problem = problems.Softmax(A, b, ids, **options)
    result = fit(problem, solver=solver, max_iter=3000)
    assert result.converged
    assert result.move <= 1e-6
    assert np.allclose(result.x, fit(problem).x, atol=1e-5)


def test_a_solver_of_ones_own_is_judged_too():
    """One that stops anywhere and calls it converged."""
    from attnfit.solvers.loop import Descent, Outcome

    class Lazy:
        def run(self, problem, start, x0, tol, max_iter, tracker, rng):
            return Outcome(Descent.begin(problem.evaluate(self.x)), {}, 0, "lazy")

    A, b, ids, options = softmax("squared")
    problem = problems.Softmax(A, b, ids, **options)
    right = fit(problem).x
    lazy = Lazy()
    for lazy.x, status in ((right, "converged"), (right + 0.01, "max_iter")):
        assert fit(problem, solver=lazy).status == status


# ---- limits


@pytest.mark.parametrize("tol", [np.inf, np.nan, 0.0, -1.0, 0.1, "a"])
def test_a_tolerance_must_mean_something(tol):
    with pytest.raises(ValueError, match="tol must be a number in"):
        minimize(problems.Softmax([[1.0], [0.0]], [0.5, 0.5]), tol=tol)


@pytest.mark.parametrize("share", [1e-4, 1e-6, 1e-9])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_small_shares_have_their_logit(share, loss):
    result = fit(problems.Softmax([[1.0], [0.0]], [share, 1.0 - share], loss=loss))
    assert result.converged
    assert abs(result.x[0] - (np.log(share) - np.log1p(-share))) <= 2e-7


def test_small_outcomes_are_ordinary():
    x = np.linspace(-2, 2, 41)
    result = fit(problems.Exponential(np.c_[np.ones(41), x], 1e-5 * np.exp(0.5 * x)))
    assert result.converged
    assert np.allclose(result.x, [np.log(1e-5), 0.5], atol=1e-9)


def test_the_published_exponential_fit():
    """Newton's method in 80 bits; statsmodels' Gaussian model with a log link agrees to eight digits."""
    rng = np.random.default_rng(0)
    A = np.column_stack([np.ones(200), rng.standard_normal((200, 2))])
    y = np.exp(A @ [0.2, 0.5, -0.3]) * rng.gamma(5.0, 0.2, 200)
    result = fit(problems.Exponential(A, y))
    assert np.allclose(result.x, [0.147634232134226, 0.455497743563860, -0.357909227099758], atol=1e-9)


def test_zero_is_no_answer_where_it_is_one_for_every_target():
    """An exact target of an odd function, whose sum is not known: the planted point, up to its sign."""
    found = 0
    for seed in range(4, 14):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((300, 4)) * 0.5
        x = rng.standard_normal(4)
        u = np.sinh(A @ x)
        result = fit(problems.Rescaled(A, u / u.sum(), "sinh"))
        if result.converged:
            assert min(np.abs(result.x - x).max(), np.abs(result.x + x).max()) <= 1e-6
        found += result.converged
    assert found >= 8


def test_an_answer_that_vanishes_is_called_so():
    result = fit(problems.Rescaled(np.eye(3), [0.2, 0.3, 0.5], "sinh", ridge=1.0))
    assert result.converged
    assert np.allclose(result.x, 0.0, atol=1e-6)
    assert "whatever the target" in result.message


@pytest.mark.parametrize("k", [0, 1, 2, 4, 8, 50])
def test_more_steps_never_take_a_verdict_back(k):
    problem = problems.Softmax(*softmax("squared")[:3], loss="squared")
    few = fit(problem, x0=[3.0, 3.0, 3.0], max_iter=k)
    assert few.status in ("max_iter", "converged")
    if few.converged:
        assert fit(problem, x0=[3.0, 3.0, 3.0], max_iter=k + 20).converged


# ---- local minima


def test_the_lower_of_two_minima():
    """Minima to 60 digits: 0.32061200845697 and 5.32804529926116, values as below."""
    problem = problems.Softmax([[0.6], [0.7], [-3.9], [0.6]], [0.01, 0.43, 0.08, 0.47])
    result = fit(problem)
    assert np.allclose(result.x, 5.32804529926116, atol=1e-7)
    assert np.allclose(sorted(result.local_values.values()), [0.0574499999988518, 0.0637860793198013])
    one = fit(problem, n_starts=1, x0=[0.3])
    assert np.allclose(one.x, 0.32061200845697, atol=1e-7)
    assert "one descent" in one.message


def test_unfinished_ends_are_no_minima():
    result = fit(problems.Softmax(*softmax("squared")[:3], loss="squared"), max_iter=1)
    assert result.status == "max_iter"
    assert result.local_values == {}


def test_both_signs_of_an_even_function_are_listed():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((30, 2))
    result = fit(problems.Exponential(A, np.cosh(A @ [1.0, -0.5]) + 0.1 * rng.standard_normal(30), "cosh"))
    assert result.converged
    assert len(result.local_values) == 2
    assert np.ptp(list(result.local_values.values())) <= 1e-9


def test_small_squared_problems_miss_few_minima():
    """Against the best of 16 starts by an independent method."""
    from scipy.optimize import minimize as descend

    missed = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        d, n_groups, size = rng.integers(1, 4), rng.integers(1, 5), rng.integers(2, 7)
        ids = np.repeat(np.arange(n_groups), size)
        A = rng.standard_normal((len(ids), d)) * rng.choice([1.0, 3.0])
        problem = problems.Softmax(A, rng.dirichlet(np.ones(size), n_groups).ravel(), ids)
        best = min(
            descend(problem.value, s * rng.standard_normal(d), jac=problem.gradient, tol=1e-12).fun
            for s in np.resize([1.0, 3.0, 10.0, 30.0], 16)
        )
        result = fit(problem)
        if np.isfinite(result.x).all():
            missed += result.value > best + 1e-6 * 0.5 * float(problem.b @ problem.b)
    assert missed <= 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
# The last ones were exceeded before the rounding of the Hessian and of each sum was counted.
@pytest.mark.parametrize("seed", [*range(52), 40059, 40184, 40210])
def test_no_certificate_is_exceeded(seed):
    known = certificate_of(seed)
    if known is None:
        # Which are valid is another matter: see the table of the benchmark.
        pytest.skip("not certified")
    certificate, error, each = known
    assert error <= certificate.radius
    assert (each <= certificate.coefficient_radius).all()
