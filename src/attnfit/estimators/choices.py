"""The rows of a share model as the problem wants them: groups, repeated rows, and the outside goods, one row
of zeros a group that the user need not add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data import DenseDesign, Design, SparseDesign
from attnfit.data.groups import Groups, parse_groups
from attnfit.estimators import reading
from attnfit.estimators.reading import ROUNDING, ShareTotals

Array = NDArray[np.float64]
Rows = slice | NDArray[np.intp]


class ZeroRowsBelow(Design):
    """A dense design followed by rows of zeros, without a copy of the data."""

    def __init__(self, inner: Design, n_zero_rows: int) -> None:
        super().__init__((inner.shape[0] + n_zero_rows, inner.shape[1]))
        self._inner = inner

    @property
    def block_rows(self) -> int:
        """Number of rows of a block."""
        return self._inner.block_rows

    @property
    def gram_cost(self) -> float:
        """Time of a weighted Gram over that of a value and gradient, roughly."""
        return self._inner.gram_cost

    def product(self, block: Array, x: Array) -> Array:
        """Return ``block @ x``, shape (n_rows,)."""
        return self._inner.product(block, x)

    def combine(self, weights: Array, block: Array) -> Array:
        """Return ``weights @ block``, shape (k, d)."""
        return self._inner.combine(weights, block)

    @property
    def storage(self) -> str | None:
        """Name of the compiled loops that read the rows above."""
        return self._inner.storage

    def parts(self, rows: Rows) -> tuple[Any, int]:
        """Return what the compiled loops read these rows from, and where the first of them is."""
        n = int(self._inner.shape[0])
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            if stop <= n:
                return self._inner.parts(slice(start, stop))
            rows = np.arange(start, stop)
        outside = rows >= n
        # A copy, since these rows are not neighbours.
        block, first = self._inner.parts(np.where(outside, 0, rows))
        block[outside] = 0.0
        return block, first

    def column_sizes(self, n_rows: int | None = None) -> Array | None:
        """Return the largest size of an entry of each column; None where the rows are not in memory."""
        return None if self._inner.on_disk else self._inner.column_sizes(n_rows)

    def peek(self, rows: Rows) -> Array | None:
        """Return some rows; None where they are not in memory."""
        return None if self._inner.peek(slice(0, 0)) is None else self._fetch(rows)

    def scaled(self, factors: Array) -> ZeroRowsBelow:
        """Return the matrix with its columns multiplied."""
        return ZeroRowsBelow(self._inner.scaled(factors), int(self.shape[0] - self._inner.shape[0]))

    def take(self, rows: Rows) -> Design:
        """Return the matrix of some rows."""
        return DenseDesign(self._fetch(rows))

    def _fetch(self, rows: Rows) -> Array:
        n = int(self._inner.shape[0])
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            above = self._inner._fetch(slice(min(start, n), min(stop, n)))
            n_below = max(stop, n) - max(start, n)
            return np.vstack([above, np.zeros((n_below, self.shape[1]))]) if n_below else above
        outside = rows >= n
        block = self._inner._fetch(np.where(outside, 0, rows))
        if outside.any():
            block[outside] = 0.0
        return np.asarray(block)


def add_zero_rows(design: Design, n_zero_rows: int) -> Design:
    """Return the design with rows of zeros below it."""
    if not isinstance(design, SparseDesign):
        return ZeroRowsBelow(design, n_zero_rows)
    matrix = design.matrix
    ends = np.full(n_zero_rows, matrix.indptr[-1], dtype=matrix.indptr.dtype)
    shape = (matrix.shape[0] + n_zero_rows, matrix.shape[1])
    indptr = np.concatenate([matrix.indptr, ends])
    return SparseDesign(sparse.csr_array((matrix.data, matrix.indices, indptr), shape=shape))


def outside_shares(shares: Array, groups: Groups, numbers: NDArray[np.intp]) -> Array:
    """Return ``1 - sum of shares`` of each group, shape (n_groups,).

    Raises
    ------
    ValueError
        Naming the group, if its shares sum to more than one.
    """
    rest = 1.0 - np.bincount(numbers, weights=shares, minlength=len(groups))
    bad = np.flatnonzero(rest < -ROUNDING)
    if len(bad):
        g = int(bad[0])
        raise ValueError(
            f"y sums to {1.0 - rest[g]:.6g} in group {groups.labels[g]}: with outside_good=True the shares "
            "of a group may sum to at most 1; divide them by the market's size, or set outside_good=False"
        )
    return np.asarray(np.maximum(rest, 0.0))


@dataclass(frozen=True)
class Choices:
    """Checked training rows; the outside goods, if any, are rows of zeros at the end of the design.

    Attributes
    ----------
    design : Design
        The rows of X that count, then one row of zeros a group if there is an outside good.
    y : ndarray, shape (n,)
        Target without the outside goods.
    outside : ndarray, shape (n_groups,) or (0,)
        Target of the outside goods.
    groups : ndarray of int or None
        Number of each row's group, outside goods included; None for one group in order.
    n_groups : int
    totals : ShareTotals
        What the targets of each group sum to, outside goods included.
    weights, outside_weights : ndarray or None
        Weights of the loss, shape (n,), and of the outside goods, shape (n_groups,), where the user gave
        groups.
    counts : ndarray or None
        How often each row is repeated, shape (n,), where the user gave weights but no groups.
    kept : ndarray of bool or None
        The rows of X with a positive count, where some have none.
    """

    design: Design
    y: Array
    outside: Array
    groups: NDArray[np.intp] | None
    n_groups: int
    totals: ShareTotals
    weights: Array | None
    outside_weights: Array
    counts: Array | None
    kept: NDArray[np.bool_] | None
    offset: Array | None

    @property
    def target(self) -> Array:
        """Target of every row of the design: a repeated row gets the sum over its copies."""
        y = self.y if self.counts is None else self.counts * self.y
        return np.concatenate([y, self.outside])

    @property
    def logit_offset(self) -> Array | None:
        """Offset of every row of the design: w copies of a row add ``log w`` to its logit."""
        offset = self.offset
        if self.counts is not None:
            offset = np.log(self.counts) + (0.0 if offset is None else offset)
        return None if offset is None else np.concatenate([offset, np.zeros(len(self.outside))])

    @property
    def loss_weights(self) -> Array | None:
        """Weights of the loss of every row of the design."""
        return None if self.weights is None else np.concatenate([self.weights, self.outside_weights])

    @property
    def squared_weights(self) -> Array | None:
        """Weights of a quadratic loss: w copies with output f have ``w (f - y)^2 = (wf - wy)^2 / w``."""
        if self.counts is None:
            return self.loss_weights
        return np.concatenate([1.0 / self.counts, np.ones(len(self.outside))])

    def with_outside(self, per_row: Array) -> Array:
        """Append zeros for the outside goods; a scalar stays one."""
        return per_row if per_row.ndim == 0 else np.concatenate([per_row, np.zeros(len(self.outside))])


def read_choices(model: Any, design: Design, y: Any, groups: Any, sample_weight: Any, offset: Any) -> Choices:
    """Check and convert the arguments of ``fit``."""
    n = int(design.shape[0])
    target = reading.read_target(model, y, n)
    sets = parse_groups(groups, n)
    shift = reading.read_offset(offset, n)
    weights = reading.read_weights(sample_weight, n, None if groups is None else sets)
    counts: Array | None = None
    kept: NDArray[np.bool_] | None = None
    if groups is None and weights is not None:
        counts, weights = weights, None
        if not counts.all():
            kept = counts > 0.0
            design, target, counts = reading.take_rows(design, kept), target[kept], counts[kept]
            shift, n = None if shift is None else shift[kept], len(target)
            sets = parse_groups(None, n)
    numbers = reading.group_numbers(sets, n)
    mass = target if counts is None else counts * target
    outside = outside_weights = np.zeros(0)
    ids = None if len(sets) == 1 else numbers
    if model.outside_good:
        outside = outside_shares(mass, sets, numbers)
        design = add_zero_rows(design, len(sets))
        if weights is not None:
            outside_weights = np.bincount(numbers, weights=weights) / np.bincount(numbers)
        if ids is not None:
            ids = np.concatenate([numbers, np.arange(len(sets))])
    totals = np.bincount(numbers, weights=mass, minlength=len(sets)) + (outside if len(outside) else 0.0)
    # With an outside good there are two rows at least.
    sizes = () if len(outside) or len(sets) == 1 else np.bincount(numbers)
    found = ShareTotals.of(totals, sets.labels, sizes)
    return Choices(
        design, target, outside, ids, len(sets), found, weights, outside_weights, counts, kept, shift
    )
