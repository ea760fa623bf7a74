"""A few log-probabilities: the order of the search, what is compared, and when it ends."""

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import topk  # noqa: E402
from attnfit.audit.engine.prefix import Prefix  # noqa: E402


def search_of(model, text, access="topk:5", defence="round:2"):
    seen = audit.observe(model, text, access, defence)
    checked = topk._checked(model, seen.shown, seen.array, seen.error, seen.error_bound)
    return topk.TopkSearch(model, *checked, model.n_vocabulary)


def test_candidates_tried_tell_where_to_look():
    random = torch.Generator().manual_seed(0)
    table = torch.randn(600, 12, generator=random)
    truth, tried = 417, list(range(200))
    missed = (table[tried] - table[truth]) @ torch.randn(12, 4, generator=random)
    shifted = missed + torch.randn(200, 1, generator=random)
    for numbers in (missed, shifted):
        assert truth in topk.likelihoods(table, tried, numbers).topk(3).indices
    assert torch.allclose(
        topk.likelihoods(table, tried, missed), topk.likelihoods(table, tried, shifted), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize(("n_tried", "n_shown"), [(0, 5), (1, 5), (50, 1)])
def test_too_little_to_learn_from(n_tried, n_shown):
    table = torch.randn(100, 8)
    told = topk.likelihoods(table, list(range(n_tried)), torch.randn(n_tried, n_shown))
    assert not told.any()


@pytest.mark.parametrize("access", ["topk:1", "topk:5"])
def test_cheap_comparisons_are_lower_bounds(tiny, access):  # noqa: F811
    text = tiny.private_texts[0]
    search, tokens = search_of(tiny, text, access), tiny.tokenise(text)
    prefix = Prefix(tiny, 5)
    prefix.extend(tokens[:4])
    states = prefix.candidates(range(1024))
    shown, values, allowed = search._shown[4], search._values[4], search._allowed[4]
    tried = topk.ShownCandidates(tiny, shown, values, allowed)
    for first in range(0, 1024, 100):
        tried.add(list(range(first, min(first + 100, 1024))), states[first : first + 100])
    # In float64, from the same states: what the library computes in float32 is off by the rounding of sums
    # of `width` products and of a few operations on logits of their size.
    head = tiny.head.weight.double()
    logits = states.double() @ head.T
    exact = (torch.log_softmax(logits, -1)[:, shown] - values).abs().div(allowed).amax(-1)
    products = (states.abs() @ tiny.head.weight.abs().T).amax()
    eps = torch.finfo(torch.float32).eps
    rounding = float((tiny.width * products + 8 * logits.abs().amax()) * eps / allowed.min())
    assert rounding < 0.1

    def same(one, other):
        return bool(((one - other).abs() <= rounding).all())

    assert (tried.gaps <= exact + rounding).all()
    assert tokens[4] in tried.agreeing
    assert same(tried.gaps[tried.agreeing], exact[tried.agreeing])
    for count in (1, 8, 200, 5000):
        tried.sharpen(count)
        # All are lower bounds and those of the nearest are exact, so the smallest are the smallest of all.
        assert same(tried.gaps.sort().values[:count], exact.sort().values[:count])
    # One number may agree better with another token; five do not.
    nearest = float(exact[tokens[4]])
    assert nearest <= 1.0 + rounding
    assert access == "topk:1" or nearest < float(np.delete(exact.numpy(), tokens[4]).min()) - 2 * rounding


@pytest.mark.parametrize("budget", [1, 2])
def test_one_candidate_proves_nothing(tiny, budget):  # noqa: F811
    text = tiny.private_texts[0]
    seen = audit.observe(tiny, text, "topk:5", "round:2")
    found = audit.invert(tiny, seen, known_prefix=tiny.tokenise(text)[:-1], budget=budget)
    assert found.positions[-1].log_odds < 5.0 if budget == 1 else found.text == text
    assert not (budget == 1 and found.verified)


def test_the_search_ends_where_doubt_will_stay(tiny, monkeypatch):  # noqa: F811
    """Under noise several tokens agree however many are tried."""
    monkeypatch.setattr(topk, "MANY", 512)
    text = tiny.private_texts[0]
    found = audit.invert(tiny, audit.observe(tiny, text, "topk:5", "noise:0.3"))
    counts = [position.n_candidates for position in found.positions]
    assert not found.verified
    assert np.median(counts) < 512


@pytest.mark.parametrize("defence", ["round:2", "round:1", "noise:0.01", "noise:0.1"])
def test_the_next_position_claims_nothing_wrong(tiny, monkeypatch, defence):  # noqa: F811
    monkeypatch.setattr(topk, "MANY", 128)
    claims = dict.fromkeys((64, 10**6), 0)
    for rivals in claims:
        monkeypatch.setattr(topk, "RIVALS", rivals)
        for text in (*tiny.private_texts[:4], "Zebras yawn; my PIN is 4921!"):
            found = audit.invert(tiny, audit.observe(tiny, text, "topk:5", defence))
            assert found.text == text or not found.verified
            claims[rivals] += found.verified
    assert claims[64] >= claims[10**6]
    assert claims[64] >= 1 or defence.startswith("noise")


def test_the_next_position_removes_doubt(tiny, monkeypatch):  # noqa: F811
    """A rival of a token must also give what follows: most that come near at one position do not.

    Three numbers with one decimal leave doubt. Rounding of a forward pass moves a gap by a thousandth of
    itself, and so log odds of 0.003 nats.
    """
    monkeypatch.setattr(topk, "MANY", 128)
    text = tiny.private_texts[0]
    seen = audit.observe(tiny, text, "topk:3", "round:1")
    after = audit.invert(tiny, seen)
    monkeypatch.setattr(topk, "RIVALS", 10**6)
    before = audit.invert(tiny, seen)
    assert after.text == before.text == text
    gained = np.subtract(after.log_odds, before.log_odds)
    certain = topk.certain_log_odds(len(before.tokens))
    assert (gained >= 0.0).all()
    assert any(
        gain > 1.0 and old < certain - 0.3 and new > certain + 0.3
        for gain, old, new in zip(gained, before.log_odds, after.log_odds, strict=True)
    )


def test_going_back_ends(tiny, monkeypatch):  # noqa: F811
    """Where noise lets many tokens agree and then none does, the vocabulary is not tried for all of them."""
    monkeypatch.setattr(topk, "COMMON", 100)
    monkeypatch.setattr(topk, "RETURNED", 300)
    seen = audit.observe(tiny, tiny.private_texts[0], "topk:1", "noise:3.0")
    # Nothing gives this at position 3.
    seen.array[3], seen.error[3] = -90.0, 0.01
    found = audit.invert(tiny, seen)
    assert found.failed_at is not None
    assert "before it several tokens agree, and one may be wrong" in found.message
    assert found.n_candidates < 3 * 1024 + 300 + 3 * 1024


def test_the_head_is_factored_once(tiny, monkeypatch):  # noqa: F811
    seen = audit.observe(tiny, tiny.private_texts[0], "logits")
    assert audit.invert(tiny, seen).verified

    def again(*_):
        raise AssertionError("factored again")

    monkeypatch.setattr(torch.linalg, "eigh", again)
    assert audit.invert(tiny, seen).verified
