"""The rows of one partition, and what is known there of the groups of all."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from attnfit.designs import SparseDesign
from attnfit.losses.segments import Array, Index, Segments
from attnfit.losses.softmax import LOSSES
from attnfit.problems.rows.masses import target_sums
from attnfit.problems.rows.neighbour import neighbouring_targets
from attnfit.problems.rows.stored import StoredProblem


@dataclass(frozen=True)
class Table:
    """Rows and what belongs to each of them; vectors that are not given are None."""

    matrix: Any
    vectors: dict[str, Any]

    def __sizeof__(self) -> int:
        # What Dask is told of the cost of moving it.
        return _size(self.matrix) + sum(_size(v) for v in self.vectors.values())

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


class Part(StoredProblem):
    """The rows of one partition."""

    shared: Shared | None = None

    def __sizeof__(self) -> int:
        # What Dask is told of the cost of moving it: a part that seems small is taken to idle workers.
        stored = self.design.matrix if isinstance(self.design, SparseDesign) else self.design.array
        return sum(map(_size, (stored, self.b, self.weights, self.offset, self.penalty, self.groups.starts)))

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

    def sums_of(self, shared: set[Any]) -> dict[Any, Array]:
        """Return constant and masses of groups that are long here or shared with other parts, by label."""
        labels = self.groups.labels.tolist() if self.loss.coupled else []
        long, ends = set(self.long_groups.tolist()), np.append(self.groups.starts, self.n_rows)
        return {
            label: np.append(self.constants[g], target_sums(self, int(ends[g]), int(ends[g + 1])))
            for g, label in enumerate(labels)
            if g in long or label in shared
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
            own = None if self.weights is None else np.array(self.weights)
            found = LOSSES["cross_entropy"], np.zeros(self.n_rows), own
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


def _size(values: Any) -> int:
    if sparse.issparse(values):
        return int(values.data.nbytes + values.indices.nbytes + values.indptr.nbytes)
    return int(getattr(values, "nbytes", 0))
