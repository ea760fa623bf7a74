"""The same problem on rows centred by group, where the loss cannot tell: columns such as years, ids or time
stamps keep the digits that tell their rows apart.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.data import SparseDesign
from attnfit.data.centred import CentredDesign, GroupReference, centre_rows
from attnfit.data.groups import Chunk
from attnfit.objectives.objective import Drawn
from attnfit.objectives.part import StoredProblem, merged
from attnfit.segments import Array

if TYPE_CHECKING:
    from attnfit.objectives.rows import GroupedProblem

# A column whose common part in a group is so many times what tells its rows apart loses digits that a fit
# needs.
SHIFTED = 1e5
# Rows that are looked at.
LOOKED_AT = 1_000


def centred(problem: GroupedProblem) -> GroupedProblem:
    """Return the problem on rows less the first row of their group: the same function of x, exactly.

    Rounding then scales with the differences within groups. The problem itself where its loss tells a group
    from a shifted one, or a row penalty does. Sparse rows of groups longer than a block take a read.
    """
    if not problem.loss.shift_invariant or problem.penalty is not None:
        return problem
    references = _rows(problem.reduce(_references)) if problem.n_long else {}
    if problem.is_whole:
        whole: GroupedProblem = _with_centred_rows(problem, references)
        return whole
    # The parts of data in several places are centred where they are.
    other: Any = copy(problem)
    other.reduce = partial(_reduce_centred, problem, references)
    return other  # type: ignore[no-any-return]


def is_shifted(part: StoredProblem) -> bool:
    """Whether the first rows show a column that is all but constant within groups, far from zero."""
    if not part.loss.shift_invariant or part.penalty is not None:
        return False
    n, order = min(part.n_rows, LOOKED_AT), part.groups.order
    block = part.design.peek(slice(0, n) if order is None else order[:n])
    if block is None:
        return False
    starts = part.groups.starts
    inside = centre_rows(block, starts[starts < n])
    size, spread = (_largest(rows) for rows in (block, inside))
    return bool(((spread > 0.0) & (size > SHIFTED * spread)).any())


def _largest(block: Any) -> Array:
    largest = abs(block).max(axis=0)
    return np.asarray(largest.toarray() if hasattr(largest, "toarray") else largest).reshape(-1)


def _rows(found: dict[int, GroupReference]) -> dict[int, Array]:
    return {number: reference.row for number, reference in found.items()}


def _references(part: StoredProblem, chunks: list[Chunk]) -> dict[int, GroupReference]:
    """Return the reference of each long group, by number; of dense rows only the first is read."""
    found: dict[int, GroupReference] = {}
    long = [chunk for chunk in chunks if chunk.long >= 0]
    if isinstance(part.design, SparseDesign):
        for chunk in part.ahead(long):
            found = merged(found, {chunk.long: GroupReference.of(part.fetch(chunk))})
        return found
    for chunk in long:
        if chunk.long not in found:
            first = chunk.index.start if isinstance(chunk.index, slice) else int(chunk.index[0])
            found[chunk.long] = GroupReference.of(part.design.block(np.array([first])))
    return found


def _with_centred_rows(part: Any, references: dict[int, Array]) -> Any:
    other = copy(part)
    numbers = zip(part.long_groups.tolist(), part.long_numbers.tolist(), strict=True)
    known = {group: references[number] for group, number in numbers}
    other.design = CentredDesign(part.design, part.groups.starts, part.groups.order, known)
    return other


def _reduce_centred(
    problem: GroupedProblem,
    references: dict[int, Array],
    work: Callable[..., Any],
    *args: Any,
    drawn: Drawn | None = None,
) -> Any:
    return problem.reduce(_on_centred_rows, references, work, *args, drawn=drawn)


def _on_centred_rows(
    part: StoredProblem,
    chunks: list[Chunk],
    references: dict[int, Array],
    work: Callable[..., Any],
    *args: Any,
) -> Any:
    return work(_with_centred_rows(part, references), chunks, *args)
