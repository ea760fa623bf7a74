"""The published algorithm: its number of rows, its guarantee, its rate, and what it refuses."""

import numpy as np
import pytest
from scipy import sparse

from attnfit import minimize, problems, theory
from attnfit.objectives.diagonal import RowSplit, split_hessian
from attnfit.solvers import Newton, Status, chernoff_rows, published
from attnfit.solvers.published import chernoff_failure, inverse_root, keep_rows

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

# Rows by number of unknowns; eps0 .3, .1, .01 with failure .1 and .01 each.
TABLE = {
    4: (393, 605, 3_509, 5_359, 350_565, 534_780), 8: (912, 1_340, 8_130, 11_834, 812_038, 1_180_471),
    10: (1_192, 1_727, 10_611, 15_241, 1_059_678, 1_520_220),
    32: (4_674, 6_402, 41_433, 56_269, 4_135_420, 5_609_174),
    64: (10_382, 13_854, 91_790, 121_483, 9_158_120, 12_105_651),
    256: (49_865, 63_856, 438_633, 557_576, 43_730_804, 55_521_113),
}  # fmt: skip


@pytest.mark.parametrize("d", TABLE)
def test_numbers_of_rows(d):
    settings = [(eps, failure) for eps in (0.3, 0.1, 0.01) for failure in (0.1, 0.01)]
    assert tuple(chernoff_rows(d, eps, failure) for eps, failure in settings) == TABLE[d]
    for eps, failure in settings:
        m = chernoff_rows(d, eps, failure, 2.5)
        assert chernoff_failure(m, d, eps, 2.5) <= failure < chernoff_failure(m - 1, d, eps, 2.5)


def gaussian(rng):
    return rng.standard_normal((20_000, 10))


def heavy(rng):
    rows = rng.standard_normal((20_000, 10))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.abs(rng.standard_t(2, 20_000))[:, None]


def spectral_errors(A, scores, m, n_draws, rng):
    Q = np.linalg.qr(A)[0]
    scores = np.sum(Q**2, axis=1) if scores is None else scores
    out = []
    for _ in range(n_draws):
        kept, inverse = keep_rows(scores, m, rng)
        out.append(np.linalg.norm(Q[kept].T @ (inverse[:, None] * Q[kept]) - np.eye(Q.shape[1]), 2))
    return np.array(out)


def test_the_failure_rate_is_within_delta():
    rng = np.random.default_rng(0)
    errors = spectral_errors(gaussian(rng), None, chernoff_rows(10, 0.3, 0.1), 1_000, rng)
    assert np.mean(errors > 0.3) <= 0.1 + 3 * np.sqrt(0.1 / 1000)
    assert 0.12 <= np.median(errors) <= 0.19


def test_uniform_rows_fail_on_heavy_tails():
    rng = np.random.default_rng(7)
    A = heavy(rng)
    m = chernoff_rows(10, 0.3, 0.1)
    assert np.mean(spectral_errors(A, np.ones(len(A)), m, 200, rng) > 0.3) > 0.9
    assert np.mean(spectral_errors(A, None, m, 200, rng) > 0.3) <= 0.1 + 3 * np.sqrt(0.1 / 200)


# ---- the split of the Hessian


RNG = np.random.default_rng(0)
A = RNG.standard_normal((60, 3))
B, W, GROUPS = RNG.random(60), RNG.random(60), RNG.permutation(np.repeat(np.arange(6), 10))
CASES = {
    "cosh": problems.Rescaled(A, B, "cosh", row_penalty=0.3),
    "groups": problems.Rescaled(A, B / B.sum(), groups=GROUPS, row_penalty=W, weights=W[::-1]),
    "softmax": problems.Softmax(A, B, groups=GROUPS, row_penalty=W),
    "sparse": problems.Softmax(sparse.csr_array(A), B, groups=GROUPS, row_penalty=W, ridge=0.1),
    "exponential": problems.Exponential(A, B, weights=W),
    "cross entropy": problems.Softmax(A, B, loss="cross_entropy"),
    "sparse rescaled": problems.Rescaled(sparse.csr_array(A), B, groups=GROUPS, offset=W),
    "two layers": problems.TwoLayer(A, RNG.standard_normal((4, 60)), B[:4], row_penalty=0.4, ridge=0.2),
}


@pytest.mark.parametrize("long_groups", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_split_is_the_hessian(case, long_groups, monkeypatch):
    problem = CASES[case]
    if long_groups and problem.rows is not None:
        # Groups in several pieces.
        monkeypatch.setattr(type(problem.rows.design), "block_rows", property(lambda self: 4))
        problem = problem.with_rows(problem.rows.on(problem.rows.design))
        problem.rows.recut()
    x = np.array([0.2, -0.1, 0.3])
    at = problem.evaluate(x)
    split = split_hessian(problem, at)
    hessian = problem.hessian_at(at)
    found = split.gram(split.weights) + split.low_rank + split.ridge
    assert np.abs(found - hessian).max() <= 1e-13 * np.abs(hessian).max()
    kept = np.sort(RNG.choice(60, 20, replace=False))
    weights = np.zeros(60)
    weights[kept] = RNG.random(20)
    assert split.gram(weights[kept], kept) == pytest.approx(split.gram(weights), rel=1e-12, abs=1e-13)
    root = inverse_root(split.gram(np.abs(split.weights)))
    assert np.abs(split.weights) @ split.squares(root) == pytest.approx(3.0)
    given = {"cosh": 0.09, "two layers": 0.16, "groups": W.min() ** 2, "softmax": W.min() ** 2}
    assert split.penalties.min() == pytest.approx({"sparse": W.min() ** 2, **given}.get(case, 0.0))
    assert split.centred == (case in ("softmax", "sparse", "cross entropy"))


# ---- the fit


def rescaled(n=5_000, d=8, seed=0, noise=0.2, **options):
    rng = np.random.default_rng(seed)
    rows = 0.3 * rng.standard_normal((n, d))
    x = 0.5 * rng.standard_normal(d)
    u = np.exp(rows @ x)
    b = u * np.exp(noise * rng.standard_normal(n))
    problem = problems.Rescaled(rows, b / b.sum(), **({"row_penalty": 0.7} | options))
    return problem, minimize(problem, x, tol=1e-10).x


PROBLEM, STAR = rescaled()
START = STAR + 1e-3 * np.random.default_rng(1).standard_normal(8)


def fit(problem=PROBLEM, x0=START, seed=0, history="records", max_iter=100, **options):
    solver = Newton.as_published(**({"epsilon0": 0.3, "T": 5} | options))
    return minimize(problem, x0, solver, random_state=seed, history=history, max_iter=max_iter)


@pytest.mark.parametrize("epsilon0", [0.3, 0.1])
def test_contraction_is_within_the_bound(epsilon0):
    H = PROBLEM.hessian(STAR)
    split = split_hessian(PROBLEM, PROBLEM.evaluate(STAR))
    root = inverse_root(H)
    # The low-rank part is exact and indefinite: what is sampled exceeds H by this factor.
    kappa = np.linalg.eigvalsh(root.T @ split.gram(split.weights) @ root)[-1]
    assert epsilon0 * kappa < 1.0
    bound = epsilon0 * kappa / (1.0 - epsilon0 * kappa)
    for seed in range(5):
        result = fit(seed=seed, history="points", epsilon0=epsilon0, measure=True)
        errors = result.points - STAR
        sizes = np.sqrt(np.einsum("ki,ij,kj->k", errors, H, errors))
        kept = sizes[:-1] > 1e-8 * sizes[0]
        assert all(step.error <= epsilon0 for step in result.sampling.steps)
        assert (sizes[1:] / sizes[:-1])[kept].max() <= bound + 0.02


def test_the_dropped_part_costs_the_rate():
    H = PROBLEM.hessian(STAR)
    ratios = {}
    for low_rank in ("exact", "dropped"):
        e = fit(history="points", epsilon0=0.1, low_rank=low_rank).points[:4] - STAR
        sizes = np.sqrt(np.einsum("ki,ij,kj->k", e, H, e))
        ratios[low_rank] = sizes[3] / sizes[2]
    assert ratios["exact"] < 0.06
    assert ratios["dropped"] > 2.0 * ratios["exact"]
    assert "dropped, as printed" in fit(low_rank="dropped").sampling.note


def test_t_steps_exactly_and_the_usual_verdict():
    for T in (1, 3, 7):
        result = fit(T=T)
        assert result.n_iter == len(result.sampling.steps) == T
        asked = chernoff_rows(8, 0.3, 0.1 / T)
        assert {step.asked for step in result.sampling.steps} == {asked}
        assert result.sampling.failure <= 0.1
        assert result.converged == (result.status == "converged") == (result.move <= 1e-8)
    assert not fit(T=1).converged
    assert "not converged after 1 published steps" in fit(T=1).message
    assert fit(T=7).converged
    with pytest.raises(ValueError, match="T=7 steps exceed max_iter=5"):
        fit(T=7, max_iter=5)


def test_without_t_the_budget_of_failure_is_spread():
    result = fit(T=None)
    assert result.converged
    assert result.n_iter < 15
    budgets = [6 * 0.1 / (np.pi * (t + 1)) ** 2 for t in range(len(result.sampling.steps))]
    assert [s.asked for s in result.sampling.steps] == [chernoff_rows(8, 0.3, b) for b in budgets]
    assert result.sampling.failure <= 0.1
    assert fit(T=None, max_iter=2).n_iter == 2


@pytest.mark.parametrize("sampling", ["leverage", "approximate", "uniform"])
def test_mu_bounds_what_scores_miss(sampling, monkeypatch):
    seen = []

    def spy(scores, m, rng):
        seen.append(scores)
        return keep_rows(scores, m, rng)

    monkeypatch.setattr(published, "keep_rows", spy)
    problem, star = rescaled(n=3_000, d=5, seed=3)
    result = fit(problem, star + 1e-3, history="points", sampling=sampling, n_probes=16)
    for x, scores, step in zip(result.points, seen, result.sampling.steps, strict=False):
        split = split_hessian(problem, problem.evaluate(x))
        leverages = split.weights * split.squares(inverse_root(split.gram(split.weights)))
        true = float(np.max(leverages / leverages.sum() / (scores / scores.sum())))
        assert true <= step.mu * (1 + 1e-9)
        assert step.mu <= {"leverage": 1.0 + 1e-9, "uniform": true * 1.001, "approximate": 40.0}[sampling]
        # Half of the budget of the step that reads estimates is theirs.
        probed = sampling == "approximate" and step is result.sampling.steps[0]
        assert step.asked == chernoff_rows(5, 0.3, 0.1 / 5 * (0.5 if probed else 1.0), step.mu)
    assert result.converged


def test_leverages_serve_again_within_their_bound():
    split = split_hessian(PROBLEM, PROBLEM.evaluate(STAR))
    D = split.weights
    draws = published._Draws(Newton.as_published(epsilon0=0.3, sampling="approximate"), RNG)
    assert draws._stretch(split, D) is None
    draws._known = np.ones(len(D)), D, 8
    assert draws._stretch(split, D) == pytest.approx(1.0)
    assert draws._stretch(split, 3.0 * D) == pytest.approx(1.0 / 3.0)
    # Four fifths of the weight before, in one row: G is at least that much of the one before.
    less = D.copy()
    less[3] *= 0.8
    assert draws._stretch(split, less) == pytest.approx(1.25)
    less[3] *= 0.5
    assert draws._stretch(split, less) is None
    less[3] = 0.0
    assert draws._stretch(split, less) is None
    draws._known = np.ones(len(D)), less, 8
    assert draws._stretch(split, D) is None
    assert draws._stretch(split, less) == pytest.approx(1.0)
    centred = split_hessian(CASES["softmax"], CASES["softmax"].evaluate(np.zeros(3)))
    draws._known = np.ones(60), np.abs(centred.weights), 3
    assert draws._stretch(centred, np.abs(centred.weights)) is None


def test_leverages_are_read_once_near_the_minimum(monkeypatch):
    reads = []
    squares = RowSplit.squares
    monkeypatch.setattr(RowSplit, "squares", lambda self, root: reads.append(root) or squares(self, root))
    result = fit(sampling="approximate", T=6)
    assert result.converged
    assert len(reads) == 1
    assert result.sampling.failure <= 0.1
    fit(sampling="leverage", T=6)
    assert len(reads) == 7


def test_errors_are_measured():
    result = fit(T=2, measure=True, history="points")
    assert fit(T=2).sampling.steps[0].error is None
    # The same draws again, against the orthonormal basis.
    split = split_hessian(PROBLEM, PROBLEM.evaluate(START))
    Q = np.linalg.qr(np.sqrt(split.weights)[:, None] * np.asarray(PROBLEM.design.block(slice(None))))[0]
    errors = []

    def spy(scores, m, rng):
        kept, inverse = keep_rows(scores, m, rng)
        errors.append(np.linalg.norm(Q[kept].T @ (inverse[:, None] * Q[kept]) - np.eye(8), 2))
        return kept, inverse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "keep_rows", spy)
        fit(T=1, measure=True)
        measured = fit(T=1, measure=True).sampling.steps[0].error
    assert measured == pytest.approx(errors[1], rel=1e-6)
    assert 0.0 < measured < 0.3
    assert "eps0 = 0.3 with probability" in str(result.sampling)


@pytest.mark.parametrize("case", ["softmax", "cross entropy", "exponential", "two layers"])
def test_other_losses(case):
    problem = {
        "softmax": lambda: problems.Softmax(A, B / B.sum(), row_penalty=1.0),
        "cross entropy": lambda: problems.Softmax(A, B, loss="cross_entropy"),
        "exponential": lambda: problems.Exponential(A, np.exp(A @ [0.1, 0.2, -0.1])),
        "two layers": lambda: problems.TwoLayer(A, RNG.random((4, 60)), B[:4], row_penalty=1.0),
    }[case]()
    star = minimize(problem).x
    result = fit(problem, star + 1e-3, T=8)
    assert result.converged
    assert result.x == pytest.approx(star, abs=1e-7)
    assert "exceed the data (60): the exact Gram is cheaper" in result.sampling.note
    assert result.sampling.failure <= 0.1


def test_without_a_start():
    assert fit(x0=None, T=None, problem=problems.Softmax(A, B, loss="cross_entropy")).converged
    layers = problems.TwoLayer(A, RNG.random((4, 60)), B[:4], row_penalty=1.0)
    assert fit(layers, None, T=None).converged


# ---- where it stops


def test_negative_weights_are_refused_by_name():
    problem, star = rescaled(row_penalty=0.0, noise=0.6)
    D = split_hessian(problem, problem.evaluate(star)).weights
    row = int(np.argmin(D))
    expected = rf"D = B_diag \+ w\^2 is {D.min():.4g} at row {row} in step 0"
    with pytest.raises(ValueError, match=expected) as told:
        fit(problem, star)
    w = float(str(told.value).split("row_penalty=")[1].split(" ")[0])
    assert w**2 == pytest.approx(-1.1 * D.min(), rel=1e-3)
    positive = problems.Rescaled(problem.design.block(slice(None)), problem.b, row_penalty=w)
    assert split_hessian(positive, positive.evaluate(star)).weights.min() > 0.0
    result = fit(problem, star + 1e-4, negative="absolute", measure=True, T=10)
    assert "D has negative entries" in result.sampling.note
    assert result.sampling.smallest < 0.0
    assert all(step.error < 0.3 for step in result.sampling.steps)


def test_rows_are_named_as_the_user_knows_them():
    problem = problems.Softmax(A, B, groups=GROUPS)
    x = np.array([1.0, -0.5, 0.4])
    D = np.empty(60)
    for g in range(6):
        f = np.exp(A[g == GROUPS] @ x)
        f /= f.sum()
        c = f - B[g == GROUPS]
        D[g == GROUPS] = f * f + f * c - (f @ c) * f
    with pytest.raises(ValueError, match=f"D = B_diag .* is {D.min():.4g} at row {D.argmin()} in step 0"):
        fit(problem, x)


def test_an_indefinite_hessian_ends_the_run():
    problem = problems.Exponential(A, 5.0 + B)
    result = fit(problem, np.full(3, -0.5), negative="absolute")
    assert result.status == Status.INDEFINITE == "indefinite"
    assert not result.converged
    assert "not positive definite" in result.message
    assert result.n_iter == 0


def test_a_step_that_overflows_ends_the_run():
    # The curvature exp(-10) asks for a step beyond all that exp can take.
    problem = problems.Poisson(np.ones((20, 1)), np.full(20, 3.0))
    result = fit(problem, np.array([-10.0]), T=20)
    assert result.status == "overflow"
    assert result.n_iter == 0
    assert np.array_equal(result.x, [-10.0])


def test_an_interruption_keeps_the_point():
    solver = Newton.as_published(epsilon0=0.3, T=5)
    result = minimize(PROBLEM, START, solver, callback=lambda record: record.iteration == 2)
    assert (result.status, result.n_iter) == ("interrupted", 2)


def test_a_checkpoint_gives_the_same_run(tmp_path):
    path, solver = tmp_path / "fit.ckpt", Newton.as_published(epsilon0=0.3, T=5)
    plain = fit(history="points")
    options = {"random_state": 0, "checkpoint": path, "history": "points"}
    minimize(PROBLEM, START, solver, callback=lambda record: record.iteration == 2, **options)
    resumed = minimize(PROBLEM, START, solver, **options)
    assert np.array_equal(resumed.points, plain.points)
    assert resumed.sampling == plain.sampling


@pytest.mark.parametrize(
    "problem",
    [
        problems.FullAttention(A[:4], A[:4], A[:4], A[:4]),
        problems.LayerInversion(np.eye(3), np.eye(3), A[:4]),
        problems.Attention(A[:4], A[:4], np.full((4, 4), 0.25)),
        problems.TwoLayer(A, RNG.random((4, 60)), RNG.random((4, 2))),
    ],
    ids=lambda p: type(p).__name__,
)
def test_problems_without_rows_are_refused(problem):
    with pytest.raises(ValueError, match=r"draws rows of Rescaled, .*; for \w+ use Newton\(\)"):
        minimize(problem, solver=Newton.as_published())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"epsilon0": 0.0}, r"epsilon0 must lie in \(0, 1\), not 0.0"),
        ({"epsilon0": 1.0}, r"epsilon0 must lie in \(0, 1\), not 1.0"),
        ({"epsilon0": "x"}, r"epsilon0 must lie in \(0, 1\), not 'x'"),
        ({"delta": -0.1}, r"delta must lie in \(0, 1\), not -0.1"),
        ({"delta": 1.0}, r"delta must lie in \(0, 1\), not 1.0"),
        ({"T": 0}, "T must be an integer >= 1, not 0"),
        ({"T": 2.5}, "T must be an integer >= 1, not 2.5"),
        ({"n_probes": 0}, "n_probes must be an integer >= 1, not 0"),
        ({"sampling": "all"}, "sampling must be one of 'leverage', 'approximate', 'uniform'"),
        ({"low_rank": "no"}, "low_rank must be one of 'exact', 'dropped'"),
        ({"negative": "drop"}, "negative must be one of 'refuse', 'absolute'"),
    ],
)
def test_bad_arguments_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        Newton.as_published(**options)


# ---- the theorems on it


def test_the_sampling_lemma_on_a_run():
    result = fit(measure=True, history="points")
    lemma = theory.on(result)["RH-5.3"]
    # Three tenths were asked for, the lemma says one per cent.
    assert lemma.status == "fails"
    assert lemma.corrected_status == "holds"
    assert [row.left for row in lemma.rows] == [step.error for step in result.sampling.steps]
    assert theory.on(result)["TL-6.5"].rows == lemma.rows
    unmeasured = theory.on(fit(history="points"))["RH-5.3"]
    assert unmeasured.status.startswith("assumption not met: spectral error measured")
    fine = theory.on(fit(epsilon0=0.01, measure=True, history="points"))["RH-5.3"]
    assert fine.status == "holds"
    exact = theory.on(minimize(PROBLEM, START, history="points"))["RH-5.3"]
    assert exact.status.startswith("not applicable: no sampled Hessian")
