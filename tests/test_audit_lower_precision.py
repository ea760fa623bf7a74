"""Observations of a run in bfloat16: errors that are measured, and texts that are verified under them."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
import torch
from audit_families import random_module, text_of, trained_tokenizer
from audit_models import audit_cache  # noqa: F401

from attnfit import audit
from attnfit.audit import calibration
from attnfit.audit.inverting import search_for
from attnfit.audit.lower_precision import run_error
from attnfit.audit.models.model import Model

RUN = "run:bfloat16"


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, audit_cache):  # noqa: F811
    """One small Llama for all tests, calibrated once and in haste."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"N_SEQUENCES": 60, "N_CONTEXTS": 4, "LENGTH": 24}.items():
            patch.setattr(calibration, name, size)
        made = Model("llama", random_module("llama"), tokenizer, "causal")
        for layer in (2, "attention:1"):
            run_error(made, layer, "bfloat16")
        yield made


@pytest.fixture(scope="module")
def texts(tokenizer):
    return [text_of(tokenizer, length) for length in range(4, 16)]


def in_bfloat16(module, tokens, block):
    """States of the library's own model, loaded as bfloat16."""
    with torch.no_grad():
        lower = module.to(torch.bfloat16)
        seen = lower.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[block]
    return seen[0].float().numpy()


@pytest.mark.parametrize(("access", "every"), [("hidden:2", 1), ("attention:1", 4)])
def test_all_texts_are_verified(model, texts, access, every):
    for text in texts[::every]:
        found = audit.invert(model, audit.observe(model, text, access, RUN))
        assert (found.text, found.verified) == (text, True), found.message


def test_states_from_elsewhere_are_said_to_be_of_such_a_run(model, texts):
    module = random_module("llama")
    for text in texts[:3]:
        states = in_bfloat16(module, model.tokenise(text), 2)
        found = audit.invert_hidden(model, states, 2, error=RUN)
        assert (found.text, found.verified) == (text, True)
        # Without being told so, the attack takes the errors for another text's.
        assert not audit.invert_hidden(model, states, 2, budget=50).verified
    output = audit.observe(model, texts[0], "attention:1", RUN).array
    found = audit.invert_attention(model, output, 1, error=RUN)
    assert (found.text, found.verified) == (texts[0], True)


def test_another_text_is_never_accepted(model, texts):
    """Neither one of the same length nor one with a single token exchanged for one like it."""
    for text in texts[:6]:
        truth = model.tokenise(text)
        search = search_for(model, audit.observe(model, text, "hidden:2", RUN))
        assert search.contradiction(truth) == ""
        other = model.tokenise(text_of(model.tokenizer, 40))[: len(truth)]
        assert search.contradiction(other)
        table = model.embeddings
        for place in (0, len(truth) // 2, len(truth) - 1):
            order = (table - table[truth[place]]).square().sum(1).argsort()
            exchanged = [*truth[:place], int(order[1]), *truth[place + 1 :]]
            assert search.contradiction(exchanged)


@pytest.mark.parametrize("layer", [2, "attention:1"])
def test_the_errors_are_measured(model, texts, layer):
    """On texts that they were not measured on: as large as said, and within the limit."""
    found = run_error(model, layer, "bfloat16")
    kind = f"hidden:{layer}" if layer == 2 else layer
    misfits, ratios = [], []
    for text in texts:
        plain, lower = (audit.observe(model, text, kind, defence) for defence in (None, RUN))
        assert np.array_equal(lower.error, found.errors(len(lower.array)))
        ratios.append(((lower.array - plain.array) / lower.error)[1:])
        misfits += np.sqrt(np.mean(((lower.array - plain.array) / lower.error) ** 2, axis=1)).tolist()
    # Channels' sizes over texts in general, of which these are a few.
    assert 0.5 < np.sqrt(np.mean(np.concatenate(ratios) ** 2)) < 2.0
    assert max(misfits) < 1.2 * found.limit
    assert found.limit >= 1.0


def test_weights_are_those_of_a_model_loaded_so(model, texts):
    lower = model.in_dtype("bfloat16")
    assert {weight.dtype for weight in lower.module.parameters()} == {torch.bfloat16}
    assert model.module.dtype == torch.float32
    tokens = model.tokenise(texts[0])
    module = random_module("llama")
    reference = module.from_pretrained(
        None, config=module.config, state_dict=module.state_dict(), dtype=torch.bfloat16
    )
    with torch.no_grad():
        expected = reference.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[2]
    np.testing.assert_array_equal(lower.states(tokens, 2), expected[0].float().numpy())


def test_a_defence_after_such_a_run(model, texts):
    seen = audit.observe(model, texts[0], "hidden:2", f"{RUN}+noise:0.05")
    assert (seen.error > audit.observe(model, texts[0], "hidden:2", RUN).error).all()
    assert audit.invert(model, seen).text == texts[0]
    withheld = audit.observe(model, texts[0], "hidden:2", f"{RUN}+drop0")
    assert len(withheld.array) == len(model.tokenise(texts[0])) - 1
    running = run_error(model, 2, "bfloat16").running.numpy()
    np.testing.assert_array_equal(withheld.error[0], running)


def test_what_is_not_measured_is_refused(model, texts):
    for access in ("logits", "topk:5"):
        with pytest.raises(audit.AuditError, match=rf"not for {access}"):
            audit.observe(model, texts[0], access, RUN)
    with pytest.raises(audit.AuditError, match=r"'run:int8' is not known; there is run:bfloat16"):
        audit.observe(model, texts[0], "hidden:2", "run:int8")
    for error in ("run:bfloat16+int8", "large"):
        with pytest.raises(audit.AuditError, match="error must be numbers or 'run:bfloat16'"):
            audit.invert_hidden(model, np.ones((2, model.width)), 2, error=error)


def test_an_audit_of_such_a_run(model, texts):
    """An inversion that is cut by the clock leaves the copy in bfloat16 intact."""
    report = audit.run(model, texts[:2], ["hidden:2", "logits"], [RUN], budget=1000)
    pair = report.pair("hidden:2", RUN)
    assert (pair.token_share, pair.verified, pair.false_claims) == (1.0, 2, 0)
    assert not report.pair("logits", RUN).tested
    assert "not for logits" in report.pair("logits", RUN).message
