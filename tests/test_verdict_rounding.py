"""What rounding may hide at an accepted point: a slope too small to tell, a value too large to see it."""

import numpy as np
import pytest
from test_verdict_rules import TOL, Logits, look, point, quadratic

from attnfit.solvers.verdicts import Judge


class Rounded(Logits):
    """Slopes of 1e-13 and 1, of which the first has an error where it is not at the origin."""

    slopes = np.array([1e-13, 1.0])

    def __init__(self, error):
        super().__init__()
        self.error = error

    def evaluate(self, x):
        return point(self.slopes * x * [1.0 + self.error, 1.0], x)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (0.0, "converged"),
        (0.049, "converged"),
        (-0.049, "converged"),
        (0.051, "precision"),
        (-0.051, "precision"),
    ],
)
def test_a_weak_direction_is_tried_out(error, found):
    """At 1e-4 logits, to 5e-6 of them."""
    judge, at = Judge(Rounded(error), TOL), point([0.0, 0.5 * TOL])
    assert look(judge, at, quadratic(Rounded.slopes, at.x, tolerance=5e-15)) == found
    if found == "precision":
        assert judge.verdict.move == pytest.approx(1e-4 * abs(error), rel=1e-6)


@pytest.mark.parametrize(("share", "found"), [(0.9e-12, "precision"), (1.1e-12, "converged")])
def test_only_a_weak_direction_is_tried_out(share, found):
    problem, at = Rounded(1.0), point([0.0, 0.5 * TOL])
    problem.slopes = np.array([share, 1.0])
    assert look(Judge(problem, TOL), at, quadratic(problem.slopes, at.x, tolerance=5e-15)) == found


@pytest.mark.parametrize(("value", "found"), [(0.9, "converged"), (1.1, "precision"), (-1.1, "precision")])
def test_the_rounding_of_the_value_is_worth_little(value, found):
    """Along the step the curvature is one a squared logit."""
    at = point([0.5 * TOL, 0.0], value=value * 1e-5 / np.finfo(float).eps)
    judge = Judge(Logits(), TOL)
    assert look(judge, at, quadratic(exact_at=at.x)) == found
    if found == "precision":
        assert judge.verdict.move == pytest.approx(1.1e-5)
