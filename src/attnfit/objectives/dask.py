"""Rows that are partitions of a Dask array or data frame: the same problems, read where the data are.

Each partition becomes a `DaskPart`, rows with a loss that stay on their worker. A pass sends x
out once and brings back one sum, merged in a tree: O(d) numbers for a gradient, O(d^2) for a Hessian. Dask
decides where the parts are, keeps them in the workers' memory and makes those of a dead worker again.

A group whose rows end early in the next partition is moved to where it begins. What is left of groups in
several partitions are *long* groups: their parts are summed up as pieces of a group longer than a block are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import reduce as fold
from typing import Any

import numpy as np

from attnfit.data import Design
from attnfit.data.inputs import is_dask
from attnfit.data.matrix import Rows
from attnfit.data.parallel import one_blas_thread
from attnfit.losses.loss import Loss
from attnfit.objectives.convexity import surrogate_targets
from attnfit.objectives.dask_parts import (
    DaskPart,
    Shared,
    Summary,
    ends_of,
    head_of,
    later,
    make_part,
    moves_between,
    shared_labels,
    summary_of,
    tables_of,
)
from attnfit.objectives.leverage import RowSampler
from attnfit.objectives.objective import Drawn, Evaluation
from attnfit.objectives.part import Part, PerPart, merged, row_values
from attnfit.objectives.recession import Frame, separated_rows
from attnfit.segments import Array, Chunk, Index, Segments

# Sums merged by one task.
FAN_IN = 8
_ONE_ROW = Segments(np.zeros(1, dtype=np.intp), 1)


class RemoteDesign(Design):
    """What is known of a matrix whose rows are elsewhere."""

    def __init__(self, shape: tuple[int, int], gram_cost: float) -> None:
        super().__init__(shape)
        self._gram_cost = gram_cost

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient, roughly."""
        return self._gram_cost

    @property
    def block_rows(self) -> int:
        """Number of rows."""
        return int(self.shape[0])

    @property
    def storage(self) -> None:
        """Nothing that compiled loops could read here."""
        return None

    def _fetch(self, rows: Rows) -> Any:
        raise TypeError("the rows are on the workers of a Dask cluster; use value, gradient, hessian or hvp")

    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Refuse."""
        return self._fetch(rows), 0

    def combine(self, weights: Array, block: Any) -> Array:
        """Return ``weights @ block``."""
        return np.asarray(weights @ block)


class OnDask:
    """The rows of a problem as partitions on workers, with the loss: what `Part` is for rows in one place.

    Parameters
    ----------
    loss : Loss
    A, b, groups, weights, offset, row_penalty
        As a problem takes them; A is a Dask array or data frame.

    Raises
    ------
    ValueError
        Like a problem in memory; the message names the partition too.
    """

    is_whole = False
    memory_limit: int | None = None

    def __init__(
        self, loss: Loss, A: Any, b: Any, groups: Any, weights: Any, offset: Any, row_penalty: Any
    ) -> None:
        from dask import compute, persist

        self.loss = loss
        scalar = np.ndim(row_penalty) == 0 and not is_dask(row_penalty)
        vectors = {"b": b, "groups": groups, "weights": weights, "offset": offset}
        vectors["row_penalty"] = None if scalar else row_penalty
        tables = persist(*tables_of(A, vectors, self.loss))
        ends = compute(*[later(ends_of)(table) for table in tables])
        tables = [table for table, end in zip(tables, ends, strict=True) if end is not None]
        if not tables:
            raise ValueError("A is empty; pass at least one row")
        moved = moves_between([end for end in ends if end is not None])
        tails = [later(head_of)(table, count) for table, count in zip(tables[1:], moved[1:], strict=True)]
        arguments = self.loss, float(row_penalty) if scalar else None
        parts = [
            later(make_part)(table, count, tail, *arguments)
            for table, count, tail in zip(tables, moved, [*tails, None], strict=True)
        ]
        # Whether they are there is all that is asked of them here.
        self.b, self.weights, self.offset = ELSEWHERE, _where(weights), _where(offset)
        self.penalty = None if scalar and not row_penalty else ELSEWHERE
        if not self._adopt(persist(*parts)):
            raise ValueError("weights are all zero; give at least one row a positive weight")

    def _adopt(self, parts: Sequence[Any]) -> bool:
        """Find the groups that are long or in several parts, and tell the parts; return whether any row has a
        weight.
        """
        from dask import compute, persist

        known: list[Summary] = list(compute(*[later(summary_of)(part) for part in parts]))
        shared = shared_labels(parts, known) if self.loss.coupled else set()
        found = compute(*[later(DaskPart.sums_of)(part, shared) for part in parts])
        sums: dict[Any, Array] = fold(merged, found)
        numbers = {label: number for number, label in enumerate(sums)}
        self.long_constants = np.array([constant for constant, *_ in sums.values()])
        self.n_long = len(self.long_constants)
        self._target_totals = {numbers[label]: values[1:] for label, values in sums.items()}
        first_labels = np.cumsum([0, *(summary.n_groups for summary in known)])
        self._first_long = int(first_labels[-1])
        told = [
            Shared(numbers, self.long_constants, int(first), self._first_long) for first in first_labels[:-1]
        ]
        self._parts = persist(*[later(DaskPart.among)(p, s) for p, s in zip(parts, told, strict=True)])
        n_rows, n_columns = sum(s.n_rows for s in known), {s.n_columns for s in known}
        if len(n_columns) > 1:
            raise ValueError(f"partitions of A have different numbers of columns: {sorted(n_columns)}")
        self.n_rows, self.n_unknowns = n_rows, n_columns.pop()
        self.design = RemoteDesign((n_rows, self.n_unknowns), max(s.gram_cost for s in known))
        self.largest_group = max(s.largest_group for s in known)
        self.n_groups = self._first_long - sum(map(len, found)) + len(numbers) if self.loss.coupled else 1
        return any(summary.has_weight for summary in known)

    @property
    def long_labels(self) -> Index:
        """The label of each long group in a sample of the data."""
        return self._first_long + np.arange(self.n_long)

    def target_totals(self) -> dict[int, Array]:
        """Return the sums of the targets of each long group, by its number."""
        return self._target_totals

    @property
    def chunks(self) -> Any:
        """Refuse: no loop over rows may run where there are none."""
        raise TypeError("the rows are on the workers of a Dask cluster; no loop over them can run here")

    def with_memory_limit(self, limit: int) -> OnDask:
        """Return the same rows, of which less is kept between passes."""
        other = copy(self)
        other.memory_limit = limit
        return other

    # ---- running over the rows

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        """Return the sum of what the work yields on the parts: see `Part.reduce`."""
        from dask import compute

        ((found, n_rows),) = compute(_tree(self._tasks(work, args, drawn)), optimize_graph=False)
        self.design.rows_read += n_rows
        return found

    def reduce_and_draw(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Drawn]:
        """Return the sum of the first results, and the rows drawn, which stay where they are."""
        from dask import compute, persist

        outs = persist(*self._tasks(work, args, None))
        sums = _tree([later(_sums)(out) for out in outs])
        (found, n_rows), *counts = compute(sums, *[later(_n_drawn)(out) for out in outs])
        self.design.rows_read += n_rows
        return found, Drawn(persist(*[later(_drawn)(out) for out in outs]), sum(counts))

    def collect(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what the work yields on each part, in order."""
        from dask import compute

        found = compute(*self._tasks(work, args, None), optimize_graph=False)
        self.design.rows_read += sum(n_rows for _, n_rows in found)
        return [result for result, _ in found]

    def share_out(self, source: RowSampler | np.random.Generator) -> Any:
        """Return a sampler or generator for each part."""
        n = len(self._parts)
        if isinstance(source, RowSampler):
            return PerPart(source.split(n))
        return PerPart(np.random.default_rng(seed) for seed in source.integers(2**63, size=n))

    def by_row(self, at: Evaluation, formula: Callable[..., Array]) -> Array:
        """Apply a formula to the logits and states of every row; return shape (n,)."""
        return np.concatenate(self.collect(row_values, at, formula))

    def surrogate(self) -> OnDask | None:
        """Return the same parts under a convex loss whose minimiser is a good start, or None."""
        totals = self.reduce(_group_totals)
        kind = surrogate_targets(self.loss, np.ones(1), None, _ONE_ROW, np.ones(1))
        if kind is None:
            return None
        other = copy(self)
        other.loss = kind[0]
        has_weight = other._adopt([later(DaskPart.surrogate)(part, totals) for part in self._parts])
        other.design = self.design
        return other if has_weight else None

    def without_penalty(self) -> OnDask:
        """Return the same parts without row penalties."""
        from dask import persist

        other = copy(self)
        other.penalty = None
        other._parts = persist(*[later(DaskPart.without_penalty)(part) for part in self._parts])
        return other

    def without_separated(self, at: Evaluation, frame: Frame, along: Array) -> OnDask:
        """Return the same parts without the rows that fall along a recession direction."""
        from dask import compute

        other, at = copy(self), at.bare()
        parts = [later(_without_separated)(part, at, frame, along) for part in self._parts]
        counts = compute(*[later(_n_rows)(part) for part in parts])
        other._adopt([part for part, count in zip(parts, counts, strict=True) if count])
        return other

    def _tasks(self, work: Callable[..., Any], args: tuple[Any, ...], drawn: Drawn | None) -> list[Any]:
        """Return the tasks that do the work on every part, each to its result and the rows it read."""
        from dask import delayed

        # One object a call: a worker fetches it once for all its parts. Of a point only what a pass needs.
        args = tuple(a.bare() if isinstance(a, Evaluation) else a for a in args)
        shared = tuple(None if isinstance(a, PerPart) else a for a in args)
        common = delayed(shared, traverse=False, pure=False)
        chunks = [None] * len(self._parts) if drawn is None else drawn.chunks
        tasks = []
        for k, (part, mine) in enumerate(zip(self._parts, chunks, strict=True)):
            own: Any = {j: a[k] for j, a in enumerate(args) if isinstance(a, PerPart)}
            own = delayed(own, traverse=False, pure=False) if own else None
            tasks.append(later(_do)(work, part, mine, common, own))
        return tasks


def _without_separated(part: Part, at: Evaluation, frame: Frame, along: Array) -> Part:
    return part.without(separated_rows(part, part.chunks, at, frame, along))


def _n_rows(part: Part) -> int:
    return part.n_rows


class _Elsewhere:
    """Stands for a vector that is kept with its rows."""

    def __repr__(self) -> str:
        return "<on the workers>"


ELSEWHERE: Any = _Elsewhere()


def _where(values: Any) -> Any:
    return None if values is None else ELSEWHERE


# ---- tasks and their sums


def _do(
    work: Callable[..., Any], part: Part, chunks: Any, common: tuple[Any, ...], own: dict[int, Any] | None
) -> Any:
    args = [a if own is None else own.get(j, a) for j, a in enumerate(common)]
    before = part.design.rows_read
    # Workers that each start a BLAS thread per core slow one another down.
    with one_blas_thread():
        found = work(part, part.chunks if chunks is None else chunks, *args)
    return found, part.design.rows_read - before


def _tree(tasks: Sequence[Any]) -> Any:
    """Return the task that adds up all results, a few at a time."""
    while len(tasks) > 1:
        tasks = [later(_merge)(*tasks[k : k + FAN_IN]) for k in range(0, len(tasks), FAN_IN)]
    return tasks[0]


def _merge(*found: Any) -> Any:
    return fold(merged, found)


def _sums(out: Any) -> Any:
    (sums, _), n_rows = out
    return sums, n_rows


def _drawn(out: Any) -> Any:
    return out[0][1]


def _n_drawn(out: Any) -> int:
    return sum(chunk.matrix.shape[0] for chunk in _drawn(out))


def _group_totals(part: Part, chunks: list[Chunk]) -> dict[int, Array]:
    """Return size, sum of targets and of weighted targets of each long group."""
    found: dict[int, Array] = {}
    for chunk in chunks:
        if chunk.long >= 0:
            b, w, _ = part.targets(chunk)
            b = np.maximum(b, 0.0)
            found[chunk.long] = found.get(chunk.long, 0.0) + np.array([len(b), b.sum(), (w * b).sum()])
    return found
