"""The problem that a certificate is about: that of rows centred by group, where the loss cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from attnfit.designs import SparseDesign
from attnfit.designs.centring import CentredDesign, GroupReference
from attnfit.losses.segments import Array
from attnfit.problems.evaluation import Drawn
from attnfit.problems.rows.grouped import GroupedProblem
from attnfit.problems.rows.merging import merged
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import StoredProblem


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
