"""The same problem in better units: rows centred by group where the loss cannot tell, so that columns such as
years, ids or time stamps keep the digits that tell their rows apart; columns of extreme size scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.data.centred import CentredDesign, GroupReference
from attnfit.data.gram import centre_rows
from attnfit.data.groups import Chunk
from attnfit.data.matrix import Design, SparseDesign
from attnfit.objectives.objective import Drawn, Reduction
from attnfit.objectives.part import Part, merged
from attnfit.segments import Array, Index

if TYPE_CHECKING:
    from attnfit.objectives.rows import RowProblem

# A column whose common part in a group is so many times what tells its rows apart loses digits that a fit
# needs.
SHIFTED = 1e5
# Rows that are looked at, and of how many groups.
LOOKED_AT, LOOKED_AT_GROUPS = 1_000, 100
# Squares of larger entries, weighted and added up, may overflow; beyond the second they do.
LARGE, HUGE = 1e60, 1e150


def better_units(problem: RowProblem) -> Reduction | None:
    """Return the problem with rows centred by group, where a column is all but constant in them and the
    loss cannot tell, or with columns of extreme size scaled by powers of two, which rounds nothing: their
    squares would underflow or overflow. None where all columns are ordinary.

    Raises
    ------
    ValueError
        If a column has an entry beyond 1e150 beside ordinary ones: a code for a missing value.
    """
    rows = problem.rows
    if not problem.rows_can_be_drawn or problem.in_better_units or rows.design.on_disk:
        return None
    if rows.is_whole and is_shifted(rows):
        inner = centred(problem)
        inner.in_better_units = True
        return Reduction(inner, np.asarray, np.asarray, "", keeps_unknowns=True)
    sizes = rows.design.column_sizes(LOOKED_AT)
    if sizes is None or ((sizes == 0.0) | ((sizes > 1.0 / LARGE) & (sizes < LARGE))).all():
        return None
    sizes = np.asarray(rows.design.column_sizes())
    exponents = np.where(sizes > 0.0, -np.floor(np.log2(np.where(sizes > 0.0, sizes, 1.0))), 0.0)
    for j in np.flatnonzero(sizes > HUGE):
        _refuse_codes(rows.design, int(j), float(sizes[j]))
    factors = np.ldexp(1.0, exponents.astype(int))
    other = problem.with_rows(rows.on(rows.design.scaled(factors)))
    other.in_better_units = True
    if np.any(problem.ridge):
        # A penalty on a column of size 1e-160 weighs what it weighs: as much as float64 can hold.
        with np.errstate(over="ignore", under="ignore"):
            other.ridge = np.minimum(problem.ridge * factors**2, 1.0 / np.finfo(float).tiny)
    return Reduction(other, lambda y: y * factors, lambda x: x / factors, "", keeps_unknowns=True)


def _refuse_codes(design: Design, j: int, size: float) -> None:
    """Raise ValueError if a column with huge entries has ordinary ones too."""
    unit = np.zeros(int(design.shape[1]))
    unit[j] = 1.0
    column = np.abs(np.concatenate([block @ unit for _, block in design.blocks()]))
    ordinary = (column > 0.0) & (column < size * 1e-50)
    if ordinary.any():
        row = int(np.argmax(column))
        raise ValueError(
            f"A has {size:.3g} at row {row}, column {j}, beside entries such as "
            f"{column[ordinary][0]:.3g}: if it stands for a missing value, drop or impute these rows"
        )


# ---- rows centred by group


def is_shifted(part: Part) -> bool:
    """Whether the first rows show a column that is all but constant within groups, far from zero."""
    starts, n = part.groups.starts, min(part.n_rows, LOOKED_AT)
    sizes = _sizes_and_spreads(part, np.arange(n), starts[starts < n])
    return sizes is not None and bool(((sizes[1] > 0.0) & (sizes[0] > SHIFTED * sizes[1])).any())


def shares_much(part: Part, ratio: float) -> bool:
    """Whether a column is so many times larger than its differences within groups, as far as some rows from
    everywhere tell; True where none are at hand.
    """
    sizes = _sizes_and_spreads(part, *_some_rows(part))
    return sizes is None or bool((sizes[0] > ratio * sizes[1]).any())


def _sizes_and_spreads(part: Part, rows: Index, starts: Index) -> tuple[Array, Array] | None:
    """Return the largest entry of each column, shape (d,), and the largest difference from the first row of
    its group, among some rows in group order; None where none are at hand or nothing is shared.
    """
    if not part.loss.shift_invariant or part.penalty is not None:
        return None
    block = part.design.peek(rows if part.groups.order is None else part.groups.order[rows])
    if block is None:
        return None
    found = []
    for entries in (block, centre_rows(block, starts)):
        largest = abs(entries).max(axis=0)
        found.append(np.asarray(largest.toarray() if hasattr(largest, "toarray") else largest).reshape(-1))
    return found[0], found[1]


def _some_rows(part: Part) -> tuple[Index, Index]:
    """Return all rows where these are few, else some of some groups, both spread over all, and where groups
    begin among them.
    """
    starts, n = part.groups.starts, part.n_rows
    if n <= LOOKED_AT:
        return np.arange(n), starts
    groups = np.unique(np.linspace(0, len(starts) - 1, LOOKED_AT_GROUPS).astype(np.intp))
    each = LOOKED_AT // len(groups)
    # The rows of a short group more than once.
    within = np.linspace(0.0, 1.0, each) * (np.diff(starts, append=n)[groups, None] - 1)
    return (starts[groups, None] + within.astype(np.intp)).ravel(), each * np.arange(len(groups))


def centred(problem: RowProblem) -> RowProblem:
    """Return the problem on rows less the first row of their group: the same function of x, exactly.

    Rounding then scales with the differences within groups. The problem itself where its loss tells a group
    from a shifted one, or a row penalty does. Sparse rows of groups longer than a block take a pass.
    """
    rows = problem.rows
    if not rows.loss.shift_invariant or rows.penalty is not None:
        return problem
    found: dict[int, GroupReference] = rows.reduce(_references) if rows.n_long else {}
    references = {number: reference.row for number, reference in found.items()}
    # The parts of data in several places are centred where they are.
    inside = _with_centred_rows(rows, references) if rows.is_whole else _CentredParts(rows, references)
    return problem.with_rows(inside)


def _references(part: Part, chunks: list[Chunk]) -> dict[int, GroupReference]:
    """Return the reference of each long group, by number; of dense rows only the first is read."""
    found: dict[int, GroupReference] = {}
    long = [chunk for chunk in chunks if chunk.long >= 0]
    if isinstance(part.design, SparseDesign):
        for chunk in part.prefetch(long):
            found = merged(found, {chunk.long: GroupReference.of(part.fetch(chunk))})
        return found
    for chunk in long:
        if chunk.long not in found:
            first = chunk.index.start if isinstance(chunk.index, slice) else int(chunk.index[0])
            found[chunk.long] = GroupReference.of(part.design.block(np.array([first])))
    return found


def _with_centred_rows(part: Part, references: dict[int, Array]) -> Part:
    numbers = zip(part.long_groups.tolist(), part.long_numbers.tolist(), strict=True)
    known = {group: references[number] for group, number in numbers}
    return part.on(CentredDesign(part.design, part.groups.starts, part.groups.order, known))


class _CentredParts:
    """Rows in several places, centred before each pass over them."""

    def __init__(self, rows: Any, references: dict[int, Array]) -> None:
        self._rows, self._references = rows, references

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        """Return what the work yields on the centred rows of all parts."""
        return self._rows.reduce(_on_centred_rows, self._references, work, *args, drawn=drawn)


def _on_centred_rows(
    part: Part, chunks: list[Chunk], references: dict[int, Array], work: Callable[..., Any], *args: Any
) -> Any:
    return work(_with_centred_rows(part, references), chunks, *args)
