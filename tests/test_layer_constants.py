"""The constants of layers: autodiff never exceeds them, and no coefficient can be dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from layer_reference import layer
from layered_instances import ACTIVATIONS, LayeredInstance
from test_certificate_constants import derivatives, third_along

from attnfit import certificates, problems
from attnfit.certificates.layers import InverseBall, LayerBall


def two_layer(A1, A2, b, activation="tanh", **options):
    """A problem of one right-hand side, its objective and the ball around a point in the user's variables."""
    inst = LayeredInstance(
        "TwoLayer", (np.array(A1, float), np.array(A2, float)), np.array(b, float), activation
    )
    inst.options.update(options)
    problem = inst.problem()

    def ball(x, T=None):
        T = np.eye(len(x)) if T is None else T
        return LayerBall(problem, problem.evaluate(np.array(x, float)), T)

    return inst.objective, ball


def scalar(outer, b, activation="tanh", x=0.0, **options):
    """Two outputs and one unknown that moves them against each other; third derivative and constant at x."""
    objective, ball = two_layer([[0.5], [-0.5]], [outer], [b], activation, **options)
    third = abs(third_along(objective, np.array([x]), np.ones(1)))
    return third, ball([x]).lipschitz(0.0)


def test_the_jerk_of_the_activation_counts_in_full():
    """Far from the target, where h' is steepest: |c| L3 |K|^3, within a tenth."""
    third, constant = scalar([100.0, -100.0], 3000.0)
    assert 0.9 * constant <= third <= constant


def test_slope_times_curvature_of_the_activation_counts():
    """At the target, where h' h'' is largest: 3 L1 L2 |K|^3 is at most a third too large."""
    y = np.arctanh(np.sqrt(0.2))
    outer = np.array([100.0, -100.0]) + y
    third, constant = scalar(outer, np.tanh(y))
    assert 0.65 * constant <= third <= constant


def test_weights_count_once():
    for w in (0.01, 1.0, 100.0):
        third, constant = scalar([100.0, -100.0], 3000.0, weights=np.array([w]))
        assert 0.9 * constant <= third <= constant


def test_the_bend_of_the_softmax_counts():
    """A linear layer at its target: all there is is 3 K . D^2 y."""
    third, constant = scalar([1.0, -1.0], np.tanh(0.4), "identity", x=0.8)
    assert 0.1 < third <= constant < 10 * third


def test_the_third_derivative_of_the_softmax_counts():
    """A linear layer whose output does not move at first, far from its target."""
    A1 = np.array([[1.0], [0.2], [-1.3], [0.4]])
    f = np.full(4, 0.25)
    c = A1[:, 0] - f @ A1[:, 0]
    v = f @ c**2
    # The first two derivatives of the outputs at zero, and what centring makes of a constant, are not seen.
    seen = np.stack([f * c, f * (c**2 - v), np.ones(4)])
    outer = np.linalg.svd(seen)[2][-1]
    for weight in (1.0, 9.0):
        objective, ball = two_layer(A1, [outer], [-1e6], "identity", weights=np.array([weight]))
        third = abs(third_along(objective, np.zeros(1), np.ones(1)))
        assert 0.01 * ball([0.0]).lipschitz(0.0) < third <= ball([0.0]).lipschitz(0.0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("radius", [1e-4, 0.3])
def test_no_third_derivative_on_the_ball_exceeds_the_constant(activation, radius):
    rng = np.random.default_rng(1)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        n, m, d = int(rng.integers(2, 6)), int(rng.integers(1, 4)), 2
        A1, A2 = 2.0 * rng.standard_normal((n, d)), 3.0 ** (seed - 1) * rng.standard_normal((m, n))
        w = rng.uniform(0.1, 3.0, m)
        objective, ball = two_layer(A1, A2, rng.standard_normal(m), activation, weights=w, ridge=0.1)
        x, T = rng.standard_normal(d), 0.5 * rng.standard_normal((d, d))
        constant = ball(x, T).lipschitz(radius)
        for y in rng.standard_normal((6, d)):
            point = x + radius * T @ y / np.linalg.norm(y)
            for u in rng.standard_normal((6, d)):
                assert abs(third_along(objective, point, T @ u / np.linalg.norm(u))) <= constant * (1 + 1e-9)


def softmax_derivatives(rows, v):
    """First three derivatives of the softmax of ``t C v`` at outputs f, by autodiff."""
    logits = as_tensor(rows)
    parts = []
    for i in range(len(rows)):
        found = derivatives(lambda t, i=i: torch.softmax(logits + t * as_tensor(v), 0)[i], 0.0, 3)
        parts.append([float(value) for value in found[1:]])
    return np.linalg.norm(np.array(parts), axis=0)


def test_the_derivatives_of_a_softmax_are_bounded():
    """s1, s2, s3 for any outputs, and for outputs none of which is large."""
    rng = np.random.default_rng(0)
    reached = np.zeros(3)
    for _ in range(300):
        n = int(rng.integers(2, 8))
        logits, v = rng.uniform(0, 4) * rng.standard_normal(n), rng.standard_normal(n)
        f = np.exp(logits - logits.max())
        f /= f.sum()
        rho = np.linalg.norm(v - f @ v)
        top = f.max()
        sizes = softmax_derivatives(logits, v) / rho ** np.arange(1, 4)
        own = [
            min(0.5, top),
            min(np.sqrt(0.5), 2.0 * top),
            min(2.5, np.sqrt(2.0) * top + 3.0 * top**2 + np.sqrt(2.0) * top**1.5),
        ]
        assert (sizes <= own).all()
        reached = np.maximum(reached, sizes / own)
    even = softmax_derivatives(np.zeros(2), np.array([1.0, -1.0]))[0] / np.sqrt(2.0)
    assert np.isclose(even, 0.5)
    assert reached[0] > 0.9


def parts_of(A1, A2, b, w, x, u, activation):
    """The three parts of ``D^3 L[u, u, u]`` at x by the chain rule, the derivatives of the outputs and the
    residuals.
    """
    outputs = [
        derivatives(
            lambda t, k=k: (as_tensor(A2) @ torch.softmax(as_tensor(A1) @ (as_tensor(x) + t * as_tensor(u)),
            0))[k], 0.0, 3,
        )
        for k in range(len(b))
    ]  # fmt: skip
    y, K, bend, jerk = np.array(outputs, dtype=float).T
    h, d1, d2, d3 = derivatives(ACTIVATIONS[activation], y, 3)
    c = h - b
    third = np.sum(w * (3.0 * d1 * d2 + c * d3) * K**3)
    second = np.sum(w * 3.0 * (d1**2 + c * d2) * K * bend)
    first = np.sum(w * d1 * c * jerk)
    return (third, second, first), K, c


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("spread", [1.0, 5.0])
@pytest.mark.parametrize("radius", [0.0, 0.01, 0.3, 3.0])
def test_the_third_derivative_is_the_sum_of_three_parts(activation, spread, radius):
    """The coefficients of the constant are those of the chain rule, and its factors bound their parts, at the
    centre and at the rim of a ball, where the derivative of the outputs and the residuals have moved by no
    more than their own derivatives.
    """
    rng = np.random.default_rng(0)
    A1, A2, b = spread * rng.standard_normal((5, 2)), rng.standard_normal((3, 5)), rng.standard_normal(3)
    w, x, u = rng.uniform(0.5, 2.0, 3), rng.standard_normal(2), rng.standard_normal(2)
    u /= np.linalg.norm(u)
    objective, ball = two_layer(A1, A2, b, activation, weights=w)
    found, _, c = parts_of(A1, A2, b, w, x, u, activation)
    assert np.isclose(sum(found), third_along(objective, x, u))
    f = np.exp(A1 @ x)
    f /= f.sum()
    rows = A1 - f @ A1
    # Outputs none of which is large, and one that is.
    assert (f.max() > 0.6) == (spread > 1.0)
    rho, top = np.linalg.norm(rows, 2), f.max() * np.exp(2.0 * radius * np.linalg.norm(rows, axis=1).max())
    top = min(top, 1.0)
    s1, s2 = min(0.5, top), min(np.sqrt(0.5), 2.0 * top)
    s3 = min(2.5, np.sqrt(2.0) * top + 3.0 * top**2 + np.sqrt(2.0) * top**1.5)
    A_w, longest = np.linalg.norm(np.sqrt(w)[:, None] * A2, 2), np.linalg.norm(A2, axis=1).max()
    J, bend = A2 @ (f[:, None] * rows), s2 * rho**2 * radius
    row = min(np.linalg.norm(J, axis=1).max() + longest * bend, longest * s1 * rho)
    norm = min(np.linalg.norm(np.sqrt(w)[:, None] * J, 2) + A_w * bend, A_w * s1 * rho)
    known = {
        "tanh": (1.0, 4.0 / (3.0 * np.sqrt(3.0)), 2.0),
        "sigmoid": (0.25, 1.0 / (6.0 * np.sqrt(3.0)), 0.125),
    }
    L1, L2, L3 = known[activation]
    largest = np.abs(c).max() + L1 * row * radius
    length = np.linalg.norm(np.sqrt(w) * c) + L1 * norm * radius
    bounds = [
        (3.0 * L1 * L2 + largest * L3) * row * norm**2,
        3.0 * (L1**2 + largest * L2) * norm * s2 * rho**2 * A_w,
        L1 * s3 * rho**3 * A_w * length,
    ]
    for angle in np.linspace(0.0, 6.0, 7):
        point = x + radius * np.array([np.cos(angle), np.sin(angle)])
        parts, K, c = parts_of(A1, A2, b, w, point, u, activation)
        assert (np.abs(parts) <= bounds).all()
        sizes = np.abs(K).max(), np.sqrt(w @ K**2), np.abs(c).max(), np.sqrt(w @ c**2)
        assert (np.array(sizes) <= np.array([row, norm, largest, length]) * (1 + 1e-12)).all()
    assert np.isclose(ball(x).lipschitz(radius), sum(bounds), rtol=1e-10)


def test_outputs_that_are_the_targets_have_no_last_matrix():
    """One of ones on the diagonal is the same layer."""
    rng = np.random.default_rng(0)
    A1, A2, b, x = (rng.standard_normal(shape) for shape in ((4, 2), (5, 4), 5, 2))
    w, T = rng.uniform(0.5, 2.0, 5), 0.3 * rng.standard_normal((2, 2))
    w[1] = 4.0
    without = problems.ReluSoftmax(A1, A2, b, weights=w)
    within = problems.ThreeLayer(A1, A2, np.eye(5), b, "identity", weights=w)
    one, other = (LayerBall(problem, problem.evaluate(x), T) for problem in (without, within))
    for radius in (0.0, 0.01, 1.0):
        assert np.isclose(one.lipschitz(radius), other.lipschitz(radius), rtol=1e-12)
    assert np.isclose(one.rounding(), other.rounding(), rtol=1e-12, atol=0.0)


def test_what_a_softmax_sees_of_a_direction():
    """The largest change of a logit less that of the first, relative to its terms; unknown where more than
    the softmax sees it.
    """
    ball = two_layer([[1.0, -1.0], [3.0, 1.0], [0.0, 0.0]], np.eye(3), np.zeros(3))[1]([0.1, 0.2])
    v = np.array([[1.0, 2.0], [0.5, 2.0]])
    assert np.isclose(ball.seen(v[:, :1]), 1.0)
    assert np.isclose(ball.seen(v[:, 1:]), 1.0)
    assert np.isclose(ball.seen(np.array([[1.0], [-2.0]])), 1.0)
    assert np.isclose(ball.seen(np.array([[1.0], [-3.0]])), 1.0)
    assert ball.seen(np.zeros((2, 1))) == 0.0
    alone = problems.TwoLayer(None, np.eye(3), np.zeros(3))
    found = LayerBall(alone, alone.evaluate(np.zeros(3)), np.eye(3))
    assert found.seen(np.full((3, 1), 2.0)) == 0.0
    assert found.seen(np.array([[2.0], [2.0], [1.0]])) == 1.0
    for options in ({"ridge": 0.1}, {"row_penalty": 0.1}):
        other = problems.TwoLayer(None, np.eye(3), np.zeros(3), **options)
        assert LayerBall(other, other.evaluate(np.zeros(3)), np.eye(3)).seen(np.ones((3, 1))) == np.inf
    relu = problems.ReluSoftmax(np.eye(2), np.eye(2), np.zeros(2))
    assert LayerBall(relu, relu.evaluate(np.ones(2)), np.eye(2)).seen(np.ones((2, 1))) == np.inf


# ---- inversion of a layer


def test_the_derivatives_of_attention_are_those_of_the_rates():
    """Second and third derivative of a softmax whose logits have a second derivative."""
    rng = np.random.default_rng(0)
    logits, z, bend = rng.standard_normal((3, 5))
    p = np.exp(logits)
    p /= p.sum()
    z, bend = z - p @ z, bend - p @ bend
    second = p * (z**2 - p @ z**2 + bend)
    third = p * (z**3 - 3.0 * z * (p @ z**2) - p @ z**3 + 3.0 * (z * bend - p @ (z * bend)))
    for i in range(5):
        found = derivatives(
            lambda t, i=i: torch.softmax(as_tensor(logits) + t * as_tensor(z) + 0.5 * t**2 *
            as_tensor(bend), 0)[i], 0.0, 3,
        )  # fmt: skip
        assert np.isclose(found[2], second[i])
        assert np.isclose(found[3], third[i])


@pytest.mark.parametrize("options", [{}, {"mask": "causal", "heads": 2}])
@pytest.mark.parametrize("radius", [0.0, 0.1])
def test_rates_are_made_of_their_parts(options, radius):
    """On a ball logits move by their rates, attention by no more than the exponential of twice that, and
    every mean is taken under an attention that has moved.
    """
    reference, x = layer(n=4, d=2, **options)
    problem = reference.problem()
    ball = InverseBall(problem, problem.evaluate(x), 0.3 * np.eye(len(x)))
    rows = np.zeros((2, 4))
    for state, bounds in zip(ball.at.forward.heads, ball.bounds, strict=True):
        for i in range(4):
            p, values = state.P[i], bounds.values
            rate = bounds.logits[i] + 2.0 * radius * (bounds.bend[i] + p @ bounds.bend[i])
            factor = np.exp(2.0 * radius * rate[p > 0.0].max())
            moved = p * factor
            z = rate + (factor - 1.0) * (p @ rate)
            gap = bounds.gaps[i] + (factor - 1.0) * (p @ bounds.gaps[i])
            gap = gap + radius * (values + moved @ values)
            # Half a second derivative, and its mean: both signs.
            bend = 2.0 * (bounds.bend[i] + moved @ bounds.bend[i])
            z2 = z**2 + moved @ z**2 + bend
            z3 = z**3 + 3.0 * z * (moved @ z**2) + moved @ z**3
            z3 += 3.0 * (z * bend + moved @ (z * bend))
            rows[0, i] += moved @ (z2 * gap + 2.0 * z * values)
            rows[1, i] += moved @ (z3 * gap + 3.0 * z2 * values)
    np.testing.assert_allclose(ball._rates(radius), np.linalg.norm(rows, axis=1), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"mask": "causal", "heads": 2}, {"n_known": 2, "bias": True}])
@pytest.mark.parametrize("radius", [0.0, 1e-2])
def test_rates_of_a_layer_bound_their_own_derivatives(options, radius):
    """Second and third derivative of the residuals, apart: what is summed up in the constant."""
    reference, x = layer(n=4, d=2, **options)
    problem = reference.problem()
    rng = np.random.default_rng(0)
    T = 0.3 * rng.standard_normal((len(x), len(x)))
    ball = InverseBall(problem, problem.evaluate(x), T)
    second, third = ball._rates(radius)
    reached = np.zeros(2)
    for _ in range(8):
        y, u = rng.standard_normal((2, len(x)))
        point, along = x + radius * T @ y / np.linalg.norm(y), T @ u / np.linalg.norm(u)
        outputs = reference.output(as_tensor(point)).numel()
        parts = [
            derivatives(
                lambda t, k=k, p=point, a=along: reference.residuals(as_tensor(p) + t *
                as_tensor(a)).reshape(-1)[k], 0.0, 3,
            )[2:]
            for k in range(outputs)
        ]  # fmt: skip
        sizes = np.linalg.norm(np.array(parts, dtype=float), axis=0)
        assert (sizes <= np.array([second, third]) * (1 + 1e-9)).all()
        reached = np.maximum(reached, sizes / [second, third])
    assert (reached > 1e-4).all()


def test_the_constant_is_made_of_slope_rates_and_residual():
    """3 r' . r'' + r . r''': on the ball each grows by the next."""
    reference, x = layer(n=4, d=2)
    problem = reference.problem()
    ball = InverseBall(problem, problem.evaluate(x), 0.3 * np.eye(len(x)))
    second, third = ball._rates(0.0)
    J = problem.layer.jacobian(ball.at.forward, problem.unknown)
    assert np.isclose(ball.slope, 0.3 * np.linalg.norm(J, 2))
    assert np.isclose(ball.residual, np.linalg.norm(ball.at.residuals))
    assert np.isclose(ball.lipschitz(0.0), 3.0 * ball.slope * second + ball.residual * third)
    second, third = ball._rates(0.1)
    slope = ball.slope + 0.1 * second
    assert np.isclose(ball.lipschitz(0.1), 3.0 * slope * second + (ball.residual + 0.1 * slope) * third)


def test_a_layer_that_ends_in_the_kink_of_relu_says_which_row():
    rng = np.random.default_rng(1)
    A1, A2 = rng.standard_normal((9, 3)), rng.standard_normal((12, 9))
    x = rng.standard_normal(3)
    problem = problems.ReluSoftmax(A1, A2, problems.ReluSoftmax(A1, A2, np.zeros(12)).predict(x))
    ball = LayerBall(problem, problem.evaluate(x), np.eye(3))
    nearest = np.min(np.abs(A1 @ x) / np.linalg.norm(A1, axis=1))
    assert ball.obstacle(0.99 * nearest) is None
    assert "row" in ball.obstacle(1.01 * nearest)
    assert certificates.certify(problem, x).valid
