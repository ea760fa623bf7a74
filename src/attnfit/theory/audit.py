"""Every bound that speaks of a user's problem, evaluated on their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.objectives.objective import Problem
from attnfit.theory.bound import AnyBound, Check, power
from attnfit.theory.bounds.assumptions import EXP
from attnfit.theory.reading import Reading, read
from attnfit.theory.table import aligned, table


@dataclass(frozen=True)
class Audit:
    """Bounds on a user's data; prints as a table.

    Attributes
    ----------
    checks : tuple of Check
        One a bound, in the order of `attnfit.theory.table`.
    notes : tuple of str
        How the problem was read, and what was left out.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def __getitem__(self, id: str) -> Check:
        for check in self.checks:
            if check.id == id:
                return check
        raise KeyError(
            f"{id!r} is not among the bounds audited; they are {', '.join(c.id for c in self.checks)}"
        )

    @property
    def failing(self) -> tuple[Check, ...]:
        """Printed bounds that fail on these data although their assumptions hold."""
        return tuple(c for c in self.checks if c.verdict in ("fails", "undefined") and not c.violated)

    @property
    def untested(self) -> tuple[str, ...]:
        """Ids of the bounds of which these data say nothing: both sides are zero."""
        return tuple(check.id for check in self.checks if not check.tested)

    @property
    def violated(self) -> dict[str, list[str]]:
        """Assumptions that these data violate, each with the ids of the bounds that make it."""
        out: dict[str, list[str]] = {}
        for check in self.checks:
            for text in check.violated:
                out.setdefault(text, []).append(check.id)
        return out

    def __str__(self) -> str:
        violated = self.violated
        number = {text: str(k) for k, text in enumerate(violated, 1)}
        head = ("id", "lhs", "printed", "sharp", "slack", "printed bound", "violates")
        rows: list[tuple[str, ...]] = []
        for c in self.checks:
            verdict = c.verdict.replace("fails", "FAILS")
            sharp = "" if c.log10_sharp is None else power(c.log10_sharp)
            rows.append((
                c.id, power(c.log10_lhs), power(c.log10_rhs), sharp, _tens(c.slack), verdict,
                ", ".join(number[text] for text in c.violated),
            ))  # fmt: skip
        lines = [
            aligned(head, rows, right=(1, 2, 3, 4)),
            "slack: powers of ten between lhs and printed bound",
        ]
        if self.untested:
            count = f"{len(self.untested)} of {len(self.checks)} bounds"
            lines.append(f"not tested, as both sides are zero: {count}")
        lines += [f"({number[text]}) {text}: {_listed(ids)}" for text, ids in violated.items()]
        return "\n".join([*lines, *self.notes])


def _tens(slack: float) -> str:
    return "" if np.isnan(slack) else f"{slack:.1f}"


def _listed(ids: list[str]) -> str:
    return ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


def audit(problem: Problem, x: Any, y: Any) -> Audit:
    """Evaluate every bound that speaks of a problem on its data, between two points.

    Bounds on a move of the data use the move of rank one that acts on the logits like that of x to y,
    ``A' = A + A (y - x) x^T / |x|^2``. Constants that the papers leave open (R, beta, R_h) are the tightest
    that each bound's assumptions allow; what cannot be met that way, such as ``|A(x - y)|_inf < 0.01``, is
    reported where the data violate it. Bounds on single steps of a solver and elementary facts are not about
    data: see `attnfit.theory.check`.

    Parameters
    ----------
    problem : Softmax, Exponential, Rescaled, Attention, TwoLayer or LayerInversion
        In groups: the vector papers' bounds are evaluated for each group by itself, with one R for all, and
        the worst is shown; the tensor-trick paper's take all groups together, as queries.
    x, y : array_like, in the problem's natural shape

    Returns
    -------
    Audit

    Raises
    ------
    TypeError
        If the papers have no bounds for this problem.
    ValueError
        If a point is not finite or of the wrong shape.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import problems, theory
    >>> rng = np.random.default_rng(0)
    >>> A = rng.standard_normal((20, 3))
    >>> report = theory.audit(problems.Softmax(A, np.full(20, 1 / 20)), np.zeros(3), np.full(3, 1e-3))
    >>> report["WS-8.1"].slack > 100
    True
    """
    reading = read(problem, x, y)
    checks = [_worst(bound, reading) for bound in table() if _speaks_of(bound, reading)]
    return Audit(tuple(checks), tuple(reading.notes))


def _speaks_of(bound: AnyBound, reading: Reading) -> bool:
    if not set(bound.models) & set(reading.models):
        return False
    return reading.function == "exp" or EXP not in bound.assumptions


def _worst(bound: AnyBound, reading: Reading) -> Check:
    checks = [bound.check(instance) for instance in reading.instances]
    tested = [check for check in checks if check.tested]
    return max(tested, key=lambda check: -check.slack) if tested else checks[0]
