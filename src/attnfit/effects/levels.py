"""Sets of effects: labels as numbers of levels, and the order of rows in which a level is a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import narwhals as nw
import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import is_dask, unlabelled

Array = NDArray[np.float64]
Index = NDArray[np.intp]
Codes = NDArray[np.int32]
# Integers whose range is at most so many times the rows are counted, which is faster than sorting them.
COUNTED = 4


@dataclass(frozen=True)
class LabelSet:
    """One set of effects.

    Attributes
    ----------
    name : str
        What messages call it: a column's name, or its place such as ``absorb[0]``.
    labels : ndarray, shape (L,)
        The distinct labels, sorted; of a set of pairs, tuples.
    codes : ndarray of int, shape (n,)
        The number of each row's label.
    """

    name: str
    labels: NDArray[Any]
    codes: Codes

    @property
    def n_levels(self) -> int:
        """Number L of levels."""
        return len(self.labels)


def encode(labels: NDArray[Any], values: Any, name: str) -> Index:
    """Return the number of each value among sorted labels, -1 for values that are none of them."""
    if labels.dtype == object and _is_tuple(labels):
        columns = [_one_column(part, name).tolist() for part in values]
        wanted: list[Any] = list(zip(*columns, strict=True))
    else:
        array = _one_column(values, name)
        if array.dtype != object and labels.dtype != object:
            found = np.minimum(np.searchsorted(labels, array), len(labels) - 1)
            return np.where(labels[found] == array, found, -1)
        wanted = array.tolist()
    place = {label: k for k, label in enumerate(labels.tolist())}
    return np.array([place.get(label, -1) for label in wanted], dtype=np.intp)


def _is_tuple(labels: NDArray[Any]) -> bool:
    return len(labels) > 0 and isinstance(labels[0], tuple)


def read_sets(absorb: Any, n: int | None = None, names: list[str] | None = None) -> list[LabelSet]:
    """Return the sets of effects that a user passes.

    Parameters
    ----------
    absorb : list of array_like, shape (n,) each; array of shape (n,) or (n, S); or data frame
        Labels: integers, text, categories, truth values or times. A tuple of arrays is one set, of the
        combinations of their labels.
    n : int, optional
        Number of rows; that of the first set by default.
    names : list of str, optional

    Raises
    ------
    ValueError
        For a set of another length, a row without a label, or labels that are broken numbers; the message
        names the set, the index and the remedy.
    """
    columns = _columns(absorb)
    if not columns:
        raise ValueError("absorb is empty; pass one array of labels for each set of effects, or leave it out")
    found = []
    for s, column in enumerate(columns):
        name = f"absorb[{s}]" if names is None else names[s]
        parts = column if isinstance(column, tuple) else (column,)
        pieces = []
        for part in parts:
            array = _one_column(part, name)
            n = len(array) if n is None else n
            if len(array) != n:
                raise ValueError(
                    f"{name} has {len(array)} labels but there are {n} rows; pass one label a row"
                )
            pieces.append(_compress(array, name))
        found.append(LabelSet(name, *_combined(pieces)))
    return found


def _columns(absorb: Any) -> list[Any]:
    if is_dask(absorb):
        raise NotImplementedError(
            "absorb needs all labels in memory, which a Dask collection does not have; call .compute() on "
            "the labels and the data, or pass data on disk"
        )
    if nw.dependencies.is_into_dataframe(absorb):
        return list(nw.from_native(absorb, eager_only=True).iter_columns())
    if isinstance(absorb, list | tuple):
        if not len(absorb):
            return []
        if np.ndim(absorb[0]) == 0:
            return [np.asarray(absorb)]
        return list(absorb)
    if nw.dependencies.is_into_series(absorb):
        return [absorb]
    array = np.asarray(absorb)
    if array.ndim not in (1, 2):
        raise ValueError(f"absorb has shape {array.shape}; pass a list of label arrays, one a set of effects")
    return list(array.T) if array.ndim == 2 else [array]


def _one_column(values: Any, name: str) -> NDArray[Any]:
    if is_dask(values):
        _columns(values)
    array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else values)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; pass labels of shape (n,)")
    return array


def _compress(array: NDArray[Any], name: str) -> tuple[NDArray[Any], Codes]:
    """Return the sorted labels and the number of each row's."""
    if array.dtype.kind in "iub":
        return _compress_integers(array)
    missing = unlabelled(array)
    if missing:
        raise ValueError(
            f"{name} has no label at index {missing[0]}; drop the row, or give it a label such as 'missing'"
        )
    if array.dtype.kind == "f":
        broken = np.flatnonzero(array != np.round(array))
        if len(broken):
            raise ValueError(
                f"{name} has the label {array[broken[0]]!r} at index {broken[0]}, which is no whole number; "
                "labels are integers, text, categories or times: bin or convert it"
            )
        return _compress_integers(array.astype(np.int64)) if len(array) else (array, array.astype(np.int32))
    try:
        labels, codes = np.unique(array, return_inverse=True)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in array})
        raise ValueError(
            f"{name} has labels of several types ({', '.join(kinds)}); make them one type"
        ) from None
    return labels, codes.astype(np.int32)


def _compress_integers(array: NDArray[Any]) -> tuple[NDArray[Any], Codes]:
    if not len(array):
        return array, array.astype(np.int32)
    low, high = int(array.min()), int(array.max())
    if high - low > COUNTED * len(array) + 1024:
        labels, codes = np.unique(array, return_inverse=True)
        return labels, codes.astype(np.int32)
    shifted = array.astype(np.int64) - low
    seen = np.flatnonzero(np.bincount(shifted, minlength=high - low + 1))
    place = np.zeros(high - low + 1, dtype=np.int32)
    place[seen] = np.arange(len(seen), dtype=np.int32)
    return (seen + low).astype(array.dtype), place[shifted]


def _combined(pieces: list[tuple[NDArray[Any], Codes]]) -> tuple[NDArray[Any], Codes]:
    """Return the combinations of labels that occur, and the number of each row's."""
    if len(pieces) == 1:
        return pieces[0]
    both = np.zeros(len(pieces[0][1]), dtype=np.int64)
    for labels, codes in pieces:
        both = both * len(labels) + codes
    kept, codes = _compress_integers(both)
    parts = []
    for labels, _ in reversed(pieces):
        parts.append(labels[kept % len(labels)])
        kept = kept // len(labels)
    tuples = np.empty(len(kept), dtype=object)
    tuples[:] = list(zip(*(part.tolist() for part in reversed(parts)), strict=True))
    return tuples, codes


def require_distinct(sets: list[LabelSet]) -> None:
    """Raise ValueError where two sets are the same up to the names of their levels."""
    for k, one in enumerate(sets):
        for other in sets[:k]:
            if one.n_levels != other.n_levels:
                continue
            place = np.zeros(one.n_levels, dtype=np.int32)
            place[one.codes] = other.codes
            if np.array_equal(place[one.codes], other.codes):
                raise ValueError(
                    f"{one.name} and {other.name} are the same set of {one.n_levels:,} levels up to their "
                    "names; leave one of them out"
                )


@dataclass(frozen=True)
class Cells:
    """Rows in the order of their levels, and the runs of rows that have all levels in common.

    Attributes
    ----------
    order : ndarray of int, shape (n,)
        ``sorted = rows[order]``: rows of a level of set 0 are a run, and within it rows of a cell.
    row_starts : ndarray of int, shape (n_cells + 1,)
        First row of each cell, and the number of rows.
    level_starts : ndarray of int, shape (L_0 + 1,)
        First cell of each level of set 0, and the number of cells.
    rest : ndarray of int, shape (n_cells, S - 1)
        Level of each cell in the other sets, numbered through all of them.
    offsets : tuple of int
        Number of the first level of each of the other sets, and of all of them.
    """

    order: Index
    row_starts: Index
    level_starts: Index
    rest: Codes
    offsets: tuple[int, ...]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.row_starts) - 1

    @property
    def n_rest(self) -> int:
        """Number M of levels of all sets but the first."""
        return self.offsets[-1]

    @property
    def n_first(self) -> int:
        """Number of levels of set 0."""
        return len(self.level_starts) - 1


def sort_into_cells(codes: list[Codes], n_levels: list[int]) -> Cells:
    """Return the rows sorted by (c_0, c_1, ...), stable, by counting, and their cells."""
    n = len(codes[0])
    order: Index = np.arange(n, dtype=np.intp)
    for column, levels in zip(reversed(codes), reversed(n_levels), strict=True):
        values = column[order]
        if n > 1 and (values[1:] < values[:-1]).any():
            order = order[counting_order(values, levels)]
    sorted_codes = [column[order] for column in codes]
    new = np.zeros(n, dtype=bool)
    new[:1] = True
    for column in sorted_codes:
        new[1:] |= column[1:] != column[:-1]
    row_starts = np.append(np.flatnonzero(new), n).astype(np.intp)
    first = sorted_codes[0][row_starts[:-1]]
    level_starts = np.searchsorted(first, np.arange(n_levels[0] + 1)).astype(np.intp)
    offsets = np.concatenate([[0], np.cumsum(n_levels[1:])]).astype(int)
    rest = np.empty((len(row_starts) - 1, len(codes) - 1), dtype=np.int32)
    for s, column in enumerate(sorted_codes[1:]):
        rest[:, s] = column[row_starts[:-1]] + offsets[s]
    return Cells(order, row_starts, level_starts, rest, tuple(offsets.tolist()))


def counting_order(values: Codes, n_levels: int) -> Index:
    """Return the stable order that sorts numbers below ``n_levels``, in linear time."""
    from attnfit.effects.kernels import place_rows

    starts = np.zeros(n_levels + 1, dtype=np.intp)
    np.cumsum(np.bincount(values, minlength=n_levels), out=starts[1:])
    order = np.empty(len(values), dtype=np.intp)
    place_rows()(values, starts[:-1].copy(), order)
    return order
