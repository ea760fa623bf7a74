"""Read a file of data: numbers as float64, missing entries as NaN, and the line each row came from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.cli.console import note
from attnfit.cli.errors import InputError
from attnfit.cli.sources import Source, open_source, with_encoding
from attnfit.cli.spelling import MISSING, WORDS, Spelled, is_spelled, read_spelled

__all__ = ["MISSING", "Array", "Table", "read_table", "with_text"]

Array = NDArray[np.float64]

# Rows whose text is turned into numbers together: a larger block leaves the cache and takes twice as long.
BLOCK = 1_000


@dataclass
class Table:
    """A file's columns.

    Attributes
    ----------
    path : Path
    names : list of str
        All columns in the file's order.
    numbers : dict of str to ndarray
        Numeric columns; NaN is a missing entry.
    labels : dict of str to ndarray of object
        The columns asked for as text, exactly as written.
    text : dict of str to (int, str)
        Every other column: the row of its first entry that is not a number, and that entry.
    lines : ndarray of int or None
        Line of the file each row stands in; None for a format without lines.
    examples, doubts : dict
        See `Spelled`.
    source : Source
    frame : narwhals.DataFrame or None
        What a format without lines was read as.
    """

    path: Path
    names: list[str]
    numbers: dict[str, Array] = field(default_factory=dict)
    labels: dict[str, NDArray[Any]] = field(default_factory=dict)
    text: dict[str, tuple[int, str]] = field(default_factory=dict)
    lines: NDArray[np.int64] | None = None
    n_rows: int = 0
    examples: dict[str, tuple[str, float]] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    frame: Any = None
    decimal: str = "."

    def where(self, row: int) -> str:
        """Return how a user finds a row (counted from 0 here) in the file."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"

    def rows(self, keep: NDArray[np.bool_]) -> Table:
        """Return the table with these rows only."""
        lines = np.arange(2, self.n_rows + 2) if self.lines is None else self.lines
        return replace(
            self,
            numbers={name: values[keep] for name, values in self.numbers.items()},
            labels={name: values[keep] for name, values in self.labels.items()},
            lines=lines[keep],
            n_rows=int(keep.sum()),
            frame=None if self.frame is None else self.frame.filter(keep.tolist()),
        )

    def tell(self, used: Collection[str]) -> None:
        """Say how entries of the columns used were read that are not written as a program writes numbers."""
        told = [
            f"{name} ({cell!r} is {value:g})" for name, (cell, value) in self.examples.items() if name in used
        ]
        if told:
            note(f"Read as numbers: {', '.join(told)}.")


def read_table(path: Path, as_text: Collection[str] = (), decimal: str | None = None) -> Table:
    """Read a file.

    Parameters
    ----------
    path : Path
        Text separated by commas, semicolons, tabs or bars, with a header; Excel, parquet, feather or
        Stata; all of them also packed. What it is is seen from its content.
    as_text : collection of str
        Columns to keep as written: labels such as 007 or long identifiers are not numbers.
    decimal : "." or ",", optional
        The decimal mark; by default that of the entries that leave no doubt.

    Raises
    ------
    InputError
        If there is no such file or it is not a table.
    """
    if decimal not in (None, ".", ","):
        raise InputError(f"--decimal must be . or , and not {decimal!r}")
    source = open_source(path)
    if source.kind == "text":
        try:
            table = _read_text(source, as_text, decimal)
        except UnicodeDecodeError as error:
            with_encoding(source, error)
            try:
                table = _read_text(source, as_text, decimal)
            except UnicodeDecodeError as again:
                with_encoding(source, again)
                raise
    else:
        table = _read_frame(source, as_text, decimal)
    table.source = source
    if not table.n_rows:
        raise InputError(f"{path} has a header but no rows; give a file with data")
    return table


def with_text(table: Table, names: Collection[str]) -> Table:
    """Return the table with more columns as they are written."""
    if not names:
        return table
    assert table.source is not None
    if table.frame is not None:
        found = {name: _as_cells(table.frame[name]) for name in names}
    else:
        with table.source.rows() as (reader, _):
            next(reader)
            cells = zip(*(row for row in reader if row), strict=True)
            found = {
                name: [cell.strip() for cell in column]
                for name, column in zip(table.names, cells, strict=True)
                if name in names
            }
    labels = {name: np.array(cells, dtype=object) for name, cells in found.items()}
    return replace(table, labels=table.labels | labels)


def _read_text(source: Source, as_text: Collection[str], decimal: str | None) -> Table:
    with source.rows() as (reader, delimiter):
        names = _names(source.path, next(reader, None))
        table = Table(source.path, names)
        blocks: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        lines: list[NDArray[np.int64]] = []
        # Blank lines come as empty rows.
        while block := [(reader.line_num, row) for row in islice(reader, BLOCK)]:
            block = [(line, row) for line, row in block if row]
            _check_lengths(source.path, block, len(names))
            columns = zip(*(row for _, row in block), strict=True)
            for name, values in zip(names, columns, strict=False):
                if name in as_text:
                    blocks[name].append(np.array([value.strip() for value in values], dtype=object))
                elif name not in table.text:
                    numbers, bad = _to_numbers(values)
                    blocks[name].append(numbers)
                    if bad is not None:
                        table.text[name] = (table.n_rows + bad, values[bad])
            lines.append(np.array([line for line, _ in block], dtype=np.int64))
            table.n_rows += len(block)
    if not table.n_rows:
        return table
    table.lines = np.concatenate(lines)
    for name in names:
        if name in as_text:
            table.labels[name] = np.concatenate(blocks[name])
        elif name not in table.text:
            table.numbers[name] = np.concatenate(blocks[name])
    if decimal == "," or any(is_spelled(value) for _, value in table.text.values()):
        # Few files need all of their text at once.
        with source.rows() as (reader, _):
            next(reader)
            cells = list(zip(*(row for row in reader if row), strict=True))
        wanted = {
            name: list(column) for name, column in zip(names, cells, strict=True) if name not in as_text
        }
        _adopt(table, read_spelled(wanted, delimiter, decimal))
    return table


def _adopt(table: Table, found: Spelled) -> None:
    table.numbers, table.text = found.numbers, found.text
    table.examples, table.doubts, table.decimal = found.examples, found.doubts, found.decimal


def _names(path: Path, header: list[str] | None) -> list[str]:
    if header is None:
        raise InputError(f"{path} is empty; give a file with a header line and data")
    names = [name.strip() for name in header]
    if not any(names):
        raise InputError(f"The first line of {path} is empty; put the names of the columns there")
    if _to_numbers(tuple(name for name in names if name))[1] is None:
        raise InputError(f"The first line of {path} holds numbers; put the names of the columns there")
    # Row numbers are often written without a name.
    names = [name or f"Unnamed: {k}" for k, name in enumerate(names)]
    repeated = [name for k, name in enumerate(names) if name in names[:k]]
    if repeated:
        raise InputError(f"{path} has two columns named {repeated[0]!r}; rename one")
    return names


def _check_lengths(path: Path, block: list[tuple[int, list[str]]], n_columns: int) -> None:
    for line, row in block:
        if len(row) != n_columns:
            raise InputError(
                f"{path}: the header names {n_columns} columns but line {line} has {len(row)}; "
                "quote values that contain the separator"
            )


def _to_numbers(values: tuple[str, ...]) -> tuple[Array, int | None]:
    """Return the numbers and the position of the first entry that is none."""
    try:
        # Four times as fast as NumPy's own conversion of text; 1_000 is a number to Python only.
        if "_" not in "".join(values):
            return np.fromiter(map(float, values), dtype=np.float64, count=len(values)), None
    except ValueError:
        pass
    out = np.empty(len(values))
    for k, value in enumerate(values):
        try:
            word = WORDS.get(value.strip().lower())
            if word is None and "_" in value:
                return out, k
            out[k] = float(value) if word is None else word
        except ValueError:
            return out, k
    return out, None


def _read_frame(source: Source, as_text: Collection[str], decimal: str | None) -> Table:
    import narwhals as nw

    frame = source.native()
    table = Table(source.path, [str(name) for name in frame.columns], n_rows=len(frame), frame=frame)
    cells: dict[str, list[str]] = {}
    for name, column in zip(table.names, frame.iter_columns(), strict=True):
        if name in as_text:
            table.labels[name] = np.array(_as_cells(column), dtype=object)
        elif column.dtype.is_numeric() or column.dtype == nw.Boolean:
            table.numbers[name] = column.cast(nw.Float64).to_numpy().astype(np.float64)
        else:
            cells[name] = _as_cells(column)
    if source.kind == "Excel":
        found = read_spelled(cells, ";", decimal)
        table.numbers |= found.numbers
        table.text, table.examples, table.doubts = found.text, found.examples, found.doubts
        return table
    for name, values in cells.items():
        # What a typed format holds as text is text, except for what has no other type there.
        words = [WORDS.get(value.lower()) for value in values]
        bad = next(
            (k for k, (word, value) in enumerate(zip(words, values, strict=True)) if word is None), None
        )
        if bad is None and any(value.lower() not in MISSING for value in values):
            table.numbers[name] = np.array(words, dtype=np.float64)
            odd = next(value for value in values if value.lower() not in MISSING)
            table.examples[name] = (odd, WORDS[odd.lower()])
        else:
            row = bad if bad is not None else 0
            table.text[name] = (row, values[row])
    return table


def _as_cells(column: Any) -> list[str]:
    return ["" if value is None or value != value else str(value).strip() for value in column.to_list()]
