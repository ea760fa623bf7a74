"""Columns of Parquet files: a file, a directory of files, or what pyarrow opened."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.sources.base import FileFormatError, checksum, require_file, require_plausible, require_rows
from attnfit.data.sources.npy import DenseBlockSource

# Columns are decoded a few at a time: the row group in memory twice, once by column and once by row, would be
# the largest thing in a fit.
DECODED_BYTES = 1 << 24


class ParquetSource(DenseBlockSource):
    """Columns of one or more files as the columns of a matrix; a block is a row group.

    Parameters
    ----------
    name : str
        What the user gave.
    paths : sequence of str
        The files, in the order of their rows.
    columns : str, list of str or None
        One column as a vector of numbers or labels, several as a matrix; None: all of them.
    fill : bool
        Whether missing values are read as zeros and empty labels, for those who leave such rows out, instead
        of being errors.
    """

    kind = "parquet"

    def __init__(
        self, name: str, paths: Sequence[str], columns: str | Sequence[str] | None, fill: bool = False
    ) -> None:
        single = isinstance(columns, str)
        wanted = [columns] if isinstance(columns, str) else None if columns is None else list(columns)
        dtypes, blocks, counts = [], [], []
        for index, path in enumerate(paths):
            with _open(path) as file:
                wanted = _all_columns(file, path) if wanted is None else wanted
                dtypes += [_dtype(file, path, column, labels=single) for column in wanted]
                for group in range(file.metadata.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if count:
                        blocks.append((index, group))
                        counts.append(count)
        if not dtypes:
            raise FileFormatError(f"{name} is read without any columns; name at least one")
        if len({dtype.hasobject for dtype in dtypes}) > 1:
            raise FileFormatError(
                f"{name} has numbers in some files and labels in others, column {columns!r}"
            )
        dtype = np.result_type(*dtypes)
        shape = (sum(counts),) if single else (sum(counts), len(wanted or ()))
        # Labels have no width of their own.
        require_rows(name, shape, np.dtype("U1") if dtype.hasobject else dtype)
        for (index, group), count in zip(blocks, counts, strict=True):
            size = count * dtype.itemsize * prod(shape[1:])
            require_plausible(f"{paths[index]}, row group {group}", size, paths[index])
        self._columns, self._groups = wanted or [], [group for _, group in blocks]
        self._opened = -1
        edges = np.cumsum([0, *counts], dtype=np.intp)
        files = np.array([index for index, _ in blocks], dtype=np.intp)
        self._fill_missing = fill
        super().__init__((name, paths, columns, fill), name, shape, dtype, edges, tuple(paths), files)

    def filled(self) -> ParquetSource:
        """Return the same columns with zeros and empty labels in place of missing values."""
        name, paths, columns, _ = self._given
        return ParquetSource(name, paths, columns, fill=True)

    def _decode(self, first: int, last: int, rows: NDArray[Any]) -> None:
        matrix = rows.reshape(len(rows), -1)
        for block in range(first, last):
            low, high = self.edges[block : block + 2] - self.edges[first]
            at_once = max(1, DECODED_BYTES // int((high - low) * self.dtype.itemsize))
            for j in range(0, len(self._columns), at_once):
                self._decode_columns(block, j, matrix[low:high, j : j + at_once])

    def _decode_columns(self, block: int, first: int, into: NDArray[Any]) -> None:
        """Fill an array with some columns of a row group."""
        from pyarrow import types

        names = self._columns[first : first + into.shape[1]]
        table = self._file(block).read_row_group(self._groups[block], columns=names)
        for j, name in enumerate(names):
            column = table.column(name)
            if len(column) != len(into):
                raise FileFormatError(
                    f"{self.locate(int(self.edges[block]))} has {len(column)} entries in column {name!r} and "
                    f"promises {len(into)}; write the file again"
                )
            start = 0
            for chunk in column.chunks:
                if chunk.null_count and not self._fill_missing:
                    row = int(self.edges[block]) + start + int(np.argmax(chunk.is_null()))
                    raise FileFormatError(
                        f"{self.locate(row)} contains a missing value at row {row}, column {name!r}; remove "
                        f"or impute it"
                    )
                decoded = chunk.dictionary_decode() if hasattr(chunk, "dictionary") else chunk
                if types.is_decimal(decoded.type):
                    decoded = decoded.cast("float64")
                if decoded.null_count:
                    decoded = decoded.fill_null("" if self.dtype.hasobject else 0)
                into[start : start + len(chunk), j] = decoded.to_numpy(zero_copy_only=False)
                start += len(chunk)

    def _check(self, start: int, rows: NDArray[Any]) -> None:
        if not self.dtype.hasobject:
            super()._check(start, rows)
            return
        first, last = np.searchsorted(self.edges, [start, start + len(rows)])
        for block in range(first, last):
            labels = rows[self.edges[block] - start : self.edges[block + 1] - start]
            text = np.frombuffer("\0".join(labels).encode("utf-8", "surrogatepass"), np.uint8)
            self._check_one(block, checksum(text))

    def _file(self, block: int) -> Any:
        """Return the file of a block, opened; one at a time is open."""
        index = int(self._file_of[block])
        if self._handle is None or self._opened != index:
            super().close()
            self._handle, self._opened = _open(self.paths[index]), index
        return self._handle

    def _place(self, block: int) -> tuple[str, str]:
        return self.paths[self._file_of[block]], f"row group {self._groups[block]}"


def _open(path: str) -> Any:
    """Open a Parquet file with reads instead of maps: mapped pages count as memory of the process."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install attnfit[dask]") from error
    require_file(path)
    try:
        return ParquetFile(path, memory_map=False, pre_buffer=False)
    except Exception as error:  # malformed footers come as several types of exception
        raise FileFormatError(f"{path} is not a readable Parquet file: {error}") from error


def _all_columns(file: Any, path: str) -> list[str]:
    names = list(file.schema_arrow.names)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FileFormatError(f"{path} has two columns named {twice!r}; rename one of them")
    # The index of a data frame, stored as a column, is no feature.
    return [name for name in names if not name.startswith("__index_level_")]


def _dtype(file: Any, path: str, column: str, *, labels: bool) -> np.dtype[Any]:
    """Return the type of a column as NumPy has it, object for labels."""
    from pyarrow import types

    schema = file.schema_arrow
    index = schema.get_field_index(column)
    if index < 0:
        names = ", ".join(map(repr, schema.names[:10])) + (", ..." if len(schema.names) > 10 else "")
        raise FileFormatError(f"{path} has no column {column!r} (or two of them); its columns are {names}")
    kind = schema.field(index).type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return dtype
    if types.is_decimal(kind):
        return np.dtype(np.float64)
    text = kind.value_type if types.is_dictionary(kind) else kind
    if labels and (types.is_string(text) or types.is_large_string(text)):
        return np.dtype(object)
    raise FileFormatError(
        f"column {column!r} of {path} has type {kind}; encode it as numbers (for example one column a "
        f"category)"
    )
