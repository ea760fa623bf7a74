"""Iterates of a fit that are kept on request: those of the descent that led to x, in the user's variables."""

import numpy as np
import pytest

from attnfit import minimize, problems, theory
from attnfit.solvers import History, LevenbergMarquardt, Newton, Record

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
A = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])


def record(phase, iteration, *, accepted=True):
    return Record(phase, iteration, 0.0, 0.0, 0.0, 0.0, accepted, 0.0, 0.0, 0.0, 0.0)


def test_the_descent_that_led_to_x_is_told_from_others():
    history = History()
    steps = [
        ("pilot: a", 0, 9, True), ("fit: a", 0, 1, True), ("fit: a", 1, 2, True), ("fit: b", 0, 3, True),
        ("fit: b", 1, 4, True), ("fit: b", 0, 4, True), ("fit: b", 1, 5, False), ("fit: b", 2, 6, True),
        ("fit: b", 0, 7, True), ("fit: b", 1, 8, True),
    ]  # fmt: skip
    for phase, iteration, x, accepted in steps:
        history.append(record(phase, iteration, accepted=accepted), np.array([float(x)]))

    def to(x):
        return [float(p[0]) for p in history.points_to(np.array([float(x)]))]

    # A start that is followed a second time goes on from where it was left; one that begins anew does not.
    assert to(6) == [3, 4, 6]
    assert to(2) == [1, 2]
    assert to(8) == [7, 8]
    # What was rejected, or never recorded, leads nowhere.
    assert to(5) == to(10) == []


@pytest.mark.parametrize("sparse_start", [False, True])
def test_points_are_the_iterates(sparse_start):
    rng = np.random.default_rng(0)
    problem = problems.Softmax(rng.standard_normal((30, 3)), rng.dirichlet(np.ones(30)))
    x0 = None if sparse_start else np.full(3, 0.5)
    result = minimize(problem, x0, history="points", random_state=0)
    assert np.array_equal(result.points[-1], result.x)
    assert result.points.shape[1:] == (3,)
    if x0 is not None:
        assert np.array_equal(result.points[0], x0)
        accepted = [r for r in result.history if r.accepted]
        assert len(result.points) == len(accepted)
        assert [problem.value(x) for x in result.points] == pytest.approx([r.value for r in accepted])
    assert minimize(problem, x0, random_state=0).points is None


def test_points_of_dependent_columns_are_the_users():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 2)) * [1e4, 1.0] + 5.0
    problem = problems.Softmax(rows, rng.dirichlet(np.ones(30)), loss="cross_entropy")
    result = minimize(problem, [0.0, 0.1], history="points")
    assert result.points[0] == pytest.approx([0.0, 0.1])
    assert result.points[-1] == pytest.approx(result.x, rel=1e-12)


def test_points_survive_a_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    problem = problems.Softmax(rng.standard_normal((30, 3)), rng.dirichlet(np.ones(30)))
    plain = minimize(problem, history="points", random_state=0)
    path = tmp_path / "fit.ckpt"
    stopped = minimize(
        problem, history="points", random_state=0, checkpoint=path, callback=lambda r: r.iteration == 2
    )
    assert stopped.status == "interrupted"
    resumed = minimize(problem, history="points", random_state=0, checkpoint=path)
    assert np.array_equal(resumed.points, plain.points)
    theory.on(resumed)


def test_what_keeps_no_points_is_refused():
    rng = np.random.default_rng(0)
    layer = problems.LayerInversion(*rng.standard_normal((2, 2, 2)), rng.standard_normal((3, 2)))
    with pytest.raises(ValueError, match=r"LevenbergMarquardt keeps no points; pass solver=Newton\(\)"):
        minimize(layer, solver=LevenbergMarquardt(), history="points")
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    with pytest.raises(ValueError, match="history must be one of 'records', 'points'"):
        minimize(problem, history="all")
    with pytest.raises(ValueError, match='history="points"'):
        theory.on(minimize(problem))
    result = minimize(problem, history="points")
    with pytest.raises(ValueError, match="epsilon0 must lie in"):
        theory.on(result, epsilon0=1.0)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        theory.on(result, gamma=-1.0)
    with pytest.raises(ValueError, match="x_ref"):
        theory.on(result, x_ref=[1.0])
    with pytest.raises(KeyError, match="'RH-9' is no convergence theorem"):
        theory.on(result)["RH-9"]


def test_a_fit_too_large_or_of_several_targets_is_refused(monkeypatch):
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    result = minimize(problem, history="points")
    monkeypatch.setattr("attnfit.theory.finished.MAX_DENSE", 1)
    with pytest.raises(ValueError, match="Hessians of 2 unknowns, more than 1"):
        theory.on(result)
    monkeypatch.undo()
    layers = problems.TwoLayer(A, np.eye(3), [[0.5, 0.3], [0.2, 0.1], [0.1, 0.0]], row_penalty=1.0)
    several = minimize(layers, np.zeros((2, 2)), Newton(), history="points")
    with pytest.raises(ValueError, match="one right-hand side, not 2"):
        theory.on(several)
    full = problems.FullAttention(A, A, A, A)
    with pytest.raises(ValueError, match="no convergence theorem for FullAttention"):
        theory.on(minimize(full, np.ones(full.shape), Newton(), max_iter=2, history="points"))
