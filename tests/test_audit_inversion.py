"""Text recovered from what a small model gives away."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import hidden  # noqa: E402
from attnfit.audit.uncertainty import Uncertainty  # noqa: E402

# What it has memorised, what it could have, and what it never saw.
TEXTS = ("private", "The quiet doctor sold the broken clock yesterday.", "Zebras yawn; my PIN is 4921!")


def text_of(model, text):
    return model.private_texts[7] if text == "private" else text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("access", ["hidden:1", "hidden:2", "hidden:4", "hidden:5", "logits", "topk:5"])
def test_everything_comes_back(tiny, access, text):  # noqa: F811
    text = text_of(tiny, text)
    found = audit.invert(tiny, audit.observe(tiny, text, access))
    assert found.text == text
    assert found.tokens == tiny.tokenise(text)
    assert found.verified
    assert found.failed_at is None
    assert len(found.margins) == len(found.distances) == len(found.methods) == len(found.tokens)
    assert all(margin > 0 for margin in found.margins)
    assert found.n_candidates >= len(found.tokens)
    assert "recovered" in str(found)


@pytest.mark.parametrize("enough", [0.0, 0.618, 2.0])
def test_drafts_are_verified_while_they_are_right_often_enough(tiny, monkeypatch, enough):  # noqa: F811
    """A share of two is never reached: after the first wrong one drafts are but candidates among others."""
    monkeypatch.setattr(hidden, "RIGHT_ENOUGH", enough)
    text = tiny.private_texts[7]
    seen = audit.observe(tiny, text, "hidden:3")
    states, errors = torch.from_numpy(seen.array), Uncertainty(torch.zeros(seen.array.shape))
    search = hidden.HiddenSearch(tiny, 3, states, errors, tiny.n_vocabulary)
    draft = search._draft()
    found = search.run([])
    assert found.verified and found.text == text
    right = [token == other for token, other in zip(draft, found.tokens, strict=True)]
    assert True in right[right.index(False) :]
    # Every token that was found tells of its draft, once.
    assert (search._n_right, search._n_judged) == (sum(right), len(right))
    verified, shares = [method == "draft" for method in found.methods], np.cumsum(right) / np.arange(1, 14)
    for place in range(1, len(right)):
        if right[place] and verified[place - 1] == right[place - 1]:
            assert verified[place] == (verified[place - 1] or shares[place - 1] >= enough)


@pytest.mark.parametrize("defence", ["float16", "bfloat16", "int8", "noise:0.05", "noise:0.05std", "round:2"])
@pytest.mark.parametrize("access", ["hidden:1", "hidden:2"])
def test_light_defences_do_not_help(tiny, access, defence):  # noqa: F811
    text = tiny.private_texts[11]
    found = audit.invert(tiny, audit.observe(tiny, text, access, defence))
    assert found.text == text
    assert found.verified


@pytest.mark.parametrize("access", ["logits", "topk:5"])
def test_rounded_probabilities_do_not_help(tiny, access):  # noqa: F811
    text = tiny.private_texts[11]
    assert audit.invert(tiny, audit.observe(tiny, text, access, "round:2")).text == text


def test_overwhelming_noise_is_not_called_recovery(tiny):  # noqa: F811
    text = tiny.private_texts[11]
    found = audit.invert(tiny, audit.observe(tiny, text, "hidden:2", "noise:5"))
    assert found.text != text


def test_layers_are_linear_where_they_say(tiny):  # noqa: F811
    from attnfit.audit.logits import last_states

    tokens = tiny.tokenise(tiny.private_texts[0])
    logits = tiny.logits(tokens)
    states, _ = last_states(tiny, logits + 3.0)
    np.testing.assert_allclose(states, tiny.states(tokens, 5), atol=1e-3)


def test_a_known_prefix_is_taken_as_known(tiny):  # noqa: F811
    text = tiny.private_texts[2]
    tokens = tiny.tokenise(text)
    for access in ("hidden:3", "topk:2"):
        found = audit.invert(tiny, audit.observe(tiny, text, access), known_prefix=tokens[:2])
        assert found.tokens == tokens
        assert found.methods[:2] == ["known", "known"]


def test_a_wrong_prefix_is_named(tiny):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[2])
    for access in ("hidden:3", "topk:2"):
        seen = audit.observe(tiny, tiny.private_texts[2], access)
        with pytest.raises(audit.ObservationMismatch, match=r"known_prefix\[1\]"):
            audit.invert(tiny, seen, known_prefix=[tokens[0], 5])
        with pytest.raises(audit.AuditError, match="known_prefix has"):
            audit.invert(tiny, seen, known_prefix=[*tokens, 5])
        with pytest.raises(audit.AuditError, match="not a token"):
            audit.invert(tiny, seen, known_prefix=[4000])


def test_another_layer_is_noticed(tiny):  # noqa: F811
    states = tiny.states(tiny.tokenise(tiny.private_texts[0]), 4)
    found = audit.invert_hidden(tiny, states, 2)
    assert found.failed_at == 0
    assert not found.verified
    assert "another model or layer" in found.message


def test_lost_first_positions_are_noticed(tiny):  # noqa: F811
    states = tiny.states(tiny.tokenise(tiny.private_texts[0]), 3)
    assert "first positions" in audit.invert_hidden(tiny, states[2:], 3).message


def test_a_corrupt_position_does_not_corrupt_the_rest(tiny):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[0])
    states = tiny.states(tokens, 3).copy()
    states[4] = np.random.default_rng(0).standard_normal(states.shape[1])
    found = audit.invert_hidden(tiny, states, 3)
    assert found.failed_at == 4
    assert found.tokens == tokens[:4]
    assert "position 4" in found.message


def test_another_model_is_named(tiny):  # noqa: F811
    seen = audit.observe(tiny, tiny.private_texts[0], "hidden:1")
    other = audit.Observation(seen.access, seen.array, seen.error, fingerprint="0" * 16)
    with pytest.raises(audit.ObservationMismatch, match="another model"):
        audit.invert(tiny, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none(tiny, bad):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[0])
    states, logits = tiny.states(tokens, 1).copy(), tiny.logits(tokens).copy()
    states[3, 5] = logits[3, 5] = bad
    with pytest.raises(audit.ObservationMismatch, match=r"states\[3, 5\]"):
        audit.invert_hidden(tiny, states, 1)
    with pytest.raises(audit.ObservationMismatch, match=r"logits\[3, 5\]"):
        audit.invert_logits(tiny, logits)
    with pytest.raises(audit.ObservationMismatch, match=r"values\[0, 1\]"):
        audit.invert_topk(tiny, [[1, 2]], [[-1.0, bad]])


@pytest.mark.parametrize("shape", [(4,), (0, 64), (4, 63), (2, 4, 64)])
def test_wrong_shapes(tiny, shape):  # noqa: F811
    with pytest.raises(audit.ObservationMismatch, match="shape"):
        audit.invert_hidden(tiny, np.zeros(shape), 1)
    with pytest.raises(audit.ObservationMismatch, match="shape"):
        audit.invert_logits(tiny, np.zeros(shape))


def test_other_bad_requests(tiny):  # noqa: F811
    states = tiny.states([1, 2, 3], 1)
    with pytest.raises(audit.AuditError, match="budget"):
        audit.invert_hidden(tiny, states, 1, budget=0)
    with pytest.raises(audit.AuditError, match="layer must be 1 to 5"):
        audit.invert_hidden(tiny, states, 6)
    with pytest.raises(audit.ObservationMismatch, match="not a token"):
        audit.invert_topk(tiny, [[1, 1024]], [[-1.0, -2.0]])
    with pytest.raises(audit.ObservationMismatch, match="explain"):
        audit.invert_logits(tiny, np.random.default_rng(0).standard_normal((3, 1024)))


def test_a_small_budget_keeps_what_was_found(tiny):  # noqa: F811
    tokens = tiny.tokenise("Zebras yawn; my PIN is 4921!")
    found = audit.invert_hidden(tiny, tiny.states(tokens, 4), 4, budget=1)
    assert found.tokens == tokens[: found.failed_at]
    assert not found.verified


def test_calibrations_are_kept(tiny, audit_cache, monkeypatch):  # noqa: F811
    from attnfit.audit import calibration

    first = calibration.calibrate(tiny, [2])[2]
    tiny.calibrations.clear()
    monkeypatch.setattr(calibration, "_learn", None)
    again = calibration.calibrate(tiny, [2])[2]
    assert torch.equal(first.within.matrix, again.within.matrix)
    assert any((audit_cache / "calibration").iterdir())
