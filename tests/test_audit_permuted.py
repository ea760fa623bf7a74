"""States in unknown order: the text comes back in its own, and nothing false is claimed."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import permuted  # noqa: E402
from attnfit.audit.inverting import search_for  # noqa: E402


def seen_of(model, array, form="permuted:2", error=0.0):
    """An observation that a user brings."""
    from attnfit.audit.forms import parse_access

    array = np.asarray(array, dtype=np.float32)
    return audit.Observation(parse_access(form), array, np.full_like(array, error))


def test_the_form_keeps_its_word():
    audit.check_access("permuted:2")


@pytest.mark.parametrize("seed", [0])
def test_any_order_gives_the_text(tiny, seed):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[seed])
    states = tiny.states(tokens, 2)
    order = np.random.default_rng(seed).permutation(len(tokens))
    found = audit.invert(tiny, seen_of(tiny, states[order]))
    assert found.tokens == tokens and found.verified
    # What leaves is in some other order than that of the text.
    leaked = audit.observe(tiny, tokens, "permuted:2").array
    assert not np.array_equal(leaked, states)
    np.testing.assert_array_equal(np.sort(leaked, axis=0), np.sort(states, axis=0))


def test_what_is_tried_for_one_row_tells_of_all(tiny, monkeypatch):  # noqa: F811
    """Where the nearest row is another one than the next token gives, its scan has tried that token, too."""
    tokens = tiny.tokenise(tiny.private_texts[0])[:6]
    last = tokens[-1]
    monkeypatch.setattr(permuted, "ROWS", ((1, None),))
    monkeypatch.setattr(
        permuted.PermutedSearch, "_likely", lambda self, name, prior, seen, size: [last][len(seen) :]
    )
    found = audit.invert(tiny, audit.observe(tiny, tokens, "permuted:2"))
    assert found.tokens == tokens and found.verified
    assert "scan" in {position.method for position in found.positions}


@pytest.mark.parametrize(
    "control", ["other text", "one token", "row missing", "row twice", "other layer", "noise"]
)
def test_nothing_false_is_claimed(tiny, control):  # noqa: F811
    text, other = tiny.private_texts[:2]
    tokens = tiny.tokenise(text)
    states = tiny.states(tokens, 2)
    if control == "other text":
        states[6:] = tiny.states(tiny.tokenise(other), 2)[6 : len(states)]
    elif control == "one token":
        states[5] = tiny.states([*tokens[:5], tokens[5] + 1], 2)[5]
    elif control == "row missing":
        states = np.delete(states, 4, axis=0)
    elif control == "row twice":
        states[5] = states[4]
    elif control == "other layer":
        states = tiny.states(tokens, 3)
    else:
        states = states + 0.3 * states.std(0) * np.random.default_rng(0).standard_normal(states.shape)
    found = audit.invert(tiny, seen_of(tiny, states[::-1]), budget=40)
    assert not found.verified
    assert "rows left at position" in found.message


def test_the_truth_of_the_search_itself(tiny):  # noqa: F811
    tokens = tiny.tokenise(tiny.private_texts[0])
    search = search_for(tiny, audit.observe(tiny, tokens, "permuted:2", "int8"))
    assert search.contradiction(tokens) == ""
    assert "at position 3" in search.contradiction([*tokens[:3], tokens[3] + 1, *tokens[4:]])


def test_noise_that_hides_rows_is_not_claimed(tiny):  # noqa: F811
    for text in tiny.private_texts[:1]:
        found = audit.invert(tiny, audit.observe(tiny, text, "permuted:1", "noise:1"), budget=40)
        assert found.text == text or not found.verified


def test_what_cannot_be_had_is_said(tiny):  # noqa: F811
    text = tiny.private_texts[0]
    with pytest.raises(audit.AuditError, match="a row of permuted:2 was withheld"):
        audit.invert(tiny, audit.observe(tiny, text, "permuted:2", "drop0"))
    with pytest.raises(audit.AuditError, match="order of the rows is not known"):
        audit.invert(tiny, audit.observe(tiny, text, "permuted:2"), known_prefix=[1])
    with pytest.raises(audit.AuditError, match="not for permuted:2"):
        audit.observe(tiny, text, "permuted:2", "run:bfloat16")
    with pytest.raises(audit.ObservationMismatch, match=r"must have shape \(n, 64\)"):
        audit.invert(tiny, seen_of(tiny, np.zeros((3, 63))))
    with pytest.raises(audit.AuditError, match=r"layer must be 1 to 5"):
        audit.observe(tiny, text, "permuted:0")


def test_the_report(tiny):  # noqa: F811
    report = audit.run(tiny, tiny.private_texts[:1], ["permuted:2"], [None, "float16", "drop0"], budget=60)
    pair = report.pair("permuted:2", "float16")
    assert (pair.token_share, pair.verified, pair.predicted) == (1.0, 1, pytest.approx(1.0, abs=1e-3))
    assert pair.divergence < 1e-3
    assert not report.pair("permuted:2", "drop0").tested
    assert sum(control.false_claims for control in report.controls) == 0
