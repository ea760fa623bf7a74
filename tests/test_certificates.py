"""Balls contain the answer, constants bound the third derivative, refusals give their reason."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from instances import ALL_LOSSES, instance

from attnfit import certificates, minimize, problems
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
def test_unidentified_directions_are_left_out_of_the_statement(column):
    inst, _ = instance("Softmax", "squared", sizes=(20, 15, 9), d=3, noise=0.1)
    A = np.column_stack([inst.A, inst.A[:, 0], np.full(len(inst.A), column)])
    result = minimize(inst.problem(A=A))
    proof = result.certificate()
    assert proof.valid
    assert proof.n_unidentified == 2
    assert "2 are not" in proof.reason


def test_nothing_identified():
    proof = certificates.certify(problems.Softmax(np.zeros((4, 2)), np.full(4, 0.25)), np.zeros(2))
    assert not proof.valid
    assert "no curvature" in proof.reason


def test_long_groups_give_the_same_certificate(monkeypatch):
    inst, _ = instance("Softmax", "squared", sizes=(300, 7), d=3, noise=0.1)
    x = minimize(inst.problem()).x + 1e-4
    whole = certificates.certify(inst.problem(), x)
    monkeypatch.setattr("attnfit.designs.dense.BLOCK_BYTES", 1)
    pieces = inst.problem()
    assert len(pieces.long_groups) == 1
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
