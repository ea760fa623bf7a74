"""Convergence theorems on finished fits: the worked examples to three digits, and no claim beyond its
assumptions.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest

from attnfit import minimize, problems, theory
from attnfit.certificates import good_start
from attnfit.certificates.good_start import TwoLayerSizes
from attnfit.solvers import Descent, GradientDescent, Newton, Outcome, Solver
from attnfit.theory import instances
from attnfit.theory.bounds.newton import ill_conditioned
from attnfit.theory.convergence import printed_factor, scaled_factor
from attnfit.theory.main_theorems import descent_factors, readings, steps_needed
from attnfit.theory.theorem import compared

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
A = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])
SWAP = np.array([[0.0, 1.0], [1.0, 0.0]])


@dataclass(frozen=True)
class Off(Solver):
    """Newton's method with the Hessian ``H^(1/2) (I + E) H^(1/2)``."""

    E: object = field(default_factory=lambda: 0.01 * SWAP)
    records_points = True

    def run(self, problem, start, x0, tol, max_iter, tracker, rng):
        run = Descent.begin(problem.evaluate(x0))
        tracker.record("fit", 0, run.at.value, 1.0, x=run.at.x)
        for _ in range(max_iter):
            values, vectors = np.linalg.eigh(problem.hessian_at(run.at))
            root = (vectors * np.sqrt(values)) @ vectors.T
            step = np.linalg.solve(root @ (np.eye(len(x0)) + self.E) @ root, run.at.gradient)
            run.at, run.n_iter = problem.evaluate(run.at.x - step), run.n_iter + 1
            tracker.record("fit", run.n_iter, run.at.value, 1.0, x=run.at.x)
        return Outcome.of(problem, {"x0": run}, "off")


def report_of(problem, star, r0, along, n_steps=4, **options):
    direction = np.array(along, float) / np.linalg.norm(along)
    x = minimize(problem, star, tol=1e-12).x
    result = minimize(
        problem, x + r0 * direction, Off(), max_iter=n_steps, history="points", **({"tol": 1e-13} | options)
    )
    return theory.on(result)


def close(found, expected):
    assert np.asarray(found) == pytest.approx(np.asarray(expected), rel=6e-4)


@pytest.fixture(scope="module")
def rescaled():
    return report_of(problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0), [0.1, 0.05], 0.030267, (2, 1))


class TestWorkedExamples:
    def test_a_rescaled(self, rescaled):
        run = rescaled.trajectory
        close(run.reference.at.x, [0.100188, 0.045516])
        close([run.reference.lowest, run.reference.cond], [0.851057, 3.967])
        close(run.r[:4], [3.027e-2, 2.365e-4, 2.691e-6, 2.322e-8])
        assert run.r[4] == pytest.approx(2.647e-10, rel=2e-3)
        close(run.scaled[:4], [2.792e-2, 2.502e-4, 2.484e-6, 2.463e-8])
        assert rescaled["RH-5.5"].rows[0].t == 0
        # The accuracy of the Hessians is read off the steps.
        assert run.accuracy[:3] == pytest.approx(0.01, rel=1e-3)
        # Printed and corrected right sides with the constant of the text, a lower estimate of ours.
        M, low = 2.6646, run.reference.lowest
        assert M <= run.lipschitz <= 5 * M
        close([printed_factor(0.01, M, low, r) * r for r in run.r[:4]],
              [6.942e-3, 5.080e-6, 5.386e-8, 4.644e-10])  # fmt: skip
        close([scaled_factor(0.01, M * e / low**1.5) * e for e in run.scaled[:4]],
              [4.770e-3, 2.854e-6, 2.512e-8, 2.488e-10])  # fmt: skip
        assert run.scaled_lipschitz >= 0.6284
        assert f"{scaled_factor(0.01, 0.0175) * run.scaled[0]:.2e}" == "1.05e-03"
        first = rescaled["RH-5.5"][0]
        assert first.right >= 6.942e-3
        assert first.corrected_holds
        assert f"{rescaled['RH-11.1'].assumptions[4].name}".endswith("10^140.88")
        assert rescaled["RH-11.1"].status.startswith("assumption not met: w_i^2 >= 100")

    def test_a_numbers_of_steps(self, rescaled):
        cond = rescaled.trajectory.reference.cond
        for ratio, ln, log2, corrected in ((1e3, 6.9, 10.0, 9), (1e6, 13.8, 19.9, 16)):
            read = readings(ratio)
            assert (round(read["ln"], 1), round(read["log2"], 1)) == (ln, log2)
            assert np.ceil(steps_needed(ratio, cond)) == corrected

    def test_b_ill_conditioned(self):
        problem = problems.Rescaled(A * [1.0, 1e-3], [0.5, 0.3, 0.2], row_penalty=1.0)
        report = report_of(problem, [0.1, 45.0], 2.829e-7, (1, 0), n_steps=2)
        run = report.trajectory
        close(run.reference.at.x, [0.100188, 45.516])
        close([run.reference.lowest, run.reference.cond], [2.113e-6, 6.44e5])
        close(run.r[1], 2.270e-6)
        assert run.r[1] / run.r[0] == pytest.approx(8.0, rel=0.01)
        close(run.scaled[1] / run.scaled[0], 0.0100)
        M, low = 0.6459, run.reference.lowest
        close(printed_factor(0.01, M, low, run.r[0]) * run.r[0], 5.92e-8)
        assert M * run.r[0] / low == pytest.approx(0.0865, rel=1e-3)
        assert run.scaled_lipschitz >= 0.598
        # The form with M/l^1.5 says nothing, that in scaled variables holds.
        assert M * run.scaled[0] / low**1.5 > 1.0
        first = report["RH-5.5"][0]
        assert first.corrected_right / run.scaled[0] == pytest.approx(0.0101, rel=2e-3)
        assert first.corrected_holds
        # Ours is a larger M: then the start is not good, and nothing is claimed.
        good = good_start(problem, run.points[0], run.reference.at.x)
        assert good.local == (run.lipschitz * run.r[0] <= 0.1 * low)
        assert not report["RH-5.5"].status.startswith("holds")

    def test_b_fails_as_printed_where_every_assumption_is_met(self):
        problem = problems.Rescaled(A * [1.0, 1e-3], [0.5, 0.3, 0.2], row_penalty=1.0)
        report = report_of(problem, [0.1, 45.0], 5e-8, (1, 0), n_steps=1)
        theorem = report["RH-5.5"]
        assert theorem.unmet == ""
        assert theorem.status == "fails"
        assert theorem[0].ratio > 20
        assert theorem.corrected_status == "holds"
        assert report["RH-5.6"].status == "fails"
        assert report["RH-5.6"].corrected_status == "holds"

    def test_c_two_layer(self):
        problem = problems.TwoLayer(A, [[1, 0, -1], [0, 1, 1]], [0.3, 0.1], "tanh", row_penalty=np.sqrt(0.5))
        report = report_of(problem, [0.17, 0.07], 3.288e-3, (2, 1), n_steps=3)
        run = report.trajectory
        close(run.reference.at.x, [0.175264, 0.068218])
        close([run.reference.lowest, run.reference.cond], [0.568624, 1.392])
        close(run.r, [3.288e-3, 3.137e-5, 3.231e-7, 3.083e-9])
        assert run.lipschitz >= 0.0826
        close([printed_factor(0.01, 16.557, run.reference.lowest, r) * r for r in run.r[:3]],
              [7.621e-4, 6.848e-7, 6.467e-9])  # fmt: skip
        assert report["TL-6.6"].status == "holds"
        assert report["TL-6.7"].status == "holds"
        printed = TwoLayerSizes(4.0, np.sqrt(2.0), 1.0, np.log(0.0999)).log10_lipschitz(3)
        assert printed == pytest.approx(55.85, abs=5e-3)
        assert report["TL-7.1"].assumptions[4].name == "M r_0 <= 0.1 l, M of Lemma 5.2 = 10^55.69"
        assert report["TL-1.5"].status == report["TL-7.1"].status
        assert report["TL-7.1"].status.startswith("assumption not met: w_i^2 >= 12 R_h")

    def test_d_gradient_descent(self):
        # Definition A.4 has the softmax of X^T W x_i, over the columns of X^T W X.
        W, V = np.array([[0.5, 0.1], [0.0, 0.5]]).T, np.eye(2)
        truth = np.array([[0.6, -0.4], [0.2, 0.7]])
        # Columns are tokens.
        P = np.exp(truth.T @ W @ truth)
        B = (P / P.sum(1, keepdims=True)) @ truth.T @ V
        problem = problems.LayerInversion(W, V, B, gamma=0.5)
        star = minimize(problem, truth, Newton(), tol=1e-12).x
        assert np.linalg.norm(star - truth) / np.linalg.norm(truth) == pytest.approx(0.80, abs=5e-3)
        # The paper's loss is twice this one.
        start = star + 0.05 * np.array([[1.0, 1.0], [-1.0, 1.0]])
        solver = GradientDescent(step_size=2 * 0.48689)
        result = minimize(problem, start, solver, max_iter=12, history="points")
        report = theory.on(result)
        run, theorem = report.trajectory, report["UT-I.1"]
        close([theorem[k].left for k in (0, 1, 5, 10)], [1.000e-1, 5.127e-2, 4.145e-3, 2.162e-4])
        factors = [descent_factors(0.8972, 3.0051, 0.48689, k) for k in (0, 1, 5, 10)]
        close([0.01 * f for f, _ in factors], [1.000e-2, 8.375e-3, 4.121e-3, 1.698e-3])
        close([0.1 * f for _, f in factors], [1.000e-1, 5.632e-2, 5.665e-3, 3.209e-4])
        # The least curvature on the first segment is 0.8972; the second iterate has less.
        m, L = np.array(run.curvature) * 2
        close(L, 3.0051)
        least = [2 * np.linalg.eigvalsh(problem.hessian(x))[0] for x in run.points[:2]]
        close(least, [0.8972, 0.8948])
        assert m == pytest.approx(min(least), rel=1e-9)
        close([theorem[k].right for k in (0, 1)], [0.01, 0.01 * (1 - m / L) ** 0.5])
        close(theorem[10].corrected_right, 0.1 * (1 - 0.48689 * m) ** 10)
        assert [theorem[k].holds for k in (0, 1, 5, 10)] == [False, False, False, True]
        assert (theorem.status, theorem.corrected_status) == ("fails", "holds")
        main = report["UT-4.3"]
        gamma = main.assumptions[-2]
        # |V|_F = 2^0.5 is the smallest R: 72 n d R^8.
        assert gamma.limit == pytest.approx(72 * 4 * 2.0**4)
        assert main.status.startswith("assumption not met: gamma >= 72 n d R^8: 0.5 against")
        assert theory.on(result, gamma=1e6)["UT-I.2"].assumptions[-2].met
        assert report["UT-I.3"].reason == "the steps are those of gradient descent"

    def test_e_the_history_is_met(self):
        H, e = np.diag([1.0, 1e6]), np.array([0.0, 1.0])
        first = instances.Step(H, e, 0.01 * np.eye(2))
        close(np.linalg.norm(first.after), 0.0099)
        second = instances.Step(H, first.after, 0.01 * SWAP, previous=first.r)
        found = theory.check("RH-5.6", second)
        assert found.violated == ()
        assert second.r <= 0.4 * first.r
        assert np.linalg.norm(second.after) / second.r == pytest.approx(10.0, rel=1e-3)
        assert second.length(second.after, H) / second.length(second.e, H) == pytest.approx(0.01, rel=1e-3)
        assert ill_conditioned().previous is not None


# ---- what is claimed


def test_exact_steps_need_no_accuracy_and_the_lemmas_hold():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    result = minimize(problem, [0.101, 0.046], Newton(hessian="exact"), history="points")
    report = theory.on(result)
    assert report.trajectory.accuracy[0] < 1e-6
    assert report["RH-5.5"].status == report["RH-5.6"].status == "holds"
    text = str(report)
    assert text.index("RH-5.5  holds") < text.index("RH-11.1  assumption not met: w_i^2")
    assert "not applicable: TL-6.6, TL-6.7, TL-7.1 (it is about TwoLayer)" in text


def test_an_accuracy_that_the_steps_refute_is_not_met():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    x = minimize(problem, [0.1, 0.05]).x
    options = {"solver": Off(), "max_iter": 3, "history": "points"}
    result = minimize(problem, x + 1e-3, **options)
    assert theory.on(result, epsilon0=0.0101)["RH-5.5"].status == "holds"
    told = theory.on(result, epsilon0=0.005)["RH-5.5"].status
    assert told.startswith("assumption not met: the Hessian that makes each step is within eps0")


def test_least_accuracy_is_that_of_some_hessian():
    # A step s is made by H~ = H^(1/2) (I + c Q) H^(1/2) with a reflection Q: it exists and is as accurate.
    rng = np.random.default_rng(0)
    for _ in range(20):
        s, v = rng.standard_normal((2, 4))
        c = np.linalg.norm(v) / np.linalg.norm(s)
        w = s / np.linalg.norm(s) - v / np.linalg.norm(v)
        Q = np.eye(4) - 2 * np.outer(w, w) / (w @ w)
        assert c * Q @ s == pytest.approx(v)
        assert np.linalg.norm(c * Q, 2) == pytest.approx(c)


def test_a_far_start_holds_nothing():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    report = theory.on(minimize(problem, [2.0, -1.0], history="points"))
    for id in ("RH-5.5", "RH-5.6", "RH-11.1", "RH-1.5"):
        assert report[id].status.startswith("assumption not met: ")
    assert "M r > 0.1 l" in str(report)


def test_a_singular_minimum_is_no_good_one():
    problem = problems.Softmax(np.column_stack([A, A[:, 0]]), [0.5, 0.3, 0.2])
    report = theory.on(minimize(problem, [0.1, 0.0, 0.0], history="points"))
    assert not report["RH-5.5"].status.startswith("holds")
    assert not report["RH-5.5"].rows


def test_another_reference_is_no_minimum():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    result = minimize(problem, [0.11, 0.05], history="points")
    own = theory.on(result, x_ref=result.x + 0.05)
    # It is polished first.
    assert own.trajectory.reference.at.x == pytest.approx(result.x, abs=1e-9)


def test_gradient_descent_is_not_newton_and_a_line_search_has_no_constant_step():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    searched = minimize(problem, [0.2, 0.1], GradientDescent(), history="points")
    assert theory.on(searched)["UT-I.1"].status.startswith("not applicable")
    fixed = minimize(problem, [0.2, 0.1], GradientDescent(0.2), history="points")
    report = theory.on(fixed)
    assert report["RH-5.5"].status == "not applicable: the steps are those of gradient descent"
    assert report["UT-I.1"].corrected_status == "holds"
    assert report["UT-4.3"].status == "not applicable: it is about gradient descent on LayerInversion"
    # A step beyond 2/(m + L) is no step of the theorem.
    L = report.trajectory.curvature[1]
    long = minimize(problem, [0.2, 0.1], GradientDescent(1.99 / L), history="points")
    assert theory.on(long)["UT-I.1"].status.startswith("assumption not met: t < 2/(m + L)")


def test_newton_on_an_inverted_layer():
    rng = np.random.default_rng(0)
    W, V, X = rng.standard_normal((3, 2, 2)) * 0.5
    layer = problems.LayerInversion(W, V, X, gamma=1.0)
    result = minimize(layer, 0.1 * rng.standard_normal(layer.shape), Newton(), history="points")
    theorem = theory.on(result)["UT-4.4"]
    assert theorem.status.startswith("assumption not met: gamma >= 72 n d R^8: 1 against")
    assert theorem.rows[-1].left == len(result.points) - 1
    assert "the run needed T = " in str(theorem)


# ---- what rounding, and a step out of the theorem's range, may not decide


def test_below_the_resolution_nothing_is_said():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    x = minimize(problem, [0.1, 0.05], tol=1e-12).x
    report = theory.on(minimize(problem, x + 1e-3, Off(), max_iter=12, history="points"))
    run, rho = report.trajectory, report.trajectory.reference.radius
    assert len(run.points) > 10
    shown = [row.t for row in report["RH-5.5"].rows]
    assert 4 <= len(shown) < 10
    assert all(run.r[t] >= 10 * rho for t in shown)
    assert report["RH-5.5"].status == "holds"
    assert f"{len(run.points) - len(shown)} points are closer than ten times that" in str(report)


def test_errors_of_both_sides_leave_a_step_open():
    def right(r):
        return 2.0 * r

    assert compared(1.0, 0.1, right, 0.6, 0.0) is True
    assert compared(1.0, 0.1, right, 0.6, 0.1) is None
    assert compared(1.0, 0.3, right, 0.6, 0.0) is None
    assert compared(1.3, 0.05, right, 0.6, 0.0) is False
    assert compared(1.3, 0.05, right, 0.6, 0.1) is None
    assert compared(0.0, 0.0, right, 0.1, 1.0) is True


def test_steps_after_one_that_shrank_too_little_are_not_judged():
    problem = problems.Rescaled(A * [1.0, 1e-3], [0.5, 0.3, 0.2], row_penalty=1.0)
    report = report_of(problem, [0.1, 45.0], 2e-9, (1, 0), n_steps=2)
    run, theorem = report.trajectory, report["RH-5.6"]
    assert run.r[1] > 0.4 * run.r[0]
    assert theorem[0].obstacle == ""
    assert theorem[1].obstacle == "r_i > 0.4 r_{i-1} before"
    assert report["RH-5.5"][1].obstacle == ""
    # Of distances only those count that no step before had reached.
    assert 1 not in [row.t for row in report["RH-1.5"].rows]


def test_corrected_forms_stay_within_their_range():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    x = minimize(problem, [0.1, 0.05], tol=1e-12).x
    coarse = theory.on(minimize(problem, x + 1e-3, Off(0.05 * SWAP), max_iter=3, history="points"))
    assert coarse["RH-5.6"].status.startswith("assumption not met: eps0 <= 0.01: 0.05")
    assert coarse["RH-5.6"].corrected_status == "not applicable"
    assert [line.split()[-3:] for line in str(coarse["RH-5.6"]).splitlines() if line.split()[0] == "0"] == [
        ["-", "-", "-"]
    ]
    assert coarse["RH-5.5"].status == coarse["RH-5.5"].corrected_status == "holds"
    assert all(np.isnan(row.corrected_right) for row in coarse["RH-11.1"].rows)
    far = theory.on(minimize(problem, [2.0, -1.0], history="points", tol=1e-10))
    assert far["RH-5.5"][0].corrected_right == np.inf
    assert far["RH-5.5"][0].right == np.inf
    assert far["RH-1.5"].rows[0].r < 0.1 < far.trajectory.r[0]
    assert far["RH-5.5"].corrected_status != "fails"
    assert scaled_factor(0.01, 1.0) == scaled_factor(1.0, 0.01) == np.inf
    assert scaled_factor(0.01, 0.1) == pytest.approx(0.18, abs=3e-3)


def test_an_accuracy_equal_to_the_limit_of_5_5_is_beyond_it():
    problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    result = minimize(problem, [0.101, 0.046], history="points")
    assert theory.on(result, epsilon0=0.1)["RH-5.5"].unmet == "eps0 < 0.1: 0.1 against 0.1"
    assert theory.on(result, epsilon0=0.099)["RH-5.5"].unmet == ""
    assert theory.on(result, epsilon0=0.01)["RH-5.6"].unmet == ""


@pytest.mark.parametrize("loss", ["squared", "rescaled"])
def test_attention_is_a_loss_of_rows(loss):
    rng = np.random.default_rng(0)
    problem = problems.Attention(
        [[1.0]], rng.standard_normal((4, 2)), rng.dirichlet(np.ones(4), 1), loss, row_penalty=1.0
    )
    x = minimize(problem, np.zeros((1, 2))).x
    result = minimize(problem, x + 1e-4, Newton(hessian="exact"), history="points")
    report = theory.on(result)
    assert report["RH-5.5"].status == "holds"
    if loss == "rescaled":
        assert report["RH-1.5"].status.startswith("assumption not met: w_i^2 >= 100 M")


def test_other_losses_than_the_papers_have_no_main_theorem():
    for options in ({"weights": [1.0, 2.0, 1.0]}, {"offset": [0.1, 0.0, 0.0]}, {"ridge": 0.1}):
        problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0, **options)
        report = theory.on(minimize(problem, [0.11, 0.05], history="points"))
        assert report["RH-1.5"].reason == "it is about one group, without weights, offset and ridge"
        assert report["RH-5.5"].rows
    groups = problems.Rescaled(A, [0.5, 0.3, 0.2], groups=[0, 0, 1], row_penalty=1.0)
    assert theory.on(minimize(groups, [0.11, 0.05], history="points"))["RH-1.5"].reason
    cosh = problems.Rescaled(A, [0.5, 0.3, 0.2], "cosh", row_penalty=1.0)
    report = theory.on(minimize(cosh, [0.1, 0.0], history="points"))
    assert report["RH-11.1"].reason == "it is about Rescaled with function='exp'"
    assert not report["RH-1.5"].reason
