"""Activations, their derivatives and the bounds of these, by autodiff and on a fine grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from autodiff import as_tensor

from attnfit.losses.activations import ACTIVATIONS, as_activation

TORCH = {
    "identity": lambda y: y + 0.0,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": lambda y: torch.logaddexp(torch.zeros_like(y), y),
    "silu": torch.nn.functional.silu,
    "gelu": lambda y: 0.5 * y * (1.0 + torch.erf(y / np.sqrt(2.0))),
}


@pytest.mark.parametrize("name", TORCH)
def test_an_activation_its_derivatives_and_their_bounds(name):
    activation, grid = ACTIVATIONS[name], np.linspace(-6.0, 6.0, 4001)
    point = as_tensor(grid).requires_grad_()
    expected = [TORCH[name](point)]
    for _ in range(3):
        last = expected[-1]
        grows = last.requires_grad
        expected.append(torch.autograd.grad(last.sum(), point, create_graph=True)[0] if grows else last * 0.0)
    ours = [*activation.jet(grid), activation.third(grid)]
    for own, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(own, other.detach().numpy(), atol=1e-12)
    np.testing.assert_array_equal(activation(grid), ours[0])
    for bound, values in zip(
        (activation.size, activation.slope, activation.curvature, activation.jerk), ours, strict=True
    ):
        largest = np.abs(values).max()
        assert largest <= bound * (1 + 1e-6)
        if np.isfinite(bound):
            assert largest >= bound * (1 - 3e-3)
        else:
            assert np.abs(activation(np.array([1e3])))[0] > 100 * (largest > 0)
    assert activation.bounds_known
    assert activation.name == name
    far = np.array([-1e200, -1e120, -1e5, -800.0, -60.0, 60.0, 800.0, 1e5, 1e120, 1e200])
    for values in (*activation.jet(far), activation.third(far)):
        assert np.isfinite(values).all()
    slopes = activation.jet(far)[1]
    assert np.isclose(slopes[-1], {"identity": 1.0, "softplus": 1.0, "gelu": 1.0, "silu": 1.0}.get(name, 0.0))
    np.testing.assert_allclose(activation.jet(far)[2], 0.0, atol=1e-20)
    np.testing.assert_allclose(activation.third(far), 0.0, atol=1e-20)
    assert as_activation(activation) is activation
    assert as_activation(name) is activation


@pytest.mark.parametrize("missing", ["slope", "curvature", "jerk"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bound_that_is_missing_is_one_too_many(missing, value):
    assert not replace(ACTIVATIONS["tanh"], **{missing: value}).bounds_known


def test_an_activation_of_ones_own():
    own = as_activation((np.sin, np.cos, lambda y: -np.sin(y)))
    grid = np.linspace(-2.0, 2.0, 9)
    for values, expected in zip(own.jet(grid), (np.sin(grid), np.cos(grid), -np.sin(grid)), strict=True):
        np.testing.assert_array_equal(values, expected)
    assert not own.bounds_known
    assert np.isnan([own.slope, own.curvature, own.jerk, own.size]).all()
    assert own.third is None


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("sine", "must be one of"),
        (np.sin, "first two derivatives"),
        ((np.sin, np.cos), "first two derivatives"),
        ((np.sin, np.cos, 3.0), "first two derivatives"),
        (
            (np.sin, lambda y: 1.001 * np.cos(y), lambda y: -np.sin(y)),
            "h' of activation is not the derivative",
        ),
        ((np.exp, lambda y: 0.999 * np.exp(y), np.exp), "h' of activation is not the derivative"),
        # Where only one of the points that are looked at tells.
        ((np.sin, lambda y: np.cos(y) + 0.1 * (y > 2.0), lambda y: -np.sin(y)), "h' of activation is not"),
        ((np.sin, lambda y: np.cos(y) + 0.1 * (y < -1.0), lambda y: -np.sin(y)), "h' of activation is not"),
        ((np.sin, np.cos, np.sin), "h'' of activation is not the derivative"),
        ((lambda y: y[:2], np.cos, np.sin), "h of activation must map"),
        ((np.sin, lambda y: np.nan * y, np.sin), "h' of activation must map"),
        ((np.sin, np.cos, lambda y: 1.0), "h'' of activation must map"),
    ],
)
def test_what_is_no_activation(given, match):
    with pytest.raises(ValueError, match=match):
        as_activation(given)


def test_derivatives_are_compared_to_their_size():
    """An error of 1e-6 is that of differences; beside a derivative of a thousand, one of 5e-3."""
    big = 1e3
    slope = [lambda y, c=c: big * np.cos(y) + c for c in (5e-6, 5e-3, 5e-1)]
    curve = lambda y: -big * np.sin(y)  # noqa: E731
    as_activation((lambda y: big * np.sin(y), slope[0], curve))
    with pytest.raises(ValueError, match="h'"):
        as_activation((lambda y: big * np.sin(y), slope[2], curve))
