"""Check and convert what a user passes in; every message names the argument, the index and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.designs import DenseDesign, Design, SparseDesign

Array = NDArray[np.float64]
Index = NDArray[np.intp]


def as_design(A: Any, name: str = "A") -> Design:
    """Wrap A, an array, sparse matrix or data frame of shape (n, d), as a design.

    Raises
    ------
    ValueError
        If A is empty, not two-dimensional, not numeric or not finite.
    """
    if isinstance(A, Design):
        return A
    if sparse.issparse(A):
        _require_numeric(A.dtype, name)
        _require_shape(A.shape, name)
        bad = np.flatnonzero(~np.isfinite(A.data)) if A.format in ("csr", "csc", "coo") else ()
        if len(bad):
            coo = sparse.coo_array(A)
            k = int(np.flatnonzero(~np.isfinite(coo.data))[0])
            raise _not_finite(name, coo.data[k], f"row {coo.coords[0][k]}, column {coo.coords[1][k]}")
        return SparseDesign(A)
    array = A if isinstance(A, np.ndarray) else _frame_to_array(A, name)
    _require_numeric(array.dtype, name)
    _require_shape(array.shape, name)
    # A memory map may be larger than memory: it is checked block by block during the first read.
    if not isinstance(array, np.memmap):
        require_finite_matrix(array, name)
    return DenseDesign(array)


def require_finite_matrix(array: NDArray[Any], name: str = "A", first_row: int = 0) -> None:
    """Raise ValueError naming row and column of the first entry that is not finite."""
    if array.dtype.kind != "f":
        return
    step = max(1, 2**20 // max(1, array.shape[1]))
    for start in range(0, array.shape[0], step):
        block = array[start : start + step]
        # A finite sum proves finite entries; only a non-finite one is worth a second, slower look.
        with np.errstate(all="ignore"):
            suspicious = not np.isfinite(block.sum())
        if suspicious and not np.isfinite(block).all():
            i, j = np.argwhere(~np.isfinite(block))[0]
            raise _not_finite(name, block[i, j], f"row {first_row + start + i}, column {j}")


def as_vector(
    values: Any, n: int, name: str, *, non_negative: bool = False, scalar: bool = False
) -> Array:
    """Return ``values`` as float64 of shape (n,) (or () where ``scalar`` is allowed), checked."""
    array = np.asarray(values)
    _require_numeric(array.dtype, name)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim == 0 and scalar:
        pass
    elif array.shape != (n,):
        raise ValueError(
            f"{name} has shape {array.shape} but A has {n} rows; pass one value a row, shape ({n},)"
        )
    array = array.astype(np.float64, copy=False)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise _not_finite(name, array.reshape(-1)[bad[0]], f"index {bad[0]}")
    if non_negative and (array < 0).any():
        k = int(np.flatnonzero(array < 0)[0])
        raise ValueError(
            f"{name} is negative at index {k} ({array.reshape(-1)[k]:g}); use values >= 0, with 0 to leave a row out"
        )
    return array


def as_point(x: Any, shape: tuple[int, ...], name: str = "x") -> Array:
    """Return x flat, accepting the flat and the natural shape."""
    array = np.asarray(x, dtype=np.float64)
    size = int(np.prod(shape))
    if array.shape not in (shape, (size,)):
        raise ValueError(f"{name} has shape {array.shape}; expected {shape} or ({size},)")
    if not np.isfinite(array).all():
        raise _not_finite(name, array.reshape(-1)[~np.isfinite(array.reshape(-1))][0], "one of its entries")
    return array.reshape(-1)


def as_ridge(ridge: float) -> float:
    """Return the ridge parameter, checked."""
    value = float(ridge)
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"ridge must be a finite number >= 0, not {ridge!r}")
    return value


def choose(value: Any, options: Any, name: str) -> Any:
    """Look up an option by name."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, not {value!r}")
    return options[value]


def _not_finite(name: str, value: Any, where: str) -> ValueError:
    return ValueError(f"{name} contains {value} at {where}; remove or impute such entries first")


def _require_numeric(dtype: Any, name: str) -> None:
    if np.dtype(dtype).kind not in "fiub":
        raise ValueError(f"{name} has dtype {dtype}; convert it to real numbers (float, integer or boolean)")


def _require_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have two dimensions (rows, features), not shape {shape}; use {name}.reshape(-1, 1) for one feature"
        )
    if 0 in shape:
        raise ValueError(f"{name} is empty: shape {shape}; pass at least one row and one column")


def _frame_to_array(frame: Any, name: str) -> NDArray[Any]:
    """Convert a data frame of any narwhals backend, or anything array-like."""
    import narwhals as nw

    try:
        native = nw.from_native(frame, eager_only=True)
    except TypeError:
        return np.asarray(frame)
    for column in native.columns:
        dtype = native[column].dtype
        if not (dtype.is_numeric() or dtype == nw.Boolean):
            raise ValueError(
                f"column {column!r} of {name} has type {dtype}; encode it as numbers (for example one column a category)"
            )
        if native[column].null_count():
            row = int(np.flatnonzero(native[column].is_null().to_numpy())[0])
            raise ValueError(f"{name} contains a missing value at row {row}, column {column!r}; remove or impute it")
    return np.column_stack([np.asarray(native[c].to_numpy()) for c in native.columns])
