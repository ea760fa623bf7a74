"""What leaks, what defences do to it, and what they cost."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit.defences import apply_defence  # noqa: E402

RNG = np.random.default_rng(0)
STATES = (RNG.standard_normal((40, 30)) * np.exp(2 * RNG.standard_normal(30))).astype(np.float32)


def test_roundings_are_those_of_torch():
    given = torch.from_numpy(STATES)
    np.testing.assert_array_equal(apply_defence(STATES, "float16").array, given.half().float())
    np.testing.assert_array_equal(apply_defence(STATES, "bfloat16").array, given.bfloat16().float())
    np.testing.assert_array_equal(apply_defence(STATES, "round:2").array, np.round(STATES, 2))


EVERY = "float16 bfloat16 int8 int4 int8:channel int4:channel noise:0.1 noise:0.2std round:1 int8+noise:0.1"
UNKNOWN = "hidden hidden:x hidden:99 attention:4 topk:0 topk:9999 weights"


@pytest.mark.parametrize("defence", EVERY.split())
def test_errors_are_as_large_as_said(defence):
    defended = apply_defence(STATES, defence)
    actual = np.sqrt(np.mean(((defended.array - STATES) / np.maximum(defended.error, 1e-30)) ** 2))
    # Numbers below half a step of the grid, and all those in one binade, are not uniform.
    assert 0.5 < actual < 1.2
    assert np.array_equal(apply_defence(STATES, defence).array, defended.array)


def test_noise_comes_in_both_units():
    row = apply_defence(STATES, "noise:0.1").error
    np.testing.assert_allclose(row[:, 0], 0.1 * np.sqrt(np.mean(STATES**2, axis=1)), rtol=1e-5)
    channel = apply_defence(STATES, "noise:0.1std").error
    np.testing.assert_allclose(channel[0], 0.1 * STATES.std(0), rtol=1e-5)


@pytest.mark.parametrize("defence", ["int9", "noise:x", "float8", "", "topk:5", "int8,noise:0.1"])
def test_unknown_defences(defence):
    if defence == "":
        assert np.array_equal(apply_defence(STATES, defence).array, STATES)
        return
    with pytest.raises(audit.AuditError, match="bfloat16"):
        apply_defence(STATES, defence)


def test_float16_may_overflow():
    with pytest.raises(audit.AuditError, match="bfloat16"):
        apply_defence(STATES * 1e6, "float16")


@pytest.mark.parametrize("access", UNKNOWN.split())
def test_unknown_access(tiny, access):  # noqa: F811
    with pytest.raises(audit.AuditError, match=r"must be|exceeds"):
        audit.observe(tiny, "A quiet train.", access)


def test_accesses_agree_with_the_model(tiny):  # noqa: F811
    text = tiny.private_texts[3]
    tokens = tiny.tokenise(text)
    logits = torch.from_numpy(tiny.logits(tokens))
    seen = audit.observe(tiny, text, "topk:5")
    values, shown = torch.log_softmax(logits, -1).topk(5)
    np.testing.assert_allclose(seen.array, values, atol=1e-5)
    np.testing.assert_array_equal(seen.shown, shown)
    assert seen.fingerprint == tiny.fingerprint
    # The residual stream after a GPT-2 block without its feed-forward part: embedding plus attention.
    attended = audit.observe(tiny, text, "attention:0").array
    block = tiny.blocks[0]
    entering = torch.from_numpy(tiny.states(tokens, 0))
    with torch.no_grad():
        middle = entering + torch.from_numpy(attended)
        np.testing.assert_allclose(tiny.states(tokens, 1), middle + block.mlp(block.ln_2(middle)), atol=1e-4)


def test_dropping_position_zero(tiny):  # noqa: F811
    text = tiny.private_texts[0]
    seen = audit.observe(tiny, text, "topk:3", "drop0")
    assert len(seen.array) == len(seen.shown) == len(seen.error_bound) == len(tiny.tokenise(text)) - 1


def test_text_beyond_the_positions(tiny):  # noqa: F811
    with pytest.raises(audit.AuditError, match="128"):
        audit.observe(tiny, "train " * 200)


@pytest.mark.parametrize("access", ["hidden:2", "attention:1", "logits"])
def test_utility_falls_with_noise(tiny, access):  # noqa: F811
    text = tiny.private_texts[0]
    lost = [
        audit.utility_lost(tiny, text, audit.observe(tiny, text, access, defence)).divergence
        for defence in (None, "noise:0.05", "noise:0.5")
    ]
    assert lost[0] < 1e-5 < lost[1] < lost[2]
    with pytest.raises(audit.AuditError, match="nothing goes on from access 'topk:5'"):
        audit.utility_lost(tiny, text, audit.observe(tiny, text, "topk:5"))


def test_utility_is_that_of_the_rest_of_the_model(tiny):  # noqa: F811
    """Against the blocks called one by one."""
    text = tiny.private_texts[0]
    seen = audit.observe(tiny, text, "hidden:3", "noise:0.3")
    x = torch.from_numpy(seen.array)[None]
    with torch.no_grad():
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
        x = tiny.blocks[3](x, None, mask)
        x = x[0] if isinstance(x, tuple) else x
        given = torch.log_softmax(tiny.head(tiny.final_norm(x))[0], -1)
    plain = torch.log_softmax(torch.from_numpy(tiny.logits(tiny.tokenise(text))), -1)
    expected = torch.nn.functional.kl_div(given, plain, log_target=True, reduction="none").sum(-1).mean()
    assert audit.utility_lost(tiny, text, seen).divergence == pytest.approx(float(expected), rel=1e-3)


def test_utility_of_an_attention_is_that_of_the_blocks_called_one_by_one(tiny):  # noqa: F811
    text = tiny.private_texts[0]
    tokens = tiny.tokenise(text)
    plain = torch.log_softmax(torch.from_numpy(tiny.logits(tokens)), -1)
    for defence in ("noise:0.3", "noise:0.3+drop0"):
        seen = audit.observe(tiny, text, "attention:3", defence)
        start = len(seen.dropped)
        attended = np.concatenate([np.zeros((start, tiny.width), np.float32), seen.array])
        block = tiny.blocks[3]
        with torch.no_grad():
            middle = torch.from_numpy(tiny.states(tokens, 3) + attended)
            last = tiny.final_norm(middle + block.mlp(block.ln_2(middle)))
            given = torch.log_softmax(tiny.head(last), -1)
        expected = (plain.exp() * (plain - given)).sum(-1)[start:].mean()
        assert audit.utility_lost(tiny, text, seen).divergence == pytest.approx(float(expected), rel=1e-3)
