"""Numbers as people write them: decimal commas, thousands, per cent, currencies, yes and no."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# What spreadsheets, R, pandas and SQL write for "no value".
MISSING = frozenset(
    {"", "na", "n/a", "nan", "-nan", "null", "none", ".", "#n/a", "#na", "#n/a n/a", "#null!", "<na>"}
)
WORDS = {
    **dict.fromkeys(MISSING, float("nan")),
    "true": 1.0,
    "false": 0.0,
    "yes": 1.0,
    "no": 0.0,
}
SPACES = "' ’\u00a0\u2009\u202f"
CURRENCY = "[$\u00a2-\u00a5\u058f\u060b\u09f2\u09f3\u0e3f\u20a0-\u20c0\ufdfc\uff04\uffe0\uffe1\uffe5\uffe6]"
CELL = re.compile(
    rf"(?P<open>\()?(?P<sign>[+\u2212-])?(?P<before>{CURRENCY})?\s?(?P<inner>[+\u2212-])?"
    rf"(?P<body>[\d.,{SPACES}]*\d[\d.,]*)(?P<power>[eE][+-]?\d+)?\s?(?P<after>%|{CURRENCY})?(?P<close>\))?"
)
# One mark that could be either: thousands have three digits behind each, and begin with another digit.
THREE = re.compile(r"[1-9]\d{0,2}([.,])\d{3}")
GROUPS = {mark: re.compile(rf"\d{{1,3}}(\{mark}\d{{3}}){{2,}}") for mark in ".,"}
PLAIN = {mark: re.compile(rf"\d*\{mark}\d*") for mark in ".,"}
BOTH = {mark: re.compile(rf"\d{{1,3}}(\{other}\d{{3}})+\{mark}\d*") for mark, other in (".,", ",.")}
OTHER = {".": ",", ",": "."}


@dataclass
class Spelled:
    """Columns of text that are numbers.

    Attributes
    ----------
    numbers : dict of str to ndarray
    text : dict of str to (int, str)
        The other columns: the row of the first entry that is no number, and the entry.
    examples : dict of str to (str, float)
        An entry that is not written as a program writes numbers, and what it is read as.
    doubts : dict of str to str
        Why a column of numbers was not read as such.
    decimal : str
    """

    numbers: dict[str, Array] = field(default_factory=dict)
    text: dict[str, tuple[int, str]] = field(default_factory=dict)
    examples: dict[str, tuple[str, float]] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    decimal: str = "."


def is_spelled(cell: str) -> bool:
    """Whether an entry that is no number to a program may be one to people."""
    return CELL.fullmatch(cell.strip()) is not None


def read_spelled(
    columns: Mapping[str, list[str]], delimiter: str = ",", decimal: str | None = None
) -> Spelled:
    """Read columns of text as numbers where all entries are; one decimal mark holds for the whole file.

    Where columns are separated by commas, a comma in a number separates thousands. Elsewhere entries that can
    be read one way only decide; where none does, or they disagree, what is in doubt stays text.
    """
    found = Spelled()
    parsed: dict[str, dict[str, Any]] = {}
    for name, cells in columns.items():
        entries = {cell: _parse(cell) for cell in dict.fromkeys(cells)}
        bad = next((cell for cell, entry in entries.items() if entry is None), None)
        if bad is None:
            parsed[name] = entries
        else:
            found.text[name] = (cells.index(bad), bad)
    bodies = {
        name: [e for e in entries.values() if isinstance(e, re.Match)] for name, entries in parsed.items()
    }
    votes = _votes(bodies)
    doubt = ""
    if decimal is None and delimiter == ",":
        decimal = "."
    elif decimal is None and votes["."] and votes[","]:
        doubt = f"{votes['.']!r} has a decimal point and {votes[',']!r} a decimal comma: add --decimal . or ,"
    found.decimal = decimal or ("," if votes[","] else ".")
    for name, entries in parsed.items():
        unclear = next((e["body"] for e in bodies[name] if THREE.fullmatch(e["body"])), None)
        comma = unclear is not None and "," in unclear
        if decimal is None and comma and not votes["."] and not votes[","]:
            value = unclear.replace(",", ".")  # type: ignore[union-attr]
            why = f"{unclear!r} may be {value} or {value.replace('.', '')}: add --decimal . or --decimal ,"
        else:
            why = doubt if any(set(e["body"]) & set(".,") for e in bodies[name]) else ""
        why = why or _mixed(bodies[name])
        if why:
            _leave(found, name, columns[name], next(iter(bodies[name])).string, why)
            continue
        values = {cell: _value(entry, found.decimal) for cell, entry in entries.items()}
        bad = next((cell for cell, value in values.items() if value is None), None)
        if bad is not None:
            comma = found.decimal == "," and "." in bad
            why = "its decimal mark is not the comma of the rest of the file" if comma else ""
            _leave(found, name, columns[name], bad, why)
            continue
        found.numbers[name] = np.fromiter(
            (values[cell] for cell in columns[name]), dtype=np.float64, count=len(columns[name])
        )
        odd = next((cell for cell in values if _is_odd(cell)), None)
        if odd is not None:
            found.examples[name] = (odd.strip(), float(values[odd] or 0.0))
    return found


def _leave(found: Spelled, name: str, cells: list[str], bad: str, why: str) -> None:
    row = next(k for k, cell in enumerate(cells) if cell.strip() == bad.strip())
    found.text[name] = (row, cells[row])
    if why:
        found.doubts[name] = why


def _parse(cell: str) -> Any:
    """Return a number, a match of its parts, or None."""
    stripped = cell.strip()
    word = WORDS.get(stripped.lower())
    if word is not None:
        return word
    match = CELL.fullmatch(stripped)
    if match is not None:
        paired = bool(match["open"]) == bool(match["close"])
        signs = [part for part in ("open", "sign", "inner") if match[part]]
        return match if paired and len(signs) <= 1 and not (match["before"] and match["after"]) else None
    try:
        # Infinities.
        return None if "_" in stripped else float(stripped)
    except ValueError:
        return None


def _votes(bodies: dict[str, list[Any]]) -> dict[str, str | None]:
    """Return an entry that can only have a decimal point, and one that can only have a decimal comma."""
    votes: dict[str, str | None] = {".": None, ",": None}
    for entry in (e for entries in bodies.values() for e in entries):
        body = re.sub(f"[{SPACES}]", "", entry["body"])
        for mark in ".,":
            alone = PLAIN[mark].fullmatch(body) and not THREE.fullmatch(body)
            if votes[mark] is None and (
                alone or BOTH[mark].fullmatch(body) or GROUPS[OTHER[mark]].fullmatch(body)
            ):
                votes[mark] = entry.string
    return votes


def _mixed(entries: list[Any]) -> str:
    """Return what makes entries incomparable."""
    units = {(e["before"] or e["after"] or ""): e.string for e in entries}
    if "%" in units and len(units) > 1:
        other = next(text for unit, text in units.items() if unit != "%")
        return f"{units['%']!r} is per cent and {other!r} is not: write all of them one way"
    signs = [text for unit, text in units.items() if unit]
    return f"{signs[0]!r} and {signs[1]!r} are of two currencies" if len(signs) > 1 else ""


def _value(entry: Any, decimal: str) -> float | None:
    if not isinstance(entry, re.Match):
        return float(entry)
    thousands = OTHER[decimal]
    body = entry["body"]
    if re.search(f"[{SPACES}]", body):
        if not re.fullmatch(rf"\d{{1,3}}([{SPACES}]\d{{3}})+(\{decimal}\d*)?", body):
            return None
        body = re.sub(f"[{SPACES}]", "", body)
    elif thousands in body:
        if not re.fullmatch(rf"\d{{1,3}}(\{thousands}\d{{3}})+(\{decimal}\d*)?", body):
            return None
        body = body.replace(thousands, "")
    if body.count(decimal) > 1:
        return None
    value = float(body.replace(decimal, ".") + (entry["power"] or ""))
    negative = entry["open"] or (entry["sign"] or entry["inner"] or "+") in "-\u2212"
    return (-value if negative else value) / (100.0 if entry["after"] == "%" else 1.0)


def _is_odd(cell: str) -> bool:
    stripped = cell.strip()
    if stripped.lower() in MISSING:
        return False
    try:
        float(stripped)
    except ValueError:
        return stripped.lower() not in ("true", "false")
    return False
