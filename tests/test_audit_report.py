"""What an audit writes: JSON with stable keys, and one page that fetches nothing."""

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import audit_reports
from audit_reports import TEXTS, report

from attnfit.audit.advice import options, percent, scope
from attnfit.audit.page import Column, Entry, number, templates
from attnfit.audit.page.chart import Chart, Line
from attnfit.audit.report_html import render

KEYS = {
    *("schema", "verdict", "advice", "model", "settings", "coverage", "pairs", "breakpoints", "controls"),
    *("cells", "seconds", "versions", "command", "made", "owner", "scope", "options"),
}
PAIR_KEYS = {
    *("access", "defence", "n_texts", "n_cut", "n_errors", "tokens_right", "tokens", "sentences_exact"),
    *("verified", "false_claims", "divergence", "agreement", "predicted", "seconds", "message", "tested"),
    *("token_share", "token_interval", "sentence_share", "sentence_interval", "n_unsupported", "n_missing"),
    "n_open",
    "tokens_ambiguous",
    "all_right",
    "all_tokens",
    "all_share",
}
VOID = {"meta", "input", "br"}


class Checker(HTMLParser):
    """Every element is closed, and nothing points elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.counts, self.links = [], {}, []

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not any(name == "style" or name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.links == []
    return checker


def test_json_has_stable_keys(tmp_path):
    report().to_json(tmp_path / "out.json", redact=False)
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["schema"] == "attnfit-audit/1"
    assert set(told) == KEYS
    assert all(set(pair) == PAIR_KEYS for pair in told["pairs"])
    first = told["pairs"][0]
    assert (first["access"], first["defence"], first["token_share"]) == ("hidden:1", "none", 1.0)
    assert first["token_interval"][1] == 1.0
    untested = [pair for pair in told["pairs"] if pair["defence"] == "drop0"]
    assert all(pair["token_share"] is None and not pair["tested"] for pair in untested)
    assert told["settings"]["texts"] == list(TEXTS)
    assert told["coverage"]["planned"] == 25


def test_redacted_files_hold_no_text(tmp_path):
    found = report()
    found.to_json(tmp_path / "out.json")
    found.to_html(tmp_path / "out.html")
    for path in (tmp_path / "out.json", tmp_path / "out.html"):
        assert "Bob" not in path.read_text() and "Alan" not in path.read_text()
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["settings"]["texts"] is None
    for cell in told["cells"]:
        assert (cell["tokens"], cell["right"], cell["failed_at"], cell["message"]) == (None, None, None, "")
        assert cell["n_right"] <= cell["n_tokens"]


@pytest.mark.parametrize("redact", [True, False])
def test_redacted_files_depend_on_counts_only(tmp_path, redact):
    """Neither what a text says nor how long it or a part of it is can be read off."""
    pages = []
    for length in (10, 1000):
        piece = "x" * (length // 5)
        found = report(texts=["x" * length] * 2, pieces=dict.fromkeys(range(1, 6), piece))
        found.to_json(tmp_path / "out.json", redact=redact)
        pages.append(render(found, redact) + (tmp_path / "out.json").read_text())
    assert (pages[0] == pages[1]) == redact


def test_an_inversion_that_was_cut_has_no_number():
    """0 % of a cut one beside 100 % of a finished one would compare what cannot be compared."""
    found = report()
    cut = [
        replace(cell, status="cut", right=[]) if cell.key.defence == "int8" else cell for cell in found.cells
    ]
    page = render(replace(found, cells=tuple(cut)), redact=False)
    rows = [
        row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if "cut short" in row and "int8" in row
    ]
    assert rows
    assert not any("%" in row for row in rows)


def test_verdict_and_advice():
    found = report()
    assert found.verdict == (
        "Not tested: hidden:1 with drop0, topk:5 with drop0; "
        "model <x>: up to 100 % of tokens recovered without a defence (hidden:1), 5 of 5 tokens, 2 of 2 "
        "texts whole, 95 % at least 57 %; with noise:9.0, the best tried, up to 0 % (hidden:1), 0 of 5 "
        "tokens, 0 of 2 texts whole, 95 % at most 43 %; 1 of 25 cells not run: budget"
    )
    hidden, topk, masked, untested = found.advice
    assert "int8 100 %, noise:1.0 60 %" in hidden
    assert "noise:9.0 does, on these texts: 0 % come back, at a cost of 2.1 nats a token" in hidden
    assert "5 largest log-probabilities" in topk
    assert "has memorised these texts" in masked
    assert (
        "no proof of protection: hidden:1 with drop0; topk:5 with drop0 (position 0 was withheld)" in untested
    )


def test_what_to_do_is_ranked_by_what_it_costs():
    """What is enough first, the cheapest first, then what is not, by what still comes back."""
    found = options(report(), 0.05)
    assert [(o.what, o.enough) for o in found] == [
        ("keep hidden:1, topk:5 on your own machines", True),
        ("noise:9.0", True),
        ("noise:1.0", False),
        ("int8", False),
    ]
    assert [o.leak for o in found] == [0.0, 0.0, 0.6, 1.0]
    assert (found[1].divergence, found[1].agreement) == (2.1, 0.5)
    # A defence that was not tried on all that leaks is no way out, nor is one where something was cut.
    assert "drop0" not in [o.what for o in found]
    cells = tuple(
        replace(cell, status="cut", right=[]) if cell.key.defence == "noise:9.0" else cell
        for cell in report().cells
    )
    pairs = tuple(replace(p, n_cut=1) if p.defence == "noise:9.0" else p for p in report().pairs)
    assert not options(replace(report(), cells=cells, pairs=pairs), 0.05)[1].enough
    assert options(report(), 1.0) == []
    # Nor is one enough, or keeping what leaks at home, where another form of access was not tested with it.
    for changed, place in (("noise:9.0", "noise:9.0"), ("none", "keep hidden:1 on your own machines")):
        pairs = tuple(
            replace(p, n_texts=0, n_unsupported=2, tokens_right=0, tokens=0)
            if (p.access, p.defence) in (("topk:5", changed), ("topk:5", "none"))
            else p
            for p in report().pairs
        )
        (option,) = [o for o in options(replace(report(), pairs=pairs), 0.05) if o.what == place]
        assert not option.enough


def test_who_attacks_and_what_was_tried_is_said():
    told = scope(report())
    assert "has the weights of the model" in told["Who attacks"]
    assert told["What was tried"].startswith("2 texts, 3 forms of access, 5 defences (none, int8")
    assert "not proven to be safe" in told["What was not"]


def test_the_first_screen_answers_what_leaks_to_whom_and_what_to_do():
    page = render(replace(report(), owner="Legal <b>", made="2026-01-31"))
    order = ["verdict", "What is exposed today", "Legal &lt;b&gt;", "2026-01-31", "Who attacks",
             "What to do instead", "All combinations"]  # fmt: skip
    body = page[page.index("<h1>") :]
    places = [body.index(words) for words in order]
    assert places == sorted(places)


def test_a_withheld_token_that_was_not_found_proves_little(monkeypatch):
    monkeypatch.setitem(audit_reports.RIGHT, ("hidden:1", "drop0"), ((0, 3), (0, 2)))
    monkeypatch.setitem(audit_reports.COSTS, "drop0", 0.2)
    hidden = report().advice[0]
    assert "drop0 does, on these texts: 0 % come back" in hidden
    assert "a better attack may find it" in hidden
    assert "a better attack" not in report().advice[1]


def test_break_points_are_measured_beside_the_prediction():
    point = report().breakpoints[0]
    assert (point.access, point.unit, point.predicted) == ("hidden:1", "noise, row RMS", 1.2)
    assert (point.kept_at, point.lost_at) == (1.0, 9.0)


def test_the_gate_counts_what_was_not_tested():
    found = report()
    assert {(p.access, p.defence) for p in found.failures(1.0)} == {
        ("hidden:1", "drop0"),
        ("topk:5", "drop0"),
    }
    assert ("masked", "none") in {(p.access, p.defence) for p in found.failures(0.4)}


def test_an_interrupted_audit_says_so():
    found = report(n_planned=30, interrupted=True)
    assert found.coverage == "6 of 30 cells not run: stopped"


def test_the_page_is_well_formed_and_alone():
    page = render(report(), redact=False)
    counts = checked(page).counts
    assert counts["svg"] == 1
    assert counts["table"] == 6
    assert "://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "model &lt;x&gt;" in page and "model <x>" not in page
    assert "<b>Bob" not in page
    assert "&lt;b&gt;Bob&lt;/b&gt;" in page
    assert "attnfit audit x --report out.html" in page


def test_the_policy_allows_this_style_and_script_only():
    page = render(report())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        assert f"{tag}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" in policy


def test_numbers_that_are_none_are_dashes_that_sort_last():
    assert number(None).text == number(float("nan")).text == "–"
    rows = [[number(1.5)], [number(None)], [Entry("<x>", 0.25)]]
    alone = templates().from_string('{% from "parts.html" import table %}{{ table("t", columns, rows) }}')
    page = alone.render(columns=[Column("a")], rows=rows)
    assert "&lt;x&gt;" in page
    assert checked(page)
    assert re.findall(r'data-value="([^"]*)"', page) == ["1.5", "nan", "0.25"]


def test_charts_are_inside_their_frame():
    chart = Chart(
        "a <b>", "x", (0.0, 1.0), (0.0, 2.0), {0.0: "0"}, {2.0: "2"},
        [Line([0.0, 1.0], [0.0, 2.0], labels=["p", "q"])], ([0.0, 1.0], [0.0, 0.0], [1.0, 2.0]),
    )  # fmt: skip
    svg = chart.svg("text{fill:red}")
    assert checked(svg).counts["circle"] == 2
    width, height = chart.size
    for points in re.findall(r'points="([^"]*)"', svg):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height


@pytest.mark.parametrize(
    ("share", "told"),
    [(1.0, "100 %"), (0.999, "99.9 %"), (0.5, "50 %"), (0.0, "0 %"), (0.001, "0.1 %"), (1e-6, "< 0.01 %")],
)
def test_percent(share, told):
    assert percent(share) == told
