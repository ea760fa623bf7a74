"""The rule that accepts a point, one number at a time: on logits that are the unknowns themselves."""

from types import SimpleNamespace

import numpy as np
import pytest

from attnfit import minimize, problems
from attnfit.objectives.objective import Evaluation, Moved
from attnfit.solvers import verdicts
from attnfit.solvers.curvature import MatrixFree, Model
from attnfit.solvers.subproblem import MoreSorensen, SteihaugToint, Step
from attnfit.solvers.verdicts import Judge, Next, Status, assess

TOL = 1e-8


class Logits:
    """Logits are the unknowns: a step moves the largest of its entries. ``unseen`` are no row's."""

    has_logits = convex = True
    shape = (2,)
    n_unknowns = 2

    def __init__(self, unseen=None, least=np.inf):
        self.unseen = np.zeros((2, 0)) if unseen is None else unseen
        self.least = least
        self.asked = 0

    def moves(self, at, steps):
        self.asked += 1
        seen = steps - self.unseen @ (self.unseen.T @ steps)
        return Moved(np.abs(seen).max(axis=0), self.least)

    def unseen_directions(self, at):
        return self.unseen


def point(gradient, x=(0.0, 0.0), value=1.0):
    return Evaluation(np.array(x, dtype=float), value, np.array(gradient, dtype=float))


def quadratic(values=(1.0, 1.0), exact_at=None, **options):
    return Model(MoreSorensen(np.diag(values), **options), np.ones(2), exact_at)


def look(judge, at, model, radius=np.inf):
    step = judge.step(at, model, radius)
    return judge.look(at, model, step, judge.guess(at, model, step.p))


def at_once(move, *, problem=None, values=(1.0, 1.0), apart=0.0, tol=TOL, exact=True):
    """A judge, and what it says of a point whose next step is so long, with curvature from ``apart``."""
    problem = Logits() if problem is None else problem
    at = point([move * values[0], 0.0])
    judge = Judge(problem, tol)
    there = at.x if apart == 0.0 else at.x + np.array([0.0, apart])
    return judge, look(judge, at, quadratic(values, there if exact else None))


# ---- accepted, or not


def test_a_step_within_the_tolerance_is_accepted():
    judge, found = at_once(0.9 * TOL)
    assert found is Status.CONVERGED
    assert judge.verdict.move == pytest.approx(0.9 * TOL)
    assert judge.verdict.decrement == pytest.approx((0.9 * TOL) ** 2)
    assert not judge.verdict.at_floor
    assert not judge.verdict.sampled
    assert at_once(1.1 * TOL)[1] is Next.STEP


@pytest.mark.parametrize(("apart", "found"), [(0.2, Status.CONVERGED), (0.3, Next.CURVATURE_HERE)])
def test_curvature_from_afar_is_formed_anew(apart, found):
    assert at_once(0.5 * TOL, apart=apart)[1] is found


def test_the_step_is_measured_on_every_row():
    """Where some rows are at hand, they say only what is too long."""
    still = lambda at, p: Moved(0.0 * np.abs(p).max(axis=0), np.inf)  # noqa: E731
    probe = SimpleNamespace(exact=False, moves=still, column_sizes=lambda: np.ones(2))
    judge = Judge(Logits(), TOL, probe)
    at = point([2.0 * TOL, 0.0])
    assert look(judge, at, quadratic(exact_at=at.x)) is Next.STEP
    assert judge.problem.asked == 1
    probe.exact = True
    judge = Judge(Logits(), TOL, probe)
    assert look(judge, at, quadratic(exact_at=at.x)) is Status.CONVERGED
    assert judge.problem.asked == 0


@pytest.mark.parametrize(
    ("move", "found"),
    [
        (2e-3, Next.STEP),
        (0.5e-3, Next.STEP_FOR_CURVATURE),
        (2e-7, Next.STEP_FOR_CURVATURE),
        (0.5e-7, Next.CURVATURE_HERE),
        (1e-12, Next.CURVATURE_HERE),
    ],
)
def test_when_the_curvature_of_all_the_data_is_asked_for(move, found):
    assert at_once(move, exact=False)[1] is found
    assert at_once(move, exact=True)[1] is (Status.CONVERGED if move < TOL else Next.STEP)


def test_steps_that_are_not_finite_are_endless():
    judge = Judge(Logits(), TOL)
    at = point([np.inf, 0.0])
    assert judge.guess(at, quadratic(), np.array([np.nan, 0.0])) == np.inf
    step = Step(np.array([np.nan, 0.0]), np.nan, False)
    assert judge.look(at, quadratic(exact_at=at.x), step, np.inf) is Next.STEP


def test_a_start_need_be_no_minimum():
    """A descent on a sample ends as soon as steps are short, whatever its curvature."""
    for exact_at in (None, np.zeros(2)):
        judge, at = Judge(Logits(), 1e-2, final=False), point([5e-4, 0.0])
        assert look(judge, at, quadratic(exact_at=exact_at)) is Status.CONVERGED
    assert look(Judge(Logits(), 1e-2, final=False), point([0.02, 0.0]), quadratic()) is Next.STEP


# ---- the floor of rounding


def stalled(moves, *, fresh=True, tol=TOL):
    """What is said at the last of some points whose steps have these lengths, each with its own curvature or
    all with that of the first.
    """
    judge = Judge(Logits(), tol)
    first = None
    for k, move in enumerate(moves):
        at = point([move, 0.0], x=(0.0, 1e-3 * k))
        first = at.x if first is None else first
        found = look(judge, at, quadratic(exact_at=at.x if fresh else first))
    return judge, found


@pytest.mark.parametrize(
    ("moves", "found"),
    [
        # Steps stop shrinking: accepted up to 2e-7, not beyond, and not while they still halve.
        ((3e-7, 1.9e-7), Status.CONVERGED),
        ((9e-7, 5e-7), Status.PRECISION),
        ((9e-7, 4e-7), Next.STEP),
        ((9e-6, 5e-6), Status.PRECISION),
        ((5e-6, 0.9e-6), Next.STEP),
        # Above 1e-4 it is no rounding.
        ((1.5e-4, 0.9e-4), Next.STEP),
        ((0.9e-4, 1.5e-4), Next.STEP),
        ((0.9e-4, 0.9e-4), Status.PRECISION),
        ((9e-7, 9e-9), Status.CONVERGED),
    ],
)
def test_steps_that_stop_shrinking_are_at_the_rounding_of_the_data(moves, found):
    judge, said = stalled(moves)
    assert said is found
    if found is Status.CONVERGED:
        assert judge.verdict.at_floor == (moves[-1] > TOL)


def test_an_old_curvature_may_shrink_steps_no_faster():
    """Only two new ones tell that it is rounding; the step before counts as it was."""
    judge, found = stalled((1.9e-7, 1.8e-7), fresh=False)
    assert found is Next.CURVATURE_HERE
    at = point([1.8e-7, 0.0], x=(0.0, 1e-3))
    assert look(judge, at, quadratic(exact_at=at.x)) is Status.CONVERGED
    # Two steps with a curvature that the first of them had not.
    judge = Judge(Logits(), TOL)
    for k, fresh in enumerate((False, True)):
        at = point([9e-7, 0.0], x=(0.0, 1e-3 * k))
        found = look(judge, at, quadratic(exact_at=at.x if fresh else at.x + 1e-3))
    assert found is Next.STEP


def test_a_tolerance_above_the_floor_is_met_by_it():
    assert stalled((9e-6, 8e-6), tol=1e-5)[1] is Status.CONVERGED


# ---- evidence for the curvature of a sample


class Heard:
    """Evidence that says what it is told to, and what it heard."""

    move, least = 0.3 * TOL, np.inf

    def __init__(self, holds, close=False):
        self.said, self.close = holds, close
        self.heard = []

    def follow(self, at, *, full):
        self.heard.append(full)

    def is_close(self, move):
        return self.close

    def holds(self, at, model, step, tol):
        self.heard.append("asked")
        return self.said


@pytest.mark.parametrize(
    ("holds", "close", "move", "found", "asked"),
    [
        (True, False, 0.9 * TOL, Status.CONVERGED, True),
        # No further step will tell, or the point has been close for too long: the curvature of all the data.
        (None, False, 0.9 * TOL, Next.CURVATURE_HERE, True),
        (True, True, 0.9 * TOL, Next.CURVATURE_HERE, False),
        (False, False, 0.9 * TOL, Next.STEP, True),
        (True, False, 1.1 * TOL, Next.STEP, False),
        (True, False, 2e-3, Next.STEP, False),
    ],
)
def test_a_point_may_be_accepted_on_evidence(holds, close, move, found, asked):
    evidence = Heard(holds, close)
    judge = Judge(Logits(), TOL, evidence=evidence)
    assert look(judge, point([move, 0.0]), quadratic()) is found
    assert evidence.heard == [True] + ["asked"] * asked
    assert (judge.evidence is None) == (found is Next.CURVATURE_HERE)
    assert judge.verdict.sampled == (found is Status.CONVERGED)
    if judge.verdict.sampled:
        assert judge.verdict.move == evidence.move
        assert judge.verdict.decrement == pytest.approx(move**2)
    # A step that the radius cuts is no full one.
    evidence = Heard(holds, close)
    look(Judge(Logits(), TOL, evidence=evidence), point([move, 0.0]), quadratic(), radius=0.1 * move)
    assert evidence.heard[0] is False


@pytest.mark.parametrize(("least", "found"), [(0.9e-12, Next.CURVATURE_HERE), (1.1e-12, Status.CONVERGED)])
def test_where_outputs_vanish_only_all_the_curvature_tells(looks, least, found):
    """It may prove that a minimum exists."""
    evidence = Heard(True)
    evidence.least = least
    assert look(Judge(Logits(), TOL, evidence=evidence), point([0.0, 0.0]), quadratic()) is found
    assert looks.n == 0


# ---- flat directions


def test_a_direction_that_no_row_sees_may_be_flat():
    """The answer is then the shortest point, once."""
    unseen = np.array([[0.0], [1.0]])
    judge = Judge(Logits(unseen), TOL)
    at = point([0.5 * TOL, 0.0], x=(2.0, 3.0))
    model = quadratic((1.0, 0.0), at.x)
    assert look(judge, at, model) is Next.SHORTEN
    np.testing.assert_allclose(judge.shorter, [2.0, 0.0])
    assert look(judge, at, model) is Status.CONVERGED
    np.testing.assert_array_equal(judge.verdict.flat, unseen)
    judge = Judge(Logits(unseen), TOL)
    at = point([0.5 * TOL, 0.0], x=(2.0, 1e-15))
    assert look(judge, at, quadratic((1.0, 0.0), at.x)) is Status.CONVERGED
    judge = Judge(Logits(unseen), TOL)
    at = point([0.5 * TOL, 0.0], x=(2.0, 1e-12))
    assert look(judge, at, quadratic((1.0, 0.0), at.x)) is Next.SHORTEN


def test_a_direction_that_rows_see_must_not_be_flat(monkeypatch):
    monkeypatch.setattr("attnfit.solvers.separation.find_separation", lambda problem, at: None)
    judge, at = Judge(Logits(), TOL), point([0.5 * TOL, 0.0])
    assert look(judge, at, quadratic((1.0, 0.0), at.x)) is Status.FLAT
    assert judge.verdict.flat.shape == (2, 1)
    without = Logits()
    without.has_logits = False
    without.moves = lambda at, steps: None
    judge, at = Judge(without, TOL), point([0.5 * TOL, 0.0], x=(1.0, 0.0))
    assert look(judge, at, quadratic((1.0, 0.0), at.x)) is Status.CONVERGED


def test_steps_stay_off_directions_that_no_row_sees():
    unseen = np.array([[0.0], [1.0]])
    g = np.array([1.0, 0.5])
    step = Judge(Logits(unseen), TOL).step(point(g), quadratic((1.0, 0.0)), np.inf)
    np.testing.assert_allclose(step.p, [-1.0, 0.0])
    assert not step.bounded
    # One that rows see is followed, unless it promises nothing.
    step = Judge(Logits(), TOL).step(point(g), quadratic((1.0, 0.0)), np.inf)
    assert step.bounded
    assert abs(step.p[1]) > 0.1
    for value, bounded in [(1e20, False), (1e3, True), (-1e20, False)]:
        step = Judge(Logits(), TOL).step(point([0.0, 1e-3], value=value), quadratic((1.0, 0.0)), 1.0)
        assert step.bounded == bounded


# ---- steps that a radius cuts


def test_a_radius_cut_by_rounding_hides_nothing():
    """A step that promises less than 1e-12 of the loss is looked at in full length."""
    at = point([0.5 * TOL, 0.0], value=1.0)
    assert look(Judge(Logits(), TOL), at, quadratic(exact_at=at.x), radius=1e-12) is Status.CONVERGED
    at = point([0.1, 0.0], value=1.0)
    assert look(Judge(Logits(), TOL), at, quadratic(exact_at=at.x), radius=1e-12) is Next.STEP
    # A flat direction that rows see, with a slope that is rounding beside the loss.
    for value, found in [(1e9, Status.CONVERGED), (1e5, Next.STEP)]:
        problem = Logits()
        problem.has_logits = False
        problem.moves = Logits.moves.__get__(problem)
        at = point([0.5 * TOL, 1e-2], value=value)
        assert look(Judge(problem, TOL), at, quadratic((1.0, 0.0), at.x), radius=0.05) is found


def test_negative_curvature_is_left_where_the_slope_is_none():
    model = quadratic((-1.0, 1.0), np.zeros(2))
    assert look(Judge(Logits(), TOL), point([1e-7, 0.0]), model, 1.0) is Next.LEAVE_SADDLE
    assert look(Judge(Logits(), TOL), point([4e-7, 0.0]), model, 1.0) is Next.STEP
    assert look(Judge(Logits(), 1e-5), point([0.5e-5, 0.0]), model, 1.0) is Next.LEAVE_SADDLE
    krylov = Model(SteihaugToint(lambda v: np.array([-1.0, 1.0]) * v, 1e-2), np.ones(2))
    assert look(Judge(Logits(), TOL), point([1e-9, 0.0]), krylov, 1.0) is Next.STEP


# ---- no minimum


def strides(judge, lengths):
    found = []
    for k, length in enumerate(lengths):
        at = point([length, 0.0], x=(0.0, float(k)))
        found.append(look(judge, at, quadratic(exact_at=at.x)))
    return found


@pytest.fixture
def looks(monkeypatch):
    """How often a direction without a minimum was looked for, and what is found."""
    count = SimpleNamespace(n=0, found=None)

    def find(problem, at):
        count.n += 1
        return count.found

    monkeypatch.setattr("attnfit.solvers.separation.find_separation", find)
    return count


@pytest.mark.parametrize(
    ("lengths", "n"),
    [
        ([1.0] * 5, 0),
        ([1.0] * 6, 1),
        ([0.11] * 6, 1),
        ([0.09] * 6, 0),
        ([*[1.0] * 5, 0.75], 1),
        ([*[1.0] * 5, 0.65], 0),
        ([1.0] * 15, 1),
        ([1.0] * 16, 2),
        ([1.0] * 25, 2),
        ([1.0] * 26, 3),
        ([1.0] * 90, 5),
    ],
)
def test_a_fit_that_keeps_its_stride_is_looked_at(looks, lengths, n):
    judge = Judge(Logits(), TOL)
    assert set(strides(judge, lengths)) == {Next.STEP}
    assert looks.n == n


@pytest.mark.parametrize(("exact", "status"), [(True, Status.SEPARABLE), (False, Status.NO_MINIMUM)])
def test_what_a_direction_without_a_minimum_means(looks, exact, status):
    looks.found = SimpleNamespace(exact=exact)
    judge = Judge(Logits(), TOL)
    assert strides(judge, [1.0] * 6)[-1] is status
    assert judge.verdict.separation is looks.found


def test_a_start_that_keeps_its_stride_ends(looks):
    judge = Judge(Logits(), 1e-2, final=False)
    found = strides(judge, [1.0] * 16)
    assert set(found[:15]) == {Next.STEP}
    assert found[15] is Status.MAX_ITER
    assert looks.n == 0


@pytest.mark.parametrize(("least", "n"), [(0.9e-12, 1), (1.1e-12, 0)])
def test_an_output_that_has_vanished_is_looked_at(looks, least, n):
    assert at_once(0.5 * TOL, problem=Logits(least=least))[1] is Status.CONVERGED
    assert looks.n == n
    looks.found = SimpleNamespace(exact=True)
    found = at_once(0.5 * TOL, problem=Logits(least=least))[1]
    assert found is (Status.SEPARABLE if n else Status.CONVERGED)
    # With too many unknowns nobody can tell.
    looks.found, many = None, Logits(least=least)
    many.n_unknowns = 10_000
    judge, found = at_once(0.5 * TOL, problem=many)
    assert found is (Status.PRECISION if n else Status.CONVERGED)
    assert judge.verdict.undecided == bool(n)


# ---- unknowns that are no logits' coefficients


def test_other_unknowns_move_by_their_share():
    """In the variables of the model."""
    problem = Logits()
    problem.moves = lambda at, steps: None
    judge = Judge(problem, TOL)
    model = Model(MoreSorensen(np.eye(2)), np.array([2.0, 1.0]), np.zeros(2))
    at = point([0.0, 0.0], x=(3.0, 8.0))
    assert judge.guess(at, model, np.array([0.0, 5.0])) == pytest.approx(0.5)
    assert judge.guess(at, model, np.array([5.0, 0.0])) == pytest.approx(1.0)
    assert judge.guess(point([0, 0]), model, np.array([1.0, 0.0])) > 1e300


# ---- judged afterwards


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_a_point_is_judged_alike_whoever_found_it(loss):
    rng = np.random.default_rng(0)
    A, b, ids = rng.standard_normal((60, 3)), rng.random(60), np.arange(60) // 6
    problem = problems.Softmax(A, b, ids, loss=loss)
    best = minimize(problem, random_state=0)
    verdict = assess(problem, problem.evaluate(best.x), TOL)
    assert verdict.status == Status.CONVERGED
    H, at = problem.hessian(best.x), problem.evaluate(best.x + 1e-4)
    verdict = assess(problem, at, TOL)
    assert verdict.status == Status.MAX_ITER
    p = np.linalg.solve(problem.hessian(at.x), at.gradient)
    assert verdict.move == pytest.approx(problem.moves(at, p[:, None]).largest[0], rel=1e-6)
    assert verdict.decrement == pytest.approx(at.gradient @ p, rel=1e-6)
    assert np.linalg.eigvalsh(H)[0] > 0.0


def test_a_longer_point_is_judged_to_be_one():
    A, b = np.array([[1.0, 1.0], [0.0, 0.0]]), [0.5, 0.5]
    problem = problems.Softmax(A, b, loss="cross_entropy")
    assert assess(problem, problem.evaluate(np.array([3.0, -3.0])), TOL).status == Status.CONVERGED


def test_a_saddle_is_called_one():
    A = np.array([[1.0], [0.0]])
    problem = problems.Softmax(A, [0.5, 0.5], loss="entropy")
    assert assess(problem, problem.evaluate(np.zeros(1)), TOL).status == Status.SADDLE


def test_many_unknowns_are_judged_without_a_matrix(monkeypatch):
    rng = np.random.default_rng(0)
    problem = problems.Softmax(
        rng.standard_normal((60, 3)), rng.random(60), np.arange(60) // 6, loss="cross_entropy"
    )
    best = minimize(problem, random_state=0).x
    made = []
    monkeypatch.setattr(verdicts, "MAX_DENSE", 2)
    monkeypatch.setattr(verdicts, "MatrixFree", lambda scale: made.append(scale) or MatrixFree(scale))
    assert assess(problem, problem.evaluate(best), 1e-6).status == Status.CONVERGED
    assert len(made) == 1
