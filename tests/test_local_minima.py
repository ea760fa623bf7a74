"""Which descents a fit makes by default: one where its end leaves no doubt, else more."""

import numpy as np
import pytest
from conftest import shrink_blocks
from instances import ALL_LOSSES, instance

from attnfit import minimize, problems
from attnfit.objectives.first_order import value_at_zero


def shares(n_groups, size, d, noise):
    """A squared softmax problem, and the first descent's phase and the second's."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((n_groups * size, d))
    b = np.exp(A @ rng.standard_normal(d) + noise * rng.standard_normal(len(A)))
    b /= np.repeat(np.add.reduceat(b, np.arange(0, len(b), size)), size)
    return problems.Softmax(A, b, np.repeat(np.arange(n_groups), size))


def phases(result):
    return list(dict.fromkeys(record.phase for record in result.history))


def test_a_good_end_is_enough():
    problem = shares(100, 20, 6, 0.5)
    result = minimize(problem, random_state=0)
    assert phases(result) == ["fit: logarithms"]
    assert "one descent, the loss is not convex: pass n_starts" in result.message
    many = minimize(problem, random_state=0, n_starts=20)
    assert many.value >= result.value * (1 - 1e-12)
    assert len(many.local_values) >= 1


@pytest.mark.parametrize(
    ("n_groups", "size", "d", "noise"),
    [(100, 20, 6, 5.0), (4, 500, 6, 0.5), (60, 5, 40, 0.5)],
    ids=["a loss near that at zero", "few groups", "few rows"],
)
def test_where_that_tells_little_zero_is_tried_too(n_groups, size, d, noise):
    assert phases(minimize(shares(n_groups, size, d, noise), random_state=0))[:2] == [
        "fit: logarithms",
        "fit: zero",
    ]


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_the_unit_of_outcomes_does_not_matter(unit, noise):
    """At zero they are all one, which is far off or near as the unit is; half of nothing is not."""
    rng = np.random.default_rng(4)
    A = np.column_stack([np.ones(2_000), rng.standard_normal((2_000, 7))])
    b = unit * np.exp(A @ (0.2 * rng.standard_normal(8)) + noise * rng.standard_normal(2_000))
    result = minimize(problems.Exponential(A, b), random_state=0)
    assert phases(result)[1:2] == ([] if noise < 1.0 else ["fit: zero"])


@pytest.mark.parametrize("seed", [14, 16, 32])
def test_a_lower_minimum_than_that_of_the_logarithms_is_found(seed):
    """Outcomes whose noise is most of them: losses there of 0.82 to 0.96 of those at zero."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((2_000, 8))
    b = np.exp(A @ (0.4 * rng.standard_normal(8)) + 2.0 * rng.standard_normal(2_000))
    problem = problems.Exponential(A, b)
    one, result = (minimize(problem, random_state=0, n_starts=n) for n in (1, "auto"))
    assert one.converged and result.converged
    assert result.value < one.value * (1 - 1e-4)


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
def test_the_loss_at_zero_takes_no_look_at_the_rows(family, loss):
    """Where offsets, weights and penalties are given, too."""
    inst, _ = instance(family, loss, sizes=(20, 15, 9), d=4)
    rng = np.random.default_rng(0)
    n = len(inst.b)
    options = {"offset": rng.standard_normal(n), "weights": rng.random(n), "row_penalty": rng.random(n)}
    problem = inst.replace(options=options).problem()
    before = problem.n_passes
    found = problem.rows.reduce(value_at_zero)
    assert problem.n_passes == before
    assert np.isclose(found, problem.value(np.zeros(4)), rtol=1e-12, atol=0.0)


def test_the_loss_at_zero_of_a_long_group_takes_a_read(monkeypatch):
    """Its normaliser is the sum of pieces; a fit that needs the loss evaluates it."""
    shrink_blocks(monkeypatch)
    problem = instance("Softmax", "squared", sizes=(400, 7), d=4)[0].problem()
    assert problem.rows.n_long
    assert np.isnan(problem.rows.reduce(value_at_zero))
