"""What the constants of layers are made of at the centre of a ball, and what rounding may do: by autodiff and
in closed form.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from autodiff import as_tensor
from layer_reference import Layer, layer
from layered_instances import ACTIVATIONS
from scipy import sparse

from attnfit import problems
from attnfit.certificates.layers import InverseBall, LayerBall

EPS = float(np.finfo(np.float64).eps)


# ---- inversion of a layer


def parts_of(reference, head, flat):
    """Logits (masked ones too), values and outputs of a head, as functions of the unknown tokens."""
    X = flat.reshape(len(reference.W[0]), -1)
    S = X.T @ as_tensor(reference.W[head]) @ X
    if reference.key_bias is not None:
        S = S + (as_tensor(reference.key_bias[head]) @ X)[None, :]
    return S, X.T @ as_tensor(reference.V[head])


@pytest.mark.parametrize("options", [{}, {"mask": "causal", "heads": 2}, {"bias": True}])
def test_the_rates_of_a_head_at_the_centre(options):
    """Of logits less their mean, of values and of gaps: exactly the largest over unit directions."""
    reference, x = layer(n=4, d=2, m=3, **options)
    problem, n = reference.problem(), 4
    T = 0.3 * np.random.default_rng(0).standard_normal((len(x), len(x)))
    ball = InverseBall(problem, problem.evaluate(x), T)
    seen = np.ones((n, n), dtype=bool) if reference.mask is None else reference.mask
    for head, bounds in enumerate(ball.bounds):
        S, H = parts_of(reference, head, as_tensor(x))
        P = torch.softmax(torch.where(torch.tensor(seen), S, -torch.inf), 1).numpy()
        by_logit, by_value = (
            torch.autograd.functional.jacobian(lambda v, k=k, h=head: parts_of(reference, h, v)[k],
            as_tensor(x)).numpy() @ T for k in (0, 1)
        )  # fmt: skip
        centred = by_logit - np.einsum("ik,ikw->iw", P, by_logit)[:, None]
        expected = np.where(seen, np.linalg.norm(centred, axis=2), 0.0)
        np.testing.assert_allclose(bounds.logits, expected, atol=1e-12)
        np.testing.assert_allclose(bounds.values, np.linalg.norm(by_value, ord=2, axis=(1, 2)))
        gaps = np.linalg.norm(H.numpy()[None] - (P @ H.numpy())[:, None], axis=2)
        np.testing.assert_allclose(bounds.gaps, gaps, atol=1e-12)


def test_how_far_logits_bend():
    """Half a second derivative: of single numbers it is their product, of vectors no more than its bound."""
    rng = np.random.default_rng(0)
    for d in (1, 3):
        reference, x = layer(n=3, d=d, m=2)
        problem = reference.problem()
        T = rng.standard_normal((len(x), 1))
        bend = InverseBall(problem, problem.evaluate(x), T).bounds[0].bend
        move = T.reshape(d, 3)
        half = np.abs(move.T @ reference.W[0] @ move)
        if d == 1:
            np.testing.assert_allclose(bend, half)
        sizes = np.linalg.norm(move, axis=0)
        np.testing.assert_allclose(bend, np.linalg.norm(reference.W[0], 2) * np.outer(sizes, sizes))
        assert (half <= bend * (1 + 1e-12)).all()


@pytest.mark.parametrize("b", [0.0, 300.0])
@pytest.mark.parametrize("c", [0.0, 2.0])
@pytest.mark.parametrize("gamma", [0.0, 70.0])
def test_the_rounding_of_a_layer_of_two_numbers(b, c, gamma):
    """Whose logits are ``c x_k``, whatever the query: outputs lose a rounding of their target and of each
    term, and two of each logit; the gradient one of each product.
    """
    x, v, T = np.array([1.7, 0.3]), -0.8, np.array([[0.6, 0.0], [0.1, 0.4]])
    known, target = np.zeros((1, 1)), np.array([[b], [0.5 * b]])
    reference = Layer([known], [np.array([[v]])], target, gamma, key_bias=np.array([[c]]))
    problem = reference.problem()
    ball = InverseBall(problem, problem.evaluate(x), T)
    p = np.exp(c * x) / np.exp(c * x).sum()
    # Tokens are centred, which no softmax can tell: values and outputs are those of the difference.
    middle = ball.at.forward.Tc[:, 0] - x
    assert np.isclose(middle[0], middle[1])
    centred = x + middle[0]
    output = abs(v * p @ centred)
    lost = p @ ((1.0 + 2.0 * c * np.abs(centred)) * (np.abs(centred * v) + output))
    J = torch.autograd.functional.jacobian(reference.output, as_tensor(x)).numpy().reshape(2, 2) @ T
    slope, residual = np.linalg.norm(J, 2), np.linalg.norm(reference.residuals(as_tensor(x)).numpy())
    forward = 4.0 * np.linalg.norm(np.abs(target[:, 0]) + lost) * slope
    backward = 8.0 * (2.0 * slope * residual + gamma * np.linalg.norm(x) * np.linalg.norm(T, 2))
    assert np.isclose(ball.rounding(), EPS * (forward + backward), rtol=1e-9, atol=0.0)


# ---- a layer after a softmax


@pytest.mark.parametrize("activation", ["identity", "tanh", "softplus"])
@pytest.mark.parametrize("storage", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize("pull", [0.5, 50.0])
def test_the_rounding_of_two_layers_is_bounded_by_the_worst_combination(activation, storage, pull):
    """Logits off by ``1 + sqrt(d) |A1| |x| + |offset|`` roundings, to the worst effect by autodiff: no less,
    and no more than a factor that does not depend on the data.
    """
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        A1, A2, b = rng.standard_normal((6, 2)), rng.standard_normal((4, 6)), rng.standard_normal(4)
        w, offset, x = rng.uniform(0.5, 2.0, 4), rng.standard_normal(6), rng.standard_normal(2)
        penalty, T = rng.uniform(0.0, pull, 6), 0.5 * rng.standard_normal((2, 2))
        ridge = 0.3
        problem = problems.TwoLayer(
            A1, storage(A2), b, activation, weights=w, offset=offset, row_penalty=penalty, ridge=ridge
        )

        def gradient(shift, A1=A1, A2=A2, b=b, w=w, x=x):
            point = as_tensor(x).requires_grad_()
            f = torch.softmax(as_tensor(A1) @ point + shift, 0)
            c = ACTIVATIONS[activation](as_tensor(A2) @ f) - as_tensor(b)
            return torch.autograd.grad(0.5 * (as_tensor(w) * c**2).sum(), point, create_graph=True)[0]

        by_logit = torch.autograd.functional.jacobian(gradient, as_tensor(offset)).numpy()
        errors = 1.0 + np.sqrt(2.0) * np.abs(A1) @ np.abs(x) + np.abs(offset)
        f = torch.softmax(as_tensor(A1 @ x + offset), 0).numpy()
        rows = np.linalg.norm((A1 - f @ A1) @ T, axis=1)
        worst = np.linalg.norm(T.T @ by_logit, axis=0) @ errors + penalty**2 * errors @ rows
        worst += ridge * np.linalg.norm(np.abs(T).T @ np.abs(x))
        bound = LayerBall(problem, problem.evaluate(x), T).rounding() / (4.0 * EPS)
        assert worst * (1 - 1e-9) <= bound
        ratios.append(bound / worst)
    assert max(ratios) <= 8.0


def test_how_matrices_are_stored_changes_no_constant():
    rng = np.random.default_rng(0)
    A1, A2, b = rng.standard_normal((6, 2)), rng.standard_normal((4, 6)), rng.standard_normal(4)
    w, x = rng.uniform(0.5, 2.0, 4), rng.standard_normal(2)
    w[1] = 0.0
    dense, stored = (
        LayerBall(problem, problem.evaluate(x), np.eye(2))
        for problem in (
            problems.TwoLayer(A1, kind(A2), b, weights=w) for kind in (np.array, sparse.csr_array)
        )
    )
    for radius in (0.0, 0.3):
        assert np.isclose(stored.lipschitz(radius), dense.lipschitz(radius), rtol=1e-4)
        assert stored.lipschitz(radius) >= dense.lipschitz(radius)
    small, other = (
        LayerBall(problem, problem.evaluate(x), np.eye(2))
        for problem in (
            problems.TwoLayer(A1, kind(1e-3 * A2), b, weights=w) for kind in (np.array, sparse.csr_array)
        )
    )
    assert np.isclose(other.lipschitz(0.3), small.lipschitz(0.3), rtol=1e-4, atol=0.0)
    # A row without weight has no part, however long.
    long = A2 * np.array([[1.0], [1e3], [1.0], [1.0]])
    other = problems.TwoLayer(A1, long, b, weights=w)
    assert np.isclose(
        LayerBall(other, other.evaluate(x), np.eye(2)).lipschitz(0.3), dense.lipschitz(0.3), rtol=1e-12
    )
    # A ball on which outputs may be anything: the largest constants of the softmax, and no overflow.
    assert np.isfinite([dense.lipschitz(radius) for radius in (1e3, 1e5)]).all()
