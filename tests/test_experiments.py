"""The studies: planted instances are what they say, and a tiny part of each table comes out right."""

import re

import numpy as np
import pytest

from experiments import layer_inversion
from experiments.planted import SETTINGS, plant


@pytest.mark.parametrize("setting", SETTINGS)
def test_planted_tokens_give_the_output(setting):
    drawn = plant(8, 4, 1.0, 0, n_vocabulary=20, **SETTINGS[setting])
    assert drawn.residual(drawn.truth) < 1e-14
    assert drawn.error(drawn.truth) == 0.0
    np.testing.assert_array_equal(drawn.truth.T, drawn.vocabulary[drawn.tokens])
    assert len(drawn.layer.unknown) == {"half known": 4, "3/4 known": 2}.get(setting, 8)
    assert len(drawn.layer.layer.heads) == (2 if setting == "two outputs" else 1)
    assert (drawn.layer.layer.mask is not None) == (setting == "causal")


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_logits_have_the_scale_asked_for(scale):
    logits = []
    for seed in range(20):
        drawn = plant(32, 16, scale, seed)
        logits.append(drawn.truth.T @ drawn.layer.layer.heads[0].M @ drawn.truth)
    assert np.std(logits) == pytest.approx(scale, rel=0.1)


def test_shares_tell_the_planted_input_from_others():
    hit = layer_inversion.Attempt(error=1e-12, zero=True, seconds=0.1)
    other = layer_inversion.Attempt(error=0.5, zero=True, seconds=0.1)
    miss = layer_inversion.Attempt(error=0.5, zero=False, seconds=0.1)
    assert layer_inversion.share([hit, hit, miss, miss]) == "0.50"
    assert layer_inversion.share([hit, other, other, miss]) == "0.25 + 0.50"


def test_success_table_of_one_cell():
    sections = list(layer_inversion.success_sections(["3/4 known"], {(8, 4): 1}, [1.0]))
    assert len(sections) == 2
    (row,) = re.findall(r"^\| 3/4 known.*$", sections[0], re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    solvers = [*layer_inversion.SOLVERS, *layer_inversion.BASELINES]
    found = dict(zip(solvers, cells[3:], strict=True))
    assert found["LM, 10 starts"] == found["vocabulary"] == "1.00"


def test_map_by_known_tokens(monkeypatch):
    monkeypatch.setattr(layer_inversion, "MAP_SCALES", (1.0,))
    monkeypatch.setattr(layer_inversion, "MAP_KNOWN", (0.75,))
    section = layer_inversion.map_section(range(1), picture=False)
    assert re.search(r"^\| 75% +\| 1\.00", section, re.MULTILINE)


def test_bias_grows_with_the_regulariser():
    drawn = plant(8, 4, 1.0, 0, heads=2)
    assert layer_inversion.papers_gamma(drawn) > 72 * 32
    assert layer_inversion.bias(drawn, layer_inversion.papers_gamma(drawn)) > 0.99
    small, smaller = (layer_inversion.bias(drawn, gamma) for gamma in (1e-6, 1e-8))
    assert small / smaller == pytest.approx(100.0, rel=0.1)
    J = drawn.layer.jacobian(drawn.truth)
    first_order = 1e-8 * np.linalg.solve(J.T @ J, drawn.truth.reshape(-1))
    assert smaller == pytest.approx(np.linalg.norm(first_order) / np.linalg.norm(drawn.truth), rel=1e-2)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_descent_is_followed_by_its_error():
    drawn = plant(8, 4, 1.0, 0, heads=2)
    result, errors = layer_inversion.descent(drawn)
    assert len(errors) == len(result.history)
    start = drawn.layer.starts(np.random.default_rng(0))["moments"]
    assert errors[0] == pytest.approx(drawn.error(start))
    assert errors[-1] == drawn.error(result.x) < 1e-10
    assert np.nanmin(errors[:-1]) > errors[-1]
