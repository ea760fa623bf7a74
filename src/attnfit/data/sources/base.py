"""Rows of numbers that stay where they are stored, and the watch over them.

A source is divided into blocks of rows: what its format stores together, or some 256 KiB where it stores
single rows. The first read of a whole block keeps its checksum (64 bits at memory speed: a guard against
accidents, not against forgery), every later one is compared with it: each pass over data that do not fit in
memory sees the same numbers, or an error that names the block.
"""

from __future__ import annotations

import os
import stat
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from threading import RLock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from attnfit.data.kernels import Compiled

# A header can claim any size: these bound what is believed before anything is allocated for it.
LARGEST_ROW = 1 << 30
LARGEST_BLOCK = 1 << 30
MOST_COMPRESSION = 64


class FileFormatError(ValueError):
    """A data file that is malformed, damaged, or holds what cannot be read as rows of numbers."""


class DriftError(RuntimeError):
    """A data file that was changed, replaced or deleted while it was being read."""


def _compare(data, edges, first, width, key, known):  # type: ignore[no-untyped-def]
    for block in range(len(known)):
        begin, end = (edges[block] - first) * width, (edges[block + 1] - first) * width
        # Words of the two halves meet keys of their place and are multiplied, 32 bits by 32 (the NH hash of
        # UMAC): order counts, a difference in two places does not cancel, and unlike full 64-bit products
        # these are computed several at a time on every processor.
        step, low, high = np.uint64(0x9E3779B185EBCA87), np.uint64(0xFFFFFFFF), np.uint64(32)
        half = (end - begin) // 16
        left = data[begin : begin + 8 * half].view(np.uint64)
        right = data[begin + 8 * half : begin + 16 * half].view(np.uint64)
        total = place = np.uint64(key)
        for i in range(half):
            a, b = left[i] + place, right[i] ^ place
            place += step
            total += (a & low) * (b & low) + (a >> high) * (b >> high)
        for i in range(begin + 16 * half, end):
            total = (total ^ np.uint64(data[i])) * step
        # 0 is kept for what has not been read.
        total = max(total, np.uint64(1))
        if known[block] == 0:
            known[block] = total
        elif known[block] != total:
            return block
    return -1


@cache
def _compiled() -> Callable[..., int]:
    return Compiled(_compare, nogil=True, error_model="numpy")


def first_difference(
    rows: NDArray[Any], edges: NDArray[np.intp], width: int, known: NDArray[np.uint64]
) -> int:
    """Compare blocks with their known checksums, and keep those that are not known (0).

    Parameters
    ----------
    rows : ndarray
        Contiguous; its first row is the first of ``edges``.
    edges : ndarray of intp, shape (n_blocks + 1,)
        First row of each block, and the one after the last.
    width : int
        Bytes a row.
    known : ndarray of uint64, shape (n_blocks,)

    Returns
    -------
    int
        The first block that differs; -1 if none does.

    Notes
    -----
    One core of an AMD Zen 4 server: 65 GB/s in the second-level cache, 25 GB/s from memory.
    """
    return _compiled()(rows.reshape(-1).view(np.uint8), edges, int(edges[0]), width, 0, known)


def checksum(*arrays: NDArray[Any]) -> int:
    """Return one checksum, never 0, of the bytes of several contiguous arrays in their order."""
    found = np.zeros(1, dtype=np.uint64)
    for array in arrays:
        key = (int(found[0]) ^ array.nbytes) & 0x7FFFFFFFFFFFFFFF
        found[0] = 0
        data = array.reshape(-1).view(np.uint8)
        _compiled()(data, np.array([0, len(data)]), 0, 1, key, found)
    return int(found[0])


class Source(ABC):
    """A matrix (n, d) or column (n,) in files.

    One read runs at a time; a copy (``copy.copy``, or a pickled one) opens the files anew and can be read at
    the same time, but knows nothing of what others read after it was made: see `apart`.

    Attributes
    ----------
    name : str
        The file or directory as the user gave it.
    shape : tuple of int
        (n, d) or (n,).
    dtype : dtype
        As stored.
    edges : ndarray of intp
        First row of every block, and n.
    checksums : ndarray of uint64
        Checksum of every block; 0 where no read has covered the whole block yet.
    """

    kind: str
    sparse = False

    def __init__(
        self,
        given: tuple[Any, ...],
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        edges: NDArray[np.intp],
        paths: tuple[str, ...],
        file_of: NDArray[np.intp],
    ) -> None:
        self._given = given
        self.name, self.shape, self.dtype = name, shape, dtype
        self._width = dtype.itemsize * prod(shape[1:])
        self.edges, self.checksums = edges, np.zeros(len(edges) - 1, dtype=np.uint64)
        self.paths, self._file_of = paths, file_of
        self._stamps = [_stamp(path) for path in paths]
        self._lock = RLock()
        self._handle: Any = None

    @property
    def stored_rows(self) -> int:
        """Number of rows that are stored, and hence decoded, together: the most that a block has."""
        return int(np.diff(self.edges).max())

    def read(self, start: int, stop: int, out: NDArray[np.uint8] | None = None) -> Any:
        """Return rows start to stop as a C-ordered array or CSR array of the stored type.

        Parameters
        ----------
        start, stop : int
            Reads that begin and end at ``edges`` are compared with earlier ones.
        out : ndarray of uint8, optional
            Memory, at least as large as the rows, that a dense source reads into: the result is a view of it.

        Raises
        ------
        DriftError
            If the data are not those of an earlier read.
        FileFormatError
            If the stored bytes cannot be decoded.
        """
        n = self.shape[0]
        if not 0 <= start < stop <= n:
            raise IndexError(f"rows {start} to {stop} of {self.name} do not exist: it has {n} rows")
        with self._lock:
            first, last = bisect_right(self.edges, start) - 1, bisect_right(self.edges, stop - 1) - 1
            self._watch(range(self._file_of[first], self._file_of[last] + 1))
            return self._read(start, stop, out)

    def take(self, rows: NDArray[np.intp]) -> Any:
        """Return any rows in the order given; each stored block is decoded once."""
        rows = np.asarray(rows, dtype=np.intp)
        n = self.shape[0]
        if len(rows) and not 0 <= rows.min() <= rows.max() < n:
            bad = rows[(rows < 0) | (rows >= n)][0]
            raise IndexError(f"row {bad} of {self.name} does not exist: it has {n} rows")
        with self._lock:
            self._watch(np.unique(self._file_of[self.block_of(rows)]))
            return self._take(rows)

    def thread_copy(self) -> Self:
        """Return the source that another thread should read: itself where rows are decoded many at a time,
        each once.
        """
        return self

    def locate(self, row: int) -> str:
        """Return file and block of a row, for messages."""
        return ", ".join(self._place(int(self.block_of(row))))

    def block_of(self, rows: Any) -> Any:
        """Return the number of the block that holds each row."""
        return np.searchsorted(self.edges, rows, side="right") - 1

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others, as JSON has it."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "sizes": [stamp[0] for stamp in self._stamps],
            "mtimes_ns": [stamp[1] for stamp in self._stamps],
        }

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()

    @abstractmethod
    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> Any: ...

    @abstractmethod
    def _take(self, rows: NDArray[np.intp]) -> Any: ...

    @abstractmethod
    def _place(self, block: int) -> tuple[str, str]:
        """Return the name of a block's file and what the block is called in it."""

    def _room(self, count: int, out: NDArray[np.uint8] | None) -> NDArray[Any]:
        """Return an array for so many rows, within ``out`` where there is one."""
        shape, size = (count, *self.shape[1:]), count * self._width
        if out is None:
            return np.empty(shape, self.dtype)
        if out.dtype != np.uint8 or out.ndim != 1 or len(out) < size:
            raise ValueError(
                f"out has dtype {out.dtype} and shape {out.shape}; pass a one-dimensional uint8 array of at "
                f"least {size} bytes"
            )
        return out[:size].view(self.dtype).reshape(shape)

    def _check(self, start: int, rows: NDArray[Any]) -> None:
        """Compare those blocks that lie as a whole within an array, whose first row is row ``start``."""
        first = bisect_left(self.edges, start)
        last = bisect_right(self.edges, start + len(rows)) - 1
        if first < last:
            edges, known = self.edges[first : last + 1], self.checksums[first:last]
            inner = rows if edges[0] == start else rows[edges[0] - start :]
            differs = first_difference(inner, edges, self._width, known)
            if differs >= 0:
                raise self._drift(first + differs, "differs from the first read")

    def _check_one(self, block: int, found: int) -> None:
        """Keep the checksum of a block, or compare it with that of the first read."""
        if self.checksums[block] not in (0, found):
            raise self._drift(block, "differs from the first read")
        self.checksums[block] = found

    def _drift(self, block: int, what: str) -> DriftError:
        file, label = self._place(block)
        rows = f"rows {self.edges[block]} to {self.edges[block + 1] - 1}"
        return DriftError(
            f"{file} changed while it was being read: {label} ({rows}) {what}; leave the file alone during a "
            f"fit, and fit again"
        )

    def _watch(self, files: Iterable[int]) -> None:
        """Make sure that these files are those that were opened."""
        for file in files if self.paths else ():
            path, seen = self.paths[file], self._stamps[file]
            try:
                now = _stamp(path)
            except (OSError, FileFormatError) as error:
                self.close()
                raise DriftError(
                    f"{path} changed while it was being read: it cannot be opened any more ({error}); "
                    f"restore it, and fit again"
                ) from error
            if now[: len(seen)] != seen:
                self._renew(path)
            self._stamps[file] = now

    def _renew(self, path: str) -> None:
        """Open files with new times or sizes again, and compare all that has been read of them so far."""
        self.close()
        try:
            fresh = type(self)(*self._given)
        except (OSError, ValueError) as error:
            raise DriftError(
                f"{path} changed while it was being read: {error}; restore it, and fit again"
            ) from error
        if (
            (fresh.shape, fresh.dtype, fresh.paths) != (self.shape, self.dtype, self.paths)
            or not np.array_equal(fresh.edges, self.edges)
        ):  # fmt: skip
            raise DriftError(
                f"{path} changed while it was being read: {self.name} had shape {self.shape} and dtype "
                f"{self.dtype}, now it has shape {fresh.shape} and dtype {fresh.dtype}, or is divided "
                f"otherwise; leave the file alone during a fit, and fit again"
            )
        fresh.checksums = self.checksums
        for block in np.flatnonzero(self.checksums):
            fresh._read(int(self.edges[block]), int(self.edges[block + 1]), None)
        fresh.close()
        self.__dict__.update(fresh.__dict__ | {"_lock": self._lock})

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"]
        # A word a block is much to send to a worker, and mostly the same word.
        packed = {name: zlib.compress(state.pop(name).tobytes(), 1) for name in ("_file_of", "checksums")}
        packed["edges"] = zlib.compress(np.diff(state.pop("edges")).tobytes(), 1)
        # Another machine may see the same file under another device and inode.
        stamps = [stamp[:2] for stamp in self._stamps]
        return state | {"_handle": None, "_stamps": stamps, "_packed": packed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = {name: zlib.decompress(data) for name, data in state.pop("_packed").items()}
        self.__dict__.update(state, _lock=RLock())
        self._file_of = np.frombuffer(packed["_file_of"], np.intp)
        self.checksums = np.frombuffer(bytearray(packed["checksums"]), np.uint64)
        self.edges = np.append(0, np.cumsum(np.frombuffer(packed["edges"], np.intp)))

    def __del__(self) -> None:
        if "_handle" in self.__dict__:
            self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: shape {self.shape}, {self.dtype}>"


def require_rows(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return the shape as plain integers where it and the dtype are those of rows of numbers, or labels."""
    if len(shape) not in (1, 2):
        raise FileFormatError(
            f"{name} has shape {shape}; store one row an observation, shape (rows, columns) or (rows,)"
        )
    shape = tuple(int(length) for length in shape)
    if min(shape) < 0:
        raise FileFormatError(f"{name} has the impossible shape {shape}; write the file again")
    if 0 in shape:
        raise FileFormatError(f"{name} is empty: shape {shape}; store at least one row and one column")
    if dtype.kind not in ("fiubUS" if len(shape) == 1 else "fiub") or dtype.itemsize == 0:
        raise FileFormatError(
            f"{name} has dtype {dtype}; convert it to real numbers (float, integer or boolean)"
        )
    if prod(shape[1:]) * dtype.itemsize > LARGEST_ROW:
        raise FileFormatError(f"{name} has shape {shape}: a row does not fit in 1 GiB; store fewer columns")
    return shape


def require_plausible(name: str, size: int, path: str) -> None:
    """Raise where ``size`` decoded bytes are said to come out of a file that is far too small for them."""
    stored = os.path.getsize(path)
    if not 0 <= size <= max(LARGEST_BLOCK, MOST_COMPRESSION * stored):
        raise FileFormatError(
            f"{name} takes {size} bytes of memory according to a file of {stored} bytes; if this is right, "
            f"store it in smaller pieces"
        )


def even_edges(n: int, step: int) -> NDArray[np.intp]:
    """Return the first row of every block of ``step`` rows, and n."""
    return np.append(np.arange(0, n, step, dtype=np.intp), n)


def require_file(path: str) -> None:
    """Raise unless there is a regular file: reading a pipe or a device may never end."""
    _stamp(path)


def _stamp(path: str) -> tuple[int, ...]:
    """Return size and time of a file, then what it is known by on this machine."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no file at {path}") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(f"{path} is not a regular file")
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino
