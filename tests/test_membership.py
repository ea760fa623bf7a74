"""Membership: against scikit-learn's areas, SciPy's intervals, what chance gives and a known epsilon."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

pytest.importorskip("torch")
pytest.importorskip("transformers")


from attnfit import audit
from attnfit.audit import AuditError, ScoredTexts
from attnfit.audit.intervals import Auc, auc, clopper_pearson, epsilon_lower_bound, wilson
from attnfit.audit.memorisation import membership
from attnfit.audit.memorisation.membership import blind_auc

WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibex", "jay", "kite", "lion"]


def texts(rng, count, words=WORDS, length=12):
    """Different texts of words drawn at random."""
    return [" ".join(rng.choice(words, length)) for _ in range(count)]


def of(rng, count, mean, words=WORDS):
    """Texts with a log-probability for each word but the first."""
    return ScoredTexts(texts(rng, count, words), -rng.gamma(4.0, mean / 4.0, (count, 11)))


def refused(match, function, *args, **options):
    with pytest.raises(AuditError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("digits", [8, 0])
def test_the_area_is_scikit_learns_and_its_variance_the_jackknifes(digits):
    rng = np.random.default_rng(0)
    members, others = np.round(rng.normal(1, 1.5, 23), digits), np.round(rng.normal(0, 1, 31), digits)

    def area(a, b):
        return roc_auc_score(np.repeat([1, 0], [len(a), len(b)]), np.append(a, b))

    found = auc(members, others)
    assert found.value == pytest.approx(area(members, others))
    # For two samples, leaving one out of either gives DeLong's variance exactly.
    parts = [
        [area(np.delete(members, k), others) for k in range(23)],
        [area(members, np.delete(others, k)) for k in range(31)],
    ]
    variance = sum(
        (len(part) - 1) / len(part) * np.sum((np.array(part) - np.mean(part)) ** 2) for part in parts
    )
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (found.value * (1 - found.value))
    middle = math.log(found.value / (1 - found.value))
    expected = 1 / (1 + np.exp(-(middle + np.array([-half, half]))))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-6)


def test_the_interval_of_the_area_covers_it():
    rng = np.random.default_rng(1)
    # The chance that N(1, 1) exceeds N(0, 1).
    truth = stats.norm.cdf(1 / np.sqrt(2))
    found = [auc(rng.normal(1, 1, 40), rng.normal(0, 1, 60)) for _ in range(600)]
    covered = sum(one.low <= truth <= one.high for one in found)
    assert 0.92 < covered / 600 < 0.98


def test_a_perfect_area_has_an_interval_too():
    above = auc(np.arange(30.0) + 100, np.arange(50.0))
    assert (above.value, above.high) == (1.0, 1.0)
    assert above.low == pytest.approx(0.025 ** (1 / 30))
    below = auc(np.arange(30.0), np.arange(50.0) + 100)
    assert (below.value, below.low) == (0.0, 0.0)
    assert below.high == pytest.approx(1 - 0.025 ** (1 / 30))
    tied = auc(np.zeros(30), np.zeros(50))
    assert tied.value == 0.5
    assert (tied.low, tied.high) == pytest.approx(
        tuple(stats.binomtest(15, 30).proportion_ci(method="exact"))
    )
    assert not tied.conclusive and above.conclusive and below.conclusive


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (1, 400)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_clopper_pearson_is_scipys(k, n, level):
    ends = stats.binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level) == pytest.approx((ends.low, ends.high))


def test_clopper_pearson_without_trials():
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes must be 0 to trials = 2, not 3"):
        clopper_pearson(3, 2)


@pytest.mark.parametrize("ties", [False, True])
def test_p_values_of_exchangeable_scores_are_uniform(ties):
    values = np.random.default_rng(0).normal(size=200)
    values = np.round(values, 1) if ties else values
    p_values = np.array([audit.conformal_p_values([values[k]], np.delete(values, k))[0] for k in range(200)])
    for level in np.arange(1, 201) / 200:
        share = (p_values <= level + 1e-12).mean()
        assert share <= level + 1e-12
        assert ties or share == pytest.approx(level)


def test_p_values_count_ties_against_membership():
    assert audit.conformal_p_values([3.0, 2.0, 1.9, 0.0], [1.0, 2.0, 2.0]).tolist() == [0.25, 0.75, 0.75, 1.0]


def test_rates_hold_on_average_over_calibrations():
    rng = np.random.default_rng(2)
    told = 0
    for _ in range(300):
        scores = rng.standard_t(3, 219)
        told += int((audit.conformal_p_values(scores[:20], scores[20:]) <= 0.05 + 1e-9).sum())
    # Of 199 others and one more, exactly one in twenty.
    share, spread = told / 6000, 0.0012 + np.sqrt(0.05 * 0.95 / 6000 + 0.05 * 0.95 / 300 / 200)
    assert abs(share - 0.05) < 4 * spread


def test_scores_are_those_of_the_papers():
    rng = np.random.default_rng(3)
    members, others = of(rng, 4, 2.0), of(rng, 5, 2.0)
    its = tuple(ScoredTexts(one.texts, -rng.random((len(one), 11))) for one in (members, others))
    found = {one.name: one for one in audit.membership(members, others, reference=its).scores}
    assert list(found) == ["reference", "loss", "zlib", "min-k"]
    rows = np.array([np.array(values) for values in members.log_probabilities])
    np.testing.assert_allclose(found["loss"].members, rows.mean(1))
    sizes = [len(zlib.compress(text.encode())) for text in members.texts]
    np.testing.assert_allclose(found["zlib"].members, rows.mean(1) / sizes)
    # A fifth of 11 tokens are 2.
    np.testing.assert_allclose(found["min-k"].members, np.sort(rows)[:, :2].mean(1))
    np.testing.assert_allclose(found["reference"].others, others.means - its[1].means)
    short = ScoredTexts(["a b", "b c"], [[-1.0, -3.0, -2.0], [-5.0]])
    least = {one.name: one for one in audit.membership(short, others).scores}["min-k"]
    assert least.members.tolist() == [-3.0, -5.0]
    five = ScoredTexts(["a b", "b c"], [[-1.0, -3.0, -2.0, -9.0, -8.0] * 2] * 2)
    assert {s.name: s for s in audit.membership(five, others).scores}["min-k"].members.tolist() == [
        -9.0,
        -9.0,
    ]
    ids = ScoredTexts([[1, 2], [2, 3]], [[-1.0], [-2.0]])
    assert [one.name for one in audit.membership(ids, others).scores] == ["loss", "min-k"]


def test_members_told_at_a_rate():
    members = ScoredTexts([f"m{k}" for k in range(50)], -np.linspace(0.1, 5, 50)[:, None])
    others = ScoredTexts([f"o{k}" for k in range(199)], -np.linspace(1, 9, 199)[:, None])
    found = audit.membership(members, others, rates=[0.005, 0.05])
    best, twentieth = found.scores[0].at_rates
    # One p-value in 200 at most means above all others; one in twenty, above all but nine.
    assert best.n_told == (members.means > others.means.max()).sum() == 9
    assert twentieth.n_told == (members.means > np.sort(others.means)[-10]).sum()
    assert twentieth.share == twentieth.n_told / 50
    assert twentieth.interval == wilson(twentieth.n_told, 50)
    np.testing.assert_array_equal(
        found.scores[0].p_values, audit.conformal_p_values(members.means, others.means)
    )
    # The rate of the largest of n is Beta(1, n), in closed form.
    assert best.realised == pytest.approx(1 - 0.025 ** (1 / 199))
    assert twentieth.realised == pytest.approx(stats.beta.ppf(0.975, 10, 190))
    table = found.columns()
    assert table["false_positive_rate"] == [0.005, 0.05] * 3
    assert found.to_frame().shape == (6, 9)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.001, 999), (0.3, 3), (0.05, 19)])
def test_rates_that_take_more_others_are_refused(rate, needed):
    members = ScoredTexts(["a", "b"], [[-1.0], [-2.0]])
    others = [ScoredTexts([f"o{k}" for k in range(n)], -np.ones((n, 1))) for n in (needed - 1, needed)]
    message = rf"rates\[0\] is {rate:g}, which takes {needed} others, and there are {needed - 1}"
    refused(message, audit.membership, members, others[0], rates=[rate])
    found = audit.membership(members, others[1], rates=[rate])
    assert found.scores[0].at_rates[0].n_told == 0
    # Those that nobody asked for are left open.
    at = audit.membership(members, others[0]).scores[0].at_rates
    assert [one.rate for one in at] == [0.01, 0.001]
    assert at[1].n_told is None
    assert math.isnan(at[1].share) and math.isnan(at[1].realised) and all(map(math.isnan, at[1].interval))


def test_a_rate_that_a_product_misses_by_rounding():
    # 0.29 * 100 is 28.999999999999996.
    others = ScoredTexts([f"o{k}" for k in range(99)], -np.arange(1.0, 100.0)[:, None])
    at = (
        audit.membership(ScoredTexts(["a", "b"], [[-28.5], [-29.5]]), others, rates=[0.29])
        .scores[0]
        .at_rates[0]
    )
    assert at.n_told == 1
    assert at.realised == pytest.approx(stats.beta.ppf(0.975, 29, 71))


def test_a_rate_that_is_no_decimal_is_not_missed_by_rounding():
    # One minus 0.9 is 0.09999999999999998, which the p-value of whatever is above all nine exceeds.
    others = ScoredTexts([f"o{k}" for k in range(9)], -np.arange(2.0, 11.0)[:, None])
    members = ScoredTexts(["a", "b"], [[-1.0], [-5.0]])
    assert audit.membership(members, others, rates=[1 - 0.9]).scores[0].at_rates[0].n_told == 1


def test_bytes_are_those_of_the_usual_compression():
    rng = np.random.default_rng(0)
    members = ScoredTexts(texts(rng, 2, length=400), [[-1.0], [-2.0]])
    sizes = [[len(zlib.compress(text.encode(), level)) for level in (1, 6)] for text in members.texts]
    assert all(fast != usual for fast, usual in sizes)
    found = {one.name: one for one in audit.membership(members, of(rng, 3, 2.0)).scores}["zlib"]
    np.testing.assert_allclose(found.members, [-1.0 / sizes[0][1], -2.0 / sizes[1][1]])


@pytest.mark.parametrize(
    ("low", "told"), [(0.51, "told apart"), (0.5, "not told apart"), (0.3, "not told apart")]
)
def test_members_are_told_apart_where_the_interval_says_so(low, told):
    rng = np.random.default_rng(0)
    found = audit.membership(of(rng, 5, 1.0), of(rng, 5, 1.0))
    first = replace(found.scores[0], auc=Auc(0.7, low, 0.9))
    assert replace(found, scores=(first, *found.scores[1:])).conclusion == told


def test_what_is_no_membership_is_refused():
    rng = np.random.default_rng(0)
    members, others = of(rng, 3, 2.0), of(rng, 3, 2.0)
    both = ScoredTexts([others.texts[0], f" {members.texts[1]}"], [[-1.0], [-1.0]])
    refused(r"members\[1\] is others\[1\] too", audit.membership, members, both)
    refused(
        r"rates\[1\] must be between 0 and 1, not 1.0", audit.membership, members, others, rates=[0.5, 1.0]
    )
    refused("delta must be at least 0 and below 1, not 1.0", audit.membership, members, others, delta=1.0)
    assert audit.membership(members, others, delta=0.0).delta == 0.0
    twice = ScoredTexts([members.texts[0]] * 2, [[-1.0], [-1.0]])
    refused(r"members\[0\] is others\[0\] too", audit.membership, twice, members)
    one = ScoredTexts(["x", " x"], [[-1.0], [-1.0]])
    refused("members has 1 different text; an interval takes 2", audit.membership, one, others)
    refused("others has 1 different text", audit.membership, members, one)
    refused("reference scored 3 members, the model 2", audit.membership, both, of(rng, 2, 1.0),
            reference=(members, members))  # fmt: skip
    longer = ScoredTexts(members.texts, [*members.log_probabilities[:2], [-1.0]])
    refused(r"reference has other tokens for members\[2\]", audit.membership, members, others,
            reference=(longer, others))  # fmt: skip
    ids = [[0, 1], [1, 1], [2, 1]]
    mine = ScoredTexts(members.texts, [[-1.0]] * 3, None, ids)
    its = ScoredTexts(members.texts, [[-1.0]] * 3, None, [[0, 1], [1, 2], [2, 1]])
    refused(
        r"reference has other tokens for members\[1\]",
        audit.membership,
        mine,
        others,
        reference=(its, others),
    )
    renamed = ScoredTexts(["p", "q", "r"], [[-1.0]] * 3, None, ids)
    refused(r"reference has other tokens for members\[0\]", audit.membership, mine, others,
            reference=(renamed, others))  # fmt: skip


def test_texts_that_come_twice_count_once():
    rng = np.random.default_rng(0)
    members, others = of(rng, 30, 2.0), of(rng, 30, 2.0)
    twice = members.take([*range(30), 3, 4])
    found, same = (audit.membership(one, others) for one in (twice, members))
    assert (found.n_duplicates, same.n_duplicates) == (2, 0)
    assert found.scores[0].auc == same.scores[0].auc


def test_words_that_tell_are_a_confounder():
    rng = np.random.default_rng(0)
    found = audit.membership(of(rng, 120, 1.0), of(rng, 120, 3.0, [*WORDS[:11], "zebu"]))
    assert found.conclusion == "confounded"
    assert found.verdict.startswith("The figures cannot be read as membership, as words alone")
    assert str(found.blind) in found.verdict
    clean = audit.membership(of(rng, 120, 1.0), of(rng, 120, 3.0))
    assert clean.conclusion == "told apart"
    assert clean.verdict.startswith(
        "Members are told apart: by loss, 120 members against 120 others have AUC 1.00"
    )
    assert "are told at a false-positive rate of at most 1 %; words alone have AUC" in clean.verdict
    few = audit.membership(of(rng, 19, 1.0), of(rng, 120, 3.0))
    assert few.blind is None and few.epsilon is None
    assert few.verdict.endswith("there are too few texts to see whether words alone tell them.")
    assert audit.membership(of(rng, 20, 1.0), of(rng, 20, 3.0)).epsilon is not None
    none = audit.membership(of(rng, 40, 2.0), of(rng, 40, 2.0))
    assert none.conclusion == "not told apart"
    assert none.verdict.startswith("Members are not told apart, which is no proof that they cannot be: ")
    # Nine of nine: with fewer than 99 others no share stands in the verdict.
    assert "false-positive" not in none.verdict


def test_the_blind_classifier_sees_words_and_nothing_else():
    rng = np.random.default_rng(1)
    values = [blind_auc(texts(rng, 60), texts(rng, 60), random_state=k) for k in range(20)]
    # Binomial(20, 0.05) exceeds 5 with probability 3e-4; areas are 1/2 on average.
    assert sum(one.conclusive for one in values) <= 5
    assert abs(np.mean([one.value for one in values]) - 0.5) < 0.05
    moved = blind_auc(texts(rng, 60), texts(rng, 60, [*WORDS[:6], *WORDS[:6], *WORDS[6:]]))
    assert moved.low > 0.5
    marks = blind_auc([f"{t} !" for t in texts(rng, 60)], [f"{t} ?" for t in texts(rng, 60)])
    assert marks.value == 1.0
    numbers = blind_auc(rng.integers(0, 50, (60, 9)).tolist(), rng.integers(30, 80, (60, 9)).tolist())
    assert numbers.value > 0.9
    assert blind_auc(texts(rng, 19), texts(rng, 60)) is None


def test_the_variance_of_areas_of_folds_is_twice_that_of_independent_ones(monkeypatch):
    monkeypatch.setattr(membership, "delong", lambda members, others: (0.6, 0.01))
    rng = np.random.default_rng(0)
    found = blind_auc(texts(rng, 20), texts(rng, 25))
    half = stats.norm.ppf(0.975) * np.sqrt(2 * 0.01 / 5) / (0.6 * 0.4)
    ends = 1 / (1 + np.exp(-(math.log(0.6 / 0.4) + np.array([-half, half]))))
    assert (found.value, found.low, found.high) == pytest.approx((0.6, *ends))


def test_epsilon_has_a_closed_form_at_the_ends():
    # All told and none false: both errors have the bound 1 - 0.025^(1/n).
    most = 1 - 0.025 ** (1 / 100)
    assert epsilon_lower_bound(100, 100, 0, 100, 0.0) == pytest.approx(math.log((1 - most) / most))
    assert epsilon_lower_bound(100, 100, 0, 100, 0.5) == pytest.approx(math.log((1 - most - 0.5) / most))
    assert epsilon_lower_bound(50, 100, 50, 100, 0.0) == 0.0
    assert epsilon_lower_bound(0, 100, 100, 100, 1e-5) == 0.0
    # Either error may decide: few of many members, or all but few of many others.
    low, high = clopper_pearson(300, 1000)[0], clopper_pearson(1, 1000)[1]
    assert epsilon_lower_bound(300, 1000, 1, 1000, 0.0) == pytest.approx(math.log(low / high))
    assert epsilon_lower_bound(999, 1000, 700, 1000, 0.0) == pytest.approx(math.log(low / high))


def test_a_score_at_the_threshold_is_above_it():
    halves = [np.ones(100), np.zeros(100)]
    assert membership._epsilon_at(1.0, halves, 0.0) == epsilon_lower_bound(100, 100, 0, 100, 0.0) > 3.0


def test_thresholds_are_many_enough_to_find_a_tenth_of_the_members():
    rng = np.random.default_rng(0)
    others = rng.random(1000)
    members = np.append(rng.random(900), 2.0 + rng.random(100))
    # A tenth of the members above all others, whatever lies below: half of either judge.
    found = membership._epsilon(members, others, 0.0, rng)
    assert found > 0.5 * epsilon_lower_bound(50, 500, 0, 500, 0.0) > 1.0


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_epsilon_stays_below_that_of_randomised_response(truth):
    rng = np.random.default_rng(4)
    honest = math.exp(truth) / (1 + math.exp(truth))
    told, false = rng.binomial(2000, honest, 400), rng.binomial(2000, 1 - honest, 400)
    bounds = np.array(
        [epsilon_lower_bound(int(a), 2000, int(b), 2000, 0.0) for a, b in zip(told, false, strict=True)]
    )
    assert stats.binomtest(int((bounds > truth).sum()), 400, 0.05, alternative="greater").pvalue > 1e-3
    assert np.median(bounds) > 0.6 * truth


def test_epsilon_is_judged_on_texts_that_did_not_choose_its_threshold(monkeypatch):
    seen = []

    def kept(threshold, halves, delta):
        seen.append([set(values) for values in halves])
        return bound(threshold, halves, delta)

    bound = membership._epsilon_at
    monkeypatch.setattr(membership, "_epsilon_at", kept)
    rng = np.random.default_rng(0)
    membership._epsilon(rng.random(100), rng.random(90), 1e-5, rng)
    *chosen, judged = seen
    assert len(chosen) > 1
    for one in chosen:
        assert not one[0] & judged[0] and not one[1] & judged[1]
    assert len(chosen[0][0] | judged[0]) == 100 and len(chosen[0][1] | judged[1]) == 90


def test_epsilon_of_membership_is_chosen_and_judged_on_different_halves():
    rng = np.random.default_rng(5)
    bounds = [
        audit.membership(
            ScoredTexts([f"m{k}" for k in range(80)], -rng.random((80, 1))),
            ScoredTexts([f"o{k}" for k in range(80)], -rng.random((80, 1))),
            random_state=seed,
        ).epsilon
        for seed in range(15)
    ]
    # Scores that say nothing: a bound above zero is an error, of which 5 % are allowed.
    assert sum(bound > 0.0 for bound in bounds) <= 4
    apart = audit.membership(
        ScoredTexts([f"m{k}" for k in range(200)], -rng.random((200, 1))),
        ScoredTexts([f"o{k}" for k in range(200)], -1.0 - rng.random((200, 1))),
    )
    most = 1 - 0.025 ** (1 / 100)
    assert apart.epsilon == pytest.approx(math.log((1 - most - 1e-5) / most), abs=0.4)
    assert apart.epsilon <= math.log((1 - most - 1e-5) / most) + 1e-9
