"""Turn what a user passes to ``fit`` and ``predict`` into designs and vectors; messages name the argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import column_or_1d, validate_data

from attnfit.data import DenseDesign, Design, SparseDesign
from attnfit.data.groups import Groups
from attnfit.data.inputs import as_design, as_vector, is_dask, require_finite_rows
from attnfit.data.on_disk import stored_source

Array = NDArray[np.float64]


def read_features(estimator: Any, X: Any, *, reset: bool) -> Design:
    """Return X as a design; set (``reset``) or compare the estimator's feature names and their number.

    Raises
    ------
    ValueError
        If X is not a finite numeric matrix, or does not fit the training data.
    """
    with _spelling():
        # Frames keep their column names for the message, what is on disk is not read before the fit.
        if nw.dependencies.is_into_dataframe(X) or stored_source(X, "X") is not None:
            design = as_design(X, "X")
            validate_data(estimator, X, reset=reset, skip_check_array=True)
            return design
        checked = validate_data(
            estimator, X, reset=reset, accept_sparse="csr", dtype="numeric", ensure_all_finite=False
        )
        return as_design(checked, "X")


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


def read_penalty(row_penalty: Any, n: int, weights: Array | None) -> Array:
    """Return the row penalty of rows that count ``weights`` times: its square enters the objective."""
    penalty = as_vector(row_penalty, n, "row_penalty", scalar=True)
    return penalty if weights is None or not penalty.any() else penalty * np.sqrt(weights)


def group_numbers(groups: Groups, n: int) -> NDArray[np.intp]:
    """Return the number of each row's group, shape (n,), in the user's order."""
    numbers = np.repeat(np.arange(len(groups)), np.diff(groups.starts, append=n))
    return groups.unsort(numbers)  # type: ignore[arg-type, return-value]


def linear_predictor(design: Design, coef: Array, offset: Array | None) -> Array:
    """Return ``X coef + offset``, shape (n,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = np.asarray(design @ coef)
    if not np.isfinite(z).all():
        with _spelling():
            for rows, block in design.blocks():
                require_finite_rows(block, rows, "X", design.locate)
        raise OverflowError("X coef_ overflows float64; X lies far outside the range of the training data")
    return z if offset is None else z + offset


def take_rows(design: Design, keep: NDArray[np.bool_]) -> Design:
    """Return the design with these rows only."""
    kept = design.block(np.flatnonzero(keep))
    return SparseDesign(kept) if isinstance(design, SparseDesign) else DenseDesign(kept)


@contextmanager
def _spelling() -> Iterator[None]:
    """Write NaN in messages about X as scikit-learn does: its checks look for it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(" nan at ", " NaN at ")) from None
