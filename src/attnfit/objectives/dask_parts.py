"""From Dask's arrays and data frames to parts: what belongs to a row is together, and most groups are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from attnfit.data import SparseDesign
from attnfit.data.inputs import as_design, as_vector, is_dask, negative_target, parse_groups, partitions
from attnfit.data.store import read_table
from attnfit.losses.loss import Loss
from attnfit.losses.softmax import LOSSES
from attnfit.objectives.convexity import surrogate_targets
from attnfit.objectives.part import Part, target_sums
from attnfit.segments import Array, Index, Segments

# The end of a group with more rows than this is not moved to another partition.
MOVED_ROWS = 10_000


@dataclass(frozen=True)
class Partition:
    """Rows and what belongs to each of them; vectors that are not given are None."""

    matrix: Any
    vectors: dict[str, Any]

    def __sizeof__(self) -> int:
        # What Dask is told of the cost of moving it.
        return _size(self.matrix) + sum(_size(v) for v in self.vectors.values())

    def take(self, rows: slice) -> Partition:
        """Return some of the rows."""
        return Partition(
            self.matrix[rows], {k: None if v is None else v[rows] for k, v in self.vectors.items()}
        )

    def followed_by(self, other: Partition) -> Partition:
        """Return the rows of both."""
        stack = partial(sparse.vstack, format="csr") if sparse.issparse(self.matrix) else np.concatenate
        vectors = {
            k: None if v is None else np.concatenate([v, other.vectors[k]]) for k, v in self.vectors.items()
        }
        return Partition(stack([self.matrix, other.matrix]), vectors)


class Shared(NamedTuple):
    """What a part knows of the long groups of all parts.

    Attributes
    ----------
    numbers : dict of int
        The number of each long group of all parts, by its label.
    constants : ndarray, shape (n_long,)
        The loss's constants of all long groups.
    first_label, first_long : int
        Labels in samples: those of its first group and of the first long group of all.
    """

    numbers: dict[Any, int]
    constants: Array
    first_label: int
    first_long: int


class DaskPart(Part):
    """The rows of one partition."""

    shared: Shared | None = None

    def __sizeof__(self) -> int:
        # What Dask is told of the cost of moving it: a part that seems small is taken to idle workers.
        stored = self.design.matrix if isinstance(self.design, SparseDesign) else self.design.array
        return sum(map(_size, (stored, self.b, self.weights, self.offset, self.penalty, self.groups.starts)))

    def among(self, shared: Shared) -> DaskPart:
        """Return the part cut into chunks anew, now that the long groups of all parts are known."""
        part = copy(self)
        labels = part.groups.labels.tolist() if part.loss.coupled else []
        own = [g for g, label in enumerate(labels) if label in shared.numbers]
        part.recut(np.array(own, dtype=np.intp))
        part.shared = shared
        found = part.groups.labels[part.long_groups].tolist()
        numbers = np.array([shared.numbers[label] for label in found], dtype=np.intp)
        part.long_numbers, part.n_long = numbers, len(shared.constants)
        part.chunks = [c if c.long < 0 else replace(c, long=int(numbers[c.long])) for c in part.chunks]
        part.constants[part.long_groups] = shared.constants[numbers]
        return part

    def sums_of(self, shared: set[Any]) -> dict[Any, Array]:
        """Return constant and masses of groups that are long here or shared with other parts, by label."""
        labels = self.groups.labels.tolist() if self.loss.coupled else []
        long, ends = set(self.long_groups.tolist()), np.append(self.groups.starts, self.n_rows)
        return {
            label: np.append(self.constants[g], target_sums(self, int(ends[g]), int(ends[g + 1])))
            for g, label in enumerate(labels)
            if g in long or label in shared
        }

    def surrogate(self, totals: dict[int, Array]) -> DaskPart:
        """Return the part of the convex surrogate; ``totals`` as from `_group_totals`."""
        segments = Segments(self.groups.starts, self.n_rows)
        sizes = np.repeat(segments.sizes, segments.sizes)
        numbers = dict(zip(self.long_groups.tolist(), self.long_numbers.tolist(), strict=True))
        of_group = {
            g: slice(s, s + segments.sizes[g]) for g, s in enumerate(self.groups.starts) if g in numbers
        }
        for g, rows in of_group.items():
            sizes[rows] = totals[numbers[g]][0]
        found = surrogate_targets(self.loss, self.b, self.weights, segments, sizes)
        if found is None:
            # Only where no target here is positive.
            own = None if self.weights is None else np.array(self.weights)
            found = LOSSES["cross_entropy"], np.zeros(self.n_rows), own
        loss, b, w = found
        if w is not None and loss.coupled:
            for g, rows in of_group.items():
                _, mass, weighted = totals[numbers[g]]
                w[rows] = weighted / mass if mass > 0 else 0.0
        return self.with_loss(loss, b, w)

    @property
    def group_labels(self) -> Index:
        assert self.shared is not None
        labels = self.shared.first_label + np.arange(len(self.groups))
        labels[self.long_groups] = self.shared.first_long + self.long_numbers
        return labels


def _size(values: Any) -> int:
    if sparse.issparse(values):
        return int(values.data.nbytes + values.indices.nbytes + values.indptr.nbytes)
    return int(getattr(values, "nbytes", 0))


def later(function: Callable[..., Any]) -> Any:
    """Return a function that makes a task of each call."""
    from dask import delayed

    return delayed(function, pure=False)


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


def tables_of(A: Any, vectors: dict[str, Any], loss: Loss) -> list[Any]:
    """Return one task a partition that brings its rows together."""
    if hasattr(A, "npartitions") and not hasattr(A, "chunks"):
        blocks = partitions(A)
    else:
        if A.ndim != 2:
            raise ValueError(f"A must have two dimensions (rows, features), not shape {A.shape}")
        A = A if A.numblocks[1] == 1 else A.rechunk({1: -1})
        blocks = partitions(A)
    if any(v is not None and not is_dask(v) for v in vectors.values()):
        vectors = _spread(vectors, blocks)
    columns = {name: _column(values, name, A, blocks) for name, values in vectors.items()}
    return [
        later(_table)(
            k, block, {name: column[k] for name, column in columns.items()}, loss.nonnegative_target
        )
        for k, block in enumerate(blocks)
    ]


def _spread(vectors: dict[str, Any], blocks: list[Any]) -> dict[str, Any]:
    """Return the vectors, those that are here cut at the partitions: one value a row, groups as labels."""
    from dask import compute

    bounds = np.cumsum([0, *compute(*[later(_n_rows)(block) for block in blocks])])
    n, groups, weights = int(bounds[-1]), vectors["groups"], vectors["weights"]
    found = dict(vectors)
    if groups is not None and not is_dask(groups):
        # Offsets become labels, and weights of groups those of their rows.
        sets = parse_groups(groups, n)
        sizes = np.diff(sets.starts, append=n)
        if weights is not None and np.shape(weights) == (len(sets),) != (n,):
            found["weights"] = sets.unsort(np.repeat(np.asarray(weights), sizes))
        found["groups"] = sets.unsort(np.repeat(np.arange(len(sets)), sizes))
    for name, values in found.items():
        if values is None or is_dask(values):
            continue
        array = np.asarray(values).reshape(-1)
        if len(array) != n:
            raise ValueError(
                f"{name} has shape {np.shape(values)} but A has {n} rows; pass one value a row, shape ({n},)"
            )
        found[name] = [array[first:last] for first, last in pairwise(bounds)]
    return found


def _column(values: Any, name: str, A: Any, blocks: list[Any]) -> list[Any]:
    """Return the piece of a vector that belongs to each block of rows."""
    if values is None:
        return [None] * len(blocks)
    if isinstance(values, list):
        return values
    if hasattr(values, "rechunk") and hasattr(A, "chunks") and values.chunks[0] != A.chunks[0]:
        if values.shape[0] != A.shape[0] and not np.isnan([values.shape[0], A.shape[0]]).any():
            raise ValueError(
                f"{name} has shape {values.shape} but A has {A.shape[0]} rows; pass one value a row, shape "
                f"({A.shape[0]},)"
            )
        values = values.rechunk({0: A.chunks[0]})
    pieces = partitions(values)
    if len(pieces) != len(blocks):
        raise ValueError(
            f"{name} has {len(pieces)} partitions but A has {len(blocks)}; repartition them alike"
        )
    return pieces


def _n_rows(block: Any) -> int:
    return int(block.shape[0])


def _table(k: int, block: Any, vectors: dict[str, Any], shares: str) -> Partition | None:
    """Bring the rows of one partition together, checked; None if it has none."""
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
        if arrays["groups"] is not None:
            parse_groups(arrays["groups"], n)
        for name in ("b", "weights", "offset", "row_penalty"):
            if arrays[name] is not None:
                # That all weights are zero is an error only where it holds of all parts.
                arrays[name] = as_vector(arrays[name], n, name, non_negative=name == "weights")
        b = arrays["b"]
        if shares and b is not None and (b < 0).any():
            raise negative_target(int(np.argmax(b < 0)), shares)
    return Partition(matrix, arrays)


@contextmanager
def _partition(k: int) -> Iterator[None]:
    """Say in which partition an error is: rows are numbered within it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"partition {k}: {error}") from error


def ends_of(table: Partition | None) -> tuple[int, int, Any, Any] | None:
    """Return the number of rows, of those of the first group, and the first and last label."""
    if table is None:
        return None
    labels, n = table.vectors["groups"], table.matrix.shape[0]
    if labels is None:
        return n, n, 0, 0
    other = np.flatnonzero(labels != labels[0])
    return n, int(other[0]) if len(other) else n, labels[:1].tolist()[0], labels[-1:].tolist()[0]


def moves_between(ends: list[tuple[int, int, Any, Any]]) -> list[int]:
    """Return how many of the first rows of each part belong to a group that begins in the part before, and
    ends here.
    """
    moved = [0]
    for (_, _, _, last), (n, first_size, first, _) in pairwise(ends):
        moved.append(first_size if first == last and first_size < min(n, MOVED_ROWS) else 0)
    return moved


def head_of(table: Partition, count: int) -> Partition | None:
    """Return the rows that move to the part before."""
    return table.take(slice(count)) if count else None


def make_part(
    table: Partition, dropped: int, tail: Partition | None, loss: Loss, row_penalty: float | None
) -> DaskPart:
    """Return the part without its first rows, and with those of the part after."""
    own = table.take(slice(dropped, None)) if dropped else table
    own = own if tail is None else own.followed_by(tail)
    vectors = dict(own.vectors)
    if row_penalty is not None:
        vectors["row_penalty"] = row_penalty
    # That all weights are zero is an error only where it holds of all parts.
    weights = vectors.pop("weights")
    rows = read_table(own.matrix, weights=None, **vectors)
    return DaskPart(loss, rows._replace(weights=None if weights is None else rows.groups.sort(weights)))


def summary_of(part: DaskPart) -> Summary:
    """Return what the scheduler's side should know."""
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


def shared_labels(parts: Sequence[Any], known: list[Summary]) -> set[Any]:
    """Return the labels of groups that are in several parts."""
    from dask import compute

    if all(s.ordered for s in known) and all(a.ends[1] <= b.ends[0] for a, b in pairwise(known)):
        return {a.ends[1] for a, b in pairwise(known) if a.ends[1] == b.ends[0]}
    seen: set[Any] = set()
    twice: set[Any] = set()
    for labels in compute(*[later(_labels)(part) for part in parts]):
        twice |= seen & set(labels)
        seen |= set(labels)
    return twice


def _labels(part: DaskPart) -> list[Any]:
    found: list[Any] = part.groups.labels.tolist()
    return found
