"""What a model has memorised: log-probabilities, extraction and the whole, against models that are known."""

import json
import math

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401
from scipy import stats

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import AuditError, ScoredTexts  # noqa: E402
from attnfit.audit.memorisation.extraction import SAMPLES  # noqa: E402
from attnfit.audit.memorisation.membership import RATES  # noqa: E402

# Three states: the likeliest way from 0 is 0 1 2 0 1 2 ...
CHAIN = np.array([[0.1, 0.7, 0.2], [0.25, 0.15, 0.6], [0.8, 0.1, 0.1]])


def chain(tokens):
    # Logits may be off by a constant for each row.
    return np.log(CHAIN)[tokens] + np.arange(len(tokens))[:, None]


def scored(texts, prefixes, suffix, **options):
    cut = audit.windows(texts, prefixes, suffix)
    return {size: audit.score_texts(chain, rows, **options) for size, rows in cut.items()}


def refused(match, function, *args, **options):
    with pytest.raises(AuditError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def test_log_probabilities_are_those_of_the_chain():
    found = audit.score_texts(chain, [[0, 1, 2, 2], [1, 1]])
    np.testing.assert_allclose(np.exp(found.log_probabilities[0]), [0.7, 0.6, 0.1])
    np.testing.assert_allclose(np.exp(found.log_probabilities[1]), [0.15])
    assert [flags.tolist() for flags in found.likeliest] == [[True, True, False], [False]]
    np.testing.assert_allclose(found.sums, np.log([0.7 * 0.6 * 0.1, 0.15]))
    np.testing.assert_allclose(found.means, [math.log(0.042) / 3, math.log(0.15)])
    hot = audit.score_texts(chain, [[0, 1]], temperature=2.0)
    powers = np.sqrt(CHAIN[0])
    assert np.exp(hot.log_probabilities[0][0]) == pytest.approx(powers[1] / powers.sum())
    kept = found.take([1])
    assert (kept.texts, kept.tokens, len(kept)) == ([[1, 1]], [[1, 1]], 1)


def test_log_probabilities_are_the_models_own(tiny, monkeypatch):  # noqa: F811
    from attnfit.audit.memorisation import scores as module

    texts = [tiny.private_texts[0], "A dog.", tiny.private_texts[1], "We saw a clock"]
    found = audit.score_texts(tiny, texts, temperature=0.7)
    # One text in a batch, instead of all.
    monkeypatch.setattr(module, "BATCH", 1)
    alone = audit.score_texts(tiny, texts, temperature=0.7)
    for text, values, same, flags in zip(
        texts, found.log_probabilities, alone.log_probabilities, found.likeliest, strict=True
    ):
        tokens = torch.tensor([tiny.tokenise(text)])
        with torch.no_grad():
            logits = tiny.module(input_ids=tokens).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits / 0.7, tokens[0, 1:], reduction="none")
        np.testing.assert_allclose(-values, loss.numpy(), atol=1e-4)
        np.testing.assert_allclose(values, same, atol=1e-4)
        assert flags.tolist() == (logits.argmax(-1) == tokens[0, 1:]).tolist()
    assert list(found.texts) == texts


def test_extraction_is_what_greedy_decoding_gives(tiny):  # noqa: F811
    texts = list(tiny.private_texts[:12])
    found = audit.memorised(tiny, texts, prefixes=[3, 6], suffix=4).extraction
    assert found.n_texts == 12
    for prefix in (3, 6):
        for text, claimed in zip(texts, found.greedy[prefix], strict=True):
            tokens = tiny.tokenise(text)
            start = tokens[6 - prefix : 6]
            made = tiny.module.generate(
                torch.tensor([start]),
                attention_mask=torch.ones(1, prefix),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                pad_token_id=0,
            )
            assert (made[0, prefix:].tolist() == tokens[6:10]) == claimed
    assert found.count(6) > 0 and found.count(3) < 12


def test_extraction_from_a_chain_is_exact():
    texts = [[0, 1, 2, 0, 1, 2], [1, 1, 2, 0, 2, 2], [2, 0, 1, 2, 0, 1], [0, 0, 0, 0, 0, 0]]
    found = audit.extraction(scored(texts, [1, 2], 3), 3, samples=(1, 5, 200), chance=0.9)
    assert found.greedy[2].tolist() == [True, False, True, False]
    # The same tokens whatever the prefix: those after the longest.
    assert found.greedy[1].tolist() == found.greedy[2].tolist()
    ways = [text[1:5] for text in texts]
    q = np.array([np.prod(CHAIN[way[:-1], way[1:]]) for way in ways])
    for prefix in (1, 2):
        np.testing.assert_allclose(np.exp(found.log_probabilities[prefix]), q)
        for n in (1, 5, 200):
            np.testing.assert_allclose(found.probabilities(prefix, n), stats.binom.sf(0, n, q))
            assert found.count(prefix, n) == (stats.binom.sf(0, n, q) >= 0.9).sum()
        np.testing.assert_array_equal(found.samples_needed(prefix), stats.geom.ppf(0.9, q))
    table = found.columns()
    assert table["prefix"] == [1] * 4 + [2] * 4
    assert table["samples"] == [0, 1, 5, 200] * 2
    assert table["extracted"][0] == 2
    for count, low, high in zip(table["extracted"], table["low"], table["high"], strict=True):
        ends = stats.binomtest(count, 4).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx((ends.low, ends.high))
    assert found.to_frame().shape == (8, 7)
    assert str(found).startswith(
        "2 of 4 texts (50 %, interval 15 % to 85 %) come back by greedy decoding: the 3 "
    )


def test_draws_contain_the_suffix_as_often_as_said():
    rng = np.random.default_rng(0)
    found = audit.extraction(scored([[0, 1, 2]], [1], 2), 2, samples=(3,))
    hits, runs = np.zeros(4000, bool), 4000
    for _ in range(3):
        first = (rng.random((runs, 1)) > np.cumsum(CHAIN[0])).sum(1)
        second = (rng.random((runs, 1)) > np.cumsum(CHAIN[first], axis=1)).sum(1)
        hits |= (first == 1) & (second == 2)
    assert stats.binomtest(int(hits.sum()), runs, float(found.probabilities(1, 3)[0])).pvalue > 1e-3


def test_certain_and_impossible_suffixes():
    sure = ScoredTexts([[0, 1], [0, 2]], [[0.0], [-2000.0]], [[True], [False]])
    found = audit.extraction({1: sure}, 1)
    assert found.probabilities(1, 1).tolist() == [1.0, 0.0]
    assert found.samples_needed(1).tolist() == [1.0, math.inf]
    assert found.samples == SAMPLES == (1, 100, 10_000)
    assert found.chance == 0.5


def test_a_probability_of_exactly_the_chance_counts():
    half = ScoredTexts([[0, 1]], [[math.log(0.5)]], [[False]])
    found = audit.extraction({1: half}, 1, samples=[1])
    assert found.probabilities(1, 1).tolist() == [0.5]
    assert (found.count(1, 1), found.samples_needed(1).tolist()) == (1, [1.0])


def test_what_came_back_is_told_without_special_tokens(tiny, monkeypatch):  # noqa: F811
    from attnfit.audit.memorisation import report

    monkeypatch.setitem(tiny.__dict__, "around", ([0], []))
    ids = tiny.tokenise("Nils Zhang has hidden")
    rows = [[0, 9, 9, 9, 9], [0, *ids]]
    scored = ScoredTexts(["a", "b"], [[-1.0]] * 2, [[False], [True]], rows)
    (found,) = report._extracted(tiny, audit.extraction({3: scored}, 1), rows)
    assert found == report.Extracted(1, tiny.detokenise(ids[:-1]), tiny.detokenise(ids[-1:]))


def test_texts_with_the_same_suffix_are_one():
    texts = [[0, 1, 2], [2, 1, 2], [0, 1, 1]]
    found = audit.extraction(scored(texts, [1], 2), 2)
    assert (found.n_texts, found.n_duplicates, found.places) == (2, 1, (0, 2))
    own = ScoredTexts(["a b", "a b ", "c"], [[-1.0], [-1.0], [-2.0]], [[True], [True], [False]])
    assert audit.extraction({1: own}, 1).n_duplicates == 1


def test_special_tokens_stay_before_a_prefix(tiny, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setitem(tiny.__dict__, "around", ([0], [0]))
    monkeypatch.setattr(
        "attnfit.audit.memorisation.report.windows", lambda rows, *_, **__: seen.append(rows) or {2: rows}
    )
    from attnfit.audit.memorisation import report

    assert report._cut(tiny, [[0, 5, 6, 7, 0], [8, 9]], [2], 1, "members") == {2: [[0, 5, 6, 7], [0, 8, 9]]}
    assert seen == [[[5, 6, 7], [8, 9]]]


def test_what_cannot_be_scored_is_refused(tiny):  # noqa: F811
    refused("texts is empty", audit.score_texts, tiny, [])
    refused("texts is one text: pass a list", audit.score_texts, tiny, "a text")
    refused(r"members\[1\]: text is empty", audit.score_texts, tiny, ["a dog", ""], name="members")
    refused(r"texts\[0\] has a single token", audit.score_texts, chain, [[1]])
    refused(r"texts\[1\] is no list of token ids", audit.score_texts, chain, [[0, 1], "a"])
    even = lambda tokens: np.zeros((len(tokens), 3))  # noqa: E731
    refused(r"texts\[1\] has token 3; model has 3", audit.score_texts, even, [[0, 1], [0, 3]])
    refused(r"texts\[0\] has token -1; model has 3", audit.score_texts, even, [[0, -1]])
    refused(
        r"shape \(1, 3\) for the 2 tokens of texts\[0\]", audit.score_texts, lambda t: chain(t)[1:], [[0, 1]]
    )
    refused("temperature must be positive, not 0", audit.score_texts, chain, [[0, 1]], temperature=0)
    refused(r"texts\[0\] has 129 tokens, and 'tiny' takes 128", audit.score_texts, tiny, [[5] * 129])
    assert len(audit.score_texts(tiny, [[5] * 128]).log_probabilities[0]) == 127
    nan = lambda tokens: np.full((len(tokens), 3), np.nan)  # noqa: E731
    refused(r"members: log_probabilities\[0\]\[0\] is nan", audit.score_texts, nan, [[0, 1]], name="members")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([], []), "texts is empty"),
        ((["a"], [[1e-3]]), r"log_probabilities\[0\]\[0\] is 0.001, above zero"),
        ((["a"], [[-1.0], [-2.0]]), "log_probabilities has 2 entries for 1 texts"),
        ((["a"], [[]]), r"log_probabilities\[0\] has shape \(0,\)"),
        ((["a", "b"], [[-1.0], [-1.0, -np.inf]]), r"log_probabilities\[1\]\[1\] is -inf: it must be finite"),
        ((["a"], [[-1.0, 0.31]]), r"log_probabilities\[0\]\[1\] is 0.31, above zero"),
        ((["a"], [[-1.0]], [[True, False]]), r"likeliest\[0\] has shape \(2,\), not \(1,\)"),
        ((["a"], [[-1.0]], None, []), "tokens has 0 entries for 1 texts"),
    ],
)
def test_numbers_that_are_no_log_probabilities_are_refused(arguments, match):
    refused(match, ScoredTexts, *arguments)


def test_rounding_above_zero_is_none():
    assert ScoredTexts(["a"], [[1e-7]]).log_probabilities[0].tolist() == [0.0]
    with pytest.raises(ValueError, match="read-only"):
        ScoredTexts(["a"], [[-1.0]]).log_probabilities[0][0] = 0.0


def test_what_cannot_be_extracted_is_refused():
    refused(r"texts\[1\] has 4 tokens, and a prefix of 3 with a suffix of 2 takes 5", audit.windows,
            [[0] * 5, [0] * 4], [1, 3], 2)  # fmt: skip
    refused(
        r"prefixes\[1\] must be a number of tokens, 1 or more, not 0", audit.windows, [[0] * 5], [1, 0], 2
    )
    refused("suffix must be a number of tokens", audit.windows, [[0] * 5], [1], 0)
    refused("prefixes is empty", audit.windows, [[0] * 5], [], 2)
    one = ScoredTexts([[0, 1]], [[-1.0]], [[True]])
    refused("scored is empty", audit.extraction, {})
    refused("chance must be between 0 and 1, not 1.0", audit.extraction, {1: one}, 1, chance=1.0)
    refused("chance must be between 0 and 1, not 0.0", audit.extraction, {1: one}, 1, chance=0.0)
    refused(r"samples\[1\] must be a number of draws", audit.extraction, {1: one}, 1, samples=[1, 0])
    refused(r"scored\[1\].likeliest is missing", audit.extraction, {1: ScoredTexts(["a"], [[-1.0]])}, 1)
    refused(r"scored\[1\].log_probabilities\[0\] has 1 numbers, fewer than the suffix of 2", audit.extraction,
            {1: one}, 2)  # fmt: skip
    two = ScoredTexts([[0, 1], [1, 1]], [[-1.0], [-1.0]], [[True], [True]])
    refused(r"scored\[2\] has 2 texts, not 1", audit.extraction, {1: one, 2: two}, 1)


def test_nothing_to_measure_is_refused(tiny):  # noqa: F811
    refused("nothing can be measured", audit.memorised, tiny)
    refused("nothing can be measured", audit.memorised, tiny, ["a text"])
    secrets = audit.canaries("{digits}", 1)
    refused("others is for members", audit.memorised, tiny, None, ["a"], canaries=secrets)
    refused("prefixes is for members", audit.memorised, tiny, prefixes=[1], canaries=secrets)
    refused("reference is for membership", audit.memorised, tiny, ["a text"], prefixes=[1], reference=tiny)


@pytest.fixture(scope="module")
def sentences(tiny):  # noqa: F811
    """Private sentences that the model has learned, and others of their kind that it has not."""
    from random import Random

    from attnfit.audit.models.tiny_text import private_sentences

    others = [text for text in private_sentences(Random(1)) if text not in tiny.private_texts]
    return list(tiny.private_texts[:120]), others[:120]


def test_the_whole_on_a_model_that_memorised(tiny, sentences):  # noqa: F811
    members, others = sentences
    secrets = audit.canaries("The code of {words} is {digits:2}.", 3)
    steps = []
    found = audit.memorised(
        tiny,
        members,
        others,
        prefixes=[6],
        suffix=5,
        canaries=secrets,
        max_compared=500,
        progress=steps.append,
    )
    assert steps == ["extraction of members", "extraction of others", "membership", "exposure"]
    assert found.extraction.count(6) / found.extraction.n_texts > 0.8
    assert found.extraction_of_others.count(6) / found.extraction_of_others.n_texts < 0.1
    assert found.membership.conclusion == "told apart"
    assert found.membership.scores[0].auc.low > 0.9
    assert [at.n_told is None for at in found.membership.scores[0].at_rates] == [False, True]
    assert found.membership.epsilon > 1.0
    assert not found.exposure.exposed.any()
    assert set(found.exposure.method) <= {"sampled", "bounded"}
    assert found.verdict.startswith("tiny: ")
    assert (
        " come back by greedy decoding: the 5 tokens after the 6 given; of texts not trained on, "
        in found.verdict
    )
    assert " Members are told apart: by loss, 120 members against 120 others have AUC " in found.verdict
    assert " 0 of 3 canaries are likelier than chance allows" in found.verdict
    plain = json.loads(json.dumps(found.as_json(), default=float))
    assert plain["schema"] == "attnfit-memorised/1"
    assert plain["membership"]["conclusion"] == "told apart"
    assert plain["settings"]["members"] == 120
    told = json.dumps(plain, default=str)
    assert not any(text in told for text in (*members, *others, *secrets.texts))
    table = found.columns()
    assert len({len(column) for column in table.values()}) == 1
    place = table["figure"].index("loss: AUC")
    assert table["value"][place] == found.membership.scores[0].auc.value
    assert found.to_frame().shape == (len(table["figure"]), 5)


def test_a_reference_takes_away_what_any_model_knows(tiny, sentences):  # noqa: F811
    members, others = sentences
    own = (audit.score_texts(tiny, texts) for texts in sentences)
    found = audit.memorised(tiny, members, others, reference=tiny).membership
    # Against itself nothing is left, and all scores are tied.
    assert [score.name for score in found.scores] == ["reference", "loss", "zlib", "min-k"]
    assert found.scores[0].auc.value == 0.5
    assert found.conclusion == "not told apart"
    assert "which is no proof that they cannot be" in found.verdict
    assert found.epsilon == 0.0
    means = [one.means for one in own]
    np.testing.assert_allclose(found.scores[1].members, means[0])
    np.testing.assert_allclose(found.scores[1].others, means[1])


def test_rates_have_defaults_that_papers_report():
    assert RATES == (0.01, 0.001)
