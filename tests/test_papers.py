"""docs/papers.md cannot lie: each call of its tables is run, and gives the figure printed."""

import ast
import doctest
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from attnfit import theory

PAGE = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
# Rows whose call needs what is not there yet.
CARRIED = "carried by "


def read():
    """Return rows (id with its paper, what it says, call, figure)."""
    rows, paper = [], ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            paper = re.findall(r"\((\w+)\)$", line)[0]
        elif line.startswith("| ") and not line.startswith("| id |"):
            id, says, call, figure = (
                cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]
            )
            rows.append((f"{paper} {id}", says, call.strip("`"), figure.strip("`")))
    return rows


ROWS = read()
CALLS = {id: (call, figure) for id, _, call, figure in ROWS if call}


@pytest.fixture(scope="module")
def names():
    """What the lines at the top of the page define."""
    pytest.importorskip("transformers")
    found = {}
    code = "".join(example.source for example in doctest.DocTestParser().get_examples(PAGE))
    exec(compile(code, "papers.md", "exec"), found)
    return found


def agrees(value, figure):
    """Whether a value is the figure: to its digits, within its limit, or as it is written."""
    if figure[0] in "<>":
        limit = float(figure[1:])
        return value < limit if figure[0] == "<" else value > limit
    if re.fullmatch(r"-?\d[\d.]*(e[+-]?\d+)?", figure):
        digits, _, power = figure.partition("e")
        unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
        return abs(value - float(figure)) <= 0.51 * unit
    return value == (float("inf") if figure == "inf" else ast.literal_eval(figure))


@pytest.mark.parametrize(
    "id",
    CALLS,
)
def test_calls_give_their_figures(names, id):
    call, figure = CALLS[id]
    value = eval(call, names)
    assert agrees(value, figure), f"{value!r} is not {figure}"


def test_rows_that_are_not_called_are_carried_by_others():
    assert len({id for id, *_ in ROWS}) == len(ROWS)
    for id, says, call, figure in ROWS:
        assert bool(call) == bool(figure), id
        if call:
            continue
        paper, (_, carriers) = id.split()[0], says.split(CARRIED)
        for carrier in carriers.split("; "):
            command = carrier.startswith("`") and carrier.endswith("`")
            assert command or carrier in CALLS or f"{paper} {carrier}" in CALLS, f"{id}: {carrier}"


@pytest.mark.parametrize("call", re.findall(r"`(python -m \S+|attnfit \S+ [\w-]+)", PAGE))
def test_commands_exist(call):
    words = call.split()
    if words[0] == "python":
        assert (Path(__file__).parent.parent / words[2].replace(".", "/")).with_suffix(".py").exists()
        return
    from attnfit.cli.reproduce import PAPERS

    assert words[1] == "reproduce"
    assert words[2] in PAPERS


def test_every_bound_of_the_papers_is_in_a_call():
    """By the patterns of `ratio` where it holds, and of `fails` where it does not."""
    patterns = {"holds": set(), "fails": set()}
    for call, _ in CALLS.values():
        for function, status in (("ratio", "holds"), ("fails", "fails")):
            for arguments in re.findall(rf"\b{function}\(([^)]*)\)", call):
                patterns[status] |= set(re.findall(r'"([^"]+)"', arguments))
    for bound in theory.table():
        if not bound.id.startswith("NEW"):
            assert any(fnmatch(bound.id, p) for p in patterns[bound.status]), bound.id
    # And no pattern is of nothing, but for those of rows that wait.
    for status, some in patterns.items():
        for pattern in some:
            known = any(fnmatch(b.id, pattern) and b.status == status for b in theory.table())
            assert known, pattern


@pytest.mark.parametrize(
    ("value", "figure", "agree"),
    [
        (0.0249, "0.025", True), (0.0256, "0.025", False), (9.9e-21, "< 1e-20", True),
        (1e-20, "< 1e-20", False), (3.94e-08, "3.9e-08", True), (3.96e-08, "3.9e-08", False),
        (2.0, "> 3", False), ([False, True], "[False, True]", True), ("holds", "'fails'", False),
        (float("inf"), "inf", True), (1.4, "1", True),
    ],
)  # fmt: skip
def test_figures_are_compared_to_their_digits(value, figure, agree):
    assert agrees(value, figure) is agree
