"""Data that are hard rather than wrong: overflow, separable choices, and whatever comes."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from instances import ALL_LOSSES, Instance, instance
from sklearn.exceptions import ConvergenceWarning
from test_inputs import refused

from attnfit import minimize, problems

# ---- overflow ----


@pytest.mark.parametrize("family", ["Exponential", "Rescaled"])
@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
@pytest.mark.parametrize(
    "method", ["value", "gradient", "value_and_gradient", "hessian", "predict", "data_gradient"]
)
def test_unnormalised_functions_overflow_with_a_remedy(family, function, method):
    problem = getattr(problems, family)(400.0 * np.ones((3, 1)), np.ones(3), function=function)
    with refused("overflow", "400", "scale", error=OverflowError):
        getattr(problem, method)([1.0])


@pytest.mark.parametrize("family", ["Exponential", "Rescaled"])
def test_a_hessian_that_alone_overflows(family):
    problem = getattr(problems, family)(np.array([[1e4], [0.5e4]]), np.ones(2))
    x = [0.034885]
    assert np.isfinite(problem.value(x))
    assert np.isfinite(problem.gradient(x)).all()
    for call in (lambda: problem.hessian(x), lambda: problem.hvp(x, [1.0])):
        with refused("overflow", error=OverflowError):
            call()


def test_fits_that_start_in_overflow():
    problem = problems.Exponential(400.0 * np.ones((3, 1)), np.ones(3))
    with refused("overflow", error=OverflowError):
        minimize(problem, [1.0])
    assert minimize(problem).converged


def test_products_that_overflow():
    with refused("overflow", "scale the columns", error=OverflowError):
        problems.Softmax(1e200 * np.eye(2), np.ones(2)).value([1e200, 0.0])


@pytest.mark.parametrize("size", [1e4, 1e8])
@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_columns_in_small_units(family, loss, size):
    """|A| = 1e8 with a good answer at 1e-8."""
    inst, _ = instance(family, loss, sizes=(8, 8), noise=0.1)
    problem = inst.problem(A=size * inst.A, ridge=0.1 * size**2)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert np.isfinite(result.value)


# ---- separable choices ----


def separable():
    """The first row of each group has the largest first feature and is always chosen."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((60, 2))
    A[::3, 0] = 3.0 + rng.random(20)
    b = np.tile([1.0, 0.0, 0.0], 20)
    return A, b


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_separable_choices_say_so(scale, loss):
    A, b = separable()
    problem = problems.Softmax(A * [scale, 1.0], b, np.arange(60) // 3, loss=loss)
    with pytest.warns(ConvergenceWarning, match=r"(?s)separable.*column 0.*ridge"):
        result = minimize(problem)
    assert result.status == "separable"
    assert not result.converged
    assert "separable" in result.message
    assert "ridge" in result.message
    assert not np.isfinite(result.x[0])


def test_a_ridge_makes_separable_choices_fit():
    A, b = separable()
    result = minimize(problems.Softmax(A, b, np.arange(60) // 3, loss="cross_entropy", ridge=0.01))
    assert result.converged


def test_quasi_separation_by_one_dummy():
    """A feature whose rows are never chosen: its coefficient falls for ever, the other is determined."""
    rng = np.random.default_rng(1)
    A = np.column_stack([rng.standard_normal(300), rng.random(300) < 0.1])
    ids = np.arange(300) // 3
    z = A[:, 0] + rng.gumbel(size=300) - 1e3 * A[:, 1]
    b = (z == np.maximum.reduceat(z, np.arange(0, 300, 3))[ids]) * 1.0
    b[A[:, 1] > 0] = 0.0
    with pytest.warns(ConvergenceWarning, match=r"(?s)separable.*column 1.*ridge"):
        result = minimize(problems.Softmax(A, b, ids, loss="cross_entropy"))
    assert result.status == "separable"


@pytest.mark.parametrize("seed", range(5))
def test_choices_with_a_minimum_are_not_called_separable(seed):
    rng = np.random.default_rng(seed)
    A, ids = rng.standard_normal((90, 2)), np.arange(90) // 3
    z = A @ [3.0, -2.0] + rng.gumbel(size=90)
    b = (z == np.maximum.reduceat(z, np.arange(0, 90, 3))[ids]) * 1.0
    assert minimize(problems.Softmax(A, b, ids, loss="cross_entropy")).converged


# ---- whatever comes ----

ODD = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 30.0, -300.0, 1e-8, 1e4, 1e150])


@st.composite
def odd_problems(draw):
    """Small arrays of entries that often break something: ties, zeros, huge and tiny values."""
    family, loss = draw(st.sampled_from(ALL_LOSSES))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    n, d = sum(sizes), draw(st.integers(1, 3))
    A = draw(arrays(np.float64, (n, d), elements=ODD))
    b = draw(arrays(np.float64, n, elements=st.sampled_from([0.0, 0.25, 1.0, 7.0])))
    ids = np.repeat(np.arange(len(sizes)), sizes)
    weights = draw(st.none() | arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0, 1e6])))
    x = draw(arrays(np.float64, d, elements=ODD))
    return Instance(
        family, loss, A, b, ids, ids, {"weights": weights, "ridge": draw(st.sampled_from([0.0, 0.1]))}
    ), x


def finite(*arrays):
    return all(np.isfinite(a).all() for a in arrays)


@given(odd_problems())
def test_values_are_finite_or_a_named_error(case):
    inst, x = case
    try:
        problem = inst.problem()
    except ValueError as error:
        assert "weights are all zero" in str(error)
        return
    for method in ("value", "gradient", "hessian", "predict"):
        try:
            assert finite(getattr(problem, method)(x)), method
        except OverflowError as error:
            assert "overflow" in str(error)
        except ValueError as error:
            assert method == "predict" and "normaliser" in str(error)


@given(odd_problems())
def test_fits_are_finite_or_a_named_error(case):
    inst, _ = case
    try:
        problem = inst.problem()
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            result = minimize(problem, max_iter=20, random_state=0)
        except OverflowError as error:
            assert "overflow" in str(error)
            return
    assert finite(result.value, result.gradient, result.gradient_norm)
    assert finite(result.x) or result.separation is not None
    assert result.message
    assert result.converged == (result.status == "converged")
