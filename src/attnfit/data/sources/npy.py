"""Rows in blocks that are decoded once a pass, and rows of .npy files, read with plain system calls.

Mapped pages count as memory of the process, and a file that shrinks beneath a map kills it: neither holds for
reads into memory of our own.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from copy import copy
from itertools import pairwise
from math import prod
from mmap import ALLOCATIONGRANULARITY
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from attnfit.data.sources.base import (
    DriftError,
    FileFormatError,
    Source,
    even_edges,
    require_file,
    require_rows,
)

BLOCK_BYTES = 1 << 18
MOST_BLOCKS = 1 << 24
# Rows of a sample that lie closer are fetched together: skipping less than a page saves no disk.
PAGE_BYTES = 1 << 12


class BlockSource(Source):
    """A source that keeps the block it decoded last, so that small reads in a row decode it once."""

    _last: tuple[int, Any] | None = None

    def close(self) -> None:
        super().close()
        self._last = None

    @abstractmethod
    def _load(self, block: int) -> Any:
        """Return the rows of a block, checked."""

    def _kept(self, block: int, *, anew: bool = False) -> Any:
        """Return the rows of a block; decoded ``anew``, they are compared with those of the last pass."""
        if anew or self._last is None or self._last[0] != block:
            self._last = None
            self._last = block, self._load(block)
        return self._last[1]

    def _decoded(self, block: int, decode: Callable[[], Any]) -> Any:
        """Return what ``decode`` returns, or name the block that it fails on."""
        try:
            return decode()
        except DriftError:
            raise
        except Exception as error:  # decoders let through whatever a damaged block provokes
            reason = str(error) or type(error).__name__
            if self.checksums[block]:
                raise self._drift(block, f"cannot be decoded any more ({reason})") from error
            if isinstance(error, FileFormatError):
                raise
            where = ", ".join(self._place(block))
            raise FileFormatError(f"{where} cannot be decoded: {reason}; write the file again") from error

    def _by_block(self, rows: NDArray[np.intp]) -> list[tuple[int, NDArray[np.intp]]]:
        """Return each block that holds some of these rows, with the places of those rows among them."""
        blocks = self.block_of(rows)
        order = np.argsort(blocks, kind="stable")
        found, starts = np.unique(blocks[order], return_index=True)
        return list(zip(found.tolist(), np.split(order, starts[1:]), strict=True)) if len(rows) else []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}


class DenseBlockSource(BlockSource):
    """Blocks that are decoded into arrays."""

    @abstractmethod
    def _decode(self, first: int, last: int, rows: NDArray[Any]) -> None:
        """Fill an array with the rows of blocks first to last - 1."""

    def _load(self, block: int) -> NDArray[Any]:
        rows = self._room(int(self.edges[block + 1] - self.edges[block]), None)
        self._fill(block, block + 1, rows)
        return rows

    def _fill(self, first: int, last: int, rows: NDArray[Any]) -> None:
        start = int(self.edges[first])
        try:
            self._decode(first, last, rows)
        except Exception:
            # One by one, to find out which it is.
            for block in range(first, last):
                piece = rows[self.edges[block] - start : self.edges[block + 1] - start]
                self._decoded(block, lambda b=block, r=piece: self._decode(b, b + 1, r))  # type: ignore[misc]
        self._check(start, rows)

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> NDArray[Any]:
        rows = self._room(stop - start, out)
        first, last = bisect_left(self.edges, start), bisect_right(self.edges, stop) - 1
        inner, tail = int(self.edges[first]), int(self.edges[last])
        if start < inner:
            offset = start - int(self.edges[first - 1])
            rows[: inner - start] = self._kept(first - 1)[offset : offset + stop - start]
        if first < last:
            self._fill(first, last, rows[inner - start : tail - start])
        if first <= last and tail < stop:
            rows[tail - start :] = self._kept(last, anew=True)[: stop - tail]
        return rows

    def _take(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        found = self._room(len(rows), None)
        for block, places in self._by_block(rows):
            found[places] = self._kept(block)[rows[places] - self.edges[block]]
        return found


class Layout(NamedTuple):
    """Where in a file the numbers are."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


class NpySource(Source):
    """An .npy file, or the region of a file that a memory map shows."""

    kind = "npy"

    def __init__(self, path: str, layout: Layout | None = None) -> None:
        require_file(path)
        given = (path, layout)
        if layout is None:
            with open(path, "rb") as file:
                layout = read_header(file, path)
        shape = require_rows(path, layout.shape, layout.dtype)
        width = prod(shape[1:]) * layout.dtype.itemsize
        end, size = layout.offset + shape[0] * width, os.path.getsize(path)
        if size < end:
            raise FileFormatError(
                f"{path} is truncated: shape {shape} of {layout.dtype} takes {end} bytes, the file has "
                f"{size}; write it again"
            )
        step = max(1, BLOCK_BYTES // width, -(-shape[0] // MOST_BLOCKS))
        edges = even_edges(shape[0], step - step % 8 or step)
        file_of = np.zeros(len(edges) - 1, dtype=np.intp)
        super().__init__(given, path, shape, layout.dtype, edges, (path,), file_of)
        self._offset = layout.offset
        self._by_columns = layout.fortran and len(shape) == 2 and 1 not in shape

    @property
    def stored_rows(self) -> int:
        """Every row can be read by itself."""
        return 1

    def thread_copy(self) -> Self:
        """Return a source that can be read at the same time and compares with the same earlier reads."""
        with self._lock:
            # What has happened to the file so far is found out once, here.
            self._watch([0])
            other = copy(self)
        other.checksums = self.checksums
        return other

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> NDArray[Any]:
        rows = self._room(stop - start, out)
        if self._by_columns:
            column = np.empty(stop - start, self.dtype)
            for j in range(self.shape[1]):
                self._fetch(column, (j * self.shape[0] + start) * self.dtype.itemsize)
                rows[:, j] = column
        else:
            self._fetch(rows, start * self._width)
        self._check(start, rows)
        return rows

    def _take(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        wanted, places = np.unique(rows, return_inverse=True)
        found = self._room(len(wanted), None)
        if self._by_columns:
            column = np.empty(len(wanted), self.dtype)
            for j in range(self.shape[1]):
                self._gather(wanted + j * self.shape[0], column, self.dtype.itemsize)
                found[:, j] = column
        else:
            self._gather(wanted, found, self._width)
        # Rows in storage order, as samples mostly are, need no second copy.
        return found if len(rows) == len(wanted) and np.array_equal(rows, wanted) else found[places]

    def _gather(self, wanted: NDArray[np.intp], found: NDArray[Any], width: int) -> None:
        """Read the entries (rows, or numbers of a column) at these increasing places, width bytes each."""
        apart = np.diff(wanted) > max(1, PAGE_BYTES // width)
        # A run that is fetched at once takes no more memory than a block.
        apart |= np.diff(wanted // max(1, BLOCK_BYTES // width)) > 0
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(wanted)]
        for low, high in pairwise(cuts) if len(wanted) else ():
            first, count = int(wanted[low]), int(wanted[high - 1] - wanted[low]) + 1
            if count == high - low:
                self._fetch(found[low:high], first * width)
            else:
                run = np.empty((count, *found.shape[1:]), found.dtype)
                self._fetch(run, first * width)
                found[low:high] = run[wanted[low:high] - first]

    def _fetch(self, into: NDArray[Any], position: int) -> None:
        """Fill an array with the bytes at a position of the data."""
        if self._handle is None:
            self._handle = open(self.paths[0], "rb", buffering=0)  # noqa: SIM115
        self._handle.seek(self._offset + position)
        left: Any = memoryview(into.reshape(-1).view(np.uint8).data)
        while left:
            count = self._handle.readinto(left)
            if not count:
                raise DriftError(
                    f"{self.name} changed while it was being read: it ends at byte "
                    f"{self._offset + position + into.nbytes - len(left)}; restore it, and fit again"
                )
            left = left[count:]

    def _place(self, block: int) -> tuple[str, str]:
        return self.name, f"block {block}"


def read_header(file: IO[bytes], name: str) -> Layout:
    """Read the header of an .npy file, which leaves the file at its numbers.

    Raises
    ------
    FileFormatError
        If there is none, or if it describes Python objects.
    """
    try:
        version = npy_format.read_magic(file)
        # Version 3 exists for names of fields beyond Latin-1, which rows of numbers have not.
        parse = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
        shape, fortran, dtype = parse(file)
    except Exception as error:  # NumPy's parser lets through whatever a hostile header provokes
        raise FileFormatError(f"{name} is not a readable .npy file: {_first_line(error)}") from None
    if dtype.hasobject:
        raise FileFormatError(f"{name} holds Python objects; save plain numbers (array.astype(float))")
    return Layout(file.tell(), shape, dtype, fortran)


def from_memmap(array: np.memmap[Any, Any]) -> NpySource:
    """Return the part of a file that a memory map, or a contiguous view of one, shows.

    Raises
    ------
    TypeError
        If there is no such part: a copy-on-write map, one whose file is gone, a strided view.
    """
    pages = array.__dict__.get("_mmap")
    if array.mode == "c" or array.filename is None or pages is None:
        raise TypeError("a memory map without a file of its own cannot be read by rows")
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise TypeError("a strided view of a memory map cannot be read by rows")
    mapped = np.frombuffer(pages, np.uint8)
    start = array.ctypes.data - mapped.ctypes.data
    # A map begins at a whole page before the offset that was asked for.
    page = array.offset - array.offset % ALLOCATIONGRANULARITY
    layout = Layout(page + start, array.shape, array.dtype, not array.flags.c_contiguous)
    return NpySource(str(array.filename), layout)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
