"""What the solvers find and what it costs: known answers, reads, strategies, the papers' algorithm."""

import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.optimize
from instances import ALL_LOSSES, COUPLED, instance, relative, softmax
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
    with pytest.warns(ConvergenceWarning, match="no curvature in float64"):
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


@pytest.mark.parametrize("loss", ["cross_entropy", "grouped", "squared", "exponential"])
def test_matrix_free_needs_no_square_array(loss):
    d = 21_000 if loss == "cross_entropy" else 9_000
    A, b = sparse_problem(30_000, d, k=5)
    convex = {"ridge": 1e-5, "loss": "cross_entropy"}
    problem = {
        "cross_entropy": lambda: problems.Softmax(A, b, **convex),
        "grouped": lambda: problems.Softmax(A, b, groups=np.arange(30_000) // 10, **convex),
        "squared": lambda: problems.Softmax(A, b, loss="squared", ridge=1e-9),
        "exponential": lambda: problems.Exponential(A, b * 30_000, ridge=1e-2),
    }[loss]()
    steps = 100 if problem.convex else 2
    tracemalloc.start()
    with nullcontext() if problem.convex else pytest.warns(ConvergenceWarning):
        result = minimize(problem, random_state=0, tol=1e-6, max_iter=steps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.converged or not problem.convex
    assert "matrix-free" in result.solver
    assert result.unidentified is None
    assert peak < 200e6 < 8 * d * d


def test_with_too_many_unknowns_for_the_programme_nothing_separable_is_called_converged():
    # Each column against nothing; the outcomes of the first one are all zero.
    d = 4_000
    rows = sparse.csr_array((np.ones(d), (2 * np.arange(d), np.arange(d))), shape=(2 * d, d))
    b = np.tile([1.0, 2.0], d)
    b[0] = 0.0
    problem = problems.Softmax(rows, b, groups=np.arange(2 * d) // 2, loss="cross_entropy")
    with pytest.warns(ConvergenceWarning, match="add ridge|raise max_iter"):
        result = minimize(problem, random_state=0)
    assert not result.converged
    assert result.x[1:] == pytest.approx(-np.log(2.0), abs=1e-3)


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
