"""The majorant of Newton-Kantorovich, and what a ball rests on."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
from instances import instance

from attnfit import certificates, minimize
from attnfit.certificates.kantorovich import newton_kantorovich
from attnfit.losses.softmax import LogRatio
from attnfit.objectives.objective import Evaluation
from attnfit.objectives.rows import RowProblem

# ---- the majorant


@dataclass
class Cubic:
    """``g t + t^2 / 2 - M t^3 / 6``, whose Hessian has the Lipschitz constant M."""

    g: float
    M: float
    n_unknowns = 1
    asked: list = field(default_factory=list)

    def hessian_at(self, at):
        return np.ones((1, 1))

    def diagonal_at(self, at):
        return np.ones(1)

    def rounding(self):
        return 0.0

    def glance(self, radius):
        return 0.0, np.inf

    def obstacle(self, radius):
        self.asked.append(radius)

    def lipschitz(self, radius):
        self.asked.append(radius)
        return self.M

    def value(self, t):
        return self.g * t + t**2 / 2 - self.M * t**3 / 6


@pytest.mark.parametrize("h", [1e-6, 0.1, 0.3, 0.499])
def test_the_majorant_is_reached(h):
    """Radius and value gap of a cubic whose curvature falls towards its minimum are exact."""
    g, M = -0.7, h / 0.7
    cubic = Cubic(g, M)
    at = Evaluation(np.zeros(1), 0.0, np.array([g]), np.zeros((0, 0)), np.zeros((0, 1)))
    proof = newton_kantorovich(cubic, at, lambda whitener: cubic)
    root = 2 * abs(g) / (1 + math.sqrt(1 - 2 * h))
    assert proof.valid
    # What is reached is not cut by a rounding.
    assert min(proof.radius, proof.scaled_radius, proof.radii[0], proof.coefficient_radius[0]) >= root
    assert np.isclose(proof.radius, root, rtol=1e-9)
    assert np.isclose(proof.scaled_radius, root, rtol=1e-9)
    assert np.isclose(proof.value_gap, -cubic.value(root), rtol=1e-9)
    assert np.isclose(proof.lambda_min, 1.0)
    # The curvature was bounded where x* may be.
    assert min(cubic.asked) >= proof.radius
    assert len(cubic.asked) == 2


def test_half_is_the_limit():
    for h, valid in ((0.4999, True), (0.5001, False)):
        cubic = Cubic(-1.0, h)
        at = Evaluation(np.zeros(1), 0.0, np.array([-1.0]), np.zeros((0, 0)), np.zeros((0, 1)))
        assert newton_kantorovich(cubic, at, lambda whitener, cubic=cubic: cubic).valid == valid


def test_a_quadratic_is_certified_exactly():
    """Log ratios: one Newton step is the whole way, and the ball says how long it is."""
    inst, _ = instance("Softmax", "squared", sizes=(9, 8), d=3, noise=0.1)
    problem = RowProblem(inst.A, np.log(inst.b), loss=LogRatio(), groups=inst.groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = minimize(problem, tol=1e-12)
    x = best.x + np.array([1e-3, -2e-3, 1e-3])
    proof = certificates.certify(problem, x)
    error, hessian = x - best.x, problem.hessian(x)
    assert proof.valid
    assert proof.lipschitz == 0.0
    assert np.isclose(proof.scaled_radius, np.sqrt(error @ hessian @ error), rtol=1e-6)
    assert np.isclose(proof.value_gap, problem.value(x) - best.value, rtol=1e-6)


# ---- what a ball rests on


@dataclass
class Given:
    """A problem known by its Hessian, and what a ball says of it."""

    H: np.ndarray
    M: float = 0.0
    seen_by_rows: float = 0.0
    obstacle_is: str | None = None

    @property
    def n_unknowns(self):
        return len(self.H)

    def hessian_at(self, at):
        return self.H

    def diagonal_at(self, at):
        return np.diag(self.H)

    def rounding(self):
        return 0.0

    def glance(self, radius):
        return 0.0, np.inf

    def obstacle(self, radius):
        return self.obstacle_is

    def lipschitz(self, radius):
        return self.M

    def seen(self, directions):
        return self.seen_by_rows

    def certificate(self, gradient, value=0.0):
        d = len(self.H)
        at = Evaluation(np.zeros(d), value, np.array(gradient), np.zeros((0, 0)), np.zeros((0, d)))
        return newton_kantorovich(self, at, lambda whitener: self)


@pytest.mark.parametrize(("least", "known"), [(1.5e-11, False), (3e-11, True), (1e-6, True)])
def test_a_hessian_must_be_known_to_half_its_least_curvature(least, known):
    """A hundred equal correlations: eigenvalues ``1 - c`` and ``1 + 99 c``, known to ``4 d eps`` of the
    largest, which is 59 and 30 % of the least, and next to nothing.
    """
    d = 100
    H = np.full((d, d), 1.0 - least) + least * np.eye(d)
    g = np.zeros(d)
    g[:2] = 1e-9, -1e-9
    proof = Given(H).certificate(g)
    assert proof.valid == known
    assert proof.n_unidentified == 0
    assert np.isclose(proof.lambda_min, least, rtol=0.05, atol=0.0)
    if known:
        lost = 4.0 * d * 2.0**-52 * d / least
        assert np.isclose(proof.eta, np.sqrt(2e-18 / least) / (1.0 - lost), rtol=0.05, atol=0.0)
    else:
        assert "least curvature only" in proof.reason


@pytest.mark.parametrize(("part", "open_too"), [(3e-6, True), (3e-7, False)])
def test_a_part_of_a_millionth_is_not_blamed_on_rounding(part, open_too):
    """The open direction has this component along the last unknown, and curvatures differ by 1e10."""
    rng = np.random.default_rng(0)
    null = np.array([1.0, -1.0, 0.0, np.sqrt(2.0) * part])
    basis = np.linalg.qr(np.column_stack([null, rng.standard_normal((4, 3))]))[0]
    basis[:, 1:] = np.linalg.qr(basis[:, 1:] - basis[:, :1] @ (basis[:, :1].T @ basis[:, 1:]))[0]
    proof = Given((basis * [0.0, 1e-10, 1.0, 1.0]) @ basis.T).certificate(np.zeros(4))
    assert proof.n_unidentified == 1
    assert proof.valid_for_predictions
    assert np.isinf(proof.coefficient_radius).tolist() == [True, True, False, open_too]


@pytest.mark.parametrize(("seen", "unseen"), [(0.9e-9, True), (1.1e-9, False)])
def test_what_rows_see_of_an_open_direction(seen, unseen):
    """Of ill-conditioned columns no more than a billionth; of others no more than rounding."""
    H = np.zeros((3, 3))
    H[:2, :2] = [[1.0, 1.0 - 1e-8], [1.0 - 1e-8, 1.0]]
    proof = Given(H, seen_by_rows=seen).certificate(np.zeros(3))
    assert proof.valid_for_predictions == unseen
    H[:2, :2] = np.eye(2)
    for share, is_rounding in ((32 * 3 * 2.0**-52, True), (33 * 3 * 2.0**-52, False)):
        found = Given(H, seen_by_rows=0.999 * share).certificate(np.zeros(3))
        assert found.valid_for_predictions == is_rounding
        # x itself is not certified, whether rows see the direction or not.
        assert not found.valid
        assert found.radii.tolist() == [found.radius] == [np.inf]
        assert found.scaled_radii.tolist() == [found.scaled_radius]
        assert found.value_gaps.tolist() == [found.value_gap]
        assert np.isfinite([found.scaled_radius, found.value_gap]).all() == is_rounding


@pytest.mark.parametrize(("units", "along"), [((1.0, 10.0), 0), ((10.0, 1.0), 1), ((-10.0, 1.0), 1)])
def test_a_direction_of_negative_curvature_is_named_in_the_users_units(units, along):
    """``(1, -1)`` where both columns have curvature one: the larger entry is that of the smaller column."""
    H = np.array([[1.0, 2.0], [2.0, 1.0]]) * np.multiply.outer(units, units)
    assert f"dominated by column {along};" in Given(H).certificate([0.0, 0.0]).reason


def test_refusals_say_what_is_known():
    """Curvatures in the user's units, the direction, how many are open and how long the step is."""
    cases = {
        "negative along a direction dominated by column 1": (Given(np.diag([1.0, -2.0, 3.0])), -2.0, 0),
        "dominated by column 2": (Given(np.diag([4.0, 0.0, -9.0])), -9.0, 1),
        "nothing is identified": (Given(np.zeros((3, 3))), 0.0, 3),
        "in the 2 identified directions (1 are not)": (Given(np.diag([4.0, 0.0, 9.0]), M=3.0), 4.0, 1),
        "constant: M eta = 3 exceeds 1/2; tighten": (Given(np.diag([4.0, 1.0, 9.0]), M=6.0), 1.0, 0),
        "a wall": (Given(np.diag([4.0, 1.0, 9.0]), obstacle_is="a wall"), 1.0, 0),
    }
    for reason, (problem, least, n_open) in cases.items():
        proof = problem.certificate([1.0, 0.0, 0.0])
        assert reason in proof.reason
        assert not (proof.valid or proof.valid_for_predictions)
        assert np.isinf([proof.radius, proof.scaled_radius, proof.value_gap]).all()
        assert np.isclose(proof.lambda_min, least, rtol=1e-12)
        assert proof.n_unidentified == n_open
        at_a_minimum = least > 0.0
        assert np.isclose(proof.eta, 0.5, rtol=1e-9) if at_a_minimum else np.isinf(proof.eta)
        stepped = at_a_minimum and problem.obstacle_is is None
        assert np.isclose(proof.lipschitz, problem.M) if stepped else np.isinf(proof.lipschitz)
    for problem, value in ((Given(np.eye(2)), np.inf), (Given(np.diag([1.0, np.inf])), 0.0)):
        proof = problem.certificate([0.0, 0.0], value)
        assert "overflows" in proof.reason
        assert np.isnan(proof.lambda_min)
        assert proof.n_unidentified == 0


@pytest.mark.parametrize(
    ("rounding", "cheap", "value", "taken"),
    [
        (0.0, 2.0, 0.0, True),  # near: M eta is 0.002
        (0.0, 30.0, 0.0, False),  # the cheap constant is too large to say how near
        (2.5e-3, 2.0, 0.0, False),  # rounding reaches beyond the ball that was looked at
        (1.5e-3, 2.0, 1e14, True),  # which is larger where the loss is
    ],
)
def test_a_cheap_constant_counts_on_its_ball_and_near_the_answer(rounding, cheap, value, taken):
    given = Given(H=np.eye(1), M=1.0)
    given.glance = lambda radius: (rounding, cheap)
    proof = given.certificate(np.array([1e-3]), value)
    assert proof.valid
    assert np.isclose(proof.lipschitz, cheap if taken else given.M)
