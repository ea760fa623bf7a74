"""Balls around inverted inputs: the truth lies inside, the constants hold."""

import numpy as np
import pytest
from layer_reference import layer, planted

from attnfit import inversion, minimize, problems
from attnfit.certificates import certify
from attnfit.certificates.layers import InverseBall


@pytest.mark.parametrize("setting", ["self-dominant", "two outputs", "half known"])
def test_the_planted_input_lies_in_the_ball(setting):
    problem, X = planted(setting, n=8, d=4, scale=1.0, seed=0)
    result = minimize(problem, random_state=0)
    proof = result.certificate()
    assert proof.valid, proof.reason
    assert np.linalg.norm(result.x - X[:, problem.unknown]) <= proof.radius < 1e-5


def test_a_point_nearby_is_certified_with_a_larger_ball():
    problem, X = planted("self-dominant", n=6, d=3, scale=1.0, seed=1)
    rng = np.random.default_rng(0)
    near = X + 1e-7 * rng.standard_normal(X.shape)
    proof = inversion.recover(problem, n_starts=1, max_iter=1000, random_state=0).certificate
    further = certify(problem, near)
    assert further.valid
    assert further.radius >= np.linalg.norm(near - X)
    assert proof.radius < further.radius
    assert not certify(problem, X + 0.3 * rng.standard_normal(X.shape)).valid


@pytest.mark.parametrize(
    "options", [{}, {"mask": "causal", "heads": 2}, {"n_known": 2, "bias": True, "gamma": 0.1}]
)
@pytest.mark.parametrize("radius", [1e-6, 1e-3])
def test_lipschitz_constant_bounds_what_is_observed(options, radius):
    reference, x = layer(n=4, d=3, **options)
    problem = reference.problem()
    rng = np.random.default_rng(0)
    whitener = 0.3 * rng.standard_normal((len(x), len(x)))
    ball = InverseBall(problem, problem.evaluate(x), whitener)
    constant = ball.lipschitz(radius)
    observed = 0.0
    for _ in range(20):
        centre = rng.standard_normal(len(x))
        centre *= radius * rng.random() / np.linalg.norm(centre)
        u = rng.standard_normal(len(x))
        for _ in range(6):
            u /= np.linalg.norm(u)
            step = 1e-5 * u
            ends = [problem.hessian(x + whitener @ (centre + s * step)) for s in (1, -1)]
            rate = whitener.T @ (ends[0] - ends[1]) @ whitener / 2e-5
            values, vectors = np.linalg.eigh(rate)
            u = vectors[:, np.argmax(np.abs(values))]
        observed = max(observed, np.abs(values).max())
    assert observed <= constant
    assert np.isfinite(constant)


def test_rounding_is_bounded():
    problem, X = planted("two outputs", n=6, d=3, scale=1.0, seed=0)
    at = problem.evaluate(X.reshape(-1))
    whitener = np.linalg.inv(np.linalg.cholesky(problem.hessian_at(at))).T
    measured = np.linalg.norm(whitener.T @ at.gradient)
    assert measured <= InverseBall(problem, at, whitener).rounding() < 1e-9


def test_large_problems_refuse_with_the_reason(monkeypatch):
    problem, _ = planted("self-dominant", n=6, d=3, scale=1.0, seed=0)
    monkeypatch.setattr("attnfit.certificates.layers.MAX_DENSE", 10)
    proof = inversion.recover(problem, random_state=0).certificate
    assert not proof.valid
    assert "18 unknowns" in proof.reason


def test_recovery_carries_the_ball():
    problem, X = planted("half known", n=8, d=4, scale=1.0, seed=0)
    found = inversion.recover(problem, random_state=0)
    assert found.certificate.valid
    assert np.linalg.norm(found.x - X[:, problem.unknown]) <= found.certificate.radius


def test_saturated_attention_is_not_certified_as_if_it_were_regular():
    rng = np.random.default_rng(0)
    X = 30.0 * rng.standard_normal((3, 5))
    W, V = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
    blank = problems.LayerInversion(W, V, np.zeros((5, 3)))
    found = inversion.recover(blank, blank.output(X), n_starts=2, max_iter=20, random_state=0)
    assert found.verdict != "recovered"
