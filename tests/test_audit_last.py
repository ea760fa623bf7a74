"""The text of one state, that of the last position after the first block."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_audit_engine import model  # noqa: E402, F401

from attnfit import audit  # noqa: E402
from attnfit.audit.cells import Cell, Key  # noqa: E402
from attnfit.audit.engine.first_block import FirstBlock, spread  # noqa: E402
from attnfit.audit.errors import AuditError, ObservationMismatch, Unsupported  # noqa: E402
from attnfit.audit.last import LastRowSearch, token_frequencies  # noqa: E402
from attnfit.audit.mixture import MixtureFinder, TokenMixture, _sharpened  # noqa: E402
from attnfit.audit.summary import summarise  # noqa: E402

BUDGET = 1 << 20
TEXTS = ([7, 300, 41], [12, 5, 99, 640])


def text_of(tiny, length, place=0):  # noqa: F811
    """The first tokens of a sentence that the model has memorised."""
    return tiny.tokenise(tiny.private_texts[place])[:length]


def searched(tiny, row, longest=3):  # noqa: F811
    return LastRowSearch(tiny, row, BUDGET, longest=longest)


def true_mixture(block, tokens):
    """Softmax of scores times values, in the order of the definition."""
    place = block.place(len(tokens))
    query, key, value = block.asked(tokens[-1], place)
    scores, values = [block.scores(query, key[:, None])[:, 0]], [value]
    for d, token in enumerate(tokens[-2::-1], 1):
        entries = block.entries(place - d)
        scores.append(block.scores(query, entries.keys[:, token, None])[:, 0])
        values.append(spread(entries.values[:, token], len(query)))
    shares = torch.softmax(torch.stack(scores), 0)
    return (shares[..., None] * torch.stack(values)).sum(0)


@pytest.mark.parametrize("tokens", TEXTS)
def test_the_block_put_together_again_is_the_models_own(model, tokens):  # noqa: F811
    block = FirstBlock(model, 6)
    mixture = true_mixture(block, tokens)
    plain = model.states(tokens, 1)[-1]
    for precision in (torch.float32, torch.float64):
        given = block.output(tokens[-1], block.place(len(tokens)), mixture.to(precision)[None])[0]
        assert given.dtype == precision
        np.testing.assert_allclose(given, plain, atol=2e-5 * np.abs(plain).max())
    other = true_mixture(block, [*tokens[:-2], tokens[-2] + 1, tokens[-1]])
    given = block.output(tokens[-1], block.place(len(tokens)), other[None])[0]
    assert np.abs(given.numpy() - plain).max() > 1e-3 * np.abs(plain).max()
    assert model.module.config._attn_implementation != "attnfit_mixture"


def test_an_attention_that_is_not_exchanged_is_refused(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(FirstBlock, "output", lambda *_: torch.zeros(1, tiny.width, dtype=torch.float64))
    with pytest.raises(Unsupported, match="put together again"):
        FirstBlock(tiny, 4)


@pytest.mark.parametrize("length", [3, 4])
def test_the_mixture_of_a_state_is_found(tiny, length):  # noqa: F811
    tokens = text_of(tiny, length)
    block, prior = FirstBlock(tiny, 6), token_frequencies(tiny)
    generator = torch.Generator().manual_seed(0)
    finder = MixtureFinder(block, prior, tokens[-1], length, generator)
    state = torch.from_numpy(tiny.states(tokens, 1)[-1])
    found = finder.find(state)
    np.testing.assert_allclose(found.values, true_mixture(block, tokens), atol=2e-2)
    search = TokenMixture(block, prior, found, generator)
    assert search.tokens(length, BUDGET) == tokens
    # Rows of the true tokens cancel to rounding, those of others do not.
    wrong = [tokens[0] + 1, *tokens[1:]]
    assert search.misfit(tokens[-2::-1]) < 50.0 < 1e3 < search.misfit(wrong[-2::-1])
    assert MixtureFinder(block, prior, tokens[-1] + 1, length, generator).find(state) is None


def test_chances_keep_a_perplexity_and_are_never_sharper_than_they_were():
    scores = torch.linspace(0.0, 5000.0, 1000).double()
    for perplexity in (2.0, 30.0, 300.0):
        entropy = torch.special.entr(_sharpened(scores, perplexity)).sum()
        assert float(entropy.exp()) == pytest.approx(perplexity, rel=1e-2)
    np.testing.assert_allclose(_sharpened(scores * 1e-4, 2.0), torch.softmax(scores * 1e-4, 0))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_texts_are_read_from_their_last_state(tiny, length):  # noqa: F811
    tokens = text_of(tiny, length)
    found = searched(tiny, audit.observe(tiny, tokens, "last:1").array).run([])
    assert (found.tokens, found.verified, found.failed_at) == (tokens, True, None)
    assert set(found.methods) == {"joint"} and found.n_candidates > 0


@pytest.mark.parametrize("case", ["moved", "noise", "layer"])
def test_rows_of_no_text_are_not_claimed(tiny, case):  # noqa: F811
    tokens, rng = text_of(tiny, 2), np.random.default_rng(0)
    row = tiny.states(tokens, 1)[-1:]
    if case == "moved":
        row = row + 1e-4 * row.std() * rng.standard_normal(row.shape)
    elif case == "noise":
        row = row.std() * rng.standard_normal(row.shape)
    elif case == "layer":
        row = tiny.states(tokens, 2)[-1:]
    else:
        other = deepcopy(tiny)
        with torch.no_grad():
            for weight in other.module.parameters():
                weight.mul_(
                    1.0 + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
                )
        row = other.states(tokens, 1)[-1:]
    search = searched(tiny, row, longest=2)
    assert "misses the state" in search.contradiction(tokens)
    found = search.run([])
    assert not found.verified and found.tokens == []
    assert found.message.endswith("not recovered within the budget, and no protection proven")


def test_tokens_that_are_one_to_the_model_are_ambiguous(tiny):  # noqa: F811
    tokens = text_of(tiny, 2)
    twin = next(token for token in range(900) if token not in tokens)
    other = replace(deepcopy(tiny), calibrations={}, ways={})
    with torch.no_grad():
        other.embeddings[twin] = other.embeddings[tokens[0]]
    found = searched(other, other.states(tokens, 1)[-1:], longest=2).run([])
    assert not found.verified and "ambiguous" in found.message
    assert {found.tokens[0], *found.alternatives[0]} == {tokens[0], twin}


def test_a_first_token_that_nothing_attends_to_is_not_claimed(tiny, monkeypatch):  # noqa: F811
    """Where a longer text gives the same state, neither is known."""
    tokens = text_of(tiny, 2)
    search = searched(tiny, tiny.states(tokens, 1)[-1:], longest=2)
    missed = search._missed
    monkeypatch.setattr(search, "_missed", lambda texts: missed([text[-2:] for text in texts]))
    found = search.run([])
    assert not found.verified and "a text of 3 tokens gives the state too" in found.message


def test_what_cannot_be_read_is_refused(tiny, monkeypatch):  # noqa: F811
    row = tiny.states([5, 6], 1)
    with pytest.raises(AuditError, match="one row, the state of the last position, not 2"):
        searched(tiny, row)
    with pytest.raises(ObservationMismatch, match="shape"):
        searched(tiny, row[-1:, :10])
    with pytest.raises(ObservationMismatch, match=r"states\[0, 3\] is nan"):
        searched(tiny, np.where(np.arange(tiny.width) == 3, np.nan, row[-1:]))
    with pytest.raises(AuditError, match="known_prefix cannot be used with one row"):
        searched(tiny, row[-1:]).run([5])
    with pytest.raises(AuditError, match="no attack here on last:1 with errors"):
        audit.invert(tiny, audit.observe(tiny, [5, 6], "last:1", "int8"))
    monkeypatch.setattr("attnfit.audit.last.LOOSEST", 0.0)
    with pytest.raises(Unsupported, match="the same text beside another differs"):
        searched(tiny, row[-1:]).contradiction([5, 6])


def test_texts_that_are_not_found_count_as_not_tested():
    def cell(place, tokens):
        right = [True] * len(tokens)
        return Cell(Key("last:1", "none", place), "done", "told", 4, tokens, right, verified=bool(tokens))

    nothing = summarise("last:1", "none", [cell(0, []), cell(1, [])], None, 2)
    assert (nothing.tested, nothing.complete, nothing.n_open, nothing.message) == (False, False, 2, "told")
    assert nothing.as_json()["token_share"] is None
    some = summarise("last:1", "none", [cell(0, [1, 2, 3, 4]), cell(1, [])], None, 2)
    assert (some.tested, some.complete, some.token_share) == (True, False, 0.5)
    every = summarise("last:1", "none", [cell(0, [1, 2, 3, 4])], None, 1)
    assert every.tested and every.complete
