"""Recovery of the input of an attention layer: what is called recovered, and what is not."""

import numpy as np
import pytest
from instances import relative
from layer_reference import planted

from attnfit import inversion, problems


@pytest.mark.parametrize("setting", ["two outputs", "half known"])
@pytest.mark.parametrize("seed", range(3))
def test_recovered_means_the_planted_input(setting, seed):
    layer, X = planted(setting, n=12, d=6, scale=1.0, seed=seed)
    found = inversion.recover(layer, random_state=0)
    assert found.verdict == "recovered"
    assert str(found).startswith("recovered: one input gives this output (residual")
    assert relative(found.x, X[:, layer.unknown]) < 1e-8
    assert found.residual < 1e-9
    assert len(found.inputs) == 1
    assert found.identifiability.rank == layer.n_unknowns


@pytest.mark.parametrize("seed", range(4))
def test_as_many_equations_as_unknowns_are_never_called_recovered(seed):
    layer, _ = planted("base", n=6, d=3, scale=0.3, seed=seed)
    found = inversion.recover(layer, n_starts=20, max_iter=300, random_state=0)
    assert found.verdict in ("ambiguous", "not recovered")
    for x in found.inputs:
        assert relative(layer.output(x), layer.B) < 1e-9
    for i, x in enumerate(found.inputs):
        assert all(relative(x, other) > 1e-6 for other in found.inputs[:i])


def test_several_inputs_are_counted():
    layer, _ = planted("base", n=8, d=4, scale=0.3, seed=2)
    found = inversion.recover(layer, n_starts=15, max_iter=300, random_state=0)
    assert len(found.inputs) == 3
    assert found.message == "ambiguous: 3 different inputs give this output"


def test_an_output_that_no_input_gives():
    rng = np.random.default_rng(0)
    V = np.hstack([rng.standard_normal((3, 3)), np.zeros((3, 2))])
    layer = problems.LayerInversion(rng.standard_normal((3, 3)), V, rng.standard_normal((5, 5)))
    found = inversion.recover(layer, n_starts=2, max_iter=20, random_state=0)
    assert found.verdict == "not recovered"
    assert "no input gives this output" in found.message
    assert found.residual >= found.residual_floor > 0.1


def test_counting():
    V = np.ones((2, 3))
    B = np.ones((4, 3))
    assert inversion.identifiable(problems.LayerInversion(np.eye(2), V, B)).value_rank == 1
    rows = np.random.default_rng(0).standard_normal((4, 3))
    shapes = {2: "isolated and mostly unique", 1: "isolated, often not unique"}
    for heads, counting in shapes.items():
        W = [np.eye(2) * (h + 1) for h in range(heads)]
        layer = problems.LayerInversion(W, np.split(rows, 2)[:heads], B)
        assert inversion.identifiable(layer).counting == counting
        assert inversion.identifiable(layer).n_equations == 4 * min(2 * heads, 3)
    assert inversion.identifiable(problems.LayerInversion(np.eye(2), V, B)).counting == "not isolated"


def test_directions_that_the_output_does_not_determine():
    rng = np.random.default_rng(1)
    layer = problems.LayerInversion(rng.standard_normal((3, 3)), rng.standard_normal((3, 2)), np.ones((4, 2)))
    x = rng.standard_normal((3, 4))
    at = inversion.identifiable(layer, x)
    assert at.rank == 8
    assert at.condition == np.inf
    assert at.directions.shape == (12, 4)
    assert np.abs(layer.jacobian(x) @ at.directions).max() < 1e-12


def test_bad_arguments():
    layer, _ = planted("base", n=4, d=2, scale=1.0, seed=0)
    with pytest.raises(ValueError, match="n_starts must be at least 1"):
        inversion.recover(layer, n_starts=0)
    biased = problems.LayerInversion(np.eye(2), np.eye(2), np.ones((4, 2)), gamma=0.1)
    with pytest.raises(ValueError, match="which draws the tokens to zero"):
        inversion.recover(biased)
