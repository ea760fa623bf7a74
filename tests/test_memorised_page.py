"""The page of `attnfit memorised`: what it says follows its figures, and its pictures are these figures."""

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_curve

pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_audit_browser import BROWSER, browse
from test_audit_report import checked

from attnfit import audit
from attnfit.audit.intervals import wilson
from attnfit.audit.memorisation.advice import REMEDIES, conclusion, findings
from attnfit.audit.memorisation.report import Extracted, Memorised
from attnfit.audit.memorisation.report_html import _exposures, _nice, _roc, _shares, _spaced, render
from attnfit.audit.page.chart import Chart, Line

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "audit-memorised.md"
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"]


def back(counts, n=40, name="text", q=1e-9, prefixes=(4, 8)):
    """Texts of which some come back greedily by each prefix, and whose suffix has probability q."""
    scored = {}
    for prefix, count in zip(prefixes, counts, strict=True):
        hits = [[k < count] for k in range(n)]
        scored[prefix] = audit.ScoredTexts(
            [f"{name} {k}" for k in range(n)], [[math.log(q)]] * n, hits, [[k] for k in range(n)]
        )
    return audit.extraction(scored, 1)


def told(shift, n=60, seed=0, other_words=None):
    """Members that score higher than others by a shift."""
    rng = np.random.default_rng(seed)

    def texts(mean, words, kind):
        sentences = [" ".join([*rng.choice(words, 12), f"{kind}{k}"]) for k in range(n)]
        return audit.ScoredTexts(sentences, (mean - 5 - rng.random(n))[:, None])

    return audit.membership(texts(shift, WORDS, "m"), texts(0.0, other_words or WORDS, "o"), rates=[0.05])


def exposed(own, others=99, possible=None, repeats=None):
    canaries = audit.ScoredTexts([f"canary <{k}>" for k in range(len(own))], np.array(own)[:, None])
    rest = audit.ScoredTexts([f"c{k}" for k in range(others)], -np.arange(1.0, others + 1)[:, None])
    return audit.exposure(canaries, rest, possible, repeats=repeats)


def found(members=None, others=None, membership=None, exposure=None, **changes):
    settings = {"random_state": 0, "temperature": 1.0, "reference": None, "fingerprint": "0123"}
    return Memorised("model <x>", members, others, membership, exposure, settings, **changes)


def whole(**changes):
    return found(
        back((10, 30)), back((0, 1), name="other"), told(0.4),
        exposed([-0.5, -40.5, -60.5], repeats=[4, 1, 0]), command="attnfit x",
        extracted=(Extracted(3, "given <i>", " and produced"), Extracted(5, "x", "y")), **changes,
    )  # fmt: skip


CASES = [
    (found(back((0, 30)), back((0, 1))), "has memorised", False),
    (found(back((30, 0)), back((0, 0))), "has memorised", False),
    # Intervals at 95 % that meet: 9 of 40 from 12 %, 1 of 40 up to 13 %.
    (found(back((0, 9)), back((0, 1))), "shows no sign", True),
    (found(back((0, 10)), back((0, 1))), "has memorised", False),
    (found(back((0, 1))), "completes texts that it was trained on, be they memorised or guessed", False),
    (found(back((0, 0))), "shows no sign", True),
    # In draws, though not greedily.
    (found(back((0, 0), q=0.4), back((0, 0))), "has memorised", False),
    (found(membership=told(3.0)), "gives away which texts", False),
    (found(membership=told(0.0)), "shows no sign", True),
    (found(exposure=exposed([-0.5])), "has memorised", False),
    (found(exposure=exposed([-50.5])), "shows no sign of memorised texts, which is no proof", True),
    # Ten ranks can show nothing at 5 %.
    (found(exposure=exposed([-0.5], others=10)), "shows no sign of memorised texts, but not all", False),
]


@pytest.mark.parametrize(("given", "lead", "good"), CASES)
def test_the_conclusion_follows_the_figures(given, lead, good):
    said, is_good = conclusion(given)
    assert said.startswith(lead)
    assert is_good == good
    page = render(given)
    assert f'class="verdict{" good" * good}"' in page
    assert ("What to do" in page) != good


def test_others_of_other_words_are_no_comparison():
    rng = ["x", "y", "z"]
    given = found(back((0, 30)), back((0, 0)), told(3.0, other_words=rng))
    assert given.membership.conclusion == "confounded"
    assert conclusion(given) == (
        "completes texts that it was trained on, be they memorised or guessed",
        False,
    )
    assert "cannot be read off, as words alone tell them apart (AUC " in findings(given)[1]
    silent = found(back((0, 0)), back((0, 0)), told(3.0, other_words=rng))
    assert conclusion(silent) == ("shows no sign of memorised texts, but not all figures can be read", False)


def test_the_first_sentence_has_counts_with_intervals():
    said = findings(whole())
    assert said[0] == (
        "given 8 tokens, it produces the next 1 for 30 of 40 texts (75 %, interval 60 % to 86 %), and for 1 "
        "of 40 texts (2 %, interval 0.4 % to 13 %) that it was not trained on"
    )
    at = whole().membership.scores[0].at_rates[0]
    ends = stats.binomtest(at.n_told, 60).proportion_ci(method="wilson")
    assert said[1] == (
        f"{at.n_told} of 60 training texts ({100 * at.n_told / 60:.0f} %, interval {100 * ends.low:.0f} % to "
        f"{100 * ends.high:.0f} %) are told from others at a false-positive rate of at most 5 %"
    )
    assert said[2] == "1 of 3 canaries (33 %, interval 6 % to 79 %) are exposed beyond chance"
    drawn = findings(found(back((0, 2), q=0.4)))
    assert (
        "for 2 of 40 texts (5 %, interval 1 % to 17 %), or for 40 with probability 0.5 or more in 10,000"
        in drawn[0]
    )
    apart = replace(told(3.0), scores=tuple(replace(s, at_rates=()) for s in told(3.0).scores))
    assert findings(found(membership=apart))[0].startswith(
        "its training texts are told from others with AUC 1.00"
    )
    assert findings(found(membership=told(0.0)))[0].startswith(
        "its training texts are not told from others (AUC "
    )
    assert "as too few texts were compared" in findings(found(exposure=exposed([-0.5], others=10)))[0]
    page = render(whole())
    assert "; ".join(said).replace(" %", "\u00a0%") in page.replace("&lt;", "<")


def test_the_first_screen_answers_what_for_whom_and_what_to_do():
    body = render(whole(owner="Legal <b>", made="2026-01-31")).partition("<h1>")[2]
    order = ["verdict", "fingerprint 0123", "Legal &lt;b&gt;", "2026-01-31", "Who attacks",
             "What was measured", "What was not", "What to do", "Pictures", "<svg", "Extraction</h2>",
             "Membership</h2>", "Canaries</h2>", "Definitions", "How to run", "attnfit x"]  # fmt: skip
    places = [body.index(words) for words in order]
    assert places == sorted(places)
    # What was not measured is not described.
    alone = render(found(exposure=exposed([-0.5])))
    assert "prompt" not in alone and "Membership" not in alone and "Extraction" not in alone
    assert alone.count("<svg") == 1


def test_the_roc_curve_is_scikit_learns_with_one_more_other():
    membership = told(0.4, n=80)
    chart = _roc(membership)
    for line, score in zip(chart.lines, membership.scores, strict=False):
        truth = np.repeat([1, 0], [80, 80])
        false, true, _ = roc_curve(truth, np.append(score.members, score.others), drop_intermediate=False)
        assert line.name == score.name
        for x, y in zip(line.x, line.y, strict=True):
            # Of the others and the text judged, so many may score as high.
            rank = round(10**x * 81)
            share = true[false <= (rank - 1) / 80 + 1e-9].max()
            assert 10**y == pytest.approx(share)
        assert (line.x[-1], line.y[-1]) == (0.0, 0.0)
    x, low, high = chart.band
    assert (x, chart.x_range, chart.y_range) == (chart.lines[0].x, (-2.0, 0.1), (-2.0, 0.0))
    for at, y in zip(range(len(x)), chart.lines[0].y, strict=True):
        ends = stats.binomtest(round(10**y * 80), 80).proportion_ci(method="wilson")
        assert (10 ** low[at], 10 ** high[at]) == pytest.approx((max(ends.low, 0.01), ends.high))
    chance = chart.lines[-1]
    assert (chance.name, chance.x, chance.y) == ("chance", chance.y, chance.x)
    assert list(chart.x_ticks.values()) == ["1 %", "10 %", "100 %"]


def test_the_rate_of_extraction_is_drawn_by_prefix():
    chart = _shares(found(back((10, 30), q=0.4), back((0, 4), name="other")))
    named = {line.name: line for line in chart.lines if line.name}
    assert list(named) == ["greedy", "10,000 draws", "greedy, others", "10,000 draws, others"]
    assert named["greedy"].x == [2.0, 3.0]
    assert named["greedy"].y == [0.25, 0.75]
    assert named["10,000 draws"].y == [1.0, 1.0]
    assert named["greedy, others"].y == [0.0, 0.1]
    assert chart.band[0] == [2.0, 3.0]
    assert list(zip(*chart.band[1:], strict=True)) == [wilson(10, 40), wilson(30, 40)]
    assert chart.x_ticks == {2.0: "4", 3.0: "8"}
    assert chart.y_range == (0.0, 1.0)
    rare = _shares(found(back((0, 1), n=400)))
    # An upper end of 1.4 %.
    assert rare.y_range == (0.0, 0.02)
    assert list(rare.y_ticks.values()) == ["0 %", "1 %", "2 %"]
    alone = _shares(found(back((3,), prefixes=(8,))))
    assert alone.x_range == (2.5, 3.5)
    # Names of ticks that would overlap give way to those of longer prefixes.
    assert _spaced([2, 50, 51], [1.0, math.log2(50), math.log2(51)], 0.1) == {1.0: "2", math.log2(51): "51"}


@pytest.mark.parametrize(("top", "size"), [(1.0, 1.0), (0.51, 1.0), (0.5, 0.5), (0.11, 0.2), (0.003, 0.005)])
def test_an_axis_ends_at_a_round_number(top, size):
    assert _nice(top) == pytest.approx(size)


def test_exposures_are_dots_beside_those_of_canaries_never_seen():
    exposure = exposed([-50.5, -0.5, -9.5, -0.2], possible=10_000, repeats=[0, 8, 1, 16])
    chart = _exposures(exposure)
    dots = {line.name: line for line in chart.lines if line.labels}
    assert exposure.exposed.tolist() == [False, True, False, True]
    assert dots["exposed"].x == [1, 2]
    assert dots["exposed"].y == exposure.bits[[1, 3]].tolist()
    assert dots["exposed"].labels == ["8 x", "16 x"]
    assert dots["not exposed"].x == [3, 4]
    assert dots["not exposed"].y == exposure.bits[[2, 0]].tolist()
    assert dots["not exposed"].tips[1].startswith("canary 0: 1.0 bits, sampled, planted 0 times")
    whiskers = [line for line in chart.lines if line.style == "whisker" and not line.name]
    assert [line.y for line in whiskers] == exposure.interval[[1, 3, 2, 0]].tolist()
    (top,) = [line for line in chart.lines if line.name == "the likeliest of all texts"]
    assert top.y == [exposure.largest] * 2
    # The k-th of n p-values that are uniform has mean k / (n + 1).
    (nominal,) = [line for line in chart.lines if line.style == "nominal"]
    for k in (1, 4):
        mean = stats.beta(k, 5 - k).mean()
        assert np.interp(k, nominal.x, nominal.y) == pytest.approx(-math.log2(mean), abs=0.02)
    assert _exposures(exposed([-0.5])).lines[-1].labels == [""]


@pytest.mark.parametrize("given", [case[0] for case in CASES] + [whole()])
@pytest.mark.parametrize("redact", [True, False])
def test_pages_are_well_formed_and_pictures_inside_their_frame(given, redact):
    page = render(given, redact)
    counts = checked(page).counts
    assert counts["svg"] >= 1
    assert "://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "<x>" not in page and "nan" not in re.sub('data-value="nan"', "", page)
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        for points in re.findall(r'points="([^"]+)"', svg):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 46 <= x <= 464 and 62 <= y <= 260
        for x, y in re.findall(r'cx="([^"]+)" cy="([^"]+)"', svg):
            assert 46 <= float(x) <= 464 and 0 < float(y) <= 260


def test_remedies_name_their_sources():
    text = RESULTS.read_text()
    rows = [
        re.findall(r"[^|]+", line)
        for line in text.partition("## Exposure")[2].partition("##")[0].splitlines()
    ]
    once = [[cell.strip() for cell in row] for row in rows if len(row) == 6 and row[1].strip() == "1"]
    assert once and all(row[2] == row[5] for row in once)
    ends = [float(end) for row in once for end in row[4].split(" to ")]
    assert (
        f"all canaries planted once were exposed, with {min(ends)} to {max(ends)} of 16.6 bits"
        in REMEDIES[0].why
    )
    assert all(re.search(r"arXiv:\d{4}\.\d{5}", one.why) and one.cost for one in REMEDIES)
    page = render(whole())
    places = [page.index(f"<strong>{one.what}</strong> {one.why}") for one in REMEDIES]
    assert places == sorted(places)


def test_a_legend_takes_more_rows_where_it_needs_them():
    lines = [Line([0.0, 1.0], [0.0, 1.0], name="n" * 25) for _ in range(3)] + [Line([0.0], [0.0])]
    places = list(Chart("t", "x", (0.0, 1.0), (0.0, 1.0), {}, {}, lines).legend)
    assert [y for _, y, _ in places] == [32, 32, 46]
    assert places[0][0] == places[2][0] == 46 < places[1][0]
    # One that is too long for a row has a row.
    (alone,) = Chart("t", "x", (0.0, 1.0), (0.0, 1.0), {}, {}, [Line([0.0], [0.0], name="n" * 99)]).legend
    assert alone[:2] == (46, 32)


def test_pages_hold_texts_only_where_they_are_revealed():
    given = whole()
    other = replace(given, extracted=(Extracted(0, "p" * 99, "q"), Extracted(1, "r", "s")))
    other = replace(other, exposure=replace(given.exposure, texts=("a", "b" * 50, "c")))
    hidden = render(given)
    assert hidden == render(other)
    assert "and produced" not in hidden and "canary &lt;" not in hidden
    assert 'id="show"' not in hidden
    shown = render(given, redact=False)
    assert "given &lt;i&gt;<mark> and produced</mark>" in shown
    assert "canary &lt;0&gt;" in shown and 'id="show"' in shown
    assert "2 of the 2 texts that come back" in shown
    first = render(given, redact=False, n_examples=1)
    assert first.count("<mark>") == 1 and "1 of the 2 texts that come back" in first
    plain, revealed = (json.dumps(given.as_json(redact), default=float) for redact in (True, False))
    assert "produced" not in plain and "canary <" not in plain
    assert "and produced" in revealed and "canary <2>" in revealed


def test_the_page_is_written_to_a_file(tmp_path):
    whole().to_html(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text() == render(whole())
    whole().to_html(tmp_path / "out.html", redact=False)
    assert (tmp_path / "out.html").read_text() == render(whole(), redact=False)


WIDE = """<body><script>
const frame = document.createElement("iframe");
frame.width = WIDTH; frame.height = 900;
frame.srcdoc = PAGE;
frame.onload = () => {
  const page = frame.contentDocument, out = [];
  for (const one of page.querySelectorAll("body *")) {
    const box = one.getBoundingClientRect();
    if (box.right > WIDTH + 0.5 || box.left < -0.5) out.push(one.tagName);
  }
  const tables = page.querySelectorAll("table").length;
  document.title = [frame.contentWindow.innerWidth, tables, ...out].join(" ");
};
document.body.append(frame);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("redact", [True, False])
def test_nothing_is_off_the_screen(tmp_path, width, redact):
    # Every column there is: 1,500 others are enough for a fitted tail.
    sample = stats.norm.ppf((np.arange(1500) + 0.5) / 1500)
    others = audit.ScoredTexts([f"c{k}" for k in range(1500)], (3 * sample - 50)[:, None])
    own = audit.ScoredTexts(["one", "another text that was planted", "c"], [[-0.1], [-38.5], [-50.0]])
    exposure = audit.exposure(own, others, 10**12, repeats=[1000, 1, 0])
    assert np.isfinite(exposure.extrapolated[:2]).all()
    page = render(replace(whole(), exposure=exposure), redact)
    script = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "outer.html").write_text(WIDE.replace("WIDTH", str(width)).replace("PAGE", script))
    dom = browse(tmp_path / "profile", "--dump-dom", (tmp_path / "outer.html").as_uri())
    title = html.unescape(re.search("<title>(.*?)</title>", dom)[1])
    assert title == f"{width} {3 if redact else 5}"
