"""Training data that are not in memory: columns on disk, or the partitions of a Dask collection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data import Column
from attnfit.data.inputs import is_dask
from attnfit.data.sources import Source
from attnfit.estimators.totals import ShareTotals
from attnfit.objectives.dask_parts import later
from attnfit.segments import Segments

Array = NDArray[np.float64]

# Rows whose targets are added up at a time.
PIECE = 1 << 20


@dataclass(frozen=True)
class Rows:
    """The arguments of ``fit`` as the problem takes them, without a copy of any; it has the attributes of
    `attnfit.estimators.choices.Choices` that a problem is made from.

    Attributes
    ----------
    y, weights : ndarray or None
        Target and weights where they are in memory, an empty array and None elsewhere.
    """

    design: Any
    target: Any
    groups: Any
    loss_weights: Any
    logit_offset: Any
    y: Array
    weights: Array | None = None
    counts: None = None
    kept: None = None

    @property
    def squared_weights(self) -> Any:
        """Weights of a quadratic loss."""
        return self.loss_weights


def is_elsewhere(X: Any, y: Any) -> bool:
    """Whether a fit should leave the data where they are."""
    return is_dask(X) or is_dask(y) or isinstance(y, Source | Column)


def read_elsewhere(
    estimator: Any, X: Any, y: Any, groups: Any, weights: Any, offset: Any, *, grouped: bool
) -> Rows:
    """Return the arguments of ``fit``; refuse what needs all rows at once.

    Raises
    ------
    ValueError
        For an outside good, penalties of single rows, or weights that repeat rows.
    """
    if getattr(estimator, "outside_good", False):
        raise ValueError(
            "outside_good=True needs the whole table in memory; add a row of zeros to each group of the "
            "data, or pass arrays"
        )
    if np.ndim(estimator.row_penalty) or is_dask(estimator.row_penalty):
        raise ValueError("a row_penalty of each row needs the data in memory; pass one number, or arrays")
    if grouped and weights is not None and groups is None:
        raise ValueError(
            "sample_weight repeats rows where there are no groups, which needs the whole table in memory; "
            "pass groups, or arrays"
        )
    names = getattr(X, "columns", None)
    if names is not None:
        estimator.feature_names_in_ = np.array([str(name) for name in names], dtype=object)
    elif hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_
    return Rows(X, y, groups, weights, offset, np.zeros(0))


def totals_elsewhere(problem: Any, y: Any, groups: Any) -> ShareTotals:
    """Return what the targets of each group sum to."""
    if is_dask(y):
        return _totals_of_parts(y, groups)
    starts = problem.groups.starts
    totals = np.zeros(len(starts))
    for first in range(0, problem.n_rows, PIECE):
        rows = np.arange(first, min(first + PIECE, problem.n_rows))
        numbers = np.searchsorted(starts, rows, side="right") - 1
        sums = np.bincount(numbers - numbers[0], weights=problem.b[rows[0] : rows[-1] + 1])
        totals[numbers[0] : numbers[0] + len(sums)] += sums
    sizes = np.diff(starts, append=problem.n_rows)
    return ShareTotals.of(totals, problem.groups.labels, sizes if len(sizes) > 1 else ())


def _totals_of_parts(y: Any, groups: Any) -> ShareTotals:
    from dask import compute

    pieces = _pieces(y)
    if groups is None or is_dask(groups):
        labels = [None] * len(pieces) if groups is None else _pieces(groups)
    else:
        sizes = compute(*[later(len)(piece) for piece in pieces])
        labels = np.split(np.asarray(groups), np.cumsum(sizes)[:-1])
    found = compute(*[later(_sums)(*pair) for pair in zip(pieces, labels, strict=True)])
    totals: dict[Any, Array] = {}
    for part in found:
        for label, sums in part.items():
            totals[label] = totals.get(label, 0.0) + sums
    summed, sizes = np.array(list(totals.values())).T
    return ShareTotals.of(summed, list(totals), sizes if len(sizes) > 1 else ())


def _pieces(values: Any) -> list[Any]:
    delayed = values.to_delayed()
    return list(delayed.ravel()) if hasattr(delayed, "ravel") else list(delayed)


def _sums(y: Any, groups: Any) -> dict[Any, Array]:
    """Return the sum of the targets and the number of rows of each group of a part."""
    target = np.asarray(y, dtype=np.float64)
    if groups is None:
        return {0: np.array([target.sum(), len(target)])}
    labels, numbers = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.column_stack([np.bincount(numbers, weights=target), np.bincount(numbers)])
    return dict(zip(labels.tolist(), sums, strict=True))


def normaliser_elsewhere(problem: Any, x: Array) -> float:
    """Return the normaliser of the only group."""
    at = problem.evaluate(x)
    if problem.rows.n_long:
        return float(at.state[0, 0])
    (chunk,) = problem.rows.chunks
    segments: Segments = chunk.segments
    return float(problem.loss.reference(problem.rows.logits(chunk, x)[1], segments)[0])
