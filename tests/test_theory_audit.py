"""Audits of users' problems, and the documentation's tables against the data."""

from pathlib import Path

import numpy as np
import pytest

from attnfit import minimize, problems, theory
from attnfit.theory import instances
from attnfit.theory.audit import theorem_of
from attnfit.theory.errata import errata_markdown
from attnfit.theory.reading import read

RNG = np.random.default_rng(0)
A = RNG.standard_normal((24, 3))
B = RNG.random(24)
GROUPS = RNG.permutation(np.repeat(np.arange(5), [3, 6, 5, 5, 5]))
X, Y = np.full(3, 0.2), np.full(3, 0.2) + np.array([1e-3, -1e-3, 5e-4])
PAGE = Path(__file__).parent.parent / "docs" / "theory.md"


def layer(**options):
    problem = problems.LayerInversion(*(RNG.standard_normal(s) for s in ((3, 3), (3, 3), (7, 3))), **options)
    return problem, RNG.standard_normal(problem.shape), RNG.standard_normal(problem.shape)


def two_layer(**options):
    return problems.TwoLayer(
        RNG.standard_normal((6, 2)), RNG.standard_normal((3, 6)), RNG.standard_normal(3), **options
    )


@pytest.mark.parametrize(
    ("problem", "some", "none"),
    [
        (problems.Softmax(A, B), ["WS-8.1", "TT-8.1", "TT-14.2"], ["RH-8.1.3", "TL-D.1"]),
        (problems.Softmax(A, B, groups=GROUPS, loss="cross_entropy"), ["WS-8.1", "TT-7.4"], ["RH-9.1"]),
        (problems.Rescaled(A, B), ["RH-9.1", "RH-11.2.1", "TT-9.1", "TT-13.2"], ["WS-8.1"]),
        (problems.Rescaled(A, B, function="sinh"), ["RH-9.1", "RH-10.3"], ["TT-9.1", "WS-8.1"]),
        (problems.Exponential(A, B, function="cosh"), ["RH-9.2", "RH-8.1.2"], ["RH-9.1", "TT-8.1"]),
    ],
)
def test_every_bound_that_speaks_of_the_problem(problem, some, none):
    report = theory.audit(problem, X, Y)
    found = [check.id for check in report.checks]
    assert set(some) <= set(found)
    assert not set(none) & set(found)
    statuses = {bound.id: bound.status for bound in theory.table()}
    assert all(statuses[check.id] == "fails" for check in report.failing)
    assert all(check.sharp_holds is not False for check in report.checks if not check.violated)


def test_the_table_of_an_audit():
    report = theory.audit(problems.Softmax(A, 9.0 * B), X, Y)
    text = str(report)
    lines = text.splitlines()
    assert lines[0].split() == ["theorem", "lhs/rhs", "printed", "bound"]
    check = report["WS-8.1"]
    shift = np.linalg.norm(np.diff([problems.Softmax(A, B).predict(p) for p in (X, Y)], axis=0))
    assert check.lhs == pytest.approx(shift, rel=1e-9)
    assert check.log10_sharp == pytest.approx(np.log10(0.5 * check.R * np.linalg.norm(X - Y)))
    assert check.slack == pytest.approx(check.log10_rhs - check.log10_lhs)
    row = next(line for line in lines if line.startswith("WS-8.1 "))
    assert f"10^-{check.slack:.1f}" in row
    assert "holds" in row
    assert any(line.startswith("(1) |b_j| = ") and "TT-8.1" in line for line in lines)
    assert "|b_j|" in next(iter(report.violated))
    row = next(line for line in lines if line.startswith("TT-8.1 "))
    assert f"assumption not met: {report['TT-8.1'].violated[0]}" in row
    with pytest.raises(KeyError, match=r"'TL-D\.1' is not among the bounds audited"):
        report["TL-D.1"]


def test_one_line_a_theorem_the_worst_first():
    report = theory.audit(problems.Rescaled(A, B), X, Y)
    found = report.theorems
    assert sum(len(parts) for parts in found.values()) == len(report.checks)
    for id, parts in found.items():
        assert all(part.id == id or part.id.startswith(f"{id}.") or "-F4.3" in id for part in parts)
        assert parts[0].slack == min(p.slack for p in parts if p.tested)
        assert report[id].id == id or report[id] is parts[0]
    lines = str(report).splitlines()
    shown = [theorem_of(line.split(" ")[0]) for line in lines if line.startswith(("WS-", "RH-", "TT-"))]
    tested = [id for id, parts in found.items() if parts[0].tested]
    assert shown == tested
    slacks = [found[id][0].slack for id in shown]
    assert slacks == sorted(slacks)
    assert len(found["RH-8.3"]) == 6
    part = found["RH-8.3"][0]
    row = next(line for line in lines if line.startswith("RH-8.3 "))
    assert row.startswith(f"RH-8.3 ({part.id.removeprefix('RH-8.3.')} of 6)")
    assert report["RH-8.3"] is part


def test_the_move_of_the_data_is_drawn_and_told():
    problem = problems.Softmax(A, B, groups=GROUPS)
    one, other = (theory.audit(problem, X, Y, random_state=seed) for seed in (3, 4))
    assert any(note.endswith("random_state 3") for note in one.notes)
    assert one["WS-7.6"].lhs != other["WS-7.6"].lhs
    again = theory.audit(problem, X, Y, random_state=3)
    assert one["WS-7.6"].lhs == again["WS-7.6"].lhs
    instance = read(problem, X, Y, 3).instances[0]
    sizes = np.linalg.norm(instance.A_moved - instance.A, 2, axis=(1, 2))
    assert sizes == pytest.approx(1e-3 * np.linalg.norm(instance.A, 2, axis=(1, 2)))
    assert not (instance.A_moved - instance.A)[~instance.mask].any()


def test_little_is_untested_at_zero():
    report = theory.audit(problems.Softmax(A, B), np.zeros(3), Y)
    # |(A' - A) x| is zero there whatever A': what compares such changes with each other says nothing.
    both_zero = {"WS-7.7", "WS-7.8", "TT-7.9", "TT-7.10", "TT-7.12", "RH-10.8"}
    assert both_zero <= set(report.untested) <= both_zero | {"RH-F4.3.7", "RH-F4.3.8-9", "RH-F4.8.series"}
    assert theory.audit(problems.Softmax(A, B), X, Y).untested == ()


def test_every_bound_of_the_papers_has_a_way_to_users_data():
    rng = np.random.default_rng(0)
    softmax = problems.Softmax(A, B)
    result = minimize(softmax, history="points")
    known = {theorem.id for theorem in theory.on(result).theorems} | {"RH-5.3"}
    layers = problems.TwoLayer(
        rng.standard_normal((4, 2)), rng.standard_normal((4, 4)), rng.random(4), row_penalty=1.0
    )
    audited = [theory.audit(problem, X, Y) for problem in (softmax, problems.Rescaled(A, B))]
    audited.append(theory.audit(problems.Exponential(A, B), X, Y))
    audited.append(theory.audit(layers, [0.1, 0.2], [0.11, 0.2]))
    audited.append(theory.audit(*layer()))
    known |= {check.id for report in audited for check in report.checks}
    # A step of a proof is about a matrix that nobody has.
    assert {bound.id for bound in theory.table() if bound.paper} - known == {"UT-H.1.step"}


def test_informal_statements_are_found():
    table = theory.table()
    assert table["TL-1.5"] is table["TL-7.1"]
    assert (table["WS-1.4.1"].id, table["WS-1.4.2"].id) == ("WS-8.1", "WS-8.2")
    assert "TL-1.5" in table
    assert "TL-1.6" not in table
    with pytest.raises(KeyError, match=r"WS-1\.4\.1"):
        table["WS-1.4"]


def test_groups_are_the_papers_problem_each():
    grouped = problems.Softmax(A, B, groups=GROUPS)
    report = theory.audit(grouped, X, Y)
    alone = [theory.audit(problems.Softmax(A[g == GROUPS], B[g == GROUPS]), X, Y) for g in range(5)]
    for id in ("WS-5.7", "WS-5.8", "WS-F3.1"):
        assert report[id].ratio == pytest.approx(max(one[id].ratio for one in alone), rel=1e-6)
    assert report["TT-8.1"].lhs == pytest.approx(abs(grouped.value(Y) - grouped.value(X)), rel=1e-8)
    assert "5 groups" in report.notes[0]


def test_what_is_left_out_is_said():
    options = {"offset": RNG.standard_normal(24), "weights": RNG.random(24), "row_penalty": 0.1}
    problem = problems.Softmax(A, B, **options)
    report = theory.audit(problem, X, Y)
    assert [word for word in ("offset", "weights",
    "penalties") if any(word in note for note in report.notes)] == [
        "offset", "weights", "penalties",
    ]  # fmt: skip
    shift = np.linalg.norm(problem.predict(Y) - problem.predict(X))
    assert report["WS-8.1"].lhs == pytest.approx(shift, rel=1e-9)


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("loss", ["squared", "rescaled"])
def test_attention(loss, mask):
    A1, maps = RNG.standard_normal((5, 2)), RNG.random((5, 5))
    problem = problems.Attention(A1, A1, maps / maps.sum(1, keepdims=True), loss, mask=mask)
    x = 0.1 * RNG.standard_normal((2, 2))
    y = x + 1e-3
    report = theory.audit(problem, x, y)
    id = "TT-8" if loss == "squared" else "TT-9"
    assert report[f"{id}.1"].lhs == pytest.approx(abs(problem.value(y) - problem.value(x)), rel=1e-7)
    change = np.linalg.norm(problem.gradient(y) - problem.gradient(x))
    assert report[f"{id}.3"].lhs == pytest.approx(change, rel=1e-7)


def test_pair_features_are_columns():
    A1, maps, far = RNG.standard_normal((4, 2)), RNG.random((4, 4)), RNG.standard_normal((4, 4))
    problem = problems.Attention(A1, A1, maps / maps.sum(1, keepdims=True), pair_features=[far])
    x = 0.1 * RNG.standard_normal(5)
    report = theory.audit(problem, x, x + 1e-3)
    assert report["TT-8.1"].lhs == pytest.approx(abs(problem.value(x + 1e-3) - problem.value(x)), rel=1e-7)


@pytest.mark.parametrize(
    "options", [{}, {"offset": np.arange(6.0)}, {"ridge": 0.5}, {"weights": [1.0, 0.0, 2.0]}]
)
def test_two_layer(options):
    problem = two_layer(**options)
    x, y = RNG.standard_normal(2), RNG.standard_normal(2)
    report = theory.audit(problem, x, y)
    shift = np.linalg.norm(problem.predict(y) - problem.predict(x))
    assert report["TL-E.3.5"].lhs == pytest.approx(shift, rel=1e-9)
    assert len(report.notes) == len(options)
    assert all(check.holds for check in report.checks if check.id.startswith("NEW"))


def test_two_layer_with_several_targets_and_an_own_activation():
    problem = problems.TwoLayer(
        RNG.standard_normal((6, 2)), RNG.standard_normal((3, 6)), RNG.standard_normal((3, 3)),
        (np.sin, np.cos, lambda y: -np.sin(y)),
    )  # fmt: skip
    x, y = RNG.standard_normal((2, 3)), RNG.standard_normal((2, 3))
    report = theory.audit(problem, x, y)
    assert any("3 of 3 right-hand sides" in note for note in report.notes)
    assert any("grid" in note for note in report.notes)
    assert report["TL-E.5"].holds


@pytest.mark.parametrize("options", [{}, {"gamma": 0.1}, {"mask": "causal"}, {"convention": "columns"}])
def test_layer_inversion(options):
    problem, x, y = layer(**options)
    report = theory.audit(problem, x, y)
    assert report.failing == ()
    if not options:
        i0, j0 = np.unravel_index(np.abs(problem.residuals(x)).argmax(), (7, 3))
        assert report["UT-F.2.3"].lhs == pytest.approx(abs(problem.residuals(x)[i0, j0]), rel=1e-10)
        change = 2 * np.linalg.norm(problem.gradient(y) - problem.gradient(x))
        assert report["UT-G.11"].lhs == pytest.approx(change, rel=1e-9)
    if "mask" in options:
        assert any("mask is left out" in note for note in report.notes)


def test_heads_are_audited_one_by_one():
    W, V = RNG.standard_normal((2, 3, 3)), RNG.standard_normal((2, 3, 3))
    problem = problems.LayerInversion(list(W), list(V), RNG.standard_normal((5, 3)))
    report = theory.audit(problem, *RNG.standard_normal((2, 3, 5)))
    assert any("2 heads" in note for note in report.notes)


def test_bad_points_and_other_problems():
    with pytest.raises(ValueError, match="y has shape"):
        theory.audit(problems.Softmax(A, B), X, np.zeros(2))
    with pytest.raises(ValueError, match="x"):
        theory.audit(problems.Softmax(A, B), [np.nan, 0, 0], Y)
    maps = np.full((4, 4), 0.25)
    with pytest.raises(TypeError, match="without rank"):
        theory.audit(problems.Attention(A[:4], A[:4], maps, rank=1), X, Y)


def test_too_many_groups_are_cut_and_said(monkeypatch):
    monkeypatch.setattr("attnfit.theory.reading.ENTRIES", 40)
    report = theory.audit(problems.Softmax(A, B, groups=GROUPS), X, Y)
    assert "of 5 groups the 2 longest are audited" in report.notes


def test_a_vanishing_normaliser_is_undefined_in_the_table():
    rows = np.array([[1.0], [-1.0]])
    report = theory.audit(problems.Rescaled(rows, [0.5, 0.5], function="sinh"), [0.4], [0.401])
    assert "undefined" in str(report)
    assert any("alpha = 0" in text for text in report.violated)


def test_tables_print():
    table = theory.table()
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 1 == len(table.ids) + 1
    assert lines[0].startswith("id")
    bound = table["TT-10.3"]
    assert bound.paper.startswith("In-Context Learning for Attention Scheme")
    assert (bound.number, bound.verdict) == ("10.3", "fails as printed; corrected form holds")
    assert table["RH-10.3"].verdict == "fails as printed"
    assert table["NEW-UT-1"].paper == ""
    assert str(theory.check("WS-8.1", instances.random("regression", 0))).startswith("WS-8.1: ")


def test_small_and_large_numbers_are_written_out():
    from attnfit.theory.bound import power

    values = (-np.inf, 0.0, 3.9999999, -40.5, 210.3, np.inf)
    assert [power(v) for v in values] == ["0", "1", "1e+04", "3.16e-41", "2.00e+210", "inf"]


@pytest.mark.parametrize("render", [theory.table().markdown, errata_markdown], ids=["bounds", "errata"])
def test_the_page_shows_the_data(render):
    assert render() in PAGE.read_text()


def test_the_page_counts_the_errata():
    rows = theory.errata()
    numeric = sum(row.numeric for row in rows)
    counted = f"printed wrong, {len(rows)} entries; {numeric} are computations"
    assert counted in " ".join(PAGE.read_text().split())
