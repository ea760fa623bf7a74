"""The text of one row: the last state after any block, the scores that follow, the mean of all states."""

from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import row_search  # noqa: E402
from attnfit.audit.errors import AuditError, ObservationMismatch, Unsupported  # noqa: E402
from attnfit.audit.last import token_frequencies  # noqa: E402
from attnfit.audit.row_response import Reader, response  # noqa: E402
from attnfit.audit.row_search import RowSearch, reordered  # noqa: E402

FORMS = ("last:2", "last:4", "last:logits", "pooled")
BUDGET = 1 << 20


def text_of(tiny, length, place=0):  # noqa: F811
    """The first tokens of a sentence that the model has memorised."""
    return tiny.tokenise(tiny.private_texts[place])[:length]


def reader_of(tiny, form="last:2"):  # noqa: F811
    layers = {"last:2": 2, "last:4": 4, "last:logits": 5, "pooled": 4}
    return Reader(tiny, layers[form], pooled=form == "pooled")


def searched(tiny, row, form="last:2", **more):  # noqa: F811
    """A search of short texts, with few evaluations."""
    options = {"longest": 2, "evaluations": 800} | more
    given = torch.from_numpy(np.asarray(row, dtype=np.float32)[0])
    return RowSearch(reader_of(tiny, form), given, token_frequencies(tiny), BUDGET, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2])
def test_short_texts_are_read_from_one_row(tiny, form, length):  # noqa: F811
    tokens = text_of(tiny, length)
    found = audit.invert(tiny, audit.observe(tiny, tokens, form))
    assert (found.tokens, found.verified, found.failed_at) == (tokens, True, None), found.message
    assert set(found.methods) == {"joint"} and found.n_candidates > 0


@pytest.mark.parametrize("defence", ["float16", "int8"])
def test_rounded_means_are_read(tiny, defence):  # noqa: F811
    tokens = text_of(tiny, 2)
    found = audit.invert(tiny, audit.observe(tiny, tokens, "pooled", defence))
    assert (found.tokens, found.verified) == (tokens, True), found.message


def test_the_first_numbers_of_a_mean_are_enough(tiny):  # noqa: F811
    tokens = text_of(tiny, 2)
    mean = tiny.states(tokens, tiny.n_layers).mean(0)[:40]
    seen = audit.observe(tiny, tokens, "pooled")
    plain = {"error": np.zeros((1, 40)), "error_bound": np.zeros((1, 40))}
    short = replace(seen, array=(mean / np.linalg.norm(mean))[None], **plain)
    found = audit.invert(tiny, short)
    assert (found.tokens, found.verified) == (tokens, True), found.message
    with pytest.raises(ObservationMismatch, match=r"length one, and this one 0\.5: divide it by its length"):
        audit.invert(tiny, replace(short, array=0.5 * short.array))


@pytest.mark.parametrize("form", FORMS)
def test_the_reader_reads_what_the_model_gives(tiny, form):  # noqa: F811
    tokens = text_of(tiny, 5)
    states = tiny.states(tokens, reader_of(tiny, form).layer)
    plain = states.mean(0) / np.linalg.norm(states.mean(0)) if form == "pooled" else states[-1]
    both = reader_of(tiny, form).rows([tokens, tokens[::-1]])
    np.testing.assert_allclose(both[0], plain, atol=1e-5 * np.abs(plain).max())
    assert np.abs(both[1].numpy() - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize("form", ["last:2", "pooled"])
def test_likelihoods_are_those_of_a_linear_model_with_gaussian_errors(tiny, form):  # noqa: F811
    """Against its definition: the row with each token in turn, weighted by the inverse covariance."""
    reader, texts = reader_of(tiny, form), torch.tensor([[7, 300, 41], [12, 5, 99]])
    learned = response(reader, token_frequencies(tiny), 3)
    target, rows, place = reader.rows([[8, 9, 10]])[0], reader.rows(texts.tolist()), 1
    scores = learned.scores(texts, rows, target, place)
    features, probe = learned.features.double().numpy(), learned.probe
    k = features.shape[1]
    at = slice(k, 2 * k) if form == "last:2" else slice(0, k)
    assert len(probe.scale) == (3 * k if form == "last:2" else k)
    B = (probe.matrix / probe.scale[:, None]).double().numpy()[at]
    for text, row, mine in zip(texts.numpy(), rows, scores.double().numpy(), strict=True):
        missed = ((row - target) / learned.spread).double().numpy() + (features - features[text[place]]) @ B
        weighted = np.linalg.solve(probe.covariance.double().numpy(), missed.T).T
        expected = -0.5 * (missed * weighted).sum(1)
        np.testing.assert_allclose(mine - mine.max(), expected - expected.max(), rtol=1e-3, atol=0.5)
        assert expected.max() - expected.min() > 20.0
    other = torch.tensor([55, 66])
    changed = (learned.changed(rows, texts[:, place], other, place) - rows) / learned.spread
    step = (features[other] - features[texts[:, place].numpy()]) @ B
    np.testing.assert_allclose(changed, step, rtol=1e-3, atol=1e-4 * np.abs(step).max())


@pytest.mark.parametrize("form", ["last:2", "last:logits", "pooled"])
@pytest.mark.parametrize("case", ["moved", "noise", "layer", "weights"])
def test_rows_of_no_text_are_not_claimed(tiny, form, case):  # noqa: F811
    tokens, rng = text_of(tiny, 2), np.random.default_rng(0)
    reader = reader_of(tiny, form)
    row = reader.rows([tokens]).numpy()
    if case == "moved":
        row = row + 1e-3 * row.std() * rng.standard_normal(row.shape)
    elif case == "noise":
        row = row.std() * rng.standard_normal(row.shape)
    elif case == "layer":
        row = Reader(tiny, 3, pooled=form == "pooled").rows([tokens]).numpy()
    else:
        other = replace(deepcopy(tiny), calibrations={}, ways={})
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for weight in other.module.parameters():
                weight.mul_(1.0 + 1e-3 * torch.randn(weight.shape, generator=generator))
        row = Reader(other, reader.layer, pooled=form == "pooled").rows([tokens]).numpy()
    search = searched(tiny, row, form)
    assert "misses the row" in search.contradiction(tokens)
    found = search.run([])
    assert not found.verified and found.tokens == []
    assert found.message.endswith("not recovered within the budget, and no protection proven")


def test_rows_within_the_bounds_of_several_texts_are_not_claimed(tiny):  # noqa: F811
    tokens = text_of(tiny, 2)
    row = reader_of(tiny, "pooled").rows([tokens]).numpy()
    search = searched(tiny, row, "pooled", error_bound=torch.full((tiny.width,), 0.2))
    assert search.contradiction(tokens) == ""
    found = search.run([])
    assert not found.verified and found.tokens == []
    assert "gives the row too" in found.message


def test_tokens_in_another_order_that_give_the_same_row_are_not_claimed(tiny, monkeypatch):  # noqa: F811
    tokens = text_of(tiny, 2)
    rows = Reader.rows
    monkeypatch.setattr(Reader, "rows", lambda self, texts: rows(self, [sorted(text) for text in texts]))
    row = reader_of(tiny, "pooled").rows([tokens]).numpy()
    found = searched(tiny, row, "pooled").run([])
    assert found.tokens == [] and not found.verified
    assert "another order give the row too" in found.message


def test_a_first_token_that_does_not_count_is_not_claimed(tiny, monkeypatch):  # noqa: F811
    tokens = text_of(tiny, 2)
    rows = Reader.rows
    row = reader_of(tiny).rows([tokens]).numpy()
    search = searched(tiny, row)
    seen = []

    def last_two(self, texts):
        seen.extend(map(len, texts))
        return rows(self, [list(text)[-2:] for text in texts])

    monkeypatch.setattr(Reader, "rows", last_two)
    found = search.run([])
    assert 3 in seen and found.tokens == [] and not found.verified
    assert "another length gives the row too" in found.message


def test_tokens_that_are_one_to_the_model_are_ambiguous(tiny):  # noqa: F811
    tokens = text_of(tiny, 2)
    twin = next(token for token in range(900) if token not in tokens)
    other = replace(deepcopy(tiny), calibrations={}, ways={})
    with torch.no_grad():
        other.embeddings[twin] = other.embeddings[tokens[0]]
    found = searched(other, Reader(other, 2).rows([tokens])).run([])
    assert not found.verified and "ambiguous" in found.message
    assert {found.tokens[0], *found.alternatives[0]} == {tokens[0], twin}


@pytest.mark.parametrize("length", [2, 3, 4])
def test_reordered_texts_are_permutations_with_one_token_moved_or_two_exchanged(length):
    text = tuple(range(length))
    given = reordered(text)
    assert len(given) == len(set(given)) and text not in given
    every = set(permutations(text)) - {text}
    swapped = {one for one in every if sum(a != b for a, b in zip(one, text, strict=True)) == 2}
    moved = {one for one in every if any(_without(one, t) == _without(text, t) for t in text)}
    assert set(given) == swapped | moved


def _without(text, token):
    return [one for one in text if one != token]


def test_a_search_ends_with_its_budget(tiny):  # noqa: F811
    row = np.random.default_rng(0).standard_normal((1, tiny.width))
    few, more = (searched(tiny, row, evaluations=n).run([]).n_candidates for n in (400, 4000))
    assert few < 1500 < 4000 <= more < 6000
    assert searched(tiny, row, seconds=0.0).run([]).n_candidates < 1500


@pytest.mark.parametrize("form", FORMS)
def test_texts_that_are_not_found_have_no_share(tiny, form, monkeypatch):  # noqa: F811
    monkeypatch.setattr(row_search, "EVALUATIONS", 100)
    published = {"pooled": "92 %", "last:logits": "79.5 %"}.get(form, "2311.13647")
    report = audit.run(tiny, tiny.private_texts[:1], [form], [None, "noise:3"], budget=120)
    for pair in report.pairs:
        plain = pair.as_json()
        assert (pair.tested, plain["token_share"], plain["token_interval"]) == (False, None, [0.0, 1.0])
    assert report.verdict.startswith(f"Not tested: {form} with none")
    told = [line for line in report.advice if line.startswith("Not tested, which is no proof of protection")]
    assert any(f"{form} with none" in line and published in line for line in told)
    assert sum(control.claims for control in report.controls) == 0


def test_what_cannot_be_read_is_refused(tiny, monkeypatch):  # noqa: F811
    seen = {form: audit.observe(tiny, [5, 6], form) for form in FORMS}
    for form in FORMS:
        two = replace(seen[form], array=np.repeat(seen[form].array, 2, 0))
        with pytest.raises(AuditError, match=r"is one row|shape \(1, k\)"):
            audit.invert(tiny, two)
        with pytest.raises(ObservationMismatch, match=r"must have shape|shape \(1, k\)"):
            audit.invert(tiny, replace(seen[form], array=seen[form].array[:, :1]))
        broken = seen[form].array.copy()
        broken[0, 3] = np.nan
        with pytest.raises(ObservationMismatch, match="finite"):
            audit.invert(tiny, replace(seen[form], array=broken))
        with pytest.raises(ObservationMismatch, match="real numbers, not complex"):
            audit.invert(tiny, replace(seen[form], array=seen[form].array.astype(complex)))
        with pytest.raises(AuditError, match="known_prefix cannot be used with one row"):
            audit.invert(tiny, seen[form], known_prefix=[5])
        with pytest.raises(AuditError, match="no attack here"):
            audit.invert(tiny, audit.observe(tiny, [5, 6], form, "noise:1"))
    with pytest.raises(AuditError, match="no attack here on last:2 with errors"):
        audit.invert(tiny, audit.observe(tiny, [5, 6], "last:2", "int8"))
    monkeypatch.setattr(row_search, "LOOSEST", 0.0)
    with pytest.raises(Unsupported, match="the same text beside another differs"):
        searched(tiny, tiny.states([5, 6], 2)[-1:]).contradiction([5, 6])
