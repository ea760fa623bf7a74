"""Canaries and their exposure: against ranks, closed forms of tails, and what chance gives."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit
from attnfit.audit import (
    AuditError,
    Canaries,
    ScoredTexts,
)
from attnfit.audit.intervals import skew_normal_above, skew_normal_fit, skew_normal_tails
from attnfit.audit.memorisation.canaries import LEVEL

TEMPLATE = "The code of the {words} is {digits:2}."


def of(sums, name="text"):
    """Texts of given log-probabilities."""
    return ScoredTexts([f"{name} {k}" for k in range(len(sums))], np.asarray(sums, float)[:, None])


def refused(match, function, *args, **options):
    with pytest.raises(AuditError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def test_canaries_are_texts_of_their_template():
    secrets = audit.canaries("{{x}} {words:2} is {digits:3}{digits}!", 50, random_state=3)
    assert secrets.n_possible == 33**2 * 10**4
    assert len(set(secrets.texts)) == 50
    for text in secrets.texts:
        first, second = re.fullmatch(r"\{x\} ([a-z]+) ([a-z]+) is \d{4}!", text).groups()
        assert {first, second} <= set(secrets.words)
    assert audit.canaries(secrets.template, 50, random_state=3).texts == secrets.texts
    assert audit.canaries(secrets.template, 50, random_state=4).texts != secrets.texts


def test_canaries_are_drawn_uniformly():
    drawn = Counter(audit.canaries("{digits}", 1, random_state=seed).texts[0] for seed in range(1000))
    assert stats.chisquare([drawn[str(digit)] for digit in range(10)]).pvalue > 1e-3
    words = ["red", "blue", "green"]
    both = Counter(audit.canaries("{words:2}", 1, words=words, random_state=s).texts[0] for s in range(900))
    assert stats.chisquare([both[f"{a} {b}"] for a in words for b in words]).pvalue > 1e-3


def test_what_is_compared_is_the_rest_of_the_template():
    secrets = audit.canaries(TEMPLATE, 5, repeats=[3, 0, 1, 1, 2], words=["cat", "dog"])
    assert Counter(secrets.inserted()) == {
        t: n for t, n in zip(secrets.texts, [3, 0, 1, 1, 2], strict=True) if n
    }
    every = secrets.compared()
    assert len(every) == len(set(every)) == secrets.n_possible - 5 == 195
    assert not set(every) & set(secrets.texts)
    some = secrets.compared(50)
    assert len(set(some)) == 50
    assert set(some) < set(every)
    assert some == secrets.compared(50)
    assert secrets.compared(195) == every
    assert len(secrets.compared(194)) == 194
    # Nor are they what would be drawn next.
    assert some != list(audit.canaries(TEMPLATE, 55, words=["cat", "dog"]).texts[5:])
    # Draws of their own: what is compared does not follow from how the canaries were drawn.
    again = Canaries(TEMPLATE, secrets.texts, words=("cat", "dog"), random_state=1)
    assert again.compared(50) != some
    assert again.inserted() == list(secrets.texts)


def test_a_sample_of_a_large_space_is_uniform():
    secrets = audit.canaries("{digits:5}", 1)
    some = secrets.compared(9000)
    for place in range(5):
        counts = np.bincount([int(text[place]) for text in some], minlength=10)
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("no placeholder", "template has no placeholder"),
        ("{name}", r"template has the placeholder \{name\}; write"),
        ("{digits:0}", "template has the placeholder"),
        ("{digits!r}", "template has the placeholder"),
        ("{digits", "template has an open brace"),
        ("{words}{words}", r"letter or other words next to \{words\}"),
        ("a{words}", r"letter or other words next to \{words\}"),
        ("{words}s", r"letter or other words next to \{words\}"),
    ],
)
def test_templates_that_make_no_canaries_are_refused(template, match):
    refused(match, audit.canaries, template, 1)


def test_requests_that_make_no_canaries_are_refused():
    refused("count must be 1 to 9, as the template allows 10 texts, not 10", audit.canaries, "{digits}", 10)
    refused("count must be 1 to 9", audit.canaries, "{digits}", 0)
    assert len(audit.canaries("{digits}", 9).compared()) == 1
    refused(r"repeats\[1\] is -1", audit.canaries, "{digits}", 2, repeats=[1, -1])
    refused("repeats has 1 entries for 2 canaries", audit.canaries, "{digits}", 2, repeats=[1])
    refused(r"words\[1\] is 'a b'", audit.canaries, "{words}", 1, words=["a", "a b"])
    refused(r"words\[0\] is 'a'", audit.canaries, "{words}", 1, words=["a", "a", "b"])
    refused(r"canaries\[1\] does not fit", Canaries, "{digits:2}", ("12", "123"))
    refused(r"canaries\[1\] is canaries\[0\] again", Canaries, "{digits:2}", ("12", "12"))
    refused("allows 2 texts and there are 2 canaries", Canaries, "{words}", ("a", "b"), words=("a", "b"))
    refused("max_texts must be at least 1", audit.canaries("{digits}", 1).compared, 0)
    assert audit.canaries("x{digits}x 7{words}!", 1).n_possible == 330


def test_exposure_is_the_rank_among_all():
    rng = np.random.default_rng(0)
    own, others = rng.normal(-40, 3, 7), rng.normal(-42, 3, 500)
    found = audit.exposure(of(own, "canary"), of(others), repeats=range(7))
    for k, value in enumerate(own):
        rank = stats.rankdata(-np.append(others, value))[-1]
        assert found.bits[k] == pytest.approx(np.log2(501) - np.log2(rank))
        assert found.p_values[k] == pytest.approx(rank / 501)
    np.testing.assert_array_equal(found.interval, np.stack([found.bits, found.bits], 1))
    assert set(found.method) == {"exact"}
    assert (found.n_compared, found.n_possible, found.largest) == (500, 501, np.log2(501))
    same = audit.exposure(of(own, "canary"), of(others), 507)
    np.testing.assert_array_equal(same.bits, found.bits)
    assert (same.method, same.n_possible) == (found.method, 501)
    table = found.columns()
    assert table["repeats"] == list(range(7))
    assert found.to_frame().shape == (7, 9)
    assert np.isnan(found.extrapolated).all()
    assert "repeats" not in same.columns()


@pytest.mark.parametrize("ties", [False, True])
def test_a_canary_never_seen_has_e_bits_with_probability_at_most_two_to_minus_e(ties):
    values = np.random.default_rng(1).normal(-9, 1, 300)
    values = np.round(values) if ties else values
    # Each of the texts in turn, which is what a random draw is.
    bits = [audit.exposure(of([values[k]], "canary"), of(np.delete(values, k))).bits[0] for k in range(300)]
    for e in np.unique(bits):
        share = np.mean(np.array(bits) >= e)
        assert share <= 2.0**-e + 1e-12
        assert ties or share == pytest.approx(2.0**-e)
    assert min(bits) == 0.0


def test_sampled_exposures_obey_it_too():
    rng = np.random.default_rng(2)
    space = rng.gamma(4.0, 1.0, 4000)
    p_values = []
    for _ in range(400):
        drawn = rng.choice(4000, 101, replace=False)
        found = audit.exposure(of(-space[drawn[:1]], "canary"), of(-space[drawn[1:]]), 4000)
        p_values.append(found.p_values[0])
    for level in (0.05, 0.2, 0.5):
        assert stats.binomtest(int((np.array(p_values) <= level).sum()), 400, level).pvalue > 1e-3


def test_sampled_intervals_are_exact_ones_of_the_share():
    others = -np.arange(1.0, 1001.0)
    found = audit.exposure(of([-50.5], "canary"), of(others), 100_001)
    assert found.method == ("sampled",)
    assert found.p_values[0] == 51 / 1001
    assert found.bits[0] == pytest.approx(np.log2(1001 / 51))
    ends = stats.binomtest(50, 1000).proportion_ci(method="exact")
    expected = [np.log2(100_001) - np.log2(1 + 100_000 * share) for share in (ends.high, ends.low)]
    np.testing.assert_allclose(found.interval[0], expected)
    assert found.interval[0][0] < found.bits[0] < found.interval[0][1]


def test_counts_of_ten_are_counted_and_nine_bound():
    others = -50 + 3 * stats.norm.ppf(np.linspace(0.0005, 0.9995, 1000))
    at = np.sort(others)[::-1]
    found = audit.exposure(of([at[9], at[8], at[500]], "canary"), of(others), 10**7)
    assert found.method == ("sampled", "bounded", "sampled")
    assert np.isfinite(found.extrapolated).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [-3.0, 0.0, 0.7, 20.0])
def test_tails_are_scipys(shape):
    at = np.linspace(-60, -20, 81)
    np.testing.assert_allclose(
        skew_normal_above(at, (shape, -40, 4.0)),
        stats.skewnorm.sf(at, shape, -40, 4.0),
        rtol=1e-9,
        atol=2e-14,
    )
    assert skew_normal_above(np.array([0.0]), (shape, -40, 4.0))[0] == 1e-15


def test_the_fit_has_the_moments_of_the_sample():
    rng = np.random.default_rng(3)
    for sample in (rng.normal(2, 3, 2000), rng.gamma(20.0, 1.0, 2000), -rng.gamma(40.0, 1.0, 2000)):
        fit = skew_normal_fit(sample)
        mean, variance, skewness = stats.skewnorm.stats(*fit, moments="mvs")
        assert (mean, variance) == pytest.approx((sample.mean(), sample.var()))
        assert skewness == pytest.approx(stats.skew(sample))
    # More skewed than any skew-normal distribution, whose skewness stays below 0.99527.
    skewness = float(stats.skewnorm.stats(*skew_normal_fit(rng.exponential(size=2000)), moments="s"))
    assert 0.99 < skewness < 0.9953


@pytest.mark.parametrize("seed", range(3))
def test_extrapolated_tails_are_those_of_the_distribution(seed):
    rng = np.random.default_rng(seed)
    truth = stats.skewnorm(1.5, -60, 5)
    own = truth.isf([1e-4, 1e-6, 1e-8])
    found = audit.exposure(
        of(own, "canary"), of(truth.rvs(1500, random_state=rng)), 10**12, random_state=seed
    )
    assert found.method == ("bounded",) * 3
    bits, low, high = found.extrapolated.T
    exact = np.log2(10**12 - 2) - np.log2(1 + 1e12 * np.array([1e-4, 1e-6, 1e-8]))
    assert (low <= bits).all() and (bits <= high).all()
    assert (low <= exact).all() and (exact <= high).all()
    assert (found.interval[:, 0] <= exact).all() and (exact <= found.interval[:, 1]).all()
    # An interval that says something: wider the further out.
    widths = high - low
    assert widths[0] < widths[1] < widths[2] < 12


def test_the_interval_of_an_extrapolation_is_that_of_the_refits():
    others = np.random.default_rng(0).normal(-50, 3, 1000)
    found = audit.exposure(of([-30.0], "canary"), of(others), 10**9, random_state=4)
    tails = skew_normal_tails(np.sort(others), np.array([-30.0]), 4)[2][:, 0]
    bits = np.log2(1e9) - np.log2(1 + (1e9 - 1) * tails)
    assert len(bits) == 200
    assert found.extrapolated[0] == pytest.approx([bits[0], *np.quantile(bits, [0.025, 0.975])])


def test_the_least_likely_of_all_has_no_bits():
    found = audit.exposure(of([-9.0], "canary"), of(np.linspace(-2, -1, 100)), 150)
    assert found.interval[0][0] == pytest.approx(0.0, abs=1e-12)


def test_no_exposure_exceeds_that_of_the_likeliest_text():
    others = np.random.default_rng(0).normal(-50, 3, 1000)
    found = audit.exposure(of([0.0], "canary"), of(others), 10**6)
    assert found.extrapolated[0, 0] == pytest.approx(found.largest) == pytest.approx(np.log2(10**6))
    assert found.bits[0] == pytest.approx(np.log2(1001))
    assert "1 of 1 canaries" in str(found) and str(found).endswith("(extrapolated: 19.9).")


def bimodal(rng):
    return np.where(rng.random(1500) < 0.5, rng.normal(-60, 2, 1500), rng.normal(-45, 2, 1500))


def heavy(rng):
    return -50 + rng.standard_t(3, 1500)


def heavy_above(rng):
    """Normal but for the likeliest twentieth, whose tail is exponential: most of a distance is elsewhere."""
    values = np.sort(rng.normal(-50, 3, 1500))
    values[-75:] = values[-75] + rng.exponential(6.0, 75)
    return values


@pytest.mark.parametrize("sample", [bimodal, heavy, heavy_above])
def test_a_wrong_fit_is_refused_and_the_sample_speaks(sample):
    others = sample(np.random.default_rng(0))
    found = audit.exposure(of([others.max() + 1], "canary"), of(others), 10**9)
    # The fit is one of the 200 that it is ranked among: no p-value is zero.
    assert 1 / 200 <= min(found.fit_p_values) <= LEVEL / 2
    assert found.method == ("bounded",)
    assert np.isnan(found.extrapolated).all()
    assert found.bits[0] == pytest.approx(np.log2(1501))
    assert found.interval[0][0] == pytest.approx(
        np.log2(1e9) - np.log2(1 + (1e9 - 1) * (1 - 0.025 ** (1 / 1500)))
    )
    assert found.interval[0][1] == np.log2(10**9)


def test_the_second_test_looks_at_the_tail():
    body = -50 + 3 * stats.norm.ppf(np.linspace(0.0005, 0.9995, 1000))
    body[-60:] = body[-60] + 0.02 * np.arange(60)
    found = audit.exposure(of([body.max() + 1], "canary"), of(body), 10**9)
    whole, tail = found.fit_p_values
    assert whole > LEVEL / 2 >= tail
    assert np.isnan(found.extrapolated).all()


def test_the_fit_is_hardly_refused_where_it_is_right():
    rng = np.random.default_rng(5)
    refusals = 0
    for seed in range(15):
        others = stats.skewnorm.rvs(2, -60, 5, size=1000, random_state=rng)
        found = audit.exposure(of([0.0], "canary"), of(others), 10**9, random_state=seed)
        refusals += bool(np.isnan(found.extrapolated[0, 0]))
    # Binomial(15, 0.05) exceeds 4 with probability 6e-4.
    assert refusals <= 4


def test_few_candidates_are_not_extrapolated():
    others = np.random.default_rng(0).normal(-50, 3, 999)
    found = audit.exposure(of([0.0], "canary"), of(others), 10**9)
    assert (found.method, found.fit) == (("bounded",), None)
    same = audit.exposure(of([0.0], "canary"), of(np.full(1000, -50.0)), 10**9)
    assert (same.method, same.fit) == (("bounded",), None)


def test_exposed_is_holm():
    rng = np.random.default_rng(0)
    sets = [np.array(flags, bool) for flags in product([0, 1], repeat=6) if any(flags)]
    # The least of the first is too large for all six, the next would do for five.
    draws = [rng.random(6) ** rng.integers(1, 8, 6) for _ in range(20)]
    for p_values in [np.array([0.0095, 0.0085, 0.9, 0.8, 0.7, 0.6]), *draws]:
        none = np.zeros((6, 2))
        found = audit.Exposure(("",) * 6, None, p_values, none, p_values, ("exact",) * 6, 9, 9, none)
        # The closure of Bonferroni's test: rejected with all others that it may be true together with.
        rejected = [p_values[chosen].min() <= 0.05 / chosen.sum() for chosen in sets]
        for k in range(6):
            closed = all(no for chosen, no in zip(sets, rejected, strict=True) if chosen[k])
            assert found.exposed[k] == closed


def test_verdicts_say_what_was_found():
    others = of(-np.arange(1.0, 100.0))
    found = audit.exposure(of([-0.5, -60.5], "canary"), others)
    assert found.exposed.tolist() == [True, False]
    assert str(found) == (
        "1 of 2 canaries are likelier than chance allows for a text never seen (5 % over all of them); the "
        "most exposed has 6.6 of 6.6 bits."
    )
    sampled = audit.exposure(of([-0.5, -60.5], "canary"), others, 10**4)
    assert sampled.verdict.endswith("has 6.6 of 13.3 bits, bounded, interval 4.8 to 13.3.")
    # A hundred ranks can show five canaries at 5 %, not six.
    five, six = (audit.exposure(of([-0.5] * n, "canary"), others) for n in (5, 6))
    assert five.decidable and five.exposed.all()
    assert not six.decidable
    assert six.verdict.startswith(
        "Whether any of 6 canaries is exposed cannot be told: 99 candidates were compared, "
    )
    assert six.verdict.endswith("and it takes 119.")


def test_wrong_comparisons_are_refused():
    refused(r"compared\[2\] is canary 0", audit.exposure, ScoredTexts(["text 2"], [[-1.0]]), of([-1.0] * 4))
    refused(
        "n_possible is 4, but 5 texts were given", audit.exposure, of([-1.0], "canary"), of([-1.0] * 4), 4
    )


def test_exposure_rises_with_repeats_in_a_model_trained_here():
    import torch

    from benchmarks.audit_memorised import sentences, trained

    torch.set_num_threads(1)
    times = (0, 1, 4, 16) * 4
    secrets = audit.canaries("The code of the door is {digits:3}.", 16, repeats=times, random_state=0)
    model = trained([*sentences(100, 0, set()), *secrets.inserted()], 20, width=32, layers=1)
    found = audit.exposure(
        audit.score_texts(model, secrets.texts), audit.score_texts(model, secrets.compared()), repeats=times
    )
    mean = {count: found.bits[np.array(times) == count].mean() for count in (0, 1, 4, 16)}
    assert mean[16] > mean[4] > mean[0] + 1
    assert mean[16] > mean[1] + 1
    assert found.exposed[np.array(times) == 16].sum() >= 2
    assert not found.exposed[np.array(times) == 0].any()
