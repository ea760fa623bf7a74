"""Model files of every version that was ever written are read, for ever."""

import json
from pathlib import Path

import numpy as np
import pytest

import attnfit

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*/*.safetensors"))
ROWS = np.array([[0.1, -0.2, 0.3], [0.5, 0.0, -0.5], [-1.0, 0.2, 0.4]])


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_model_of_every_version_predicts_what_it_did(path):
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem]
    model = attnfit.load(path)
    assert type(model).__name__ == expected["class"]
    groups = [[0, 1, 1]] if hasattr(model, "n_groups_") else []
    labels = {"absorb": expected["absorb"]} if "absorb" in expected else {}
    found = model.predict(ROWS, *groups, **labels)
    assert np.allclose(found, expected["predicted"], rtol=1e-12, atol=1e-300)
    if hasattr(model, "summary"):
        assert str(model.summary())


def test_every_estimator_has_one():
    kinds = {
        content["class"]
        for p in GOLDEN.glob("*/expected.json")
        for content in json.loads(p.read_text()).values()
    }
    savable = {n for n in attnfit.__all__ if n.endswith("Regressor") and hasattr(getattr(attnfit, n), "save")}
    assert kinds == savable
