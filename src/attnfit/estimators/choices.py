"""The rows of a share model as the problem wants them: groups, repeated rows, outside goods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data import Design
from attnfit.data.groups import parse_groups
from attnfit.estimators import reading
from attnfit.estimators.outside import add_zero_rows, outside_shares
from attnfit.estimators.totals import ShareTotals

Array = NDArray[np.float64]


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
