"""Known optima, agreement with scipy, reads of the data, rank deficiency, reports and interruptions."""

import tracemalloc

import numpy as np
import pytest
import scipy.optimize
from instances import ALL_LOSSES, COUPLED, SOFTMAX, instance, relative, softmax
from scipy import sparse
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning

from attnfit import minimize, problems
from attnfit.datasets import load_austrian_flows, load_car_shares, load_travel_mode
from attnfit.solvers import GradientDescent, Newton

# These fall towards one-hot outputs at infinity: only a ridge gives them a minimum.
UNBOUNDED = {"entropy", "linear_cross_entropy"}
# At zero the rescaled sinh loss vanishes for every target: the trivial minimum.
RECOVERABLE = [(f, n) for f, n in ALL_LOSSES if n not in UNBOUNDED and (f, n) != ("Rescaled", "sinh")]


def relative_gradient(exact, x):
    """Norm of the autodiff gradient, relative to the larger of those at zero and halfway there."""
    origin = max(np.linalg.norm(exact.gradient(share * x)) for share in (0.0, 0.5))
    return np.linalg.norm(exact.gradient(x)) / origin


# ---- known answers ----


@pytest.mark.parametrize(("family", "loss"), RECOVERABLE)
@pytest.mark.parametrize("seed", range(3))
def test_exact_data_give_back_their_parameter(family, loss, seed):
    inst, x = instance(family, loss, sizes=(30, 20, 4, 7), d=4, noise=0.0, seed=seed)
    result = minimize(inst.problem())
    assert result.converged
    assert result.status == "converged"
    # cosh(A x) = cosh(-A x): the answer is known up to its sign.
    found = result.x if loss != "cosh" else result.x * np.sign(result.x @ x)
    assert relative(found, x) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_rescaled_sinh_from_a_start_nearby(seed):
    inst, x = instance("Rescaled", "sinh", sizes=(30, 20, 4, 7), d=4, noise=0.0, seed=seed)
    result = minimize(inst.problem(), 1.1 * x)
    assert result.converged
    assert result.value < 1e-12
    # The exact scale of x is all but undetermined: sinh is nearly linear, and u / alpha nearly free of scale.
    assert relative(result.x / np.linalg.norm(result.x), x / np.linalg.norm(x)) < 1e-3


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scipy(family, loss, seed):
    inst, _ = instance(family, loss, sizes=(5, 8, 3, 6), d=3, noise=0.2, seed=seed)
    inst = inst.replace(options={"ridge": 0.5 if loss in UNBOUNDED else 1e-3})
    result = minimize(inst.problem(), random_state=0)
    exact = inst.objective()
    assert result.converged
    assert relative(result.value, exact.value(result.x)) < 1e-12
    assert relative(result.gradient, inst.problem().gradient(result.x)) < 1e-6 or np.allclose(
        result.gradient, 0, atol=1e-12
    )
    starts = {"answer": result.x + 1e-3, "zero": np.full(3, 1e-3)}
    ends = {
        name: scipy.optimize.minimize(
            exact.value,
            x,
            jac=exact.gradient,
            hess=exact.hessian,
            method="trust-exact",
            options={"gtol": 1e-10},
        )
        for name, x in starts.items()
    }
    assert np.allclose(result.x, ends["answer"].x, atol=1e-5)
    if loss != "entropy":
        # Entropy has a minimum for every choice of winners.
        # Rescaled sinh is zero at zero whatever the target: relative to that nothing is small.
        slack = 1e-9 if (family, loss) == ("Rescaled", "sinh") else 1e-9 * abs(result.value)
        assert result.value <= min(end.fun for end in ends.values()) + slack
    assert np.linalg.eigvalsh(exact.hessian(result.x))[0] > 0.0


@pytest.mark.parametrize(
    ("family", "loss"),
    [("Softmax", "squared"), ("Softmax", "kl"), ("Exponential", "exp"), ("Rescaled", "exp")],
)
def test_weights_offset_and_penalties_reach_the_answer(family, loss):
    inst, _ = instance(family, loss, sizes=(5, 8, 3, 6), noise=0.2)
    rng = np.random.default_rng(1)
    n = len(inst.b)
    options = {
        "weights": rng.integers(0, 3, n),
        "offset": 0.3 * rng.standard_normal(n),
        "row_penalty": 0.1 * rng.random(n),
    }
    inst = inst.replace(options={**options, "ridge": 0.01})
    result = minimize(inst.problem())
    exact = inst.objective()
    assert relative_gradient(exact, result.x) < 1e-7
    best = scipy.optimize.minimize(
        exact.value, result.x + 0.01, jac=exact.gradient, method="L-BFGS-B", tol=1e-14
    )
    assert np.allclose(result.x, best.x, atol=1e-4)


PUBLISHED = [
    (load_car_shares, {}, "cross_entropy"),
    (load_car_shares, {}, "squared"),
    (load_austrian_flows, {}, "cross_entropy"),
    (load_austrian_flows, {}, "squared"),
    (load_austrian_flows, {"dummies": True}, "cross_entropy"),
    (load_austrian_flows, {"dummies": True}, "squared"),
    (load_travel_mode, {}, "cross_entropy"),
]


@pytest.mark.parametrize(("load", "options", "loss"), PUBLISHED)
def test_published_coefficients(load, options, loss):
    data = load(**options)
    weights = data.weights if loss == "cross_entropy" else None
    result = minimize(problems.Softmax(data.A, data.b, data.groups, loss, weights=weights))
    reference = data.references[loss]
    known = np.isfinite(reference.coefficients)
    assert result.converged
    assert np.allclose(result.x[known], reference.coefficients[known], rtol=2e-6, atol=6e-7)
    if reference.squared_error is not None:
        f = softmax(data.A @ result.x, data.groups)
        assert np.isclose(np.sum((f - data.b) ** 2), reference.squared_error, rtol=2e-5)
    if options:
        # Eight dummies and the mass they determine, up to a constant.
        assert result.unidentified.shape[1] == 1


def test_brier_score_of_choices():
    """One-hot targets leave a nearly flat valley: the value and two coefficients are determined."""
    data = load_travel_mode()
    result = minimize(problems.Softmax(data.A, data.b, data.groups, "squared"), max_iter=500)
    reference = data.references["squared"]
    known = np.isfinite(reference.coefficients)
    assert np.isclose(2.0 * result.value, reference.squared_error, rtol=1e-5)
    assert np.allclose(result.x[known], reference.coefficients[known], rtol=1e-3)


# ---- reads of the data ----


def conditioned(kind, kappa, n=200_000, d=16, seed=0):
    """The conditioned problem of the benchmarks."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
    s = np.logspace(0.0, -np.log10(kappa), d)
    A = (rng.standard_normal((n, d)) @ Q * s) @ Q.T
    z = A @ (Q @ (rng.standard_normal(d) / s)) / np.sqrt(d)
    if kind == "Exponential":
        return A, np.exp(0.5 * z + 0.05 * rng.standard_normal(n))
    b = np.exp(z - logsumexp(z) + 0.1 * rng.standard_normal(n))
    return A, b / b.sum()


def textbook_gradient(kind, A, b, x):
    z = A @ x
    if kind == "Exponential":
        return A.T @ ((np.exp(z) - b) * np.exp(z))
    f = np.exp(z - logsumexp(z))
    s = f - b if kind == "cross_entropy" else f * (f - b - f @ (f - b))
    return A.T @ s


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("kind", ["squared", "cross_entropy", "Exponential"])
def test_eight_reads_at_any_conditioning(kind, kappa):
    A, b = conditioned(kind, kappa)
    problem = problems.Exponential(A, b) if kind == "Exponential" else problems.Softmax(A, b, loss=kind)
    result = minimize(problem, random_state=0)
    gradient = np.linalg.norm(textbook_gradient(kind, A, b, result.x))
    assert result.converged
    assert gradient <= 1e-8 * np.linalg.norm(textbook_gradient(kind, A, b, np.zeros(A.shape[1])))
    assert result.n_passes <= 8.0
    # What the result reports is what the problem counted, plus work on the samples.
    assert problem.n_passes <= result.n_passes


def test_rows_of_very_different_size_do_not_lead_astray():
    """Seven rows carry the answer. From zero the sample leads nowhere, and the full data must not follow."""
    rng = np.random.default_rng(0)
    n, d = 60_000, 64
    Q, s = np.linalg.qr(rng.standard_normal((d, d)))[0], np.geomspace(1.0, 1e-2, d)
    A = rng.gamma(2.0, 0.5, (n, 1)) * (rng.standard_normal((n, d)) @ ((Q * s) @ Q.T))
    z = A @ (Q @ (rng.standard_normal(d) / s) / np.sqrt(d)) + 0.1 * rng.standard_normal(n)
    b = np.exp(z - logsumexp(z))
    result = minimize(problems.Softmax(A, b), random_state=0)
    assert result.converged
    gradient = np.linalg.norm(textbook_gradient("squared", A, b, result.x))
    assert gradient <= 1e-8 * np.linalg.norm(textbook_gradient("squared", A, b, np.zeros(d)))
    assert result.n_passes <= 15.0


@pytest.mark.parametrize("scales", [(1e-6, 1.0, 1e6), (1e4, 1e-4, 1.0)])
@pytest.mark.parametrize(
    ("family", "loss"), [("Softmax", "squared"), ("Exponential", "exp"), ("Rescaled", "exp")]
)
def test_units_of_the_columns_do_not_matter(family, loss, scales):
    inst, _ = instance(family, loss, sizes=(9, 8, 7), noise=0.2)
    scales = np.array(scales)
    plain = minimize(inst.problem())
    scaled = minimize(inst.problem(A=inst.A * scales))
    assert scaled.converged
    assert scaled.n_iter <= plain.n_iter + 1
    assert relative(scaled.x * scales, plain.x) < 1e-6


# ---- strategies ----


@pytest.mark.parametrize("hessian", ["auto", "exact", "sampled", "matrix_free"])
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize(
    ("family", "loss"),
    [("Softmax", "squared"), ("Softmax", "cross_entropy"), ("Exponential", "exp"), ("Rescaled", "exp")],
)
def test_every_strategy_finds_the_same_answer(hessian, storage, family, loss, small_blocks):
    inst, _ = instance(family, loss, sizes=(700, 3, 5, 300, 8), d=5, noise=0.2)
    problem = inst.problem(A=storage(inst.A))
    result = minimize(problem, solver=Newton(hessian=hessian, sample_rows=400), random_state=1)
    assert result.converged
    assert relative_gradient(inst.objective(), result.x) < 1e-7
    assert relative(result.x, minimize(problem, random_state=2).x) < 1e-6


@pytest.mark.parametrize(("family", "loss"), [case for case in COUPLED if case[1] != "sinh"])
def test_many_short_groups(family, loss):
    """Whole groups are sampled."""
    inst, _ = instance(family, loss, sizes=[3, 5, 2, 6] * 8_000, d=4, noise=0.2)
    inst = inst.replace(options={"ridge": {"entropy": 1e3, "linear_cross_entropy": 2e4}.get(loss, 0.0)})
    result = minimize(inst.problem(), random_state=0)
    assert np.linalg.norm(result.x) > 0.1
    assert result.converged
    assert relative_gradient(inst.objective(), result.x) < 1e-7
    if loss != "entropy":
        # Entropy is concave in most directions: the way out of its saddles is long.
        assert result.n_passes <= 12.0


def test_one_huge_group_among_many(monkeypatch):
    inst, _ = instance("Softmax", "squared", sizes=[30_000] + [3] * 10_000, d=4, noise=0.2)
    order = np.random.default_rng(0).permutation(len(inst.b))
    labels = np.array([f"g{i}" for i in inst.ids])[order]
    result = minimize(inst.problem(A=inst.A[order], b=inst.b[order], groups=labels), random_state=0)
    assert result.converged
    assert relative_gradient(inst.objective(), result.x) < 1e-7
    assert result.n_passes <= 10.0


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_sparse(loss):
    A, b = sparse_problem(20_000, 300)
    result = minimize(problems.Softmax(A, b, loss=loss), random_state=0)
    gradient = np.linalg.norm(textbook_gradient(loss, A, b, result.x))
    assert result.converged
    assert gradient <= 1e-7 * np.linalg.norm(textbook_gradient(loss, A, b, np.zeros(300)))


def sparse_problem(n, d, k=10):
    rng = np.random.default_rng(0)
    columns = np.argsort(rng.random((n, 3 * k)), axis=1)[:, :k] + 3 * k * rng.integers(
        0, d // (3 * k), (n, 1)
    )
    A = sparse.csr_array(
        (rng.standard_normal(n * k), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, d)
    )
    z = A @ rng.standard_normal(d) / np.sqrt(k) + 0.1 * rng.standard_normal(n)
    return A, np.exp(z - logsumexp(z))


def test_matrix_free_needs_no_square_array():
    d = 21_000
    A, b = sparse_problem(30_000, d, k=5)
    problem = problems.Softmax(A, b, loss="cross_entropy", ridge=1e-5)
    tracemalloc.start()
    result = minimize(problem, random_state=0, tol=1e-6)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.converged
    assert "matrix-free" in result.solver
    assert result.unidentified is None
    assert peak < 200e6 < 8 * d * d


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"hessian must be one of .*'sampled'"):
        Newton(hessian="approximate")
    with pytest.raises(ValueError, match=r"globalisation must be one of .*'none'"):
        Newton(globalisation="line_search")
    with pytest.raises(ValueError, match="step_size must be positive"):
        GradientDescent(step_size=-1.0)


# ---- the papers' algorithm ----


def theorem_instance(n=2_000, d=3):
    """Rescaled regression with the theorem's row penalty on the unit ball, and a Lipschitz bound there.

    With all rows and the unknown in unit balls |z| <= 1 there. The bound follows from D^3 L[h,k,k] =
    <v o p o q^2, Q u> + 2 <P(u o p o q), P(v o q)> + <P(u o q^2), P(v o p)>, where |p|_inf <= 1,
    |p|, |q| <= sigma, P = I - b 1^T.
    """
    rng = np.random.default_rng(0)
    A = rng.standard_normal((n, d)) * np.array([1.0, 0.3, 0.1])
    A /= np.linalg.norm(A, axis=1).max()
    b = rng.gamma(1.0, size=n)
    b /= b.sum()
    sigma = np.linalg.svd(A, compute_uv=False)
    u, norm_b = np.sqrt(n) * np.e, np.linalg.norm(b)
    R0 = u + n * np.e * norm_b
    w = np.sqrt(200.0 * R0**4 + 1.0 / sigma[-1] ** 2)
    Qu = np.e + n * np.e * b.max() + norm_b * u + norm_b**2 * n * np.e
    M = sigma[0] ** 2 * np.e * (Qu + 3.0 * (1.0 + norm_b * np.sqrt(n)) ** 2 * np.e)
    return problems.Rescaled(A, b, row_penalty=w), M


def test_sampled_newton_without_globalisation_contracts_as_the_corrected_lemma_says(
    monkeypatch, small_blocks
):
    problem, M = theorem_instance()
    answer = np.zeros(3)
    for _ in range(5):
        answer = answer - np.linalg.solve(problem.hessian(answer), problem.gradient(answer))
    H = problem.hessian(answer)
    lowest = np.linalg.eigvalsh(H)[0]
    points, models = [], []
    evaluate, hessian_at = problem.evaluate, problem.hessian_at

    def record_point(x, *args, **kwargs):
        if kwargs.get("sampler") is not None:
            points.append(x)
        return evaluate(x, *args, **kwargs)

    def record_model(at, sample=None, **kwargs):
        model = hessian_at(at, sample, **kwargs)
        if sample is not None:
            models.append((at.x, model))
        return model

    monkeypatch.setattr(problem, "evaluate", record_point)
    monkeypatch.setattr(problem, "hessian_at", record_model)
    x0 = answer + np.array([0.3, -0.4, 0.5])
    solver = Newton(hessian="sampled", globalisation="none", sample_rows=400)
    result = minimize(problem, x0, solver, tol=1e-9, random_state=0)
    assert result.converged
    assert len(points) >= 4
    errors = [np.sqrt((x - answer) @ H @ (x - answer)) for x in points]
    for (x, model), error, following in zip(models, errors, errors[1:], strict=False):
        root = np.linalg.cholesky(problem.hessian(x))
        spectrum = np.linalg.eigvalsh(np.linalg.solve(root, np.linalg.solve(root, model).T))
        eps = np.abs(spectrum - 1.0).max()
        theta = M * error / lowest**1.5
        assert theta <= 0.1
        factor = (eps + theta + eps * theta + theta / 2) / ((1 - eps) * (1 - theta))
        assert eps < 0.5
        assert factor < 1.0
        assert following <= factor * error * (1 + 1e-6) + 1e-12 * errors[0]


def test_no_globalisation_takes_every_step():
    inst, x = instance("Softmax", "squared", sizes=(20, 20), noise=0.1)
    result = minimize(inst.problem(), x, Newton(hessian="exact", globalisation="none"))
    assert result.converged
    assert all(record.accepted for record in result.history)


@pytest.mark.parametrize(
    ("family", "loss"), [("Softmax", "squared"), ("Softmax", "cross_entropy"), ("Exponential", "exp")]
)
def test_gradient_descent(family, loss):
    inst, _ = instance(family, loss, sizes=(9, 8, 7), noise=0.2)
    baseline = minimize(inst.problem(), solver=GradientDescent(), max_iter=20_000, tol=1e-6)
    assert baseline.converged
    newton = minimize(inst.problem())
    assert relative(baseline.x, newton.x) < 1e-3
    assert baseline.n_iter > newton.n_iter
    largest = np.linalg.eigvalsh(inst.problem().hessian(newton.x))[-1]
    fixed = minimize(
        inst.problem(), newton.x + 0.05, GradientDescent(step_size=0.5 / largest), max_iter=20_000, tol=1e-6
    )
    assert fixed.converged
    assert relative(fixed.x, newton.x) < 1e-3
    values = baseline.history.columns()["value"]
    assert (np.diff(values) <= 0).all()


def test_a_fixed_step_that_overflows_says_so():
    inst, _ = instance("Exponential", "exp")
    with pytest.warns(ConvergenceWarning, match="step_size"):
        result = minimize(inst.problem(), solver=GradientDescent(step_size=1e6))
    assert not result.converged
    assert np.isfinite(result.x).all()
    assert np.isfinite(result.value)


# ---- rank deficiency ----


def spans(directions, expected):
    expected = np.linalg.qr(np.asarray(expected, dtype=float).T)[0]
    assert directions.shape == expected.shape
    assert np.allclose(directions.T @ directions, np.eye(directions.shape[1]), atol=1e-10)
    assert np.allclose(expected @ (expected.T @ directions), directions, atol=1e-5)


@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array], ids=["dense", "csr"])
@pytest.mark.parametrize("loss", ["squared", "cross_entropy", "kl"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_duplicated_and_constant_columns(loss, storage, scale):
    """The minimum-norm answer, in the user's units, and the directions the data leave open."""
    inst, _ = instance("Softmax", loss, sizes=(9, 8, 7, 6), noise=0.2)
    A = np.column_stack([inst.A, scale * inst.A[:, 1], np.full(len(inst.b), 2.0)])
    reduced = minimize(inst.problem()).x
    result = minimize(inst.problem(A=storage(A)))
    null = [[0.0, scale, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]]
    assert result.converged
    spans(result.unidentified, null)
    assert np.allclose(np.array(null) @ result.x / scale, 0.0, atol=1e-6)
    expected = np.array(
        [reduced[0], reduced[1] / (1 + scale**2), reduced[2], scale * reduced[1] / (1 + scale**2), 0.0]
    )
    assert relative(result.x, expected) < 1e-5


def test_dummies_that_sum_to_a_constant():
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(12), 5)
    dummies = np.tile(np.eye(5), (12, 1))
    A = np.column_stack([dummies, rng.standard_normal(60)])
    b = softmax(A @ np.array([0.5, -0.2, 0.1, 0.0, 0.3, 1.0]) + 0.1 * rng.standard_normal(60), ids)
    result = minimize(problems.Softmax(A, b, ids))
    spans(result.unidentified, [[1, 1, 1, 1, 1, 0]])
    assert abs(result.x[:5].sum()) < 1e-6
    with_base = minimize(problems.Softmax(A[:, 1:], b, ids))
    assert with_base.unidentified.shape == (5, 0)
    assert np.allclose(result.x[1:5] - result.x[0], with_base.x[:4], atol=1e-5)


@pytest.mark.parametrize(
    "family, loss", [("Exponential", "exp"), ("Exponential", "sinh"), ("Rescaled", "exp")]
)
def test_rank_deficiency_without_a_softmax(family, loss):
    inst, _ = instance(family, loss, sizes=(20, 20), noise=0.2)
    A = np.column_stack([inst.A, inst.A.sum(axis=1)])
    result = minimize(inst.problem(A=A))
    null = np.array([[1.0, 1.0, 1.0, -1.0]])
    assert result.converged
    spans(result.unidentified, null)
    assert np.allclose(null @ result.x, 0.0, atol=1e-6)
    assert np.allclose(A @ result.x, inst.A @ minimize(inst.problem()).x, atol=1e-5)


def test_more_columns_than_rows():
    inst, _ = instance("Softmax", "squared", sizes=(6, 5), d=20, noise=0.2)
    result = minimize(inst.problem())
    assert result.converged
    # Two groups of 6 and 5 rows fix at most 5 + 4 directions.
    assert result.unidentified.shape == (20, 11)
    assert np.allclose(result.unidentified.T @ result.x, 0.0, atol=1e-6)
    assert np.allclose(inst.problem().predict(result.x), inst.b, atol=1e-5)


def test_a_ridge_identifies_everything():
    inst, _ = instance("Softmax", "squared", sizes=(9, 8, 7))
    A = np.column_stack([inst.A, inst.A[:, 0], np.ones(len(inst.b))])
    result = minimize(inst.problem(A=A, ridge=1e-3))
    assert result.converged
    assert result.unidentified.shape == (5, 0)
    assert np.isclose(result.x[0], result.x[3], atol=1e-6)


@pytest.mark.parametrize("hessian", ["exact", "sampled", "matrix_free"])
def test_rank_deficiency_with_every_strategy(hessian):
    inst, _ = instance("Softmax", "squared", sizes=[900, 300], noise=0.2)
    A = np.column_stack([inst.A, inst.A[:, 0], np.ones(len(inst.b))])
    result = minimize(inst.problem(A=A), solver=Newton(hessian=hessian, sample_rows=300), random_state=0)
    assert result.converged
    assert np.isclose(result.x[0], result.x[3], atol=1e-4)
    assert abs(result.x[4]) < 1e-4


# ---- degenerate answers ----


def test_uniform_targets_have_their_answer_at_zero():
    rng = np.random.default_rng(0)
    result = minimize(
        problems.Softmax(rng.standard_normal((30, 3)), np.full(30, 1 / 3), np.repeat(np.arange(10), 3))
    )
    assert result.converged
    assert np.allclose(result.x, 0.0, atol=1e-12)


def test_groups_of_one_row_leave_everything_open():
    result = minimize(problems.Softmax(np.eye(4)[:, :3], np.ones(4), np.arange(4), "cross_entropy"))
    assert result.converged
    assert np.array_equal(result.x, np.zeros(3))
    assert result.unidentified.shape == (3, 3)


def test_a_column_of_zeros():
    inst, _ = instance("Softmax", "squared", sizes=(9, 8, 7))
    A = np.insert(inst.A, 1, 0.0, axis=1)
    result = minimize(inst.problem(A=A))
    assert result.converged
    assert abs(result.x[1]) < 1e-12
    spans(result.unidentified, [[0.0, 1.0, 0.0, 0.0]])
    assert np.allclose(np.delete(result.x, 1), minimize(inst.problem()).x, atol=1e-6)


def test_cosh_leaves_its_saddle_at_zero():
    inst, _ = instance("Exponential", "cosh", sizes=(40,), noise=0.0, scale=1.0)
    result = minimize(inst.problem(), np.zeros(3), random_state=0)
    assert result.value < inst.problem().value(np.zeros(3)) or result.status != "converged"
    assert minimize(inst.problem(), random_state=0).value < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_entropy_is_not_stuck_at_uniform_outputs(seed):
    inst, _ = instance("Softmax", "entropy", sizes=(5, 6, 7), seed=seed)
    problem = inst.problem(ridge=0.3)
    result = minimize(problem, random_state=0)
    assert result.converged
    assert result.value < problem.value(np.zeros(3)) - 1e-3


# ---- several minima ----


def two_minima():
    """Two groups of four that pull one unknown to different places."""
    rng = np.random.default_rng(230)
    A, b, ids = 3.0 * rng.standard_normal((8, 1)), rng.gamma(0.2, size=8), np.repeat([0, 1], 4)
    return problems.Softmax(A, b / np.bincount(ids, weights=b)[ids], ids)


def test_every_local_value_is_reported_and_the_best_returned():
    problem = two_minima()
    grid = np.linspace(-8.0, 8.0, 1601)
    values = np.array([problem.value([x]) for x in grid])
    lows = np.flatnonzero((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])) + 1
    assert len(lows) == 2
    result = minimize(problem)
    assert set(result.local_values) == {"convex", "zero"}
    assert np.allclose(sorted(result.local_values.values()), sorted(values[lows]), atol=1e-5)
    assert result.value == min(result.local_values.values())
    for low in lows:
        assert np.isclose(minimize(problem, [grid[low]]).value, values[low], atol=1e-5)
        assert set(minimize(problem, [grid[low]]).local_values) == {"x0"}


# ---- reports ----


def test_result_and_history():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    problem = inst.problem()
    result = minimize(problem)
    columns = result.history.columns()
    assert set(columns) == {
        "phase", "iteration", "value", "gradient_norm", "step_norm", "radius", "accepted", "n_passes",
        "seconds_model", "seconds_step", "seconds_evaluate",
    }  # fmt: skip
    assert {len(column) for column in columns.values()} == {len(result.history)}
    assert (np.diff(columns["n_passes"]) >= 0).all()
    assert columns["n_passes"][-1] <= result.n_passes
    assert result.history[-1].value in columns["value"]
    assert result.problem is problem
    assert result.x.shape == problem.shape
    assert result.seconds > 0
    assert result.gradient_norm <= 1e-8
    assert "Newton" in result.solver
    assert result.message
    table = str(result.history)
    assert len(table.splitlines()) == len(result.history) + 1
    assert "rel.grad" in table


@pytest.mark.parametrize("hessian", ["auto", "sampled", "matrix_free"])
def test_the_same_seed_gives_the_same_fit(hessian):
    inst, _ = instance("Softmax", "squared", sizes=[25_000, 4_000], d=5, noise=0.2)
    first, second = (
        minimize(inst.problem(), solver=Newton(hessian=hessian), random_state=7) for _ in range(2)
    )
    assert np.array_equal(first.x, second.x)
    assert first.history.columns()["value"] == second.history.columns()["value"]
    generator = minimize(
        inst.problem(), solver=Newton(hessian=hessian), random_state=np.random.default_rng(7)
    )
    assert np.array_equal(first.x, generator.x)


def test_x0_of_any_kind_and_the_answer_as_start():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    first = minimize(inst.problem())
    again = minimize(inst.problem(), list(first.x))
    assert again.converged
    assert again.n_iter <= 1
    assert np.allclose(again.x, first.x, atol=1e-8)


def test_too_few_iterations_warn_and_return_the_best_point():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    with pytest.warns(ConvergenceWarning, match="max_iter"):
        result = minimize(inst.problem(), np.full(3, 3.0), max_iter=3)
    assert result.n_iter == 3
    assert result.status == "max_iter"
    assert not result.converged
    assert result.value < inst.problem().value(np.full(3, 3.0))


def test_a_tolerance_beyond_float64_says_so():
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), noise=0.2)
    with pytest.warns(ConvergenceWarning):
        result = minimize(inst.problem(), tol=1e-25)
    assert result.status in ("precision", "max_iter")
    assert result.gradient_norm < 1e-10


@pytest.mark.parametrize("arguments", [{"tol": 0.0}, {"tol": np.nan}, {"max_iter": -1}])
def test_bad_settings_are_named(arguments):
    inst, _ = instance("Softmax", "squared")
    with pytest.raises(ValueError, match=next(iter(arguments))):
        minimize(inst.problem(), **arguments)


# ---- interruption ----


def hard():
    """A problem of many steps, and a start."""
    inst, _ = instance("Softmax", "squared", sizes=(20, 20), d=4, noise=0.3)
    return inst.problem(), np.full(4, 4.0)


def best_recorded(result):
    return min(r.value for r in result.history if r.accepted and r.phase.startswith("fit"))


def interrupting(after, how):
    seen = []

    def callback(record):
        seen.append(record)
        if len(seen) == after:
            if how == "interrupt":
                raise KeyboardInterrupt
            return True
        return False

    return callback, seen


@pytest.mark.parametrize("how", ["interrupt", "return"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_fit_returns_its_best_point(how, after):
    problem, x0 = hard()
    assert len(minimize(problem, x0).history) > 4
    callback, seen = interrupting(after, how)
    result = minimize(problem, x0, callback=callback)
    assert result.status == "interrupted"
    assert not result.converged
    assert len(seen) == after == len(result.history)
    assert result.value == best_recorded(result)
    assert result.value == problem.value(result.x)


@pytest.mark.parametrize("how", ["interrupt", "return"])
@pytest.mark.parametrize("n", [40, 30_000])
def test_an_interruption_while_the_start_is_sought_ends_the_fit(how, n):
    inst, _ = instance("Softmax", "squared", sizes=(n,), noise=0.3)
    callback, seen = interrupting(1, how)
    result = minimize(inst.problem(), callback=callback, random_state=0)
    assert result.status == "interrupted"
    assert len(seen) == 1
    assert np.isfinite(result.x).all()
    assert np.isclose(result.value, inst.problem().value(result.x))


@pytest.mark.parametrize("how", ["interrupt", "return"])
def test_gradient_descent_can_be_interrupted(how):
    problem, x0 = hard()
    callback, seen = interrupting(3, how)
    result = minimize(problem, x0, GradientDescent(), callback=callback)
    assert result.status == "interrupted"
    assert len(seen) == 3
    assert result.value == best_recorded(result)


def test_a_callback_sees_every_record():
    problem, x0 = hard()
    seen = []
    result = minimize(problem, x0, callback=seen.append)
    assert seen == list(result.history)


def test_errors_in_a_callback_are_not_swallowed():
    problem, x0 = hard()

    def broken(record):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        minimize(problem, x0, callback=broken)


def test_every_softmax_loss_is_covered():
    assert len(SOFTMAX) == 5
