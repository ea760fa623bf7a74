"""Rows that are partitions of a Dask array or data frame: the same problems, read where the data are.

Each partition becomes a `Part`, an ordinary problem on its own rows that stays on its worker. A read sends x
out once and brings back one sum, merged in a tree: O(d) numbers for a gradient, O(d^2) for a Hessian. Dask
decides where the parts are, keeps them in the workers' memory and makes those of a dead worker again.

A group whose rows end early in the next partition is moved to where it begins. What is left of groups in
several partitions are *long* groups: their parts are summed up as pieces of a group longer than a block are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from functools import reduce as fold
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from attnfit.designs import Design, SparseDesign
from attnfit.designs.base import Rows
from attnfit.losses.base import Loss
from attnfit.losses.segments import Array, Index, Segments
from attnfit.losses.softmax import LOSSES
from attnfit.problems.evaluation import Drawn
from attnfit.problems.inputs import as_design, as_vector
from attnfit.problems.rows.merging import PerPart, merged
from attnfit.problems.rows.neighbour import neighbouring_targets
from attnfit.problems.rows.partition import Chunk
from attnfit.problems.rows.stored import DERIVED, StoredProblem
from attnfit.sketching import RowSampler

# Sums merged by one task.
FAN_IN = 8
# The end of a group with more rows than this is not moved to another partition.
MOVED_ROWS = 10_000


def is_dask(values: Any) -> bool:
    """Whether these are a Dask array or data frame."""
    return type(values).__module__.partition(".")[0] in ("dask", "dask_expr") and hasattr(values, "dask")


@cache
def distributed(kind: type[Any]) -> type[Any]:
    """Return the class of the same problem on data in several places."""
    return type(f"Distributed{kind.__name__}", (Distributed, kind), {"__module__": kind.__module__})


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


@dataclass(frozen=True)
class Table:
    """Rows and what belongs to each of them; vectors that are not given are None."""

    matrix: Any
    vectors: dict[str, Any]

    def take(self, rows: slice) -> Table:
        """Return some of the rows."""
        return Table(self.matrix[rows], {k: None if v is None else v[rows] for k, v in self.vectors.items()})

    def followed_by(self, other: Table) -> Table:
        """Return the rows of both."""
        stack = partial(sparse.vstack, format="csr") if sparse.issparse(self.matrix) else np.concatenate
        vectors = {
            k: None if v is None else np.concatenate([v, other.vectors[k]]) for k, v in self.vectors.items()
        }
        return Table(stack([self.matrix, other.matrix]), vectors)


class Shared(NamedTuple):
    """What a part knows of the long groups of all parts.

    Attributes
    ----------
    numbers : dict of int
        The number of each of its own groups that is long, by its label.
    constants : ndarray, shape (n_long,)
        The loss's constants of all long groups.
    first_label, first_long : int
        Labels in samples: those of its first group and of the first long group of all.
    """

    numbers: dict[Any, int]
    constants: Array
    first_label: int
    first_long: int


class Part(StoredProblem):
    """The rows of one partition."""

    shared: Shared | None = None

    def among(self, shared: Shared) -> Part:
        """Return the part cut into chunks anew, now that the long groups of all parts are known."""
        part = copy(self)
        labels = part.groups.labels.tolist() if part.loss.coupled else []
        own = [g for g, label in enumerate(labels) if label in shared.numbers]
        part._cut(np.array(own, dtype=np.intp))
        part.shared = shared
        numbers = part.long_numbers
        part.chunks = [c if c.long < 0 else replace(c, long=int(numbers[c.long])) for c in part.chunks]
        part.constants[part.long_groups] = shared.constants[numbers]
        return part

    def constants_of(self, shared: set[Any]) -> dict[Any, float]:
        """Return the constants of the groups that are long here or shared with other parts, by label."""
        labels = self.groups.labels.tolist() if self.loss.coupled else []
        long = set(self.long_groups.tolist())
        return {
            label: float(self.constants[g]) for g, label in enumerate(labels) if g in long or label in shared
        }

    def neighbour(self, totals: dict[int, Array]) -> Part:
        """Return the part of the convex neighbour; ``totals`` as from `_group_totals`."""
        segments = Segments(self.groups.starts, self.n_rows)
        sizes = np.repeat(segments.sizes, segments.sizes)
        numbers = dict(zip(self.long_groups.tolist(), self.long_numbers.tolist(), strict=True))
        of_group = {
            g: slice(s, s + segments.sizes[g]) for g, s in enumerate(self.groups.starts) if g in numbers
        }
        for g, rows in of_group.items():
            sizes[rows] = totals[numbers[g]][0]
        found = neighbouring_targets(self.loss, self.b, self.weights, segments, sizes)
        if found is None:
            # Only where no target here is positive.
            found = LOSSES["cross_entropy"], np.zeros(self.n_rows), self.weights
        loss, b, w = found
        if w is not None and loss.coupled:
            for g, rows in of_group.items():
                _, mass, weighted = totals[numbers[g]]
                w[rows] = weighted / mass if mass > 0 else 0.0
        return self.with_loss(loss, b, w)

    @property
    def long_numbers(self) -> Index:
        assert self.shared is not None
        labels = self.groups.labels[self.long_groups].tolist()
        return np.array([self.shared.numbers[label] for label in labels], dtype=np.intp)

    @property
    def n_long(self) -> int:
        assert self.shared is not None
        return len(self.shared.constants)

    @property
    def group_labels(self) -> Index:
        assert self.shared is not None
        labels = self.shared.first_label + np.arange(len(self.groups))
        labels[self.long_groups] = self.shared.first_long + self.long_numbers
        return labels

    # A part has no solver of its own.
    evaluate = hessian_at = hessian_operator = diagonal_at = None  # type: ignore[assignment]


class Summary(NamedTuple):
    """What the scheduler's side knows of a part; ``ordered`` says that its labels increase."""

    n_rows: int
    n_columns: int
    gram_cost: float
    n_groups: int
    largest_group: int
    has_weight: bool
    ordered: bool
    ends: tuple[Any, Any]


class Distributed(StoredProblem):
    """Overrides who iterates over the data; mixed into the class of the problem."""

    def _store(self, A: Any, b: Any, groups: Any, weights: Any, offset: Any, row_penalty: Any) -> None:
        from dask import compute, persist

        scalar = np.ndim(row_penalty) == 0 and not is_dask(row_penalty)
        vectors = {"b": b, "groups": groups, "weights": weights, "offset": offset}
        vectors["row_penalty"] = None if scalar else row_penalty
        tables = persist(*_tables(A, vectors))
        ends = compute(*[_later(_ends)(table) for table in tables])
        tables = [table for table, end in zip(tables, ends, strict=True) if end is not None]
        if not tables:
            raise ValueError("A is empty; pass at least one row")
        moved = _moves([end for end in ends if end is not None])
        tails = [_later(_head)(table, count) for table, count in zip(tables[1:], moved[1:], strict=True)]
        arguments = self.loss, float(row_penalty) if scalar else None
        parts = [
            _later(_make_part)(k, table, count, tail, *arguments)
            for k, (table, count, tail) in enumerate(zip(tables, moved, [*tails, None], strict=True))
        ]
        # Whether they are there is all that is asked of them here.
        self.b, self.weights, self.offset = ELSEWHERE, _where(weights), _where(offset)
        self.penalty = None if scalar and not row_penalty else ELSEWHERE
        self._adopt(persist(*parts))

    def _adopt(self, parts: Sequence[Any]) -> None:
        """Find the groups that are long or in several parts, and tell the parts."""
        from dask import compute, persist

        known: list[Summary] = list(compute(*[_later(_summary)(part) for part in parts]))
        shared = _shared_labels(parts, known) if self.loss.coupled else set()
        found = compute(*[_later(Part.constants_of)(part, shared) for part in parts])
        constants: dict[Any, float] = fold(merged, found)
        numbers = {label: number for number, label in enumerate(constants)}
        self._constants = np.array(list(constants.values()))
        first_labels = np.cumsum([0, *(summary.n_groups for summary in known)])
        self._first_long = int(first_labels[-1])
        told = [Shared(numbers, self._constants, int(first), self._first_long) for first in first_labels[:-1]]
        self._parts = persist(*[_later(Part.among)(p, s) for p, s in zip(parts, told, strict=True)])
        n_rows, n_columns = sum(s.n_rows for s in known), {s.n_columns for s in known}
        if len(n_columns) > 1:
            raise ValueError(f"partitions of A have different numbers of columns: {sorted(n_columns)}")
        self.design = RemoteDesign((n_rows, n_columns.pop()), max(s.gram_cost for s in known))
        self._largest_group = max(s.largest_group for s in known)
        self._n_groups = self._first_long - sum(map(len, found)) + len(numbers) if self.loss.coupled else 1
        if not any(summary.has_weight for summary in known):
            raise ValueError("weights are all zero; give at least one row a positive weight")

    # ---- what is known here of the groups

    @property
    def is_whole(self) -> bool:
        return False

    @property
    def n_groups(self) -> int:
        return self._n_groups

    @property
    def n_long(self) -> int:
        return len(self._constants)

    @property
    def long_constants(self) -> Array:
        return self._constants

    @property
    def long_labels(self) -> Index:
        return self._first_long + np.arange(self.n_long)

    @property
    def largest_group(self) -> int:
        return self._largest_group

    @property
    def chunks(self) -> list[Chunk]:  # type: ignore[override]
        """Refuse: no loop over rows may run where there are none."""
        raise TypeError("the rows are on the workers of a Dask cluster; no loop over them can run here")

    # ---- who iterates over the data

    def reduce(self, work: Callable[..., Any], *args: Any, drawn: Drawn | None = None) -> Any:
        from dask import compute

        ((found, n_rows),) = compute(_tree(self._tasks(work, args, drawn)))
        self.design.rows_read += n_rows
        return found

    def reduce_and_draw(self, work: Callable[..., Any], *args: Any) -> tuple[Any, Drawn]:
        from dask import compute, persist

        outs = persist(*self._tasks(work, args, None))
        sums = _tree([_later(_sums)(out) for out in outs])
        (found, n_rows), *counts = compute(sums, *[_later(_n_drawn)(out) for out in outs])
        self.design.rows_read += n_rows
        return found, Drawn(persist(*[_later(_drawn)(out) for out in outs]), sum(counts))

    def collect(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        from dask import compute

        found = compute(*self._tasks(work, args, None))
        self.design.rows_read += sum(n_rows for _, n_rows in found)
        return [result for result, _ in found]

    def share_out(self, source: RowSampler | np.random.Generator) -> Any:
        n = len(self._parts)
        if isinstance(source, RowSampler):
            return PerPart(source.split(n))
        return PerPart(np.random.default_rng(seed) for seed in source.integers(2**63, size=n))

    def convex_neighbour(self) -> Any:
        """Return the neighbour on the same parts."""
        totals = self.reduce(_group_totals)
        kind = neighbouring_targets(self.loss, np.ones(1), None, _ONE_ROW, np.ones(1))
        if kind is None:
            return None
        other: Any = copy(self)
        for name in DERIVED:
            other.__dict__.pop(name, None)
        other.loss = kind[0]
        other._adopt([_later(Part.neighbour)(part, totals) for part in self._parts])
        other.design = self.design
        return other

    def _tasks(self, work: Callable[..., Any], args: tuple[Any, ...], drawn: Drawn | None) -> list[Any]:
        """Return the tasks that do the work on every part, each to its result and the rows it read."""
        from dask import delayed

        # One object a call: a worker fetches it once for all its parts.
        shared = tuple(None if isinstance(a, PerPart) else a for a in args)
        common = delayed(shared, traverse=False, pure=False)
        chunks = [None] * len(self._parts) if drawn is None else drawn.chunks
        tasks = []
        for k, (part, mine) in enumerate(zip(self._parts, chunks, strict=True)):
            own = {j: a[k] for j, a in enumerate(args) if isinstance(a, PerPart)}
            tasks.append(_later(_do)(work, part, mine, common, delayed(own, traverse=False, pure=False)))
        return tasks


class _Elsewhere:
    """Stands for a vector that is kept with its rows."""

    def __repr__(self) -> str:
        return "<on the workers>"


ELSEWHERE: Any = _Elsewhere()
_ONE_ROW = Segments(np.zeros(1, dtype=np.intp), 1)


def _where(values: Any) -> Any:
    return None if values is None else ELSEWHERE


# ---- tasks and their sums


def _later(function: Callable[..., Any]) -> Any:
    from dask import delayed

    return delayed(function, pure=False)


def _do(
    work: Callable[..., Any], part: Part, chunks: Any, common: tuple[Any, ...], own: dict[int, Any]
) -> Any:
    args = [own.get(j, a) for j, a in enumerate(common)]
    before = part.design.rows_read
    # Workers that each start a BLAS thread per core slow one another down.
    with threadpool_limits(1):
        found = work(part, part.chunks if chunks is None else chunks, *args)
    return found, part.design.rows_read - before


def _tree(tasks: Sequence[Any]) -> Any:
    """Return the task that adds up all results, a few at a time."""
    while len(tasks) > 1:
        tasks = [_later(_merge)(*tasks[k : k + FAN_IN]) for k in range(0, len(tasks), FAN_IN)]
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


def _group_totals(part: StoredProblem, chunks: list[Chunk]) -> dict[int, Array]:
    """Return size, sum of targets and of weighted targets of each long group."""
    found: dict[int, Array] = {}
    for chunk in chunks:
        if chunk.long >= 0:
            b, w, _ = part.targets(chunk)
            b = np.maximum(b, 0.0)
            found[chunk.long] = found.get(chunk.long, 0.0) + np.array([len(b), b.sum(), (w * b).sum()])
    return found


# ---- from collections to parts


def _tables(A: Any, vectors: dict[str, Any]) -> list[Any]:
    """Return one task a partition that brings its rows together."""
    if hasattr(A, "npartitions") and not hasattr(A, "chunks"):
        blocks = A.to_delayed()
    else:
        if A.ndim != 2:
            raise ValueError(f"A must have two dimensions (rows, features), not shape {A.shape}")
        A = A if A.numblocks[1] == 1 else A.rechunk({1: -1})
        blocks = A.to_delayed()[:, 0].tolist()
    columns = {name: _column(values, name, A, blocks) for name, values in vectors.items()}
    return [
        _later(_table)(k, block, {name: column[k] for name, column in columns.items()})
        for k, block in enumerate(blocks)
    ]


def _column(values: Any, name: str, A: Any, blocks: list[Any]) -> list[Any]:
    """Return the piece of a vector that belongs to each block of rows."""
    if values is None:
        return [None] * len(blocks)
    if is_dask(values):
        if hasattr(values, "rechunk") and hasattr(A, "chunks") and values.chunks[0] != A.chunks[0]:
            values = values.rechunk({0: A.chunks[0]})
        pieces = np.asarray(values.to_delayed(), dtype=object).reshape(-1).tolist()
        if len(pieces) != len(blocks):
            raise ValueError(
                f"{name} has {len(pieces)} partitions but A has {len(blocks)}; repartition them alike"
            )
        return pieces
    from dask import compute

    array = np.asarray(values)
    bounds = np.cumsum([0, *compute(*[_later(_n_rows)(block) for block in blocks])])
    if array.ndim != 1 or len(array) != bounds[-1]:
        raise ValueError(
            f"{name} has shape {array.shape} but A has {bounds[-1]} rows; pass one value a row, shape "
            f"({bounds[-1]},)"
        )
    return [array[first:last] for first, last in pairwise(bounds)]


def _n_rows(block: Any) -> int:
    return int(block.shape[0])


def _table(k: int, block: Any, vectors: dict[str, Any]) -> Table | None:
    """Bring the rows of one partition together; None if it has none."""
    if block.shape[0] == 0:
        return None
    with _partition(k):
        design = as_design(block)
        matrix = design.matrix if isinstance(design, SparseDesign) else design.array
        n = matrix.shape[0]
        arrays = {name: None if v is None else np.asarray(v).reshape(-1) for name, v in vectors.items()}
        for name, v in arrays.items():
            if v is not None and len(v) != n:
                raise ValueError(f"{name} has {len(v)} rows but A has {n}; give both the same partitions")
    return Table(matrix, arrays)


@contextmanager
def _partition(k: int) -> Iterator[None]:
    """Say in which partition an error is: rows are numbered within it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"partition {k}: {error}") from error


def _ends(table: Table | None) -> tuple[int, int, Any, Any] | None:
    """Return the number of rows, of those of the first group, and the first and last label."""
    if table is None:
        return None
    labels, n = table.vectors["groups"], table.matrix.shape[0]
    if labels is None:
        return n, n, 0, 0
    other = np.flatnonzero(labels != labels[0])
    return n, int(other[0]) if len(other) else n, labels[:1].tolist()[0], labels[-1:].tolist()[0]


def _moves(ends: list[tuple[int, int, Any, Any]]) -> list[int]:
    """Return how many of the first rows of each part belong to a group that begins in the part before, and
    ends here.
    """
    moved = [0]
    for (_, _, _, last), (n, first_size, first, _) in pairwise(ends):
        moved.append(first_size if first == last and first_size < min(n, MOVED_ROWS) else 0)
    return moved


def _head(table: Table, count: int) -> Table | None:
    return table.take(slice(count)) if count else None


def _make_part(
    k: int, table: Table, dropped: int, tail: Table | None, loss: Loss, row_penalty: float | None
) -> Part:
    own = table.take(slice(dropped, None)) if dropped else table
    own = own if tail is None else own.followed_by(tail)
    vectors = dict(own.vectors)
    if vectors["weights"] is not None:
        # That all are zero is an error only where it holds of all parts.
        vectors["weights"] = as_vector(vectors["weights"], own.matrix.shape[0], "weights", non_negative=True)
    if row_penalty is not None:
        vectors["row_penalty"] = row_penalty
    weights = vectors.pop("weights")
    with _partition(k):
        part = Part(own.matrix, loss=loss, **vectors)
    part.weights = None if weights is None else part.groups.sort(weights)
    part._cut()
    return part


def _summary(part: Part) -> Summary:
    labels = part.groups.labels
    ordered = bool((labels[1:] > labels[:-1]).all())
    sizes = np.diff(part.groups.starts, append=part.n_rows)
    return Summary(
        part.n_rows,
        part.n_unknowns,
        part.design.gram_cost,
        len(labels),
        int(sizes.max()),
        part.weights is None or bool(part.weights.any()),
        ordered,
        (labels[:1].tolist()[0], labels[-1:].tolist()[0]),
    )


def _shared_labels(parts: Sequence[Any], known: list[Summary]) -> set[Any]:
    """Return the labels of groups that are in several parts."""
    from dask import compute

    if all(s.ordered for s in known) and all(a.ends[1] <= b.ends[0] for a, b in pairwise(known)):
        return {a.ends[1] for a, b in pairwise(known) if a.ends[1] == b.ends[0]}
    seen: set[Any] = set()
    twice: set[Any] = set()
    for labels in compute(*[_later(_labels)(part) for part in parts]):
        twice |= seen & set(labels)
        seen |= set(labels)
    return twice


def _labels(part: Part) -> list[Any]:
    found: list[Any] = part.groups.labels.tolist()
    return found
