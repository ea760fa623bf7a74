"""Every bound that speaks of a user's problem, evaluated on their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.objectives.objective import Problem
from attnfit.theory.bound import AnyBound, Check
from attnfit.theory.bounds.assumptions import EXP
from attnfit.theory.instances.sampling import AnyInstance
from attnfit.theory.reading import Reading, read
from attnfit.theory.table import aligned, table


@dataclass(frozen=True)
class Audit:
    """Bounds on a user's data; prints one line a theorem, the worst ratio first, its worst part in short.

    ``audit["RH-9.1"]`` is the check of one bound with all numbers; ``audit["RH-8.3"]``, of a theorem of
    several parts, that of its worst part.

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
        parts = self.theorems.get(id)
        if parts:
            return parts[0]
        raise KeyError(
            f"{id!r} is not among the bounds audited; they are {', '.join(c.id for c in self.checks)}"
        )

    @property
    def theorems(self) -> dict[str, list[Check]]:
        """The checks by theorem, the one with the worst ratio first, and so the parts of each."""
        found: dict[str, list[Check]] = {}
        for check in self.checks:
            found.setdefault(theorem_of(check.id), []).append(check)
        for parts in found.values():
            parts.sort(key=_badness)
        return dict(sorted(found.items(), key=lambda item: _badness(item[1][0])))

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
        rows: list[tuple[str, ...]] = []
        for theorem, parts in self.theorems.items():
            c = parts[0]
            if not c.tested:
                continue
            part = c.id[len(theorem) + 1 :]
            name = f"{theorem} ({part} of {len(parts)})" if part and len(parts) > 1 else c.id
            status = c.verdict.replace("fails", "FAILS")
            unmet = f"assumption not met: {c.violated[0]}" if c.violated else ""
            rows.append((name, _tens(c), status, unmet))
        untested = [id for id, parts in self.theorems.items() if not parts[0].tested]
        lines = [aligned(("theorem", "lhs/rhs", "printed bound", ""), rows, right=(1,))]
        if untested:
            lines.append(f"not tested, as both sides are zero: {', '.join(untested)}")
        lines += [f"({k}) {text}: {_listed(ids)}" for k, (text, ids) in enumerate(self.violated.items(), 1)]
        return "\n".join([*lines, *self.notes])


def theorem_of(id: str) -> str:
    """Return the theorem that a bound is a part of: paper and two numbers, as "RH-8.3" of "RH-8.3.1"."""
    paper, _, number = id.rpartition("-") if id.startswith("NEW") else id.partition("-")
    parts = number.split(".")
    return id if id.startswith("NEW") else f"{paper}-{'.'.join(parts[:2])}"


def _badness(check: Check) -> tuple[bool, float]:
    """Order checks by ratio, the largest first, those that say nothing last."""
    return not check.tested, check.slack if check.tested else 0.0


def _tens(check: Check) -> str:
    """Return the ratio of both sides as a power of ten."""
    if np.isnan(check.ratio):
        return "undefined"
    if np.isinf(check.slack):
        return "0" if check.slack > 0.0 else "infinite"
    return f"10^{-round(check.slack, 1) + 0.0:.1f}"


def _listed(ids: list[str]) -> str:
    return ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


def audit(problem: Problem, x: Any, y: Any, *, random_state: Any = 0) -> Audit:
    """Evaluate every bound that speaks of a problem on its data, between two points.

    Bounds on a move of the data use ``A' = A + 1e-3 |A_j| E_j`` for each group j, with E_j standard normal,
    scaled to spectral norm 1. Elementary facts on vectors and matrices are evaluated on the logits at both
    points and on Gram matrices of the data. Constants that the papers leave open (R, beta, R_h) are the
    tightest that each bound's assumptions allow; what cannot be met that way, such as ``|A(x - y)|_inf <
    0.01``, is reported where the data violate it. Bounds on single steps of a solver, and convergence
    theorems, are about a fit: see `attnfit.theory.on`.

    Parameters
    ----------
    problem : Softmax, Exponential, Rescaled, Attention, TwoLayer or LayerInversion
        In groups: the vector papers' bounds are evaluated for each group by itself, with one R for all, and
        the worst is shown; the tensor-trick paper's take all groups together, as queries.
    x, y : array_like, in the problem's natural shape
    random_state : int, numpy.random.Generator or None
        Seed of the move of the data; an integer is printed with it.

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
    reading = read(problem, x, y, random_state)
    checks = [_worst(bound, reading) for bound in table() if _speaks_of(bound, reading)]
    return Audit(tuple(checks), tuple(reading.notes))


def _speaks_of(bound: AnyBound, reading: Reading) -> bool:
    if not set(bound.models) & set(reading.models) or not _instances(bound, reading):
        return False
    return reading.function == "exp" or EXP not in bound.assumptions


def _instances(bound: AnyBound, reading: Reading) -> list[AnyInstance]:
    return [instance for instance in reading.instances if isinstance(instance, bound.kind)]


def _worst(bound: AnyBound, reading: Reading) -> Check:
    checks = [bound.check(instance) for instance in _instances(bound, reading)]
    tested = [check for check in checks if check.tested]
    return max(tested, key=lambda check: -check.slack) if tested else checks[0]
