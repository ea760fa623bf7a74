"""What certificates are made of: intervals against their corners, proven balls against the exact answer, from
below and from above.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from autodiff import Objective, as_tensor
from hypothesis import given
from hypothesis import strategies as st
from instances import ALL_LOSSES, instance
from mpmath import mpf
from test_certificate_constants import TIGHT, third_along

from attnfit import certificates, minimize, problems
from attnfit.certificates.certification import RowBall
from attnfit.certificates.lipschitz import Interval, lipschitz_constant
from attnfit.certificates.rigorous import (
    Enclosure,
    _ball,
    _lipschitz,
    _rows_of,
    _third_of_exponential,
    _whitening,
)
from attnfit.losses.elementwise import output_range
from benchmarks.exact_answers import DIGITS, error_of, exact_answer, scaled_error_of, stationarity

SOFTMAX = ("cross_entropy", "kl", "squared", "entropy", "linear_cross_entropy")
FUNCTIONS = ("exp", "cosh", "sinh")
ENDS = st.tuples(st.floats(-10.0, 10.0), st.floats(-10.0, 10.0)).map(sorted)


@given(ENDS, ENDS)
def test_intervals_are_the_ranges_over_their_corners(one, other):
    """Sums, differences, products and distances are monotone in each end."""
    a, b = (Interval(*(np.array([end]) for end in ends)) for ends in (one, other))
    for found, of in (
        (a + b, lambda x, y: x + y), (a - b, lambda x, y: x - y), (a * b, lambda x, y: x * y)
    ):  # fmt: skip
        corners = [of(x, y) for x in one for y in other]
        assert (found.low[0], found.high[0]) == (min(corners), max(corners))
    assert a.magnitude[0] == max(map(abs, one))
    for centre in other:
        assert a.deviation(np.array([centre]))[0] == max(abs(end - centre) for end in one)


# ---- proven balls of one unknown, where norms are numbers


def one_unknown(loss, seed=0):
    """A problem, its exact stationarity and its minimum."""
    rng = np.random.default_rng(seed)
    ids = np.repeat([0, 1], [5, 4])
    A, weights, offset = rng.standard_normal((9, 1)), rng.uniform(0.5, 2.0, 9), 0.3 * rng.standard_normal(9)
    if loss in FUNCTIONS:
        b = getattr(np, loss)(0.6 * A[:, 0] + offset) * np.exp(0.2 * rng.standard_normal(9))
        problem = problems.Exponential(A, b, loss, weights=weights, offset=offset)
        exact = stationarity("Exponential", loss, A, b, weights=weights, offset=offset)
    else:
        b = rng.gamma(1.0, size=9)
        b = b / np.bincount(ids, weights=b)[ids]
        ridge = 1.5 if loss in ("entropy", "linear_cross_entropy") else 0.2
        problem = problems.Softmax(A, b, ids, loss=loss, weights=weights, offset=offset, ridge=ridge)
        exact = stationarity("Softmax", loss, A, b, ids, weights=weights, offset=offset, ridge=ridge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem, exact, minimize(problem, tol=1e-12).x


def fall(exact, x, answer):
    """``L(x) - L(x*)`` of one unknown: the integral of the gradient."""
    with mpmath.workdps(20):
        return mpmath.quad(
            lambda t: exact(mpmath.matrix([t]))[0][0], [answer[0], mpf(float(x[0]))], maxdegree=3
        )


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("loss", [*SOFTMAX, *FUNCTIONS])
def test_near_the_answer_nothing_is_larger_than_it_is(loss, rigorous):
    """Radii, the value gap and the step are upper bounds, by less than a thousandth."""
    problem, exact, best = one_unknown(loss)
    for step in (1e-6, -1e-5):
        x = best + step
        proof = certificates.certify(problem, x, rigorous=rigorous)
        assert proof.valid
        with mpmath.workdps(DIGITS):
            answer, hessian = exact_answer(exact, x)
            gradient, curvature = exact(mpmath.matrix([mpf(float(x[0]))]))
            true = {
                "radius": error_of(x, answer)[0],
                "scaled_radius": scaled_error_of(x, answer, hessian),
                "value_gap": float(fall(exact, x, answer)),
                "eta": float(abs(gradient[0]) / mpmath.sqrt(curvature[0, 0])),
            }
        for name, value in true.items():
            # The norm of H at x, not at x*, makes the second a bound of another norm.
            slack = 1e-3 if name == "scaled_radius" else 0.0
            assert value * (1 - slack) <= getattr(proof, name) <= value * (1 + 1e-3), name
        assert np.isclose(proof.lambda_min, float(curvature[0, 0]), rtol=1e-6)
        assert proof.n_unidentified == 0
        assert proof.radii.tolist() == [proof.radius]
        assert np.isclose(proof.identified.radius, proof.radius, rtol=1e-7, atol=0.0)
        assert proof.coefficient_radius.shape == (1,)
        assert np.isclose(proof.coefficient_radius[0], proof.radius, rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("rigorous", [False, True])
def test_nothing_is_said_of_what_is_refused(rigorous):
    problem, _, best = one_unknown("cross_entropy")
    proof = certificates.certify(problem, best + 30.0, rigorous=rigorous)
    assert not (proof.valid or proof.valid_for_predictions)
    for name in ("radii", "scaled_radii", "value_gaps", "coefficient_radius"):
        assert getattr(proof, name).tolist() == [np.inf]
    assert np.isinf([proof.radius, proof.scaled_radius, proof.value_gap]).all()
    assert proof.n_unidentified == 0
    assert proof.identified is None


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "exp"])
def test_a_proven_ball_goes_as_far_as_the_default(loss):
    """Both bound one third derivative by one formula, and stop at M eta = 1/2."""
    problem, _, best = one_unknown(loss)
    seen = set()
    for step in np.geomspace(0.05, 0.4, 12):
        for x in (best + step, best - step):
            default, proof = (certificates.certify(problem, x, rigorous=flag) for flag in (False, True))
            h = default.lipschitz * default.eta
            assert np.isclose(proof.eta, default.eta, rtol=1e-6)
            assert np.isclose(proof.lipschitz, default.lipschitz, rtol=1e-5)
            if not np.isclose(h, 0.5, rtol=1e-4):
                assert proof.valid == default.valid == (h < 0.5)
                seen.add(proof.valid)
    assert seen == {True, False}


@pytest.mark.parametrize("rigorous", [False, True])
@pytest.mark.parametrize("loss", [*SOFTMAX, *FUNCTIONS])
def test_far_from_the_answer_the_ball_still_holds_it(loss, rigorous):
    """On both sides, where the curvature rises and where it falls, up to the largest ball there is."""
    problem, exact, best = one_unknown(loss)
    for sign in (1.0, -1.0):
        steps = (sign * step for step in np.geomspace(1.0, 5e-3, 14))
        proofs = ((x, certificates.certify(problem, x, rigorous=rigorous)) for x in (best + s for s in steps))
        x, proof = next(found for found in proofs if found[1].valid)
        with mpmath.workdps(DIGITS):
            answer, _ = exact_answer(exact, x)
            assert error_of(x, answer)[0] <= proof.radius
            gap = float(fall(exact, x, answer))
        assert gap <= proof.value_gap <= 8.0 * gap
        assert 0.1 < proof.lipschitz * proof.eta <= 0.5


@pytest.mark.parametrize("loss", [*SOFTMAX, *FUNCTIONS])
@pytest.mark.parametrize("c", [0.9, 0.75])
def test_a_whitener_that_is_too_short_proves_the_same(loss, c):
    """Of c times the whitener ``|1 - T^T H T|`` is ``1 - c^2``: the step grows by ``1 / c``, the constant
    falls by ``c^3``, and nothing changes of the ball.
    """
    problem, _, best = one_unknown(loss)
    x = best + 1e-3
    rows, white = _rows_of(problem, x), _whitening(problem, problem.evaluate(x))
    whole = _ball(rows, Enclosure.exact(white.T), white)
    short = _ball(rows, Enclosure.exact(c * white.T), replace(white, T=c * white.T))
    assert whole.valid
    assert short.valid
    assert np.isclose(short.eta, whole.eta / c, rtol=1e-4)
    assert np.isclose(short.lipschitz, c**3 * whole.lipschitz, rtol=1e-4)
    assert np.isclose(short.radius, whole.radius, rtol=1e-4)
    # In the norm of H, and in the loss, what is not known of H is added.
    assert np.isclose(short.scaled_radius, whole.scaled_radius * np.sqrt(2.0 - c**2) / c, rtol=1e-4)
    assert whole.value_gap <= short.value_gap <= 2.0 * whole.value_gap / c**2


ROWS = [name for name, case in TIGHT.items() if case.family != "Rescaled"]


@pytest.mark.parametrize("name", ROWS)
def test_proven_constants_that_are_reached(name):
    """As `test_constants_that_are_reached`; of cosh and sinh exponentials bound all."""
    case = TIGHT[name]
    A, b = np.array(case.A, dtype=float)[:, None], np.array(case.b, dtype=float)
    w = np.ones(len(b)) if case.w is None else np.array(case.w, dtype=float)
    named = {"loss" if case.family == "Softmax" else "function": case.loss}
    x = np.array([case.x])
    rows = _rows_of(getattr(problems, case.family)(A, b, weights=w, **named), x)
    constant = _lipschitz(rows, rows.centred @ Enclosure.exact(np.eye(1)), case.radius)
    reference = Objective(case.family, case.loss, A, b, np.zeros(len(b), dtype=int), w)
    reached = abs(third_along(reference, x + case.where * case.radius, np.ones(1)))
    share = 0.4 if case.loss == "cosh" else case.share
    assert share * constant <= reached <= constant


@pytest.mark.parametrize("loss", ["squared", "linear_cross_entropy", "entropy"])
@pytest.mark.parametrize("radius", [1e-3, 0.1, 0.5, 1.0])
def test_both_constants_of_two_outcomes_are_alike(loss, radius):
    """Centres move along one direction there: the two ways to bound how far they do differ by little."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        A, b, w = 1.5 * rng.standard_normal((2, 1)), 2.0 * rng.random(2), rng.random(2) + 0.3
        problem, x = problems.Softmax(A, b, loss=loss, weights=w), rng.standard_normal(1)
        default = lipschitz_constant(problem, problem.evaluate(x), np.eye(1), radius)
        rows = _rows_of(problem, x)
        proven = _lipschitz(rows, rows.centred @ Enclosure.exact(np.eye(1)), radius)
        assert 0.88 * default <= proven <= 1.12 * default


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("z", [-4.0, -0.3, 0.0, 0.5, 4.0])
@pytest.mark.parametrize("b", [-300.0, 0.0, 2.0, 300.0])
@pytest.mark.parametrize("reach", [0.0, 0.3])
def test_the_proven_third_derivative_of_an_exponential(function, z, b, reach):
    """``u' (4 u - b)``, whose ends are those of the interval, or zero."""
    bound = _third_of_exponential(function, Enclosure.exact(np.array([z])), np.array([reach]), np.array([b]))[
        0
    ]
    with mpmath.workdps(DIGITS):
        u, v = {
            "exp": (mpmath.exp, mpmath.exp), "cosh": (mpmath.cosh, mpmath.sinh),
            "sinh": (mpmath.sinh, mpmath.cosh),
        }[function]  # fmt: skip
        grid = [mpf(z) + mpf(reach) * mpf(k) / 50 for k in range(-50, 51)]
        largest = max(abs(v(t) * (4 * u(t) - mpf(b))) for t in grid)
        slope, size = max(abs(v(t)) for t in grid), max(abs(4 * u(t) - mpf(b)) for t in grid)
        assert largest <= bound
        # Each factor on its own; one and four exponentials are at most twice the hyperbolic functions of 4.
        assert bound <= float(slope * size) * (1 + 1e-6) or function != "exp"
        if abs(z) == 4.0:
            assert bound <= 4.1 * float(slope) * max(float(max(4 * abs(u(t)) for t in grid)), abs(b))


# ---- what rounding may do

EPS = float(np.finfo(np.float64).eps)


@pytest.mark.parametrize("size", [0.1, 1.0])
@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_rounding_is_bounded_by_the_worst_combination(family, loss, size):
    """Each logit off by ``1 + sqrt(d) |A| |x| + |offset|`` roundings, and each term of the gradient by one,
    to the worst effect, by autodiff: exactly that where rows are on their own, up to ten times where the sums
    over a group are bounded one by one.
    """
    inst, x = instance(family, loss, sizes=(6, 4), d=2, noise=0.3)
    offset, penalty, ridge = np.linspace(-size, size, 10), np.linspace(0.0, 0.5, 10), 0.3
    T = np.array([[0.7, 0.2], [-0.4, 0.9]])
    problem = inst.problem(offset=offset, row_penalty=penalty, ridge=ridge)
    objective = inst.objective()

    def gradient(shift):
        point = as_tensor(x).requires_grad_()
        value = objective.rows(as_tensor(inst.A) @ point + shift).sum()
        return torch.autograd.grad(value, point, create_graph=True)[0]

    by_logit = torch.autograd.functional.jacobian(gradient, as_tensor(offset)).numpy()
    logits = as_tensor(inst.A @ x + offset).requires_grad_()
    slope = np.abs(torch.autograd.grad(objective.rows(logits).sum(), logits)[0].numpy())
    errors = 1.0 + np.sqrt(2.0) * np.abs(inst.A) @ np.abs(x) + np.abs(offset)
    columns = (slope + penalty**2 * errors) @ np.abs(inst.A) + np.abs(ridge * x)
    own = np.linalg.norm(inst.A @ T, axis=1)
    worst = (np.linalg.norm(T.T @ by_logit, axis=0) + penalty**2 * own) @ errors
    worst += slope @ own + np.linalg.norm(np.abs(T).T @ columns)
    bound = RowBall(problem, problem.evaluate(x), T).rounding() / (4.0 * EPS)
    assert worst * (1 - 1e-9) <= bound <= worst * (1 + 1e-9 if family == "Exponential" else 10.0)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("b", [0.1, 0.25, -0.25, 0.5, -0.5, 30.0, -30.0])
@pytest.mark.parametrize("far", [0.0, 100.0])
def test_errors_that_might_cancel_are_added(function, b, far):
    """Two outputs of which one grows as the other falls, and what both add to a sum that targets multiply;
    logits that are the small difference of a column and an offset.
    """
    A, target = np.array([[1.0, 1.0], [-1.0, 1.0]]), np.array([b, 2.0 * b])
    x, offset, T = np.array([1.3, far]), np.full(2, -far), np.array([[1.0], [0.0]])
    problem = problems.Rescaled(A, target, function, offset=offset)
    reference = Objective("Rescaled", function, A, target, np.zeros(2, dtype=int))

    def gradient(shift):
        point = as_tensor(x).requires_grad_()
        value = reference.rows(as_tensor(A) @ point + shift).sum()
        return torch.autograd.grad(value, point, create_graph=True)[0]

    by_logit = torch.autograd.functional.jacobian(gradient, as_tensor(offset)).numpy()
    errors = 1.0 + np.sqrt(2.0) * np.abs(A) @ np.abs(x) + np.abs(offset)
    worst = 4.0 * EPS * float((np.abs(T.T @ by_logit) @ errors)[0])
    bound = RowBall(problem, problem.evaluate(x), T).rounding()
    # Of sinh the sum is zero, and nothing of the worst is left in the gradient.
    assert worst <= bound <= (np.inf if function == "sinh" else 20.0 * worst)


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_rounding_has_the_unit_of_the_weights(family, loss):
    """Without a penalty: of weights a million times as large it is a million times as large."""
    inst, x = instance(family, loss, sizes=(6, 4), d=2, noise=0.3)
    one, other = (
        RowBall(problem, problem.evaluate(x), np.eye(2)).rounding()
        for problem in (inst.problem(weights=np.full(10, w)) for w in (1.0, 1e-6))
    )
    assert np.isclose(other, 1e-6 * one, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("family", ["Exponential", "Rescaled"])
@pytest.mark.parametrize("function", ["cosh", "sinh"])
def test_rounding_is_the_same_on_both_sides(family, function):
    """Cosh is even, and so is the loss; sinh is odd: so is the loss of shares, or with the other targets."""
    A, x = np.array([[1.0], [0.5], [2.0]]), np.array([1.1])
    b = np.array([3.0, -1.0, 0.4])
    flipped = -b if (family, function) == ("Exponential", "sinh") else b
    one, other = (
        RowBall(problem, problem.evaluate(point), np.eye(1)).rounding()
        for problem, point in (
            (getattr(problems, family)(A, b, function), x),
            (getattr(problems, family)(A, flipped, function), -x),
        )
    )
    assert np.isclose(one, other, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("size", [1e-200, 1e-3, 1.0, 1e200])
def test_what_rows_see_has_no_unit(size):
    """Of a logit whose terms cancel to a share, and of rows of zeros."""
    A = size * np.array([[1.0, -1.0 + 1e-6], [0.0, 0.0], [0.5, -0.5]])
    problem = problems.Exponential(A, np.zeros(3))
    ball = RowBall(problem, problem.evaluate(np.zeros(2)), np.eye(2))
    assert np.isclose(ball.seen(np.ones((2, 1))), 5e-7, rtol=1e-5)
    assert np.isclose(ball.seen(np.array([[1.0, 1.0], [1.0, 3.0]])), 0.5, rtol=1e-5)
    assert ball.seen(np.array([[0.0], [0.0]])) == 0.0


@pytest.mark.parametrize("loss", ["squared", "linear_cross_entropy"])
@pytest.mark.parametrize("common", [-1e6, 1e6])
def test_slopes_that_cancel_are_known_to_the_rounding_of_their_terms(loss, common):
    """Targets with a large part in common: the slope is the difference of two numbers of its size."""
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((7, 2)), common + rng.random(7)
    problem = problems.Softmax(A, b, loss=loss)
    at = problem.evaluate(np.array([0.4, -0.2]))
    f = np.asarray(problem.predict(at.x))
    own = np.linalg.norm(A - f @ A, axis=1)
    term = np.abs(b) if loss == "linear_cross_entropy" else np.abs(f - b)
    worst = 4.0 * EPS * float(f * term @ own)
    assert worst <= RowBall(problem, at, np.eye(2)).rounding() <= 20.0 * worst


@pytest.mark.parametrize("function", ["exp", "cosh", "sinh"])
@pytest.mark.parametrize("ends", [(-2.0, -0.5), (-1.0, 2.0), (-3.0, 1.0), (0.2, 1.5), (0.7, 0.7)])
def test_the_range_of_an_output(function, ends):
    grid = as_tensor(np.linspace(*ends, 2001)).requires_grad_()
    u = getattr(torch, function)(grid)
    v = torch.autograd.grad(u.sum(), grid)[0]
    found = output_range(function, np.array([ends[0]]), np.array([ends[1]]))
    expected = [e.item() for e in (u.min(), u.max(), v.min(), v.max())]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-5)
