"""What is printed wrong in the papers, as data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from attnfit.theory.bound import PAPERS


@dataclass(frozen=True)
class Erratum:
    """One wrong formula or statement.

    Attributes
    ----------
    id : str
        Such as "TT-e1".
    paper : str
        Key of `attnfit.theory.PAPERS`.
    place : str
        Where it is printed.
    kind : {"matters", "proof", "misprint"}
        It affects an implementation or a theorem; a step of a proof is wrong but the statement survives; or
        neither.
    numeric : bool
        Whether the evidence is a computation; the tests of this library repeat it.
    printed, correct, evidence : str
    """

    id: str
    paper: str
    place: str
    kind: str
    numeric: bool
    printed: str
    correct: str
    evidence: str

    @property
    def title(self) -> str:
        """Title of the paper."""
        return PAPERS[self.paper]


@cache
def _all() -> tuple[Erratum, ...]:
    text = files("attnfit.theory").joinpath("errata.json").read_text(encoding="utf-8")
    return tuple(Erratum(**row) for row in json.loads(text))


def errata(paper: str | None = None) -> tuple[Erratum, ...]:
    """Return the errata of a paper, or of all five.

    Parameters
    ----------
    paper : {"WS", "RH", "TT", "TL", "UT"}, optional

    Raises
    ------
    KeyError
        If there is no such paper.

    Examples
    --------
    >>> from attnfit import theory
    >>> theory.errata("TT")[0].place
    'Lemma 10.3'
    """
    if paper is not None and paper not in PAPERS:
        raise KeyError(f"there is no paper {paper!r}; they are {', '.join(PAPERS)}")
    return tuple(row for row in _all() if paper in (None, row.paper))


def errata_markdown() -> str:
    """Return the errata as a Markdown table."""
    lines = ["| id | place | kind | printed | correct | evidence |", "|---|---|---|---|---|---|"]
    for e in _all():
        checked = f"{e.evidence} (tested)" if e.numeric else e.evidence
        cells = (e.id, e.place, e.kind, f"`{e.printed}`", f"`{e.correct}`", checked)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
