"""A theorem about a finished fit: its assumptions as data, its steps, and what follows from both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attnfit.theory.bound import ROUNDING, power

# Rows shown of a long run: the first and the last.
FIRST, LAST = 8, 4


@dataclass(frozen=True)
class Assumption:
    """A condition of a theorem on a fit.

    Attributes
    ----------
    name : str
    value : float
        What the fit has.
    limit : float
        What the theorem asks for.
    met : bool
    """

    name: str
    value: float
    limit: float
    met: bool

    @classmethod
    def below(cls, name: str, value: float, limit: float, *, strict: bool = False) -> Assumption:
        """Return the assumption that a value does not exceed a limit; NaN never meets it."""
        met = value < limit if strict else value <= limit * (1.0 + ROUNDING)
        return cls(name, float(value), float(limit), bool(met))

    @classmethod
    def above(cls, name: str, value: float, limit: float) -> Assumption:
        """Return the assumption that a value reaches a limit."""
        return cls(name, float(value), float(limit), bool(value >= limit * (1.0 - ROUNDING)))

    def __str__(self) -> str:
        values = f"{number(self.value)} against {number(self.limit)}"
        return f"{self.name}: {values}{'' if self.met else ', NOT MET'}"


@dataclass(frozen=True)
class Row:
    """What a theorem says of one step.

    Attributes
    ----------
    t : int
    r : float
        ``|x_t - x*|``.
    left, right : float
        Both sides as printed.
    holds : bool or None
        None where rounding decides.
    obstacle : str
        Which assumption on this step alone is not met; empty where all are.
    corrected_left, corrected_right : float
        Both sides of the corrected form, NaN where it does not apply.
    corrected_holds : bool or None
    """

    t: int
    r: float
    left: float
    right: float
    holds: bool | None
    obstacle: str = ""
    corrected_left: float = np.nan
    corrected_right: float = np.nan
    corrected_holds: bool | None = None

    @property
    def ratio(self) -> float:
        """Left over right."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(self.left, self.right))

    @property
    def corrected_ratio(self) -> float:
        """Left over right of the corrected form."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.divide(self.corrected_left, self.corrected_right))


@dataclass(frozen=True)
class Theorem:
    """A published convergence theorem, evaluated on a finished fit; prints as a block.

    Attributes
    ----------
    id, formula, corrected : str
        What is printed, and what holds in its place.
    assumptions : tuple of Assumption
    rows : tuple of Row
    reason : str
        Why the theorem does not speak of this fit; empty where it does.
    notes : tuple of str
    """

    id: str
    formula: str
    corrected: str
    assumptions: tuple[Assumption, ...] = ()
    rows: tuple[Row, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def unmet(self) -> str:
        """The first assumption that is not met, with its value; empty where all are."""
        for one in self.assumptions:
            if not one.met:
                return f"{one.name}: {number(one.value)} against {number(one.limit)}"
        return ""

    @property
    def status(self) -> str:
        """What the fit says of it: "holds" (every assumption met, every step holds), "fails" (every
        assumption met, a step does not hold), "assumption not met: ..." or "not applicable: ...".
        """
        if self.reason:
            return f"not applicable: {self.reason}"
        if self.unmet:
            return f"assumption not met: {self.unmet}"
        judged = [row for row in self.rows if not row.obstacle]
        if any(row.holds is False for row in judged):
            return "fails"
        barred = next((row for row in self.rows if row.obstacle), None)
        if barred is not None:
            return f"assumption not met: {barred.obstacle} at t = {barred.t}"
        if not any(row.holds for row in judged):
            return "not applicable: no step is resolved"
        return "holds"

    @property
    def corrected_status(self) -> str:
        """Status of the corrected form, which has fewer assumptions: "holds", "fails" or "not applicable"."""
        if self.reason:
            return f"not applicable: {self.reason}"
        told = [row.corrected_holds for row in self.rows if np.isfinite(row.corrected_right)]
        if any(one is False for one in told):
            return "fails"
        if len(told) < len(self.rows) or not any(told):
            return "not applicable" if not any(told) else "holds where it applies"
        return "holds"

    def __getitem__(self, t: int) -> Row:
        for row in self.rows:
            if row.t == t:
                return row
        raise KeyError(f"{self.id} says nothing of t = {t}; its steps are {[row.t for row in self.rows]}")

    def __str__(self) -> str:
        lines = [f"{self.id}  {self.status}"]
        if self.reason:
            return lines[0]
        lines += [f"  printed:   {self.formula}", f"  corrected: {self.corrected}: {self.corrected_status}"]
        lines += [f"  {one}" for one in self.assumptions]
        if self.rows:
            head = ("t", "r_t", "left", "printed", "ratio", "cor. left", "corrected", "ratio")
            lines.append("  " + "".join(f"{name:>11}" for name in head))
        hidden = len(self.rows) - FIRST - LAST
        for k, row in enumerate(self.rows):
            if hidden > 0 and FIRST <= k < FIRST + hidden:
                if k == FIRST:
                    lines.append(f"  {'...':>11}")
                continue
            cells = [row.r, row.left, row.right, row.ratio]
            repaired = [row.corrected_left, row.corrected_right, row.corrected_ratio]
            cells += repaired if np.isfinite(row.corrected_right) else 3 * [np.nan]
            told = f"   {row.obstacle}" if row.obstacle else ""
            lines.append("  " + f"{row.t:>11}" + "".join(f"{number(v):>11}" for v in cells) + told)
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def number(value: float) -> str:
    """Return a number to three digits, whatever its size."""
    if np.isnan(value):
        return "-"
    if value < 0.0:
        return f"-{number(-value)}"
    if not np.isfinite(value):
        return "inf"
    return power(float(np.log10(value))) if value > 0.0 else "0"


def compared(
    left: float, error: float, right: Callable[[float], float], at: float, at_error: float
) -> bool | None:
    """Return whether ``left <= right(at)``, None where errors of both leave it open; right does not fall.

    A limit below which nothing is resolved must neither prove nor refute.
    """
    if left + error <= right(max(at - at_error, 0.0)) * (1.0 + ROUNDING):
        return True
    if left - error > right(at + at_error) * (1.0 + ROUNDING):
        return False
    return None
