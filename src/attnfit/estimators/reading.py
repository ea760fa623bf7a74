"""What ``fit`` and ``predict`` are given, checked: in memory, on disk, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import column_or_1d, validate_data

from attnfit.data import DenseDesign, Design, SparseDesign
from attnfit.data.inputs import as_design, as_vector, is_dask, partitions, require_finite_rows
from attnfit.data.on_disk import stored_source
from attnfit.objectives.dask_parts import later
from attnfit.segments import Groups, Segments

# Groups that are named.
EXAMPLES = 3


# Shares that were rounded or added up in single precision miss one by about this much.
ROUNDING = 1e-6
# Rows whose targets are added up at a time.
PIECE = 1 << 20
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ShareTotals:
    """Groups whose targets do not sum to one; more than one means something else than less.

    Attributes
    ----------
    n_above, n_below : int
    above, below : tuple of (label, float)
        Up to three groups of each kind and their totals, the farthest from one first.
    n_single : int
        Groups of one row, whose share is one whatever the features.
    """

    n_above: int
    n_below: int
    above: tuple[tuple[Any, float], ...]
    below: tuple[tuple[Any, float], ...]
    n_single: int = 0

    @classmethod
    def of(
        cls, totals: NDArray[np.floating[Any]], labels: Sequence[Any] | NDArray[Any], sizes: Any = ()
    ) -> ShareTotals:
        """Tell the groups apart.

        Examples
        --------
        >>> import numpy as np
        >>> ShareTotals.of(np.array([1.0, 1.5, 0.25]), ["a", "b", "c"])
        ShareTotals(n_above=1, n_below=1, above=(('b', 1.5),), below=(('c', 0.25),), n_single=0)
        """
        order = np.argsort(-np.abs(totals - 1.0), kind="stable")
        above = order[totals[order] > 1.0 + ROUNDING]
        below = order[totals[order] < 1.0 - ROUNDING]
        named: list[tuple[tuple[Any, float], ...]] = []
        for groups in (above, below):
            shown: list[tuple[Any, float]] = []
            for g in groups[:EXAMPLES]:
                shown.append((labels[int(g)], float(totals[g])))
            named.append(tuple(shown))
        single = int(np.count_nonzero(np.asarray(sizes) == 1))
        return cls(len(above), len(below), named[0], named[1], single)

    @property
    def n_unbalanced(self) -> int:
        """How many there are."""
        return self.n_above + self.n_below


@dataclass(frozen=True)
class Rows:
    """The checked arguments of ``fit`` as the problem takes them; outside goods, if any, are rows of zeros at
    the end of the design.

    Attributes
    ----------
    design : Design
        The rows of X that count, then one row of zeros a group if there is an outside good.
    target : ndarray
        Of every row of the design: a repeated row gets the sum over its copies.
    groups : ndarray of int or None
        Number of each row's group, outside goods included; None for one group in order.
    loss_weights, squared_weights : ndarray or None
        Weights of every row of the design in the loss, and in a quadratic one: w copies with output f have
        ``w (f - y)^2 = (wf - wy)^2 / w``.
    logit_offset : ndarray or None
        Of every row of the design: w copies of a row add ``log w`` to its logit.
    row_penalty : ndarray
        A number, or one of every row of the design. Its square enters the objective: of rows that count w
        times it is multiplied by ``sqrt(w)``.
    y : ndarray, shape (n,)
        Target without the outside goods, where it is in memory; else an empty array.
    weights : ndarray or None
        Weights of the loss, shape (n,), where the user gave groups or the loss has none.
    counts : ndarray or None
        How often each row is repeated, shape (n,), where the user gave weights but no groups.
    kept : ndarray of bool or None
        The rows of X with a positive count, where some have none.
    outside, outside_weights : ndarray
        Targets and weights of the outside goods, shape (n_groups,) or (0,).
    n_groups : int
    totals : ShareTotals or None
        What the targets of each group sum to, outside goods included; of shares in memory.
    """

    design: Any
    target: Any
    groups: Any
    loss_weights: Any
    squared_weights: Any
    logit_offset: Any
    row_penalty: Any
    y: Array
    weights: Array | None = None
    counts: Array | None = None
    kept: NDArray[np.bool_] | None = None
    outside: Array = field(default_factory=partial(np.zeros, 0))
    outside_weights: Array = field(default_factory=partial(np.zeros, 0))
    n_groups: int = 0
    totals: ShareTotals | None = None


def read_features(estimator: Any, X: Any, *, reset: bool) -> Design:
    """Return X as a design; set (``reset``) or compare the estimator's feature names and their number.

    Raises
    ------
    ValueError
        If X is not a finite numeric matrix, or does not fit the training data.
    """
    # Frames keep their column names for the message, what is on disk is not read before the fit.
    in_memory = type(X) is np.ndarray
    try:
        if not in_memory and (nw.dependencies.is_into_dataframe(X) or stored_source(X, "X") is not None):
            design = as_design(X, "X")
            validate_data(estimator, X, reset=reset, skip_check_array=True)
            return design
        checked = validate_data(
            estimator, X, reset=reset, accept_sparse="csr", dtype="numeric", ensure_all_finite=False
        )
        return as_design(checked, "X")
    except ValueError as error:
        raise _spelled(error) from None


def read_groups(X: Any, groups: Any, argument: str = "groups") -> tuple[Any, Any]:
    """Return X and the groups, or other labels; a name is that of a column of X, which is then no feature.

    Raises
    ------
    ValueError
        If X has no such column.
    """
    if not isinstance(groups, str):
        return X, groups
    labels, others = column_of(X, groups, argument)
    return others, labels


def column_of(X: Any, name: str, argument: str = "groups") -> tuple[Any, Any]:
    """Return a column of a data frame, and the frame without it."""
    columns = getattr(X, "columns", None)
    if columns is None:
        raise ValueError(
            f"{argument}={name!r} names a column, but X is no data frame; pass one label a row, or a data "
            "frame"
        )
    if name not in list(columns):
        shown = ", ".join(map(str, list(columns)[:12]))
        raise ValueError(f"{argument}={name!r} is no column of X; its columns are {shown}")
    if is_dask(X):
        return X[name], X.drop(columns=[name])
    frame = nw.from_native(X, eager_only=True)
    return frame[name].to_numpy(), frame.drop(name).to_native()


def read_target(estimator: Any, y: Any, n: int) -> Array:
    """Return y as float64, shape (n,)."""
    if y is None:
        raise ValueError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None; "
            "pass one value a row"
        )
    array = column_or_1d(y, warn=True)
    if array.dtype.kind == "O":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"y is not numeric: {error}; convert it to real numbers") from None
    return as_vector(array, n, "y")


def read_weights(sample_weight: Any, n: int, groups: Groups | None) -> Array | None:
    """Return row weights of shape (n,); one weight a group is spread over its rows, None stays None."""
    if sample_weight is None:
        return None
    if groups is not None and len(groups) != n and np.shape(sample_weight) == (len(groups),):
        per_group = as_vector(sample_weight, len(groups), "sample_weight", non_negative=True)
        weights = per_group[group_numbers(groups, n)]
    else:
        weights = as_vector(sample_weight, n, "sample_weight", non_negative=True)
    if not weights.any():
        raise ValueError("sample_weight is zero for every row; give at least one row a positive weight")
    return weights


def read_offset(offset: Any, n: int) -> Array | None:
    """Return the offset as float64, shape (n,), or None."""
    return None if offset is None else as_vector(offset, n, "offset")


def group_numbers(groups: Groups, n: int) -> NDArray[np.intp]:
    """Return the number of each row's group, shape (n,), in the user's order."""
    numbers = np.repeat(np.arange(len(groups)), np.diff(groups.starts, append=n))
    return groups.unsort(numbers)  # type: ignore[arg-type, return-value]


def linear_predictor(design: Design, coef: Array, offset: Array | None) -> Array:
    """Return ``X coef + offset``, shape (n,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = np.asarray(design @ coef)
    if not np.isfinite(z).all():
        try:
            for rows, block in design.blocks():
                require_finite_rows(block, rows, "X", design.locate)
        except ValueError as error:
            raise _spelled(error) from None
        raise OverflowError("X coef_ overflows float64; X lies far outside the range of the training data")
    return z if offset is None else z + offset


def take_rows(design: Design, keep: NDArray[np.bool_]) -> Design:
    """Return the design with these rows only."""
    kept = design.block(np.flatnonzero(keep))
    return SparseDesign(kept) if isinstance(design, SparseDesign) else DenseDesign(kept)


def _spelled(error: ValueError) -> ValueError:
    """Return an error about X with NaN as scikit-learn writes it: its checks look for it."""
    return ValueError(str(error).replace(" nan at ", " NaN at "))


def read_elsewhere(estimator: Any, X: Any, y: Any, given: dict[str, Any]) -> Rows:
    """Return the arguments of ``fit`` without a copy of any; refuse what needs all rows at once.

    Raises
    ------
    ValueError
        For an outside good, penalties of single rows, or weights that repeat rows.
    """
    groups, weights = given.get("groups"), given["sample_weight"]
    if getattr(estimator, "outside_good", False):
        raise ValueError(
            "outside_good=True needs the whole table in memory; add a row of zeros to each group of the "
            "data, or pass arrays"
        )
    if np.ndim(estimator.row_penalty) or is_dask(estimator.row_penalty):
        raise ValueError("a row_penalty of each row needs the data in memory; pass one number, or arrays")
    if "groups" in given and weights is not None and groups is None:
        raise ValueError(
            "sample_weight repeats rows where there are no groups, which needs the whole table in memory; "
            "pass groups, or arrays"
        )
    names = getattr(X, "columns", None)
    if names is not None:
        estimator.feature_names_in_ = np.array([str(name) for name in names], dtype=object)
    elif hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_
    penalty = estimator.row_penalty
    return Rows(X, y, groups, weights, weights, given["offset"], penalty, y=np.zeros(0))


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

    pieces = partitions(y)
    if groups is None or is_dask(groups):
        labels = [None] * len(pieces) if groups is None else partitions(groups)
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
