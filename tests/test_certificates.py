"""Balls contain the answer, constants bound the third derivative, refusals give their reason."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
from instances import ALL_LOSSES, instance

from attnfit import certificates, minimize, problems
from attnfit.certificates.certification import RowBall
from attnfit.certificates.lipschitz import lipschitz_constant

SCALES = np.array([1.0, 0.1, 0.01, 1.0])


def well_posed(family, loss, seed, sizes=(20, 15, 9)):
    """Return a problem with columns of very different scale and a minimum, and that minimum."""
    inst, _ = instance(family, loss, sizes=sizes, d=4, noise=0.1, seed=seed)
    ridge = {"entropy": 0.3, "linear_cross_entropy": 0.3}.get(loss, 0.0)
    penalty = 0.5 if family == "Rescaled" else 0.0
    problem = inst.problem(A=inst.A * SCALES, ridge=ridge, row_penalty=penalty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem, minimize(problem, tol=1e-13)


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("sizes", [(20, 15, 9), (40,)])
def test_balls_contain_the_answer(family, loss, sizes):
    rng = np.random.default_rng(3)
    certified = 0
    for seed in range(4):
        problem, result = well_posed(family, loss, seed, sizes)
        for distance in (1e-6, 1e-4, 1e-3, 1e-2):
            x = result.x + distance * rng.standard_normal(4) / SCALES
            proof = certificates.certify(problem, x)
            if not proof.valid:
                assert proof.reason
                continue
            certified += 1
            error = result.x - x
            scaled = np.sqrt(max(error @ problem.hessian(x) @ error, 0.0))
            assert np.linalg.norm(error) <= proof.radius * (1 + 1e-6)
            assert scaled <= proof.scaled_radius * (1 + 1e-6)
            assert problem.value(x) - result.value <= proof.value_gap * (1 + 1e-6) + 1e-13
    assert certified >= 8


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("radius", [1e-6, 0.05])
def test_constants_bound_the_change_of_the_hessian(family, loss, radius):
    """In the whitened variables, between random pairs of points of the ball."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for seed in range(3):
        problem, result = well_posed(family, loss, seed)
        values, vectors = np.linalg.eigh(problem.hessian(result.x))
        assert values[0] > 0
        whitener = vectors / np.sqrt(values)
        constant = lipschitz_constant(problem, problem.evaluate(result.x), whitener, radius)
        for _ in range(10):
            ends = rng.standard_normal((2, 4))
            ends *= radius * rng.random((2, 1)) / np.linalg.norm(ends, axis=1, keepdims=True)
            change = problem.hessian(result.x + whitener @ ends[0])
            change = change - problem.hessian(result.x + whitener @ ends[1])
            ratio = np.linalg.norm(whitener.T @ change @ whitener, 2) / np.linalg.norm(ends[0] - ends[1])
            worst = max(worst, ratio / constant)
    assert worst <= 1.0 + 1e-4
    # A constant a thousand times too large would certify nothing: it has to be of the right size.
    assert worst > 1e-3


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("sizes", [(20, 15, 9), (400, 7)])
@pytest.mark.parametrize("wide", [1, 1 << 30])
def test_traces_bound_eigenvalues_from_one_read(monkeypatch, family, loss, sizes, wide):
    """A cheap constant is one, at most d times the other, and the rounding beside it the same; whether or not
    what is known of rows is kept between reads.
    """
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 8192)
    monkeypatch.setattr("attnfit.data.matrix.DENSE_ENTRIES", 1)
    monkeypatch.setattr("attnfit.certificates.lipschitz.WIDE", wide)
    inst, x = instance(family, loss, sizes=sizes, d=4, noise=0.1)
    problem = inst.problem(ridge=0.3)
    at, T = problem.evaluate(x), np.diag([0.5, 1.0, 2.0, 0.1])
    ball = RowBall(problem, at, T)
    rounding, cheap = ball.glance(0.05)
    constant = ball.lipschitz(0.05)
    assert np.isclose(rounding, ball.rounding(), rtol=1e-12, atol=0.0)
    assert constant * (1 - 1e-12) <= cheap
    if np.isfinite(cheap):
        assert cheap <= 4.0 * constant * (1 + 1e-12)
    else:
        assert family == "Rescaled"


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-12])
def test_a_cheap_constant_hardly_makes_a_radius_longer(monkeypatch, family, loss, tol):
    """Far from the answer eigenvalues decide, near it half a percent at most is lost."""
    problem = instance(family, loss, sizes=(20, 15, 9), d=4, noise=0.1)[0].problem(ridge=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = minimize(problem, tol=tol, random_state=0).x
    proof = certificates.certify(problem, x)
    monkeypatch.setattr("attnfit.certificates.kantorovich.NEAR", -1.0)
    exact = certificates.certify(problem, x)
    assert exact.valid == proof.valid
    if exact.valid:
        assert exact.radius <= proof.radius * (1 + 1e-12)
        assert proof.radius <= 1.006 * exact.radius
        assert exact.lipschitz <= proof.lipschitz * (1 + 1e-12)


def test_the_ball_is_small_at_the_answer():
    _, result = well_posed("Softmax", "cross_entropy", 0)
    proof = result.certificate()
    assert proof.valid
    assert proof.radius < 1e-7
    assert proof.n_unidentified == 0


def test_a_saddle_is_refused():
    A = np.random.default_rng(0).standard_normal((30, 2))
    proof = certificates.certify(problems.Exponential(A, np.full(30, 5.0), "cosh"), np.zeros(2))
    assert not proof.valid
    assert "not a minimum" in proof.reason
    assert proof.radius == np.inf


def test_far_away_is_refused_with_the_remedy():
    problem, result = well_posed("Softmax", "cross_entropy", 1)
    proof = certificates.certify(problem, result.x + 2.0)
    assert not proof.valid
    assert "M eta" in proof.reason
    assert "tol" in proof.reason


@pytest.mark.parametrize("column", [1.0, 7.0])
def test_nothing_is_certified_of_x_while_directions_are_open(column):
    inst, _ = instance("Softmax", "squared", sizes=(20, 15, 9), d=3, noise=0.1)
    A = np.column_stack([inst.A, inst.A[:, 0], np.full(len(inst.A), column)])
    result = minimize(inst.problem(A=A))
    proof = result.certificate()
    assert not proof.valid
    assert proof.radius == np.inf
    assert proof.n_unidentified == 2
    assert "2 directions are open" in proof.reason
    assert "column 0, column 3, column 4" in proof.reason


def test_nothing_identified():
    proof = certificates.certify(problems.Softmax(np.zeros((4, 2)), np.full(4, 0.25)), np.zeros(2))
    assert not proof.valid
    assert "no curvature" in proof.reason


def test_long_groups_give_the_same_certificate(monkeypatch):
    inst, _ = instance("Softmax", "squared", sizes=(300, 7), d=3, noise=0.1)
    x = minimize(inst.problem()).x + 1e-4
    whole = certificates.certify(inst.problem(), x)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1)
    pieces = inst.problem()
    assert len(pieces.rows.long_groups) == 1
    split = certificates.certify(pieces, x)
    assert np.isclose(split.radius, whole.radius, rtol=1e-6)
    assert np.isclose(split.lipschitz, whole.lipschitz, rtol=1e-6)


@pytest.mark.parametrize(("family", "loss"), [("Softmax", "squared"), ("Rescaled", "exp")])
def test_good_start(family, loss):
    problem, result = well_posed(family, loss, 0)
    near = certificates.good_start(problem, result.x + 1e-8, result.x)
    far = certificates.good_start(problem, result.x + 3.0 / SCALES, result.x)
    assert near.scaled
    assert near.local
    assert not near.printed
    assert not far.scaled
    assert near.log10_printed_constant > 100
    assert near.lambda_min > 0
    assert "affine-scaled" in str(near)
    assert str(near).count("holds") == 2


def exact_answer(A, b, x):
    """The minimiser of ``0.5 sum (exp(a.x) - b)^2`` near x, and the Hessian there, to 40 digits."""
    at = mpmath.matrix(x.tolist())
    rows = mpmath.matrix(A.tolist())
    d = A.shape[1]
    for _ in range(6):
        z = rows * at
        gradient, hessian = mpmath.zeros(d, 1), mpmath.zeros(d, d)
        for i in range(len(b)):
            u = mpmath.exp(z[i])
            s = (u - mpmath.mpf(float(b[i]))) * u
            for j in range(d):
                gradient[j] += s * rows[i, j]
                for k in range(d):
                    hessian[j, k] += (u * u + s) * rows[i, j] * rows[i, k]
        at = at - mpmath.lu_solve(hessian, gradient)
    return at, hessian


@pytest.mark.parametrize("seed", range(3))
def test_logits_that_cancel_are_known_less_well(seed):
    """Terms of 1e5 add up to logits of one: rounding is that of the terms."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(1, 2, 40), rng.standard_normal(40)
    A, x0 = np.column_stack([u, u + v / 1e5]), np.array([-0.5e5, 0.5e5])
    b = np.exp(A @ x0) + 0.01 * rng.standard_normal(40)
    problem = problems.Exponential(A, b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = minimize(problem, x0=1.001 * x0, tol=1e-14).x
    hessian = problem.hessian(x)
    with mpmath.workdps(40):
        answer, curvature = exact_answer(A, b, x)
        for _ in range(10):
            proof = certificates.certify(problem, x)
            error = mpmath.matrix(x.tolist()) - answer
            assert proof.valid
            assert mpmath.norm(error) <= proof.radius
            assert mpmath.sqrt((error.T * curvature * error)[0]) <= proof.scaled_radius
            x = x - np.linalg.solve(hessian, problem.gradient(x)) * rng.uniform(0.9, 1.1)


def test_what_overflows_is_refused():
    steep = np.array([[1000.0, 0.0], [1000.0, 1.0]])
    proof = certificates.certify(problems.Exponential(steep, np.ones(2)), np.array([0.35, 0.0]))
    assert "the Hessian overflows" in proof.reason
    rng = np.random.default_rng(10)
    for scale in (1.0, 10.0, 100.0):
        far = problems.Rescaled(5.0 * rng.standard_normal((30, 3)), rng.dirichlet(np.ones(30)), "cosh")
        assert not certificates.certify(far, scale * rng.standard_normal(3)).valid
    with pytest.raises(ValueError, match="x_ref: the loss overflows there"):
        certificates.good_start(problems.Exponential(np.array([[1.0], [0.5]]), np.ones(2)), [0.0], [800.0])


def test_the_curvature_of_a_saddle_is_in_the_units_of_the_user():
    A = 0.01 * np.random.default_rng(0).standard_normal((30, 2))
    problem = problems.Exponential(A, np.full(30, 5.0), "cosh")
    proof = certificates.certify(problem, np.zeros(2))
    assert np.isclose(proof.lambda_min, np.linalg.eigvalsh(problem.hessian(np.zeros(2)))[0])


@pytest.mark.parametrize(("family", "loss"), ALL_LOSSES)
@pytest.mark.parametrize(("sizes", "most"), [((20, 15, 9), 2), ((3000, 7), 7)])
def test_a_certificate_takes_a_handful_of_reads(monkeypatch, family, loss, sizes, most):
    # Two balls are looked at where no trace bounds an eigenvalue.
    most += family == "Rescaled"
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 8192)
    problem = instance(family, loss, sizes=sizes, d=4, noise=0.1)[0].problem(ridge=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = minimize(problem, random_state=0).x
    before = problem.n_passes
    proof = certificates.certify(problem, x)
    assert proof.valid or "M eta" in proof.reason
    assert problem.n_passes - before <= most + 0.1
