"""What tells many fits of one problem apart: weights of units, folds, penalties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from attnfit.data.inputs import unlabelled
from attnfit.objectives.rows import RowProblem
from attnfit.segments import Array, Index


@dataclass(frozen=True)
class Fits:
    """What tells the fits apart: weights (n_units, R) of the units, and a ridge for each; ``units`` numbers
    those of the groups, or of the rows in group order.
    """

    weights: Array
    ridge: Array
    units: Index

    @classmethod
    def read(cls, problem: RowProblem, weights: Any, ridge: Any, folds: Any, units: Any) -> Fits:
        """Check the arguments."""
        if weights is None and ridge is None and folds is None:
            raise ValueError("pass weights, ridge or folds: what tells the fits apart")
        if folds is not None and (weights is not None or units is not None):
            raise ValueError("folds are weights of zero and one; pass folds, or weights and units")
        if units is not None and weights is None:
            raise ValueError("units say what weights belong to; pass weights of shape (n_units, R)")
        penalties = None if ridge is None else _penalties(ridge)
        labels, name = (folds, "folds") if folds is not None else (units, "units")
        numbers, n_units = _units(problem, labels, name)
        if folds is not None:
            W = 1.0 - np.eye(n_units)
            if penalties is not None:
                W, penalties = np.repeat(W, len(penalties), axis=1), np.tile(penalties, n_units)
        elif weights is None:
            assert penalties is not None
            W = np.ones((n_units, len(penalties)))
        else:
            W = _weights(weights, n_units, "unit" if units is not None else "group or row")
        if penalties is None:
            penalties = np.full(W.shape[1], float(np.max(problem.ridge)))
        if len(penalties) != W.shape[1]:
            raise ValueError(
                f"ridge has {len(penalties)} entries for {W.shape[1]} columns of weights; pass one for each"
            )
        empty = np.flatnonzero(W.sum(axis=0) == 0.0)
        if len(empty):
            raise ValueError(f"column {empty[0]} of weights is zero: nothing is left to fit")
        return cls(W, penalties, numbers)

    def of_rows(self, problem: RowProblem, w: Array) -> Array:
        """Return weights of units as weights of rows, in group order."""
        own = w[self.units]
        rows: Any = problem.rows
        return np.repeat(own, rows.group_sizes()) if rows.loss.coupled else own


def _penalties(ridge: Any) -> Array:
    values = np.atleast_1d(np.asarray(ridge, dtype=np.float64))
    if values.ndim != 1 or not len(values):
        raise ValueError(f"ridge must be a number for each fit, not of shape {values.shape}")
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0.0)))
    if len(wrong):
        raise ValueError(f"ridge must be finite and >= 0, not {values[wrong[0]]} at index {wrong[0]}")
    return values


def _weights(weights: Any, n_units: int, unit: str) -> Array:
    W = np.asarray(weights, dtype=np.float64)
    if W.ndim != 2 or len(W) != n_units:
        raise ValueError(f"weights must have shape ({n_units}, R), one row a {unit}, not {W.shape}")
    wrong = np.argwhere(~(np.isfinite(W) & (W >= 0.0)))
    if len(wrong):
        i, r = wrong[0]
        raise ValueError(f"weights must be finite and >= 0, not {W[i, r]} at row {i}, column {r}")
    return W


def _units(problem: RowProblem, labels: Any, name: str) -> tuple[Index, int]:
    """Return the number of the unit of each group, or of each row in group order, and how many there are."""
    rows: Any = problem.rows
    coupled = rows.loss.coupled
    if labels is None:
        n = len(rows.groups) if coupled else rows.n_rows
        return np.arange(n), n
    labels = np.asarray(labels)
    if labels.shape != (rows.n_rows,):
        raise ValueError(f"{name} must have one label a row, shape ({rows.n_rows},), not {labels.shape}")
    missing = unlabelled(labels)
    if missing:
        raise ValueError(f"{name} has no label at index {missing[0]}; give every row one")
    found, numbers = np.unique(labels, return_inverse=True)
    numbers = np.asarray(rows.groups.sort(numbers))
    if name == "folds" and len(found) < 2:
        raise ValueError("folds has one label only: nothing would be left to fit")
    if not coupled:
        return numbers, len(found)
    starts = rows.groups.starts
    first = numbers[starts]
    split = np.flatnonzero(np.maximum.reduceat(numbers != np.repeat(first, rows.group_sizes()), starts))
    if len(split):
        raise ValueError(
            f"{name} splits group {rows.groups.labels[split[0]]}, whose rows share one normaliser; give "
            "all of them one label"
        )
    return first, len(found)
