"""Every coefficient of every bound: autodiff never exceeds it, and somewhere comes close."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from autodiff import Objective, as_tensor
from instances import ALL_LOSSES, instance

from attnfit import problems
from attnfit.certificates.lipschitz import lipschitz_constant, output_bounds
from attnfit.certificates.mixture import _on_face
from attnfit.losses.elementwise import LeastSquares, PoissonDeviance, SquaredExponential, Total
from attnfit.losses.softmax import LOSSES


def derivatives(function, at, order):
    """Derivatives of an entrywise function by autograd, the function itself first."""
    point = as_tensor(at).requires_grad_()
    found = [function(point)]
    for _ in range(order):
        last = found[-1]
        grown = last.requires_grad
        found.append(
            torch.autograd.grad(last.sum(), point, create_graph=True)[0] if grown else torch.zeros_like(point)
        )
    return [values.detach().numpy() for values in found]


def third_along(objective, x, u):
    """``D^3 L[u, u, u]`` at x."""
    return derivatives(lambda t: objective(as_tensor(x) + t * as_tensor(u)), 0.0, 3)[3]


# ---- formulas of one row

PHI = {
    "squared": lambda f, b, w: 0.5 * w * (f - b) ** 2,
    "cross_entropy": lambda f, b, w: -w * b * torch.log(f),
    "kl": lambda f, b, w: w * b * (math.log(b) - torch.log(f)),
    "linear_cross_entropy": lambda f, b, w: -w * b * f,
    "entropy": lambda f, b, w: -w * f * torch.log(f),
}


@pytest.mark.parametrize("loss", PHI)
@pytest.mark.parametrize(("b", "w"), [(0.3, 1.0), (0.8, 2.5)])
def test_the_terms_of_a_softmax_loss_are_derivatives(loss, b, w):
    """p, g2 and g3 from their definition, each monotone in f, as the bounds on a ball take for granted."""
    f = np.linspace(0.01, 0.99, 60)
    _, d1, d2, d3 = derivatives(lambda t: PHI[loss](t, b, w), f, 3)
    own, h = LOSSES[loss], np.log(f)
    expected = {"p": d1, "g2": d2 * f + d1, "g3": d3 * f**2 + 3.0 * d2 * f + d1}
    for name, values in expected.items():
        ours = getattr(own, name)(f, h, np.full(60, b), np.full(60, w)) + 0.0 * f
        np.testing.assert_allclose(ours, values, rtol=1e-10, atol=1e-10)
        steps = np.diff(ours)
        assert (steps >= -1e-12).all() or (steps <= 1e-12).all()


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        (SquaredExponential("exp"), lambda z, b: 0.5 * (torch.exp(z) - b) ** 2),
        (SquaredExponential("cosh"), lambda z, b: 0.5 * (torch.cosh(z) - b) ** 2),
        (SquaredExponential("sinh"), lambda z, b: 0.5 * (torch.sinh(z) - b) ** 2),
        (Total(), lambda z, b: torch.exp(z)),
        (PoissonDeviance(), lambda z, b: torch.exp(z) - b * z),
        (LeastSquares(), lambda z, b: 0.5 * (z - b) ** 2),
    ],
    ids=lambda value: getattr(value, "function", type(value).__name__),
)
def test_the_bound_of_a_single_row(loss, function):
    """On a short interval it is the third derivative; on a long one it is no smaller."""
    rng = np.random.default_rng(0)
    z, b, w = rng.uniform(-2, 2, 200), rng.uniform(-1, 3, 200), rng.uniform(0.5, 2.0, 200)

    def third(at):
        return np.abs(w * derivatives(lambda t: function(t, as_tensor(b)), at, 3)[3])

    tiny = loss.third_derivative_bound(z - 1e-6, z + 1e-6, b, w)
    np.testing.assert_allclose(tiny, third(z), rtol=1e-4, atol=1e-3)
    assert (tiny >= third(z) * (1 - 1e-12)).all()
    long = loss.third_derivative_bound(z - 0.5, z + 1.0, b, w)
    for t in np.linspace(-0.5, 1.0, 31):
        assert (third(z + t) <= long * (1 + 1e-12)).all()


# ---- constants of a ball


@dataclass
class Tight:
    """One unknown, and a point of the ball where the third derivative comes close to the constant."""

    family: str
    loss: str
    A: list
    b: list
    x: float
    radius: float = 0.0
    w: list | None = None
    groups: list | None = None
    where: float = 1.0
    share: float = 0.9


RARE = math.log(1e-3)
TIGHT = {
    # Third moment of an outcome that is rare: sum of f c^3.
    "rows, cross entropy": Tight("Softmax", "cross_entropy", [0, 1], [0.5, 0.5], RARE),
    "outputs grow on the ball": Tight("Softmax", "cross_entropy", [0, 1], [0.5, 0.5], RARE, 1.0),
    "rows, squared": Tight("Softmax", "squared", [0, 1], [0, -1], RARE, w=[0, 1]),
    "rows, squared, on the ball": Tight("Softmax", "squared", [0, 1], [0, -1], RARE, 1.0, w=[0, 1]),
    "rows, entropy": Tight("Softmax", "entropy", [0, 1], [0, 0], RARE, w=[0, 1]),
    "rows, linear": Tight("Softmax", "linear_cross_entropy", [0, 1], [0, 1], RARE, 0.5),
    # Outcomes near the mean that pull, and far ones that do not: -3 e <f, c^2>.
    "centres": Tight("Softmax", "linear_cross_entropy", [1, -1, 0.1, -0.1], [1, 1, 2, 0], 0.0),
    "one row": Tight("Exponential", "exp", [1], [0.0], 0.3, 0.5),
    "one row, far target": Tight("Exponential", "cosh", [1], [-50.0], 1.0, 0.5),
    "rescaled, no target": Tight("Rescaled", "exp", [1], [0.0], 0.0),
    "rescaled, no target, on the ball": Tight("Rescaled", "exp", [1], [0.0], 0.0, 0.5),
    "rescaled, target": Tight("Rescaled", "exp", [1], [-2.0], 0.0),
    "rescaled, target, on the ball": Tight("Rescaled", "exp", [1], [-2.0], 0.0, 0.5),
    "rescaled, large target": Tight("Rescaled", "exp", [1], [-30.0], 0.0, 0.5),
    "rescaled, groups": Tight("Rescaled", "exp", [1, 0], [-2.0, 0.0], 0.0, groups=[0, 1]),
    "rescaled, groups, on the ball": Tight("Rescaled", "exp", [1, 0], [-2.0, 0.0], 0.0, 0.5, groups=[0, 1]),
    "rescaled, groups, no target": Tight("Rescaled", "exp", [1, 0], [0.0, 0.0], 0.0, 0.5, groups=[0, 1]),
}


@pytest.mark.parametrize("name", TIGHT)
def test_constants_that_are_reached(name):
    """No coefficient of these formulas can be smaller by a tenth."""
    case = TIGHT[name]
    A, b = np.array(case.A, dtype=float)[:, None], np.array(case.b, dtype=float)
    w = np.ones(len(b)) if case.w is None else np.array(case.w, dtype=float)
    options = {} if case.family == "Exponential" else {"groups": case.groups}
    named = {"loss" if case.family == "Softmax" else "function": case.loss}
    problem = getattr(problems, case.family)(A, b, weights=w, **options, **named)
    ids = np.zeros(len(b), dtype=int) if case.groups is None else np.array(case.groups)
    reference = Objective(case.family, case.loss, A, b, ids, w)
    at = problem.evaluate(np.array([case.x]))
    constant = lipschitz_constant(problem, at, np.eye(1), case.radius)
    reached = abs(third_along(reference, np.array([case.x + case.where * case.radius]), np.ones(1)))
    assert case.share * constant <= reached <= constant * (1 + 1e-9)


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("sizes", [(6, 4, 5), (9,)])
def test_no_third_derivative_on_the_ball_exceeds_its_constant(family, loss, sizes):
    """At its rim, where the bounds on the ball are tried hardest; along the steepest of many directions."""
    rng = np.random.default_rng(0)
    for seed in range(2):
        inst, x = instance(family, loss, sizes=sizes, d=3, noise=0.3, seed=seed)
        problem, reference = inst.problem(), inst.objective()
        T = np.linalg.inv(np.linalg.cholesky(problem.hessian_at(problem.evaluate(x), absolute=True))).T
        for radius in (1e-3, 0.3):
            constant = lipschitz_constant(problem, problem.evaluate(x), T, radius)
            for _ in range(6):
                y = rng.standard_normal(3)
                point = x + radius * T @ y / np.linalg.norm(y)
                for u in rng.standard_normal((6, 3)):
                    reached = abs(third_along(reference, point, T @ u / np.linalg.norm(u)))
                    assert reached <= constant * (1 + 1e-9)


@pytest.mark.parametrize("loss", ["squared", "entropy", "linear_cross_entropy", "kl"])
def test_a_row_that_is_gone_leaves_the_constant_as_it_is(loss):
    """Its output is zero in float64, and every term that it could add with it."""
    inst, x = instance("Softmax", loss, sizes=(6,), d=2)
    A, b = np.vstack([inst.A, [-800.0, 0.0]]), np.append(inst.b, 0.1 * (loss != "kl"))
    point = np.array([1.0, x[1]])
    more, less = problems.Softmax(A, b, loss=loss), problems.Softmax(inst.A, inst.b, loss=loss)
    for radius in (0.0, 1e-3):
        constant = lipschitz_constant(less, less.evaluate(point), np.eye(2), radius)
        assert np.isclose(lipschitz_constant(more, more.evaluate(point), np.eye(2), radius), constant)


@pytest.mark.parametrize("groups", [[0, 0, 0], [0, 1, 1]])
def test_rows_that_add_nothing_leave_a_rescaled_constant_as_it_is(groups):
    """However many rows a group has: what belongs to it is shared out among them, and added up again."""
    A, b = np.array([[1.0], [0.5], [-0.3]]), np.array([-2.0, 1.0, 0.7])
    less = problems.Rescaled(A, b, "exp", groups)
    some = np.concatenate([groups, [0] * 4, [groups[-1]] * 2])
    more = problems.Rescaled(
        np.vstack([A, np.zeros((6, 1))]), np.append(b, np.zeros(6)), "exp", some,
        offset=np.append(np.zeros(3), np.full(6, -800.0)),
    )  # fmt: skip
    for x in (0.0, 0.4):
        for radius in (0.0, 0.3):
            one, other = (
                lipschitz_constant(p, p.evaluate(np.array([x])), np.eye(1), radius) for p in (less, more)
            )
            assert np.isclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.3])
def test_outputs_on_the_ball_are_enclosed_and_the_ends_are_near(share):
    """Two outcomes of which one grows at the cost of the other."""
    f = np.array([1.0 - share, share])
    c = np.array([-share, 1.0 - share])
    radius = np.log(1.5 / share)
    reach = radius * np.abs(c)
    total = np.sum(f * np.exp(reach)) * np.ones(2)
    outputs, logs = output_bounds(np.log(f), reach, total)
    seen = []
    for y in np.linspace(-radius, radius, 101):
        moved = f * np.exp(c * y) / np.sum(f * np.exp(c * y))
        assert (outputs.low <= moved).all() and (moved <= outputs.high).all()
        assert (logs.low <= np.log(moved)).all() and (np.log(moved) <= logs.high).all()
        seen.append(moved)
    lowest = np.min(seen, axis=0)
    assert (outputs.low >= 0.3 * lowest).all()
    assert (logs.low >= np.log(lowest) - 1.2).all()


# ---- mixtures


@pytest.mark.parametrize("seed", range(4))
def test_the_radius_on_a_face_is_reached(seed):
    """Proportions that differ along an edge, by what the gap allows."""
    rng = np.random.default_rng(seed)
    A = rng.random((6, 4))
    face = np.array([True, False, True, False])
    move = 0.1 * np.array([1.0, 0.0, -1.0, 0.0])
    gap = 0.5 * np.sum((A @ move) ** 2)
    radii, smallest = _on_face(A, face, np.array([gap]), np.zeros(1))
    assert np.isclose(radii[0], np.linalg.norm(move), rtol=1e-9)
    assert np.isclose(smallest, np.sum((A @ move) ** 2) / np.sum(move**2), rtol=1e-9)


def test_what_lies_off_a_face_is_in_the_radius():
    rng = np.random.default_rng(0)
    for _ in range(200):
        A = rng.random((6, 4))
        face = np.array([True, True, False, False])
        f = np.array([0.5, 0.5, 0.0, 0.0])
        other = rng.dirichlet(np.ones(4))
        gap = 0.5 * np.sum((A @ (f - other)) ** 2)
        radius = _on_face(A, face, np.array([gap]), np.array([other[2:].sum()]))[0][0]
        assert np.linalg.norm(f - other) <= radius * (1 + 1e-12)
