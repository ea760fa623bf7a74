"""Activations with kinks, of all outputs together, and with stated bounds, in layered problems."""

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from instances import relative
from scipy.special import softmax

from attnfit import losses, minimize, problems
from attnfit.certificates import good_start
from attnfit.losses import ACTIVATIONS, Activation, VectorActivation, as_activation, leaky_relu
from attnfit.theory import audit

KINKED = {"relu": 0.0, "leaky_relu": 0.01}


def data(seed, n=8, d=3, m=5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((m, n)), rng.standard_normal(m), rng


def objective(A1, A2, b, h, w=1.0, ridge=0.0):
    def of(x):
        y = as_tensor(A2) @ torch.softmax(as_tensor(A1) @ x, 0)
        return (0.5 * as_tensor(w) * (h(y) - as_tensor(b)) ** 2).sum() + 0.5 * ridge * (x @ x)

    return of


def same_as_autodiff(problem, of, x):
    at = as_tensor(x)
    assert relative(problem.value(x), float(of(at))) < 1e-12
    assert relative(problem.gradient(x), torch.func.grad(of)(at).numpy()) < 1e-12
    expected = torch.func.hessian(of)(at).numpy()
    assert relative(problem.hessian(x), expected) < 1e-11
    v = np.arange(1.0, len(x) + 1.0)
    assert relative(problem.hvp(x, v), expected @ v) < 1e-11


# ---- kinks


@pytest.mark.parametrize("name", KINKED)
def test_derivatives_off_the_kinks_are_those_of_autodiff(name):
    for seed in range(5):
        A1, A2, b, rng = data(seed)
        w = rng.uniform(0.5, 2.0, 5)
        problem = problems.TwoLayer(A1, A2, b, name, weights=w, ridge=0.1)
        leaky = lambda y: torch.nn.functional.leaky_relu(y, KINKED[name])  # noqa: E731
        same_as_autodiff(problem, objective(A1, A2, b, leaky, w, 0.1), rng.standard_normal(3))


def test_the_slope_at_a_kink_is_the_left_one():
    h, dh, d2h = leaky_relu(0.25).jet(np.array([-2.0, -0.0, 0.0, 3.0]))
    np.testing.assert_array_equal(h, [-0.5, 0.0, 0.0, 3.0])
    np.testing.assert_array_equal(dh, [0.25, 0.25, 0.25, 1.0])
    np.testing.assert_array_equal(d2h, 0.0)
    for slope in (-0.1, 1.0, 2.0, np.nan):
        with pytest.raises(ValueError, match="at least 0 and less than 1"):
            leaky_relu(slope)


def is_minimum(problem, x, rng, radius):
    """No point at a small distance is lower: a claim about the world that needs no gradient."""
    value = problem.value(x)
    for _ in range(400):
        v = rng.standard_normal(len(x))
        v *= radius / np.linalg.norm(v)
        if problem.value(x + v) < value * (1.0 - 1e-12):
            return False
    return True


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_that_is_called_converged_is_at_a_minimum_on_kinks_too(name):
    on_kinks = 0
    for seed in range(25):
        A1, A2, b, rng = data(seed)
        problem = problems.TwoLayer(A1, A2, b, name, ridge=0.05)
        result = minimize(problem, random_state=0)
        if not result.converged:
            continue
        y = A2 @ softmax(A1 @ result.x)
        assert {kink.output for kink in result.kinks} == set(np.flatnonzero(np.abs(y) < 1e-7))
        for kink in result.kinks:
            assert kink.side == "on" and abs(y[kink.output]) < 1e-12 and b[kink.output] < 0.0
        on_kinks += bool(result.kinks)
        assert is_minimum(problem, result.x, rng, 1e-3)
        assert is_minimum(problem, result.x, rng, 1e-5)
        if result.kinks:
            assert "kink" in result.message
            proof = result.certificate()
            assert not proof.valid and "kink" in proof.reason
    # The instances are such that some fits end there.
    assert on_kinks >= 3


def test_a_concave_kink_is_never_where_a_fit_ends():
    """One output, y = x-dependent: with b > 0 the kink at y = 0 is a local maximum along y."""
    A1, A2 = np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])
    problem = problems.TwoLayer(A1, A2, [0.3], "leaky_relu", ridge=1e-3)
    result = minimize(problem, np.array([1e-4]))
    assert result.converged and not result.kinks
    assert abs(A2 @ softmax(A1 @ result.x) - 0.3) < 0.01


def test_the_side_of_a_kink_is_told():
    A1, A2 = np.array([[1.0], [-1.0]]), np.array([[1.0, -1.0]])
    problem = problems.TwoLayer(A1, A2, [-1.0], "leaky_relu")
    assert [k.side for k in problem.kinks([1e-8])] == ["right"]
    assert [k.side for k in problem.kinks([-1e-8])] == ["left"]
    assert [k.side for k in problem.kinks([0.0])] == ["on"]
    assert problem.kinks([1e-2]) == []
    assert problems.TwoLayer(A1, A2, [-1.0], "tanh").kinks([0.0]) == []


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_several_right_hand_sides_each_have_their_kinks():
    A1, A2, _, _ = data(1)
    b = np.column_stack([data(s)[2] for s in (1, 2, 1)])
    problem = problems.TwoLayer(A1, A2, b, "relu", ridge=0.05)
    result = minimize(problem)
    # From where all begin together the second ends with its outputs dead: that is said of it alone.
    assert list(result.column_status) == ["converged", "flat", "converged"]
    assert result.status == "flat"
    alone = minimize(problems.TwoLayer(A1, A2, b[:, 0], "relu", ridge=0.05))
    assert relative(result.x[:, 0], alone.x) < 1e-6
    assert {k.output for k in result.kinks if k.column == 0} == {k.output for k in alone.kinks}
    assert {k.output for k in result.kinks if k.column == 2} == {k.output for k in alone.kinks}
    assert any(k.column == 0 for k in result.kinks)


@pytest.mark.parametrize("columns", [None, 2])
def test_dead_outputs_are_no_fit(columns):
    A1, _, _, rng = data(0)
    A2, b = -rng.uniform(0.5, 1.0, (4, 8)), np.array([0.5, 0.0, 1.0, 0.2])
    b = b if columns is None else np.column_stack([b] * columns)
    with pytest.warns(UserWarning, match="dead"):
        result = minimize(problems.TwoLayer(A1, A2, b, "relu"))
    assert result.status == "flat" and not result.converged
    if columns:
        assert set(result.column_status) == {"flat"}
    # A slope below zero is alive, and where no target asks for more the outputs are where they should be.
    assert minimize(problems.TwoLayer(A1, A2, b, "leaky_relu", ridge=0.1)).converged
    assert minimize(problems.TwoLayer(A1, A2, 0.0 * b, "relu", ridge=0.1)).converged
    assert minimize(problems.TwoLayer(A1, A2, -b, "relu", ridge=0.1)).converged


def test_an_output_that_is_always_on_the_kink_is_refused():
    A1, A2, b, _ = data(0)
    A2[3] = 0.0
    for name in KINKED:
        with pytest.raises(ValueError, match="row 3 of the last matrix is zero"):
            problems.TwoLayer(A1, A2, b, name)
    assert problems.TwoLayer(A1, A2, b, "silu").value(np.ones(3)) > 0.0


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_certified_ball_crosses_no_kink(name):
    """And the Hessian changes on it by no more than the constant says."""
    from attnfit.certificates.layers import LayerBall

    n_valid = 0
    for seed in range(12):
        A1, A2, b, rng = data(seed)
        problem = problems.TwoLayer(A1, A2, b, name, ridge=0.3)
        result = minimize(problem, random_state=0)
        proof = result.certificate()
        if not proof.valid:
            continue
        n_valid += 1
        at = problem.evaluate(result.x)
        y = A2 @ softmax(A1 @ result.x)
        ball = LayerBall(problem, at, np.eye(3))
        # The largest radius that is let through, by bisection.
        low, high = 0.0, 10.0
        for _ in range(40):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if ball.obstacle(middle) is None else (low, middle)
        assert low > 0.0
        hessian, constant = problem.hessian(result.x), ball.lipschitz(low)
        for _ in range(200):
            v = rng.standard_normal(3)
            v *= low / np.linalg.norm(v)
            assert (np.sign(A2 @ softmax(A1 @ (result.x + v))) == np.sign(y)).all()
            change = np.linalg.norm(problem.hessian(result.x + v) - hessian, 2)
            assert change <= constant * low * (1 + 1e-9)
        assert proof.radius <= low
    assert n_valid >= 3


def test_what_the_papers_say_of_smooth_layers_is_not_said_of_kinks():
    A1, A2, b, _ = data(0)
    problem = problems.TwoLayer(A1, A2, b, "relu")
    with pytest.raises(TypeError, match="Lipschitz derivative"):
        audit(problem, np.zeros(3), 0.1 * np.ones(3))
    with pytest.raises(ValueError, match="bounds of the activation"):
        good_start(problem, np.zeros(3), 0.1 * np.ones(3))


# ---- bounds of one's own


def test_callables_with_bounds_are_certified():
    A1, A2, b, _ = data(0)
    bounds = {"slope": 1.0, "curvature": 1.0, "jerk": 1.0}
    own = (np.sin, np.cos, lambda y: -np.sin(y), bounds)
    assert minimize(problems.TwoLayer(A1, A2, b, own, ridge=0.3)).certificate().valid
    bare = minimize(problems.TwoLayer(A1, A2, b, own[:3], ridge=0.3)).certificate()
    assert not bare.valid and "states no bound" in bare.reason


@pytest.mark.parametrize("name", ["slope", "curvature", "jerk", "size"])
def test_a_bound_that_a_value_exceeds_is_refused(name):
    bounds = {"slope": 1.0, "curvature": 1.0, "jerk": 1.0, "size": 1.0}
    own = (np.sin, np.cos, lambda y: -np.sin(y))
    assert as_activation((*own, bounds)).bounds_known
    with pytest.raises(ValueError, match=f"{name}=0.999 of activation 'custom' bounds no"):
        as_activation((*own, bounds | {name: 0.999}))
    with pytest.raises(ValueError, match=f"{name}=0.999"):
        Activation("own", lambda y: (np.sin(y), np.cos(y), -np.sin(y)), None, **(bounds | {name: 0.999}))
    with pytest.raises(ValueError, match="bounds are slope"):
        as_activation((*own, bounds | {"steepness": 1.0}))


# ---- all outputs together


def of_softmax(y):
    return softmax(y)


def softmax_jacobian(y):
    f = softmax(y)
    return np.diag(f) - np.outer(f, f)


def softmax_bend(y, c):
    f = softmax(y)
    p = f * c
    total = p.sum()
    return np.diag(p) - np.outer(p, f) - np.outer(f, p) + 2.0 * total * np.outer(f, f) - total * np.diag(f)


def norm_value(y, eps=0.1):
    r = y - y.mean()
    return r / np.sqrt(r @ r / len(y) + eps)


def norm_derivatives(y, c=None):
    """Of a layer's normalisation, by autodiff: a user may have them from anywhere."""

    def h(t):
        r = t - t.mean()
        return r / torch.sqrt((r @ r) / len(r) + 0.1)

    at = as_tensor(y)
    if c is None:
        return torch.func.jacrev(h)(at).numpy()
    return torch.func.hessian(lambda t: h(t) @ as_tensor(c))(at).numpy()


VECTORS = {
    "softmax": ((of_softmax, softmax_jacobian, softmax_bend), lambda y: torch.softmax(y, 0)),
    "norm": (
        (norm_value, norm_derivatives, norm_derivatives),
        lambda y: (y - y.mean()) / torch.sqrt(((y - y.mean()) @ (y - y.mean())) / len(y) + 0.1),
    ),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("form", ["dense", "sparse", "weighted"])
def test_derivatives_of_vector_activations_are_those_of_autodiff(name, form):
    from scipy import sparse

    own, h = VECTORS[name]
    A1, A2, b, rng = data(3)
    w = rng.uniform(0.0, 2.0, 5) if form == "weighted" else np.ones(5)
    stored = sparse.csr_array(A1) if form == "sparse" else A1
    problem = problems.TwoLayer(stored, A2, b, own, weights=w, ridge=0.1)
    x = rng.standard_normal(3)
    same_as_autodiff(problem, objective(A1, A2, b, h, w, 0.1), x)
    at = problem.evaluate(x)
    step = problem.newton_step(x).step
    np.testing.assert_allclose(problem.hessian(x) @ step, -problem.gradient(x), atol=1e-10)
    majorant = problem.hessian_at(at, absolute=True)
    assert np.linalg.eigvalsh(majorant - problem.hessian(x))[0] > -1e-10
    np.testing.assert_allclose(problem.diagonal_at(at), np.diag(majorant), rtol=1e-10)


def test_several_right_hand_sides_under_a_vector_activation():
    own, _ = VECTORS["softmax"]
    A1, A2, _, rng = data(0)
    b, X = rng.standard_normal((5, 3)), rng.standard_normal((3, 3))
    together = problems.TwoLayer(A1, A2, b, own, ridge=0.1)
    for j in range(3):
        one = problems.TwoLayer(A1, A2, b[:, j], own, ridge=0.1)
        assert relative(together.gradient(X)[:, j], one.gradient(X[:, j])) < 1e-12
    assert together.predict(X).shape == (5, 3)


def test_without_second_derivatives_a_fit_says_so_and_is_not_certified():
    own, _ = VECTORS["softmax"]
    A1, A2, b, _ = data(0)
    bounds = {"slope": 1.0, "curvature": 1.0, "jerk": 3.0}
    whole = problems.TwoLayer(A1, A2, b, (*own, bounds), ridge=0.3)
    part = problems.TwoLayer(A1, A2, b, (*own[:2], bounds), ridge=0.3)
    first, second = minimize(whole), minimize(part)
    assert first.converged and second.converged
    assert relative(second.x, first.x) < 1e-6
    assert "Gauss-Newton in h" in second.message and "Gauss-Newton" not in first.message
    assert first.certificate().valid
    proof = second.certificate()
    assert not proof.valid and "second derivatives of h" in proof.reason
    unknown = minimize(problems.TwoLayer(A1, A2, b, own, ridge=0.3)).certificate()
    assert not unknown.valid and "states no bound" in unknown.reason


@pytest.mark.parametrize("weighted", [False, True])
def test_the_constant_of_vector_activations_bounds_the_change_of_the_hessian(weighted):
    from attnfit.certificates.layers import LayerBall

    own, _ = VECTORS["softmax"]
    for seed in range(4):
        A1, A2, b, rng = data(seed)
        w = rng.uniform(0.1, 2.0, 5) * (np.arange(5) != 2) if weighted else None
        # The derivatives of a softmax are at most 1/2, 1/sqrt(2) and 2.5 in norm.
        h = VectorActivation("softmax", *own, 0.5, np.sqrt(0.5), 2.5)
        problem = problems.TwoLayer(A1, A2, 3.0 * b, h, weights=w)
        x = rng.standard_normal(3)
        ball = LayerBall(problem, problem.evaluate(x), np.eye(3))
        for radius in (1e-3, 0.3):
            constant = ball.lipschitz(radius)
            for _ in range(40):
                v = rng.standard_normal(3)
                v *= radius / np.linalg.norm(v)
                change = np.linalg.norm(problem.hessian(x + v) - problem.hessian(x), 2)
                assert change <= constant * radius


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((of_softmax, lambda y: 1.001 * softmax_jacobian(y)), r"Jh of activation is not .* entry \("),
        ((of_softmax, softmax_jacobian, lambda y, c: 1.001 * softmax_bend(y, c)), "K of activation is not"),
        ((of_softmax, lambda y: softmax_jacobian(y)[:2]), "Jh of activation gave shape"),
        ((of_softmax, softmax_jacobian, lambda y, c: np.zeros(5)), "K of activation gave shape"),
        ((lambda y: np.zeros(3), softmax_jacobian), "h of activation gave shape"),
        ((of_softmax, softmax_jacobian, {"size": 1.0}), "bounds are slope, curvature and jerk"),
    ],
)
def test_what_is_no_vector_activation(given, message):
    A1, A2, b, _ = data(0)
    with pytest.raises(ValueError, match=message):
        problems.TwoLayer(A1, A2, b, given)


def test_names_of_activations_are_public():
    assert losses.leaky_relu is leaky_relu
    assert {"silu", "relu", "leaky_relu"} <= set(ACTIVATIONS)
    assert not ACTIVATIONS["relu"].bounds_known
