"""All bounds by id, as a table and one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from attnfit.theory.bound import PAPERS, AnyBound, Check
from attnfit.theory.bounds import (
    algorithms,
    facts,
    newton,
    recovery,
    rescaled,
    rescaled_changes,
    rescaled_hessian,
    tensor,
    tensor_losses,
    two_layer,
    two_layer_changes,
    weight_shift,
)  # fmt: skip

_ROOMS: tuple[list[Any], ...] = (
    weight_shift.BOUNDS, rescaled.BOUNDS, rescaled_hessian.BOUNDS, rescaled_changes.BOUNDS, tensor.BOUNDS,
    tensor_losses.BOUNDS,
    two_layer.BOUNDS, two_layer_changes.BOUNDS, recovery.BOUNDS, newton.BOUNDS,
    algorithms.BOUNDS, facts.BOUNDS,
)  # fmt: skip


# Informal statements of theorems that are in the table under their formal number.
ALIASES = {"TL-1.5": "TL-7.1", "WS-1.4.1": "WS-8.1", "WS-1.4.2": "WS-8.2"}


class Table:
    """Bounds in the order of their papers; prints as a text table, and as Markdown with `markdown`.

    Informal statements are found under their own number too: "TL-1.5" is "TL-7.1", and "WS-1.4.1" and
    "WS-1.4.2", on moves of x and of A, are "WS-8.1" and "WS-8.2".
    """

    def __init__(self, bounds: list[AnyBound]) -> None:
        self._bounds = {bound.id: bound for bound in bounds}
        if len(self._bounds) != len(bounds):
            raise ValueError("two bounds share an id")

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[AnyBound]:
        return iter(self._bounds.values())

    def __contains__(self, id: object) -> bool:
        return ALIASES.get(str(id), id) in self._bounds

    def __getitem__(self, id: str) -> AnyBound:
        id = ALIASES.get(id, id)
        if id in self._bounds:
            return self._bounds[id]
        close = get_close_matches(id, [*self._bounds, *ALIASES], n=5, cutoff=0.5)
        hint = f"; close ones are {', '.join(close)}" if close else ""
        raise KeyError(f"there is no bound {id!r}{hint}; theory.table() lists all {len(self)}")

    @property
    def ids(self) -> list[str]:
        """All ids."""
        return list(self._bounds)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return id, statement, printed formula, verdict and sharp form of each bound."""
        return [
            (b.id, b.statement, b.formula, b.verdict, "" if b.sharp is None else b.sharp.formula)
            for b in self
        ]

    def __str__(self) -> str:
        return aligned(("id", "what", "printed", "verdict", "sharp or corrected"), self.rows())

    def markdown(self) -> str:
        """Return the table as Markdown: id, printed formula, largest ratio found or counterexample, sharp
        form.
        """
        lines = [
            "| id | printed | verdict | largest ratio found | sharp or corrected |",
            "|---|---|---|---|---|",
        ]
        for b in self:
            sharp = "" if b.sharp is None else f"`{b.sharp.formula}`"
            cells = (b.id, f"`{b.formula}`", b.verdict, b.worst, sharp)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines)


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
    """Return rows as a text table with columns aligned, those in ``right`` to the right."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(w) if k in right else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(line(row) for row in [head, *rows])


_ORDER = [*PAPERS, "NEW"]
_TABLE = Table(sorted((b for room in _ROOMS for b in room), key=lambda b: _ORDER.index(b.id.split("-")[0])))


def table() -> Table:
    """Return all bounds.

    Examples
    --------
    >>> from attnfit import theory
    >>> theory.table()["TT-10.3"].verdict
    'fails as printed; corrected form holds'
    """
    return _TABLE


def check(id: str, instance: Any) -> Check:
    """Evaluate a bound on an instance.

    Parameters
    ----------
    id : str
        Such as "TT-7.4": see `table`.
    instance : Regression, TwoLayer, Recovery, Step or Facts
        Of `attnfit.theory.instances`. One that violates assumptions is evaluated all the same, and the check
        says which.

    Raises
    ------
    KeyError
        If there is no such bound; the message lists close matches.
    TypeError
        If the bound speaks of another kind of instance.
    """
    return _TABLE[id].check(instance)
