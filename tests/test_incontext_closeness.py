"""Closeness of k steps: moves and shifts against autodiff and the public shifts, verdicts that can fail."""

from dataclasses import replace

import numpy as np
import pytest
from instances import relative

from attnfit import incontext, problems
from attnfit.incontext.closeness import (
    DATA,
    GRADIENT,
    NEWTON,
    PROJECTED,
    RAW,
    SIDES,
    compare,
    compare_on,
    cosines,
)
from attnfit.incontext.families import DAMPINGS, STEP_SIZES, Family, draw

torch = pytest.importorskip("torch")

LINKS = ["softmax", "exp", "cosh", "sinh"]
CASES = [(link, shape) for link in LINKS for shape in ((6, 3), (3, 4, 2, 2))]
U = {"exp": torch.exp, "cosh": torch.cosh, "sinh": torch.sinh}


def drawn(link, shape=(6, 3), count=5, seed=0):
    return draw(link, count, shape, np.random.default_rng(seed))


def residual(link, z, b):
    """``f - b``, or ``u - <u, 1> b``, row by row."""
    if link == "softmax":
        return torch.softmax(z, -1) - b
    u = U[link](z)
    return u - u.sum(-1, keepdim=True) * b


def tensors(family, k):
    return (torch.from_numpy(np.ascontiguousarray(a[k])) for a in (family.rows, family.b, family.x))


@pytest.mark.parametrize(("link", "shape"), CASES)
def test_slopes_are_those_of_autodiff(link, shape):
    family = drawn(link, shape)
    for k in range(len(family)):
        _, b, _ = tensors(family, k)
        z = torch.from_numpy(family.z[k]).requires_grad_()
        truth = torch.autograd.grad(0.5 * residual(link, z, b).square().sum(), z)[0].numpy()
        found = family.slope[k]
        assert relative(found / np.linalg.norm(found), truth / np.linalg.norm(truth)) < 1e-12


@pytest.mark.parametrize(("link", "shape"), CASES)
def test_losses_are_of_the_residual_over_the_normaliser(link, shape):
    family = drawn(link, shape)
    for k in range(len(family)):
        _, b, _ = tensors(family, k)
        z = torch.from_numpy(family.z[k])
        alpha = 1.0 if link == "softmax" else U[link](z).sum(-1, keepdim=True)
        truth = 0.5 * float((residual(link, z, b) / alpha).square().sum())
        assert family.loss()[k] == pytest.approx(truth, rel=1e-12)
        dz = 0.3 * family.slope
        assert family.loss(dz)[k] == pytest.approx(family.moved(dz).loss()[k], rel=1e-12)


@pytest.mark.parametrize("link", LINKS)
def test_shifts_are_the_public_ones(link):
    family = drawn(link)
    dz = family.gradient_move(0.1)
    for k in range(len(family)):
        A, b = family.rows[k, 0], family.b[k, 0]
        problem = problems.Softmax(A, b) if link == "softmax" else problems.Rescaled(A, b, link)
        move = np.linalg.lstsq(A, dz[k, 0], rcond=None)[0]
        found = incontext.shift(problem, family.x[k], family.x[k] + move)
        assert relative(family.shift(dz)[k, 0], found.delta) < 1e-9


@pytest.mark.parametrize("link", ["softmax", "exp"])
def test_shifts_of_maps_are_the_public_ones(link):
    family = drawn(link, (3, 4, 2, 2))
    A1, A2 = family.sides
    dz = family.sides_move(0.2)
    for k in range(len(family)):
        loss = "squared" if link == "softmax" else "rescaled"
        problem = problems.Attention(A1[k], A2[k], family.b[k], loss=loss)
        X = family.x[k].reshape(2, 2)
        s = family.slope[k]
        moved = A1[k] - 0.2 * s @ A2[k] @ X.T, A2[k] - 0.2 * s.T @ A1[k] @ X
        found = incontext.data_shift(problem, X, (A1[k], A2[k]), moved)
        assert relative(family.shift(dz)[k], found.delta) < 1e-9


@pytest.mark.parametrize(("link", "shape"), CASES)
def test_gradient_and_data_moves_descend_along_autodiff(link, shape):
    """-A A^T s, -|x|^2 s, and for maps the steps on queries and keys, to first order."""
    family = drawn(link, shape)
    tiny = 1e-7
    for k in range(len(family)):
        rows, b, x = tensors(family, k)
        slope = family.slope[k]

        def loss(rows, x, b=b):
            return 0.5 * residual(link, rows @ x, b).square().sum()

        point, data = x.clone().requires_grad_(), rows.clone().requires_grad_()
        by_x, by_rows = torch.autograd.grad(loss(data, point), (point, data))
        # The slope is known up to a positive factor an instance.
        factor = np.linalg.norm(slope) / np.linalg.norm((by_rows @ x / (x @ x)).numpy())
        assert relative(family.gradient_move(1.0)[k], -factor * (rows @ by_x).numpy()) < 1e-10
        assert relative(family.data_move(1.0)[k], -factor * (by_rows @ x).numpy()) < 1e-10
        if family.sides is None:
            continue
        A1, A2 = (torch.from_numpy(side[k]).clone().requires_grad_() for side in family.sides)
        X = x.reshape(2, 2)
        value = 0.5 * residual(link, A1 @ X @ A2.T, b).square().sum()
        d1, d2 = torch.autograd.grad(value, (A1, A2))
        first = -factor * (d1 @ X @ A2.T + A1 @ X @ d2.T).detach().numpy()
        assert relative(family.sides_move(tiny)[k] / tiny, first) < 1e-5


@pytest.mark.parametrize(("link", "shape"), [*CASES, ("softmax", (4, 9)), ("cosh", (4, 9))])
def test_damped_moves_solve_the_damped_least_squares(link, shape):
    family = drawn(link, shape)
    for k in range(len(family)):
        rows, b, x = tensors(family, k)
        flat = rows.flatten(0, 1)
        shape_of = family.b[k].shape

        def c(x, flat=flat, b=b, shape_of=shape_of):
            return residual(link, (flat @ x).reshape(shape_of), b).flatten()

        J, r = torch.autograd.functional.jacobian(c, x).numpy(), c(x).numpy()
        D = J.shape[1]
        damping = np.sqrt(0.1 * np.trace(J.T @ J) / D)
        step = np.linalg.lstsq(np.vstack([J, damping * np.eye(D)]), np.append(-r, np.zeros(D)), rcond=None)[0]
        assert relative(family.damped_move(0.1)[k].reshape(-1), flat.numpy() @ step) < 1e-8


@pytest.mark.parametrize("link", LINKS)
def test_the_best_step_of_a_grid_never_raises_the_loss(link):
    family = drawn(link, count=30)
    after = family.moved(family.best(family.data_move, STEP_SIZES)).loss()
    assert (after <= family.loss()).all()
    assert (after <= family.loss(family.data_move(1.0))).all()
    assert np.median(after / family.loss()) < 0.9


@pytest.mark.parametrize(("link", "shape"), CASES)
def test_projections_are_the_nearest_moves_that_some_x_makes(link, shape):
    family = drawn(link, shape)
    dz = np.random.default_rng(1).standard_normal(family.z.shape)
    found = family.projected(dz)
    G, m = dz.shape[1:]
    for k in range(len(family)):
        columns = family.rows[k].reshape(G * m, -1)
        if link in ("softmax", "exp"):
            columns = np.hstack([columns, np.kron(np.eye(G), np.ones((m, 1)))])
        flat = dz[k].reshape(-1)
        truth = columns @ np.linalg.lstsq(columns, flat, rcond=None)[0]
        assert relative(found[k].reshape(-1), truth) < 1e-9


def test_shapes_and_links_are_checked():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="shape is \\(3,\\); pass \\(n, d\\)"):
        draw("softmax", 2, (3,), rng)
    with pytest.raises(ValueError, match="link must be one of"):
        draw("tanh", 2, (4, 2), rng)
    with pytest.raises(ValueError, match="no queries and keys"):
        drawn("softmax").sides_move(1.0)


# ---- trained layers


@pytest.mark.parametrize(("link", "shape"), [("softmax", (6, 3)), ("cosh", (6, 3)), ("exp", (3, 4, 2, 2))])
def test_layers_see_the_slope_and_no_target(link, shape):
    from attnfit.incontext import trained_layers as layers

    family = drawn(link, shape)
    rows, b, z = (torch.from_numpy(a) for a in (family.rows, family.b, family.z))
    slope = layers._slope(link, z, b).numpy()
    for found, truth in zip(slope, family.slope, strict=True):
        assert relative(found / np.linalg.norm(found), truth / np.linalg.norm(truth)) < 1e-12
    assert relative(layers._loss(link, z, b).numpy(), family.loss()) < 1e-12
    trained = layers.train(family, 2, 1, 0)
    assert len(trained.layers) == 2
    assert trained.layers[0]["V"].shape == (4, family.rows.shape[-1] + 3)
    if link == "softmax":
        # A constant in the residual leaves the slope as it is: another target, the same token.
        parameters = {name: torch.from_numpy(value) for name, value in trained.layers[0].items()}
        other = layers._update(parameters, link, rows, b - 0.1, z).numpy()
        assert relative(other, trained.move(family, 0)) < 1e-9
    assert np.abs(trained.move(family, 0)).max() <= 3.0


def test_training_lowers_the_loss_of_other_instances():
    found = compare("softmax", (8, 3), depth=2, count=60, n_training=2000, n_epochs=6)
    losses = np.median(found.steps[RAW].losses, axis=1)
    assert losses[1] < losses[0] < 0.7
    assert (found.in_span <= 1.0 + 1e-12).all()
    # What some x makes does not go below what the best x attains.
    assert (found.steps[PROJECTED].losses >= found.floor * (1 - 1e-3)).mean() > 0.95


def test_training_is_repeatable():
    from attnfit.incontext.trained_layers import train

    one, other = (train(drawn("exp", count=64), 2, 2, 3) for _ in range(2))
    assert np.array_equal(one.losses, other.losses)
    assert all(np.array_equal(one.layers[1][name], other.layers[1][name]) for name in "QKV")


# ---- verdicts


def test_the_verdict_can_go_either_way():
    near = compare_on(draw("softmax", 40, (6, 600), np.random.default_rng(0)), depth=1)
    far = compare_on(drawn("softmax", (12, 4), 40), depth=1)
    assert near.close[DATA]
    assert not far.close[DATA]
    assert set(far.close) == {NEWTON, DATA}
    assert far.shape == (12, 4)


def test_what_is_no_nearer_than_another_instance_is_not_close():
    near = compare_on(draw("softmax", 40, (6, 600), np.random.default_rng(0)), depth=1)
    assert near.close[DATA]
    for null, close in ((0.5, True), (0.999, False)):
        nulls = near.nulls | {"another instance": np.full(40, null)}
        assert replace(near, nulls=nulls).close[DATA] is close
    low = replace(near.steps[DATA], cosines=np.full((1, 40), 0.94))
    assert not replace(near, steps=near.steps | {DATA: low}).close[DATA]


def test_what_says_nothing_is_beside_it():
    found = compare_on(drawn("softmax", (12, 4), 60), depth=4)
    assert np.allclose(found.steps[GRADIENT].cosines, 1.0)
    assert np.median(found.nulls["another instance"]) < 0.5
    # After several steps the shift to the optimum is as close as the methods are.
    null = np.median(found.nulls["the optimum, after 4"])
    assert null > 0.9
    assert np.median(found.steps[DATA].cosines[3]) < null
    assert (found.floor <= found.steps[NEWTON].losses[3] * (1 + 1e-6)).mean() > 0.9


def test_maps_have_a_step_on_queries_and_keys():
    found = compare_on(drawn("softmax", (4, 6, 2, 2), 40), depth=2)
    assert found.shape == (4, 6, 2, 2)
    assert {SIDES, DATA} <= set(found.small)
    # Queries and keys of a map share X: closer to the step on X than free rows are.
    assert np.median(found.steps[SIDES].cosines[0]) > np.median(found.steps[DATA].cosines[0])
    told = found.as_json()
    assert len(told["steps"][DATA]["cosine"]) == 2
    median, low, high, *_ = told["steps"][DATA]["cosine"][0]
    assert low <= median <= high
    assert told["close"] == found.close


def test_cosines_of_very_large_and_of_no_shifts():
    shifts = np.ones((2, 1, 3))
    assert cosines(1e200 * shifts, shifts)[0] == pytest.approx(1.0)
    assert cosines(0.0 * shifts, shifts)[0] == 0.0
    assert isinstance(drawn("exp").moved(0.0), Family)
    assert DAMPINGS[0] < DAMPINGS[-1]
