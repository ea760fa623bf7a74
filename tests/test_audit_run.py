"""The audit itself: cells, budget, checkpoints, intervals and predicted break-points."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from audit_models import audit_cache, tiny  # noqa: F401

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from attnfit import audit  # noqa: E402
from attnfit.audit import breakpoints, cells, deadline, running  # noqa: E402
from attnfit.audit.breakpoints import forecast  # noqa: E402
from attnfit.audit.intervals import wilson  # noqa: E402
from attnfit.audit.running import run  # noqa: E402
from attnfit.audit.summary import Pair, measured_bracket  # noqa: E402

EVERY_ACCESS = ["hidden:1", "hidden:4", "logits", "topk:5", "masked"]


@pytest.fixture(scope="module")
def found(tiny):  # noqa: F811
    return run(tiny, tiny.private_texts[:2], EVERY_ACCESS, [None, "int8", "noise:4.0"], budget=300)


def test_everything_comes_back_without_a_defence(found):
    assert found.coverage == ""
    for access in EVERY_ACCESS:
        pair = found.pair(access)
        assert (pair.token_share, pair.sentence_share, pair.n_texts) == (1.0, 1.0, 2), access
        assert pair.token_interval[0] > 0.5 and pair.token_interval[1] == 1.0
    assert found.pair("masked").tokens == 4
    assert found.pair("masked", "int8") is None


def test_defences_are_compared(found):
    for access in ("hidden:1", "hidden:4", "logits"):
        assert found.pair(access, "int8").token_share == 1.0
        assert found.pair(access, "int8").divergence < 1e-3
        assert found.pair(access).divergence == pytest.approx(0, abs=1e-6)
    strong = found.pair("hidden:1", "noise:4.0")
    assert strong.token_share < 0.5
    assert strong.divergence > 1.0
    assert strong.predicted < 0.1


def test_controls_claim_nothing_false(found):
    assert [control.access for control in found.controls] == EVERY_ACCESS[:-1]
    for control in found.controls:
        assert (control.other_texts, control.noise) == (2, 2)
        assert control.other_texts_exact == 2
        assert control.false_claims == 0


def test_the_verdict_and_the_advice_name_numbers(found):
    assert found.verdict.startswith("tiny: up to 100 % of tokens recovered without a defence (hidden:1)")
    assert "the best tried" in found.verdict
    advice = "\n".join(found.advice)
    assert "int8 100 %" in advice
    assert "memorised" in advice


def test_the_gate(found):
    assert {(p.access, p.defence) for p in found.failures(0.99)} >= {("hidden:1", "none"), ("masked", "none")}
    weak = [pair for pair in found.failures(1.0) if pair.tested]
    assert weak == []


def test_only_defences_asked_for_are_judged(tiny):  # noqa: F811
    report = run(tiny, tiny.private_texts[:1], ["hidden:1"], ["noise:4.0"], budget=600)
    assert {pair.defence for pair in report.pairs} == {"none", "noise:4.0"}
    assert [pair.defence for pair in report.judged()] == ["noise:4.0"]


def test_untested_combinations_fail_the_gate(tiny):  # noqa: F811
    report = run(tiny, tiny.private_texts[:1], ["topk:5"], ["drop0"], budget=600)
    pair = report.pair("topk:5", "drop0")
    assert not pair.tested
    assert "the first position was withheld" in pair.message
    assert report.failures(1.0) == [pair]
    assert any("no proof of protection" in sentence for sentence in report.advice)


def test_a_short_budget_says_what_was_not_run(tiny, monkeypatch):  # noqa: F811
    clock = iter(np.arange(0, 1000, 4.0))
    monkeypatch.setattr(running, "perf_counter", lambda: float(next(clock)))
    report = run(tiny, tiny.private_texts[:4], ["hidden:1"], budget=30)
    n_missing = report.n_planned - len(report.cells)
    assert 0 < n_missing < report.n_planned
    assert f"{n_missing} of {report.n_planned} cells not run: budget" in report.coverage
    assert report.coverage in report.verdict


def test_a_cell_is_cut_when_its_time_is_over(tiny):  # noqa: F811
    attack = cells.Attack(tiny, tiny.private_texts[:1], [tiny.tokenise(tiny.private_texts[0])], 0)
    for access in ("hidden:4", "topk:5", "masked"):
        cell = attack.run(cells.Key(access, "none", 0), 0.0)
        assert cell.status == "cut", access
        assert not cell.exact
    assert attack.run(cells.Key("hidden:4", "none", 0), 60.0).exact


def test_what_is_too_slow_does_not_take_the_time_of_the_rest(tiny, monkeypatch):  # noqa: F811
    """Once logits were cut, cells of them that would have less time are not begun."""
    begun = []

    def run_cell(self, key, seconds):
        begun.append(key)
        slow = key.access == "logits"
        status = "cut" if slow else "done"
        return cells.Cell(key, status, "told", 4, [1, 2], [True, slow], seconds=1.0)

    monkeypatch.setattr(cells.Attack, "run", run_cell)
    report = run(tiny, tiny.private_texts[:1], ["logits", "hidden:1"], [None, "int8", "int4"], budget=600)
    assert sum(key.access == "logits" for key in begun) < 3
    assert sum(key.access == "hidden:1" for key in begun) == 5
    assert "came back until it was cut" in report.pair("logits").message
    assert "cut short" in report.coverage


def test_a_cut_inversion_says_how_far_it_came(tiny, monkeypatch):  # noqa: F811
    text = tiny.private_texts[0]
    attack = cells.Attack(tiny, [text], [tiny.tokenise(text)], 0)
    # How candidates are evaluated is checked once, before the clock runs.
    assert attack.run(cells.Key("topk:5", "none", 0), 60.0).exact
    clock = iter(np.arange(0.0, 1e6, 1.0))
    monkeypatch.setattr(deadline, "perf_counter", lambda: float(next(clock)))
    cell = attack.run(cells.Key("topk:5", "none", 0), 12.0)
    assert cell.status == "cut"
    assert 0 < sum(cell.right) < cell.n_tokens
    assert f"{sum(cell.right)} of {cell.n_tokens} tokens were recovered until then" in cell.message


def test_checkpoints_are_resumed(tiny, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "cells.jsonl"
    settings = {"access": ["hidden:1", "topk:5"], "budget": 60, "checkpoint": path}
    first = run(tiny, tiny.private_texts[:2], **settings)
    # The last line was torn by a crash.
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    ran = []
    plain = cells.Attack.run
    monkeypatch.setattr(cells.Attack, "run", lambda self, key, s: ran.append(key) or plain(self, key, s))
    again = run(tiny, tiny.private_texts[:2], **settings)
    assert len(ran) == 1
    assert {c.key: c.tokens for c in again.cells} == {c.key: c.tokens for c in first.cells}
    assert len(path.read_text().splitlines()) == len(lines)


def test_checkpoints_of_others_are_refused(tiny, tmp_path):  # noqa: F811
    path = tmp_path / "cells.jsonl"
    run(tiny, tiny.private_texts[:1], ["hidden:1"], budget=600, checkpoint=path)
    with pytest.raises(audit.AuditError, match="texts, access differ"):
        run(tiny, tiny.private_texts[1:2], ["hidden:2"], budget=600, checkpoint=path)
    path.write_text("no json\n")
    with pytest.raises(audit.AuditError, match="not one of an audit"):
        run(tiny, tiny.private_texts[:1], ["hidden:1"], budget=600, checkpoint=path)


def test_ctrl_c_keeps_what_was_done(tiny):  # noqa: F811
    def stop(step):
        if step.done == 2:
            raise KeyboardInterrupt

    report = run(tiny, tiny.private_texts[:2], ["hidden:1"], budget=600, progress=stop)
    assert report.interrupted
    assert len(report.cells) == 2
    assert "stopped" in report.coverage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "at least one text"),
        ({"texts": "one text"}, "must be a list"),
        ({"texts": ["\udcff"]}, r"texts\[0\].*Unicode"),
        ({"texts": ["a" * 300]}, "takes 128: shorten it"),
        ({"budget": 0}, "budget must be a positive"),
        ({"access": []}, "access is empty"),
        ({"access": ["weights"]}, "topk:COUNT, masked"),
        ({"access": ["hidden:15"]}, "layer must be 1 to 5"),
        ({"access": ["attention:4"]}, "block must be 0 to 3"),
        ({"defences": ["rot13"]}, "'rot13' is not known"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tiny, change, message):  # noqa: F811
    request = {"texts": ["A train."], "access": ["hidden:1"]} | change
    with pytest.raises(audit.AuditError, match=message):
        run(tiny, **request)


def test_one_bad_text_does_not_stop_the_others(tiny):  # noqa: F811
    texts = ["", "A train.", "\udcff", "a" * 300]
    report = run(tiny, texts, ["hidden:1"], budget=600)
    assert report.coverage == ""
    pair = report.pair("hidden:1")
    assert (pair.n_texts, pair.n_errors, pair.tested, pair.complete) == (1, 3, True, False)
    told = {cell.key.text: cell.message for cell in report.cells if cell.status == "error"}
    assert [told[place].partition(":")[0] for place in (0, 2, 3)] == ["texts[0]", "texts[2]", "texts[3]"]
    assert report.untested() == [pair]
    report.as_json(redact=False)


def test_a_report_that_contradicts_itself_says_so(found):
    import dataclasses

    assert found.contradictions() == []
    broken = [
        dataclasses.replace(cell, right=[False] * len(cell.right))
        if (cell.key.access, cell.key.defence, cell.key.control) == ("hidden:4", "none", "") else cell
        for cell in found.cells
    ]  # fmt: skip
    wrong = dataclasses.replace(found, cells=tuple(broken))
    assert wrong.verdict.startswith("The report contradicts itself: hidden:4 gives away")


def test_what_does_not_apply_to_encoders_is_named(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tiny, "kind", "encoder")
    with pytest.raises(audit.AuditError, match="'hidden:1', 'logits', 'topk:5', 'masked' does not apply"):
        run(tiny, ["A train."], ["hidden:1", "attention:0", "logits", "topk:5", "masked"])


def test_too_short_to_hide_a_beginning(tiny):  # noqa: F811
    pair = run(tiny, ["A train"], ["masked"], budget=600).pair("masked")
    assert not pair.tested
    assert "too few to hide 2" in pair.message


# ---- intervals and break-points ----------------------------------------------------------------------------


def test_wilson_against_published_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(81, 263) == pytest.approx((0.2552817, 0.3662189), abs=1e-5)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="trials"):
        wilson(3, 2)


def test_one_rival_gives_the_closed_form(tiny, monkeypatch):  # noqa: F811
    """With one rival at relative distance delta the error is Q(delta sqrt(d) / (2 r))."""
    monkeypatch.setattr(breakpoints, "_rivals", lambda model, token, rng: ([7], np.ones(1)))
    tokens = tiny.tokenise("The train moved.")
    told = forecast(tiny, [tokens], "hidden:2", ["noise:0.8"], 60)
    errors = []
    for place in range(len(tokens)):
        h = tiny.states(tokens[: place + 1], 2)[-1]
        rival = tiny.states([*tokens[:place], 7], 2)[-1]
        delta = np.linalg.norm(rival - h) / np.linalg.norm(h)
        errors.append(NormalDist().cdf(-delta * np.sqrt(len(h)) / (2 * 0.8)))
    assert told.shares["noise:0.8"] == pytest.approx(1 - np.mean(errors), abs=1e-4)


def test_predicted_half_is_where_the_predicted_share_is_half(tiny):  # noqa: F811
    tokens = [tiny.tokenise(text) for text in tiny.private_texts[:1]]
    for access in ("hidden:2", "attention:0", "logits"):
        half = forecast(tiny, tokens, access, [], 60).noise["noise, row RMS"]
        assert 0.1 < half < 10
        shares = forecast(tiny, tokens, access, [f"noise:{half}", "none", "drop0"], 60).shares
        assert shares["none"] == 1.0
        assert shares[f"noise:{half}"] == pytest.approx(0.5, abs=0.01)
        assert "drop0" not in shares


def test_large_vocabularies_are_sampled(tiny, monkeypatch):  # noqa: F811
    tokens = [tiny.tokenise(tiny.private_texts[0])[:5]]
    full = forecast(tiny, tokens, "hidden:2", ["noise:1.0"], 60)
    monkeypatch.setattr(breakpoints, "N_RIVALS", 128)
    some = forecast(tiny, tokens, "hidden:2", ["noise:1.0"], 60)
    assert some.noise["noise, row RMS"] == pytest.approx(full.noise["noise, row RMS"], rel=0.15)


def test_measured_brackets():
    def pair(defence, right):
        return Pair("hidden:1", defence, 1, 0, 0, right, 10, 0, 0, 0, None, None, None, 0.0, "")

    noisy = [pair("none", 10), pair("noise:0.5", 9), pair("noise:1.0", 7), pair("noise:2.0", 2)]
    assert measured_bracket(noisy, "noise:{}", False) == (1.0, 2.0)
    assert measured_bracket(noisy, "noise:{}std", False) == (None, None)
    bits = [pair("int8", 10), pair("int4", 6), pair("int2", 1), pair("int8:channel", 0)]
    assert measured_bracket(bits, "int{}", True) == (4.0, 2.0)


def test_records_survive_json(found):
    for cell in found.cells:
        assert cells.from_record(json.loads(json.dumps(cells.as_record(cell)))) == cell
