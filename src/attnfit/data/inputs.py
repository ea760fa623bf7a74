"""Check and convert what a user passes in; every message names the argument, the index and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data import Column, DenseDesign, Design, SparseDesign
from attnfit.data.on_disk import PIECE_ROWS, open_design, stored_source
from attnfit.data.sources import Source
from attnfit.segments import Groups

Array = NDArray[np.float64]
Index = NDArray[np.intp]

FRAMES = ("pandas", "polars", "pyarrow")


def is_dask(values: Any) -> bool:
    """Whether these are a Dask array or data frame."""
    return type(values).__module__.partition(".")[0] in ("dask", "dask_expr") and hasattr(values, "dask")


def library_and_index(data: Any) -> tuple[str | None, Any]:
    """Return the name of the library that a data frame is of, None for anything else, and its index, if it
    has one.
    """
    name = type(data).__module__.partition(".")[0]
    library = name if name in FRAMES and hasattr(data, "columns") else None
    return library, data.index if library == "pandas" else None


def partitions(values: Any) -> list[Any]:
    """Return one task for each partition of a Dask array, of all its columns, or data frame.

    Dask reads small files together, as many as the columns asked for allow: of two selections of one data
    frame the partitions would differ. Only what is not read is left out here.
    """
    if hasattr(values, "simplify"):
        return list(values.simplify().to_delayed(optimize_graph=False))
    return list(np.asarray(values.to_delayed(), dtype=object).ravel())


def from_tensor(values: Any) -> Any:
    """Return a torch tensor of any type, on any device, as an array; anything else as it is."""
    if not (hasattr(values, "detach") and hasattr(values, "cpu")):
        return values
    tensor = values.detach().cpu()
    # NumPy has no bfloat16; single precision holds it.
    return (tensor.float() if str(tensor.dtype).endswith("bfloat16") else tensor).numpy()


def pieces(values: Any) -> Iterator[tuple[slice, Array]]:
    """Yield (rows, values) of a vector in memory or on disk."""
    for rows in values.spans() if hasattr(values, "spans") else [slice(0, len(values))]:
        yield rows, np.asarray(values[rows])


def as_design(A: Any, name: str = "A") -> Design:
    """Wrap A, an array, sparse matrix, data frame or anything stored on disk, of shape (n, d), as a design.

    Raises
    ------
    ValueError
        If A is empty, not two-dimensional, not numeric or not finite.
    """
    if isinstance(A, Design):
        return A
    source = None if type(A) is np.ndarray else stored_source(A, name)
    if source is not None:
        _require_numeric(source.dtype, name)
        _require_shape(source.shape, name)
        return open_design(source)
    if sparse.issparse(A):
        _require_numeric(A.dtype, name)
        _require_shape(A.shape, name)
        require_indices(A, name)
        design = SparseDesign(A)
        require_finite_rows(design.matrix, slice(0, A.shape[0]), name)
        return design
    array = A if isinstance(A, np.ndarray) else _frame_to_array(A, name)
    if isinstance(array, np.ma.MaskedArray):
        array = _unmasked(array, name)
    _require_numeric(array.dtype, name)
    _require_shape(array.shape, name)
    require_finite_matrix(array, name)
    return DenseDesign(array)


def require_indices(A: Any, name: str = "A") -> None:
    """Raise ValueError if the index arrays of a sparse matrix point outside it: products would read there."""
    if not hasattr(A, "indptr"):
        return
    try:
        # A copy of the object, not of its arrays: checking may set them.
        copy(A).check_format(full_check=True)
    except ValueError as error:
        limit = A.shape[0 if A.format == "csc" else 1]
        outside = np.flatnonzero((A.indices < 0) | (A.indices >= limit))
        where = f" (entry {outside[0]} has index {A.indices[outside[0]]})" if len(outside) else ""
        raise ValueError(
            f"{name} is not a valid {A.format} matrix: {error}{where}; build it from its entries, as "
            "scipy.sparse.csr_array((values, (rows, columns)), shape=shape)"
        ) from error


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


def require_finite_rows(
    block: Any, rows: slice | Index, name: str, locate: Callable[[int], str] | None = None
) -> None:
    """Raise ValueError naming the user's row and the column of the first entry of a block that is not
    finite, and where it is stored.
    """
    if not sparse.issparse(block):
        bad = np.argwhere(~np.isfinite(block))
        entry = (int(bad[0][0]), int(bad[0][1])) if len(bad) else None
    else:
        stored = np.flatnonzero(~np.isfinite(block.data))
        entry = None
        if len(stored):
            row = int(np.searchsorted(block.indptr, stored[0], side="right")) - 1
            entry = (row, int(block.indices[stored[0]]))
    if entry is not None:
        row = rows.start + entry[0] if isinstance(rows, slice) else int(rows[entry[0]])
        place = "" if locate is None else locate(row)
        where = f"row {row}, column {entry[1]}{f' ({place})' if place else ''}"
        raise _not_finite(name, block[entry], where)


def as_column(
    values: Any, n: int, name: str, *, non_negative: bool = False, scalar: bool = False
) -> Array | Column:
    """Return ``values``, one a row of A, as `as_vector` does, but as a `Column` where they are on disk."""
    if type(values) in (np.ndarray, float, int):
        return as_vector(values, n, name, non_negative=non_negative, scalar=scalar)
    source = values.source if isinstance(values, Column) else stored_source(values, name)
    if source is None:
        return as_vector(values, n, name, non_negative=non_negative, scalar=scalar)
    column = values if isinstance(values, Column) else Column(source)
    _require_numeric(source.dtype, name)
    if len(column) != n or int(np.prod(source.shape)) != n:
        raise ValueError(
            f"{name} has shape {source.shape} but A has {n} rows; pass one value a row, shape ({n},)"
        )
    for rows, piece in pieces(column):
        bad = np.flatnonzero(~np.isfinite(piece))
        if len(bad):
            k = rows.start + int(bad[0])
            raise _not_finite(name, piece[bad[0]], f"index {k} ({source.locate(k)})")
        if non_negative and (piece < 0).any():
            k = rows.start + int(np.flatnonzero(piece < 0)[0])
            raise _negative(name, k, piece[k - rows.start])
    return column


def as_vector(
    values: Any, n: int, name: str, *, non_negative: bool = False, scalar: bool = False, rows_of: str = "A"
) -> Array:
    """Return ``values`` as float64 of shape (n,) (or () where ``scalar`` is allowed), checked."""
    try:
        array = np.asarray(_unmasked(values, name) if isinstance(values, np.ma.MaskedArray) else values)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be read as an array of numbers: {error}; pass one value a row"
        ) from error
    _require_numeric(array.dtype, name)
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim == 0 and scalar:
        pass
    elif array.shape != (n,):
        raise ValueError(
            f"{name} has shape {array.shape} but {rows_of} has {n} rows; pass one value a row, shape ({n},)"
        )
    array = array.astype(np.float64, copy=False)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise _not_finite(name, array.reshape(-1)[bad[0]], f"index {bad[0]}")
    if non_negative and (array < 0).any():
        k = int(np.flatnonzero(array < 0)[0])
        raise _negative(name, k, array.reshape(-1)[k])
    return array


def as_point(x: Any, shape: tuple[int, ...], name: str = "x") -> Array:
    """Return x flat, accepting the flat and the natural shape."""
    try:
        array = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read as numbers: {error}; pass an array of shape {shape}"
        ) from error
    size = int(np.prod(shape))
    if array.shape not in (shape, (size,)):
        raise ValueError(f"{name} has shape {array.shape}; expected {shape} or ({size},)")
    flat = array.reshape(-1)
    bad = np.flatnonzero(~np.isfinite(flat))
    if len(bad):
        raise ValueError(f"{name} contains {flat[bad[0]]} at index {bad[0]}; pass finite numbers")
    return flat


def as_ridge(ridge: float) -> float:
    """Return the ridge parameter, checked."""
    try:
        value = float(ridge)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"ridge must be a finite number >= 0, not {ridge!r}")
    return value


def choose(value: Any, options: Any, name: str) -> Any:
    """Look up an option by name."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, not {value!r}")
    return options[value]


def negative_target(k: int, loss: str) -> ValueError:
    """Return the error of a target that a loss of shares does not take."""
    return ValueError(
        f"b is negative at index {k}; {loss} needs targets >= 0 (squared loss takes any target)"
    )


def _negative(name: str, k: int, value: float) -> ValueError:
    return ValueError(
        f"{name} is negative at index {k} ({value:g}); use values >= 0, with 0 to leave a row out"
    )


def _not_finite(name: str, value: Any, where: str) -> ValueError:
    return ValueError(
        f"{name} contains {str(value).replace('nan', 'NaN')} at {where}; remove or impute such entries first"
    )


def _unmasked(values: Any, name: str) -> Any:
    """Return the data of a masked array, which must not hide any."""
    hidden = np.argwhere(np.ma.getmaskarray(values))
    if len(hidden):
        where = ", ".join(map(str, hidden[0]))
        raise ValueError(
            f"{name} is masked at index {where}; fill the masked entries or drop their rows first"
        )
    return values.data


def _require_numeric(dtype: Any, name: str) -> None:
    if np.dtype(dtype).kind not in "fiub":
        raise ValueError(f"{name} has dtype {dtype}; convert it to real numbers (float, integer or boolean)")


def _require_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"{name} must have two dimensions (rows, features), not shape {shape}; use {name}.reshape(-1, "
            f"1) for one feature"
        )
    if 0 in shape:
        raise ValueError(f"{name} is empty: shape {shape}; pass at least one row and one column")


def _frame_to_array(frame: Any, name: str) -> NDArray[Any]:
    """Convert a data frame of any narwhals backend, or anything array-like."""
    import narwhals as nw

    try:
        native = nw.from_native(frame, eager_only=True)
    except TypeError:
        try:
            return np.asarray(frame)
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be read as a matrix: {error}; pass rows of equal length"
            ) from error
    _require_shape(native.shape, name)
    columns = list(native.iter_columns())
    for series in columns:
        column, dtype = series.name, series.dtype
        if not (dtype.is_numeric() or dtype == nw.Boolean):
            raise ValueError(
                f"column {column!r} of {name} has type {dtype}; encode it as numbers (for example one "
                f"column a category)"
            )
        if series.null_count():
            row = int(np.flatnonzero(series.is_null().to_numpy())[0])
            raise ValueError(
                f"{name} contains a missing value at row {row}, column {column!r}; remove or impute it"
            )
    return np.column_stack([np.asarray(series.to_numpy()) for series in columns])


# ---- groups


def parse_groups(groups: Any, n: int) -> Groups:
    """Read ``groups``: None, n labels in any order, or offsets ``0 = o_0 < o_1 < ... = n``.

    An array of length n holds labels; any other length must be offsets.

    Raises
    ------
    ValueError
        If the length fits neither reading, an offset repeats (empty group) or decreases, or a label is
        missing.
    """
    if groups is None:
        return Groups(np.zeros(1, dtype=np.intp), None, np.zeros(1, dtype=np.intp))
    source = None if type(groups) is np.ndarray else stored_source(groups, "groups")
    if source is not None:
        if source.shape == (n,):
            found = _stored_groups(source)
            if found is not None:
                return found
        groups = source.read(0, int(source.shape[0]))
    array = np.asarray(groups)
    if array.ndim != 1:
        raise ValueError(f"groups must be one-dimensional, not shape {array.shape}; pass one label a row")
    if len(array) != n:
        return Groups(_offsets(array, n), None, np.arange(len(array) - 1))
    # A whole number or a truth value is a label.
    missing = [] if array.dtype.kind in "iub" else unlabelled(array)
    if missing:
        raise ValueError(f"groups has no label at index {missing[0]}; give every row a label or drop the row")
    starts = np.concatenate([[0], np.flatnonzero(array[1:] != array[:-1]) + 1])
    try:
        labels, first, inverse = np.unique(array[starts], return_index=True, return_inverse=True)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in array[starts]})
        raise ValueError(
            f"groups has labels of several types ({', '.join(kinds)}); make them one type"
        ) from None
    if len(labels) == len(starts):
        return Groups(starts.astype(np.intp), None, array[starts])
    rank = np.empty(len(labels), dtype=np.intp)
    by_appearance = np.argsort(first)
    rank[by_appearance] = np.arange(len(labels))
    ids = np.repeat(rank[inverse], np.diff(starts, append=n))
    sizes = np.bincount(ids)
    return Groups(np.cumsum(sizes) - sizes, np.argsort(ids, kind="stable"), labels[by_appearance])


def unlabelled(array: NDArray[Any]) -> list[int]:
    """Return the rows without a label."""
    if array.dtype.kind == "O":
        return [i for i, label in enumerate(array) if is_missing(label)]
    return list(np.flatnonzero(array != array).tolist())


def is_missing(label: Any) -> bool:
    """Whether a label is none: None, not a number, no time, or pandas' NA."""
    try:
        return label is None or bool(label != label)
    except TypeError:
        # Of NA it is not even known whether it differs from itself.
        return True


def _stored_groups(source: Source) -> Groups | None:
    """Read labels from disk piece by piece; None unless the rows of every group are next to each other."""
    n = int(source.shape[0])
    starts: list[Index] = [np.zeros(1, dtype=np.intp)]
    labels: list[NDArray[Any]] = [source.read(0, 1)]
    last = labels[0]
    for start in range(0, n, PIECE_ROWS):
        piece = source.read(start, min(start + PIECE_ROWS, n))
        missing = np.flatnonzero(piece != piece)
        if len(missing):
            k = start + int(missing[0])
            raise ValueError(
                f"groups has no label at index {k} ({source.locate(k)}); give every row a label or drop the "
                "row"
            )
        changes = np.flatnonzero(piece != np.concatenate([last, piece[:-1]]))
        starts.append(changes + start)
        labels.append(piece[changes])
        last = piece[-1:]
    found = np.concatenate(labels)
    if len(np.unique(found)) < len(found):
        return None
    return Groups(np.concatenate(starts).astype(np.intp), None, found)


def _offsets(array: NDArray[Any], n: int) -> Index:
    if array.dtype.kind not in "iu" or len(array) < 2 or array[0] != 0 or array[-1] != n:
        raise ValueError(
            f"groups has length {len(array)} but A has {n} rows; pass one label a row, or integer offsets "
            f"that start at 0 and end at {n}"
        )
    empty = np.flatnonzero(np.diff(array) <= 0)
    if len(empty):
        raise ValueError(
            f"groups: group {empty[0]} is empty (offsets {array[empty[0]]} to {array[empty[0] + 1]}); drop it"
        )
    return array[:-1].astype(np.intp)
