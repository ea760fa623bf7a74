"""Proper scores of shares: the log loss and the Brier score of a choice or a market."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_vector, parse_groups

__all__ = ["brier", "log_loss"]

Array = NDArray[np.float64]


def log_loss(
    y: Any, shares: Any, groups: Any = None, sample_weight: Any = None, *, outside_good: bool = False
) -> float:
    """Return ``-sum w y log f / sum w y``.

    Parameters
    ----------
    y, shares : array_like, shape (n,)
        Choices or shares, and what a model says of them.
    groups : array_like, optional
        Labels of rows or offsets of groups; one group by default.
    sample_weight : array_like, shape (n,) or (n_groups,), optional
    outside_good : bool
        Count the outside good of each group: what its shares leave of one.

    Returns
    -------
    float
        Zero times the logarithm of zero is zero; infinite, with a warning that names the row, where a share
        of zero was chosen.

    Examples
    --------
    >>> from attnfit import metrics
    >>> round(metrics.log_loss([1, 0], [0.5, 0.5]), 6)
    0.693147
    """
    target, f, w, _, _ = _rows(y, shares, groups, sample_weight, outside_good)
    wrong = (f <= 0.0) & (w * target > 0.0)
    if wrong.any():
        warnings.warn(
            f"row {int(np.argmax(wrong))} has a share of zero and was chosen: the log loss is infinite",
            UserWarning,
            stacklevel=2,
        )
        return float("inf")
    total = float(np.sum(w * target))
    if total <= 0.0:
        raise ValueError("y sums to zero: nothing was chosen, and there is no log loss")
    return -float(np.sum(w * target * np.log(np.where(target > 0.0, f, 1.0)))) / total


def brier(
    y: Any, shares: Any, groups: Any = None, sample_weight: Any = None, *, outside_good: bool = False
) -> float:
    """Return ``sum_g w_g sum_i (f - y)^2 / sum_g w_g``, w_g the mean weight of a group; parameters as in
    `log_loss`.

    Examples
    --------
    >>> from attnfit import metrics
    >>> metrics.brier([1, 0, 0, 1], [0.5, 0.5, 0.0, 1.0], groups=[0, 0, 1, 1])
    0.25
    """
    target, f, w, numbers, n_groups = _rows(y, shares, groups, sample_weight, outside_good)
    of_group = np.bincount(numbers, weights=(f - target) ** 2, minlength=n_groups)
    weight = np.bincount(numbers, weights=w, minlength=n_groups) / np.bincount(numbers, minlength=n_groups)
    return float(np.sum(weight * of_group) / np.sum(weight))


def _rows(
    y: Any, shares: Any, groups: Any, sample_weight: Any, outside_good: bool
) -> tuple[Array, Array, Array, NDArray[np.intp], int]:
    from attnfit.estimators.reading import group_numbers, read_weights

    f = np.asarray(shares, dtype=np.float64)
    n = len(f)
    target = as_vector(y, n, "y")
    sets = parse_groups(groups, n)
    weights = read_weights(sample_weight, n, None if groups is None else sets)
    w = np.ones(n) if weights is None else weights
    numbers = group_numbers(sets, n)
    if not outside_good:
        return target, f, w, numbers, len(sets)
    own, theirs = (np.maximum(1.0 - np.bincount(numbers, weights=v), 0.0) for v in (target, f))
    mean = np.bincount(numbers, weights=w) / np.bincount(numbers)
    joined = (np.concatenate(pair) for pair in ((target, own), (f, theirs), (w, mean)))
    return (*joined, np.concatenate([numbers, np.arange(len(sets))]), len(sets))  # type: ignore[return-value]
