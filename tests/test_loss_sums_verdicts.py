"""Certificates and verdicts of weighted sums of losses."""

import numpy as np
import pytest
from instances import instance
from test_loss_sums import MIXED, SUMS, Quartic

from attnfit import minimize, problems
from attnfit.certificates.certification import RowBall, certify
from attnfit.losses import LOSSES, SeparableLoss


@pytest.mark.parametrize("name", SUMS)
def test_the_certificates_constant_bounds_the_change_of_the_hessian(name):
    """On balls around x: differences of Hessians at points inside, whitened, by their distance."""
    inst, x = instance("Softmax", "squared", sizes=(4, 3, 5))
    problem = problems.Softmax(inst.A, inst.b, inst.groups, loss=SUMS[name], ridge=0.2)
    at, rng = problem.evaluate(x), np.random.default_rng(0)
    T = rng.standard_normal((3, 3))
    for radius in (1e-3, 0.3):
        constant = RowBall(problem, at, T).lipschitz(radius)
        ratios = []
        for _ in range(60):
            y, u = rng.standard_normal((2, 3))
            y *= radius / np.linalg.norm(y) * rng.random()
            step = 1e-3 * radius * u / np.linalg.norm(u)
            change = problem.hessian(x + T @ (y * (1 - 1e-3) + step)) - problem.hessian(
                x + T @ y * (1 - 1e-3)
            )
            ratios.append(np.linalg.norm(T.T @ change @ T, 2) / np.linalg.norm(step))
        assert max(ratios) <= constant * (1 + 1e-6)
        assert constant <= 100.0 * max(ratios)


@pytest.mark.parametrize("name", SUMS)
def test_fits_are_certified(name):
    inst, _ = instance("Softmax", "squared", sizes=(4, 3, 5, 6, 7))
    problem = problems.Softmax(inst.A, inst.b, inst.groups, loss=SUMS[name], ridge=0.2)
    result = minimize(problem)
    assert result.status == "converged"
    proof = result.certificate()
    assert proof.valid, proof.reason
    # Newton's method from the fit moves within the radius.
    exact = result.x - np.linalg.solve(problem.hessian(result.x), problem.gradient(result.x))
    assert np.linalg.norm(exact - result.x) <= proof.radius


def test_the_constant_of_cross_entropy_stands_where_its_outputs_underflow():
    """What it adds to <f, p> is w b: a sum with next to nothing of another loss has its constant."""
    A, b = np.array([[0.0], [0.3], [-1.0]]), [0.3, 0.2, 0.5]
    x, T = np.array([720.0]), np.eye(1)
    found = []
    for loss in ("cross_entropy", [("cross_entropy", 1.0), ("squared", 1e-9)]):
        problem = problems.Softmax(A * [[0.0], [1.0 / 720.0], [1.0]], b, loss=loss)
        found.append(RowBall(problem, problem.evaluate(x), T).lipschitz(1e-3))
    assert found[1] >= found[0] * (1 - 1e-6) > 0.0
    assert np.isfinite(found[1])


def test_a_part_that_states_no_third_derivative_is_named():
    class Plain(SeparableLoss):
        phi, first, second = Quartic.phi, Quartic.first, Quartic.second

    problem = problems.Softmax(
        np.eye(3, 2), [0.5, 0.3, 0.2], loss=[(Plain(), 1.0), ("entropy", 0.1)], ridge=1.0
    )
    assert not minimize(problem).certificate().valid
    assert "states no bound" in certify(problem, np.zeros(2)).reason


def test_sums_of_cross_entropies_are_separable_where_each_is():
    A, b = np.array([[1.0], [-1.0], [1.0], [-1.0]]), [1.0, 0.0, 1.0, 0.0]
    problem = problems.Softmax(A, b, [0, 0, 1, 1], loss=SUMS["convex"])
    with pytest.warns(UserWarning, match="separable"):
        found = minimize(problem)
    assert found.status == "separable"
    assert found.x[0] == np.inf


def test_a_share_that_no_part_wants_goes_to_zero():
    """Cross entropy asks nothing of a target of zero, whatever the output there."""
    nothing = LOSSES["cross_entropy"].p(*(np.array([v]) for v in (0.0, -800.0, 0.0, 1.0)))
    assert nothing[0] == 0.0
    A, b = np.array([[1.0], [-1.0]]), [1.0, 0.0]
    with pytest.warns(UserWarning, match="no minimum"):
        found = minimize(problems.Softmax(A, b, loss=[("squared", 1.0), ("cross_entropy", 0.5)]))
    assert found.status == "no_minimum" and found.x[0] == np.inf


def test_a_boundary_limit_of_shares_is_none_that_converged():
    """The second row's share wants to be zero: no minimum, as for the squared loss alone; the entropy's
    weight decides, as its slope at zero is infinite.
    """
    A, b = np.array([[1.0], [-1.0]]), [1.2, -0.2]
    with pytest.warns(UserWarning):
        found = minimize(problems.Softmax(A, b, loss=[("squared", 1.0), ("linear_cross_entropy", 0.1)]))
    assert found.status == "no_minimum"
    pulled = minimize(problems.Softmax(A, b, loss=[("squared", 1.0), ("entropy", -0.1)]))
    assert pulled.status == "converged" and pulled.certificate().valid
    with pytest.warns(UserWarning):
        pushed = minimize(problems.Softmax(A, b, loss=[("squared", 1.0), ("entropy", 0.1)]))
    assert pushed.status == "no_minimum"


@pytest.mark.parametrize("terms", [MIXED["sparse"], MIXED["three"]], ids=["sparse", "three"])
def test_a_total_that_may_fall_for_ever_is_never_called_converged(terms):
    """With a constant among the columns all logits may fall together: there is no minimum."""
    rng = np.random.default_rng(0)
    A = np.column_stack([np.ones(12), rng.standard_normal((12, 2))])
    b = rng.dirichlet(np.ones(4), size=3).reshape(-1)
    groups = np.repeat(np.arange(3), 4)
    with pytest.warns(UserWarning):
        found = minimize(problems.Softmax(A, b, groups, loss=terms))
    assert not found.converged
    held = minimize(problems.Softmax(A, b, groups, loss=terms, ridge=1e-3))
    assert held.converged and held.certificate().valid


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("unit", [1.0, 1e6, 1e-6])
@pytest.mark.parametrize("seed", range(6))
def test_a_slope_that_others_round_away_is_no_minimum(seed, unit, weight):
    """The slope along the constant falls like e^z, below the rounding of the slopes of the shares, whatever
    the units of the columns.
    """
    rng = np.random.default_rng(seed)
    n, k, d = rng.integers([2, 3, 1], [6, 7, 4])
    A = np.column_stack([np.full(n * k, unit), rng.standard_normal((n * k, d))])
    b, groups = rng.dirichlet(np.ones(k), size=n).reshape(-1), np.repeat(np.arange(n), k)
    for shares in ("cross_entropy", "squared"):
        found = minimize(problems.Softmax(A, b, groups, loss=[(shares, 1.0), ("sparse", weight)]))
        assert not found.converged
