"""What speaks for the curvature of a sample, and samples that err."""

from types import SimpleNamespace

import numpy as np
import pytest

from attnfit import minimize, problems
from attnfit.solvers.curvature import FrozenHessian, Model, PilotHessian, dense_model
from attnfit.solvers.evidence import SAME_PLACE, Evidence
from attnfit.solvers.loop import Tracker, descend
from attnfit.solvers.newton import Newton
from attnfit.solvers.subproblem import QuasiNewton
from attnfit.solvers.verdicts import STAY, Judge, Next, Status

TOL = 1e-8

# ---- a fit that arrives, and what a sample says of it


def newton_step(H, at):
    return SimpleNamespace(p=-np.linalg.solve(H, at.gradient), bounded=False)


class Arrival:
    """Three points of a descent whose gradient shrinks by ``rate`` a step, the last next to the minimum; d
    unknowns in pairs that are collinear to ``apart``.
    """

    def __init__(self, rate=0.1, apart=1.0, d=8, seed=0, size=1e-9, weight=1.0, spread=0.0):
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((3_000, d))
        for j in range(0, d - 1, 2):
            A[:, j + 1] = A[:, j] + apart * (1.0 + j) * A[:, j + 1]
        A *= 10.0 ** rng.uniform(-spread, spread, d)
        groups, loss = np.arange(3_000) // 6, "cross_entropy"
        b = rng.gamma(2.0, size=3_000)
        b = b / np.bincount(groups, weights=b)[groups]
        self.problem = problems.Softmax(A, b, groups, loss=loss, weights=np.full(500, weight))
        self.best = minimize(self.problem, tol=1e-10, random_state=0).x
        self.H = self.problem.hessian(self.best)
        part = rng.permutation(500)[:250]
        kept = np.isin(groups, part)
        self.second = problems.Softmax(
            A[kept], b[kept], groups=groups[kept], loss=loss, weights=np.full(250, 2.0)
        )
        self.P = self.second.hessian(self.best)
        way = np.linalg.solve(self.H, A.T @ rng.standard_normal(3_000))
        way *= size / np.abs(A @ way).max()
        self.way, self.A_way = way, A @ way
        self.points = [self.at(rate ** (k - 2)) for k in range(3)]
        self.n_second, self.rows = 0, A[:4]

    def at(self, c):
        """A point whose gradient is c times that of the last."""
        return self.problem.evaluate(self.best + c * self.way)

    def draw(self):
        self.n_second += 1
        return self.second

    def follow(self, full=(True, True, True), points=None):
        evidence = Evidence(self.problem, self.draw)
        for at, is_full in zip(self.points if points is None else points, full, strict=True):
            evidence.follow(at, full=is_full)
        return evidence

    def judge(self, M, evidence=None, tol=TOL):
        at = self.points[-1]
        evidence = self.follow() if evidence is None else evidence
        return evidence.holds(at, dense_model(self.problem, at, M), newton_step(M, at), tol)


@pytest.fixture(scope="module")
def arrival():
    return Arrival()


@pytest.fixture(scope="module")
def collinear():
    return Arrival(apart=1e-3)


@pytest.fixture(scope="module")
def uneven():
    """Columns of all sizes, collinear in pairs."""
    return Arrival(apart=1e-3, spread=4.0)


def test_the_true_curvature_is_accepted(arrival, collinear):
    for case in (arrival, collinear, Arrival(d=2), Arrival(d=3), Arrival(weight=1e-9), Arrival(spread=5.0)):
        evidence = case.follow()
        assert case.judge(case.H, evidence) is True
        step = newton_step(case.H, case.points[-1])
        moved = case.problem.moves(case.points[-1], step.p[:, None])
        assert np.isclose(evidence.move, moved.largest[0], rtol=1e-9)
        assert evidence.least == moved.least


@pytest.mark.parametrize(("c", "accepted"), [(0.55, True), (1.9, True), (0.45, False), (2.2, False)])
def test_curvature_that_is_off_everywhere(arrival, c, accepted):
    assert (arrival.judge(c * arrival.H) is True) == accepted


@pytest.mark.parametrize("c", [0.2, 0.45, 2.2, 5.0])
def test_the_curvature_of_one_column_that_is_off(arrival, c):
    """Seen by the diagonal, whatever the directions say."""
    for j in range(8):
        factor = np.ones(8)
        factor[j] = np.sqrt(c)
        assert arrival.judge(arrival.H * factor * factor[:, None]) is not True


def test_a_step_longer_than_the_tolerance_is_not_accepted(arrival):
    move = arrival.follow()
    arrival.judge(arrival.H, move)
    assert arrival.judge(arrival.H, tol=1.01 * move.move) is True
    assert arrival.judge(arrival.H, tol=0.99 * move.move) is not True


@pytest.mark.parametrize("F", [30.0, 1e4, 1e8])
@pytest.mark.parametrize("kind", ["weak", "random", "column", "row"])
@pytest.mark.parametrize("case", ["arrival", "collinear"])
def test_curvature_that_is_not_there_is_never_accepted(case, kind, F, request):
    """A rank-one excess, F times the curvature along a direction v and none along those conjugate to it: it
    makes steps along v too short to tell how far the minimum is.
    """
    case = request.getfixturevalue(case)
    rng = np.random.default_rng(0)
    scale = np.sqrt(np.diag(case.H))
    _, vectors = np.linalg.eigh(case.H / scale / scale[:, None])
    for j in range(4):
        v = {
            "weak": vectors[:, j] / scale,
            "random": rng.standard_normal(8) / scale,
            "column": np.eye(8)[j],
            "row": np.linalg.solve(case.H, case.rows[j]),
        }[kind]
        y = case.H @ v
        M = case.H + (F - 1.0) * np.multiply.outer(y, y) / (v @ y)
        assert np.isclose(v @ M @ v, F * (v @ y))
        assert case.judge(M) is not True


@pytest.mark.parametrize("j", range(4))
@pytest.mark.parametrize("case", ["collinear", "uneven"])
def test_collinear_columns_that_a_sample_takes_for_independent(case, j, request):
    """The excess is as large as ordinary curvature, so that the model's own weakest directions miss it and
    its diagonal hides it: the second sample has four.
    """
    case = request.getfixturevalue(case)
    H = case.H
    scale = np.sqrt(np.diag(H))
    values, vectors = np.linalg.eigh(H / scale / scale[:, None])
    v = vectors[:, j] * scale
    M = H + (0.7 - values[j]) * np.multiply.outer(v, v)
    ratio = np.diag(M) / np.diag(H)
    assert ((ratio >= 0.5) & (ratio <= 2.0)).all()
    assert values[j] < 1e-3
    assert case.judge(M) is not True
    assert case.judge(H) is True


def test_curvature_that_the_sample_lacks_is_not_accepted(arrival):
    """The model's own weakest directions tell."""
    scale = np.sqrt(np.diag(arrival.H))
    values, vectors = np.linalg.eigh(arrival.H / scale / scale[:, None])
    v = vectors[:, 5] * scale
    M = arrival.H - 0.95 * values[5] * np.multiply.outer(v, v)
    ratio = np.diag(M) / np.diag(arrival.H)
    assert ((ratio >= 0.5) & (ratio <= 2.0)).all()
    assert np.linalg.eigvalsh(M / scale / scale[:, None])[0] > 0.01
    assert arrival.judge(M) is not True


@pytest.mark.parametrize(("lowest", "flat"), [(1e-12, False), (1e-13, True), (0.0, True), (-1e-3, True)])
def test_a_flat_model_asks_for_the_exact_hessian(arrival, lowest, flat):
    """Below 3e-13 of the largest curvature, or with a negative one: no further step would tell."""
    evidence = Evidence(arrival.problem, arrival.draw)
    at = arrival.points[-1]
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    # Eigenvalues of a matrix whose diagonal is nearly even.
    M = (Q * np.array([lowest, *np.ones(7)])) @ Q.T
    M = 0.5 * (M + M.T)
    scale = np.sqrt(np.diag(M))
    values = np.linalg.eigvalsh(M / scale / scale[:, None])
    assert (values[0] <= 3e-13 * values[-1]) == flat
    found = evidence.holds(at, dense_model(arrival.problem, at, M), newton_step(arrival.H, at), TOL)
    assert found is (None if flat else False)


def test_a_pair_does_not_mend_a_flat_model(arrival):
    """What was filled in there was not seen by the sample."""
    at = arrival.points[-1]
    scale = np.sqrt(np.diag(arrival.H))
    values, vectors = np.linalg.eigh(arrival.H / scale / scale[:, None])
    kept = (vectors * np.where(np.arange(8) == 0, 1e-14, values)) @ vectors.T
    model = dense_model(arrival.problem, at, kept * scale * scale[:, None])
    v = vectors[:, 0] / scale
    model = Model(QuasiNewton(model.base).learn(model.scale * v, arrival.H @ v / model.scale), model.scale)
    np.testing.assert_allclose(model.matrix(), arrival.H, rtol=1e-4, atol=1e-4)
    assert arrival.follow().holds(at, model, newton_step(arrival.H, at), TOL) is None


def test_a_column_without_curvature_asks_for_the_exact_hessian(arrival):
    H = arrival.H.copy()
    H[3] = H[:, 3] = 0.0
    step = newton_step(arrival.H, arrival.points[-1])
    model = dense_model(arrival.problem, arrival.points[-1], H)
    assert arrival.follow().holds(arrival.points[-1], model, step, TOL) is None


@pytest.mark.parametrize(("rate", "holds"), [(0.45, True), (0.55, False), (0.9, False)])
def test_each_of_the_last_two_steps_halves_the_gradient(rate, holds):
    case = Arrival(rate)
    assert (case.judge(case.H) is True) == holds


@pytest.mark.parametrize("sizes", [(100.0, 10.0, 9.0), (10.0, 9.0, 1.0), (1.0, 10.0, 1.0)])
def test_one_good_step_is_no_evidence(arrival, sizes):
    points = [arrival.at(c) for c in sizes]
    assert arrival.judge(arrival.H, arrival.follow(points=points)) is False


@pytest.mark.parametrize("full", [(False, True, True), (True, False, True), (True, True, False)])
def test_steps_that_a_radius_cut_are_no_evidence(arrival, full):
    assert arrival.judge(arrival.H, arrival.follow(full)) is False


def test_two_points_are_no_evidence(arrival):
    for n in (0, 1, 2):
        evidence = arrival.follow([True] * n, arrival.points[3 - n :])
        assert arrival.judge(arrival.H, evidence) is False


def test_only_the_last_steps_count(arrival):
    """What lies further back is forgotten; a point that is looked at twice is one point."""
    early = [arrival.problem.evaluate(arrival.best + 1e-3 * k) for k in (1.0, 2.0, 3.0)]
    evidence = arrival.follow([False] * 3, early)
    for at in arrival.points:
        evidence.follow(at, full=False)
        evidence.follow(at, full=True)
    assert arrival.judge(arrival.H, evidence) is True
    evidence = arrival.follow(points=[arrival.at(c) for c in (1e-3, 2e-3, 0.5)])
    for at in arrival.points:
        evidence.follow(at, full=True)
    assert arrival.judge(arrival.H, evidence) is True
    evidence = arrival.follow([True] * 2, arrival.points[1:])
    evidence.follow(arrival.points[-1], full=True)
    assert arrival.judge(arrival.H, evidence) is False


def test_the_second_failure_asks_for_the_exact_hessian(arrival):
    evidence = arrival.follow()
    assert arrival.judge(3.0 * arrival.H, evidence) is False
    assert arrival.judge(3.0 * arrival.H, evidence) is None
    evidence = arrival.follow((True, False, True))
    assert arrival.judge(arrival.H, evidence) is False
    assert arrival.judge(arrival.H, evidence) is None


def test_the_second_sample_is_drawn_once_and_only_if_needed(arrival):
    before = arrival.n_second
    assert arrival.judge(arrival.H, arrival.follow((False, True, True))) is False
    assert arrival.n_second == before
    evidence = arrival.follow()
    for _ in range(3):
        arrival.judge(arrival.H, evidence)
    assert arrival.n_second == before + 1


def test_what_was_seen_close_by_is_not_looked_for_again(monkeypatch):
    case = Arrival(size=1e-6)
    looks, plain = [], case.problem.look_along
    monkeypatch.setattr(case.problem, "look_along", lambda *given: looks.append(1) or plain(*given))

    def judge(evidence, M, c, tol=TOL):
        at = case.at(c)
        evidence.follow(at, full=True)
        return evidence.holds(at, dense_model(case.problem, at, M), newton_step(M, at), tol)

    for M, expected in ((case.H, True), (2.5 * case.H, None), (0.4 * case.H, None)):
        evidence = case.follow()
        assert judge(evidence, case.H, 0.1, tol=1e-30) is False
        before = len(looks)
        # The step is measured anew, and the model compared with what was seen.
        assert judge(evidence, M, 5e-3) is expected
        assert len(looks) == before
    moved = case.problem.moves(case.at(5e-3), newton_step(case.H, case.at(5e-3)).p[:, None])
    evidence = case.follow()
    judge(evidence, case.H, 0.1, tol=1e-30)
    assert judge(evidence, case.H, 5e-3) is True
    assert np.isclose(evidence.move, moved.largest[0], rtol=1e-6)
    for distance, again in ((0.9, 0), (1.1, 1)):
        c = distance * SAME_PLACE / np.ptp(case.A_way.reshape(-1, 6), axis=1).max() * 2.0
        evidence = case.follow(points=[case.at(k * c) for k in (100.0, 10.0, 3.0)])
        judge(evidence, case.H, c, tol=1e-30)
        before = len(looks)
        judge(evidence, case.H, 1e-2 * c)
        assert len(looks) == before + again


def test_negative_curvature_along_a_direction_asks_for_the_exact_hessian():
    """A saddle: the sample takes it for a minimum."""
    A = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1e-3]] * 50)
    b, ids, x = np.tile([0.3, 0.4, 0.3], 50), np.repeat(np.arange(50), 3), np.zeros(2)
    saddle = problems.Softmax(A, b, ids, loss="entropy", ridge=1.0)
    H = saddle.hessian(x)
    assert H[0, 0] < 0.0 < H[1, 1]
    convex = problems.Softmax(A, b, ids, loss="cross_entropy", ridge=1.0)
    M = convex.hessian(x)
    M[1, 1] = H[1, 1]
    M[0, 1] = M[1, 0] = 0.0
    evidence, at = Evidence(saddle, lambda: convex), saddle.evaluate(x)
    for size in (1.0, 0.1, 0.01):
        evidence.follow(SimpleNamespace(x=np.zeros(2), gradient=np.array([size, 0.0])), full=True)
    assert evidence.holds(at, dense_model(convex, at, M), newton_step(M, at), TOL) is None


def test_patience():
    """Six evaluations close by may pass without evidence."""
    evidence = Evidence(None, None)
    assert not any(evidence.is_close(2e-5) for _ in range(20))
    assert [evidence.is_close(9e-6) for _ in range(7)] == [False] * 6 + [True]
    assert evidence.is_close(1.0)


# ---- who asks


def test_a_judge_accepts_on_a_sample_only_with_evidence(arrival):
    """At a small move; else it steps on, and without evidence or patience asks for the exact Hessian."""
    at = arrival.points[-1]
    sampled = dense_model(arrival.problem, at, arrival.H)

    def look(evidence, M=arrival.H, tol=TOL, point=at):
        judge = Judge(arrival.problem, tol, evidence=evidence)
        model = dense_model(arrival.problem, point, M)
        step = model.solve(point.gradient, np.inf)
        return judge, judge.look(point, model, step, judge.guess(point, model, step.p))

    assert sampled.exact_at is None
    judge, found = look(arrival.follow())
    assert found is Status.CONVERGED
    assert judge.verdict.sampled
    assert np.isclose(judge.verdict.decrement, at.gradient @ np.linalg.solve(arrival.H, at.gradient))
    exact = arrival.problem.moves(at, np.linalg.solve(arrival.H, at.gradient)[:, None]).largest[0]
    assert np.isclose(judge.verdict.move, exact, rtol=1e-9)
    assert look(None)[1] is Next.CURVATURE_HERE
    assert look(arrival.follow(), 3.0 * arrival.H)[1] is Next.STEP
    tired = arrival.follow()
    for _ in range(6):
        tired.is_close(0.0)
    judge, found = look(tired)
    assert found is Next.CURVATURE_HERE
    assert judge.evidence is None
    assert look(arrival.follow(), tol=1e-12)[1] is Next.STEP
    failed = arrival.follow((False, True, True))
    arrival.judge(arrival.H, failed)
    judge, found = look(failed, 3.0 * arrival.H)
    assert judge.evidence is None
    assert found is Next.CURVATURE_HERE


def test_a_pair_of_rounding_is_not_learned(arrival):
    """The model stays what it was, and the next pair begins where that step ended."""
    first, second, third = arrival.points
    strategy = PilotHessian(arrival.problem, first.x, FrozenHessian)
    strategy.request(None)
    model = strategy.model(arrival.problem, first, None)
    again = strategy.model(arrival.problem, second, model, learn=False)
    np.testing.assert_array_equal(again.matrix(), model.matrix())
    learned = strategy.model(arrival.problem, third, again, learn=True)
    s, y = third.x - second.x, third.gradient - second.gradient
    np.testing.assert_allclose(learned.matrix() @ s, y, rtol=1e-8)


@pytest.mark.parametrize("size", [3.0, 0.3 * STAY])
def test_a_descent_tells_its_strategy_what_to_learn(arrival, size):
    """A step that moves no logit by more than 1e-7 ends in a difference of gradients that is rounding."""
    told = []

    class Strategy:
        def request(self, contraction, *, exact=False):
            return {}

        def model(self, problem, at, last, *, learn=True):
            told.append(learn)
            return dense_model(problem, at, arrival.H) if len(told) == 1 else None

    way = np.linalg.solve(arrival.H, np.ones(8))
    moved = arrival.problem.moves(arrival.points[-1], way[:, None]).largest[0]
    at = arrival.problem.evaluate(arrival.best + size / moved * way)
    judge = Judge(arrival.problem, 1e-12, evidence=Evidence(arrival.problem, arrival.draw))
    with pytest.raises(AttributeError):
        descend(arrival.problem, at, Strategy(), judge, Tracker(lambda: 0.0), phase="", max_iter=9)
    assert told == [True, size > STAY]


@pytest.mark.parametrize(("d", "asked"), [(40, False), (300, True)])
def test_evidence_is_gathered_where_a_gram_is_dear(d, asked):
    """The second sample has rows enough for the unknowns."""
    rng = np.random.default_rng(0)
    problem = problems.Softmax(rng.standard_normal((9_000, d)), rng.random(9_000), np.arange(9_000) // 9)
    start = SimpleNamespace(full=problem)
    for kind in ("sampled", "corrected_sample"):
        evidence = Newton()._evidence(kind, start, rng)
        assert (evidence is not None) == asked
    assert Newton()._evidence("exact", start, rng) is None
    if asked:
        assert 0.8 * 8_000 <= evidence._draw().n_rows <= 1.2 * 8_000
