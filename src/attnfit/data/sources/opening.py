"""From what a user names to a source: files, directories, objects of other libraries; shards of CSR matrices;
some rows of a source.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from attnfit.data.matrix import row_view
from attnfit.data.sources.base import (
    FileFormatError,
    Source,
    checksum,
    require_file,
    require_plausible,
    require_rows,
)
from attnfit.data.sources.npy import BlockSource, NpySource, from_memmap, read_header
from attnfit.data.sources.parquet import ParquetSource
from attnfit.data.sources.zarr_store import ZarrSource, is_zarr

# Compiled loops take a column's number for 32 bits.
MOST_COLUMNS = (1 << 31) - 1
PIECE_BYTES = 1 << 20


class ShardSource(BlockSource):
    """CSR matrices below each other; a block is a file.

    SciPy's own reader believes what a file says of itself: here nothing is allocated that the file is too
    small for, and no index leaves this class that is out of bounds.
    """

    kind = "csr"
    sparse = True

    def __init__(self, name: str, paths: Sequence[str]) -> None:
        shapes, dtypes = zip(*(_describe(path) for path in paths), strict=True)
        for path, (_, d) in zip(paths, shapes, strict=True):
            if d != shapes[0][1]:
                raise FileFormatError(
                    f"{path} has {d} columns but {paths[0]} has {shapes[0][1]}; all shards need the same "
                    f"columns"
                )
        files = np.array([index for index, (n, _) in enumerate(shapes) if n], dtype=np.intp)
        counts = [n for n, _ in shapes if n]
        shape, dtype = (sum(counts), shapes[0][1]), np.result_type(*dtypes)
        require_rows(name, (*shape[:1], min(shape[1], 1)), dtype)
        edges = np.cumsum([0, *counts], dtype=np.intp)
        super().__init__((name, paths), name, shape, dtype, edges, tuple(paths), files)

    def _load(self, block: int) -> Any:
        path = self.paths[self._file_of[block]]
        shape = int(self.edges[block + 1] - self.edges[block]), self.shape[1]
        indptr, indices, data = self._decoded(block, lambda: _read(path, shape))
        self._check_one(block, checksum(indptr, indices, data))
        matrix = sparse.csr_array(shape, dtype=self.dtype)
        matrix.indptr, matrix.indices = indptr, indices
        matrix.data = data.astype(self.dtype, copy=False)
        return matrix

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> Any:
        parts = []
        for block in range(self.block_of(start), self.block_of(stop - 1) + 1):
            first, last = int(self.edges[block]), int(self.edges[block + 1])
            matrix = self._kept(block, anew=start <= first)
            parts.append(row_view(matrix, max(start, first) - first, min(stop, last) - first))
        return parts[0] if len(parts) == 1 else sparse.vstack(parts, format="csr")

    def _take(self, rows: NDArray[np.intp]) -> Any:
        parts, places = [sparse.csr_array((0, self.shape[1]), dtype=self.dtype)], []
        for block, at in self._by_block(rows):
            parts.append(self._kept(block)[rows[at] - self.edges[block]])
            places.append(at)
        found = sparse.vstack(parts, format="csr")
        order = np.concatenate(places) if places else rows
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return found[back]

    def _place(self, block: int) -> tuple[str, str]:
        return self.paths[self._file_of[block]], f"shard {self._file_of[block]}"


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileFormatError:
        raise
    except Exception as error:  # zipfile and zlib have many ways to say that a file is damaged
        raise FileFormatError(
            f"{path} is not a readable .npz file: {error or type(error).__name__}"
        ) from error


def _describe(path: str) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Return shape of a shard and type of its entries without reading them."""
    with _opened(path) as archive:
        form = _array(archive, "format", path).reshape(-1)
        if form.tolist() not in ([b"csr"], ["csr"]):
            raise FileFormatError(f"{path} is not a CSR matrix; write it with save_npz(path, matrix.tocsr())")
        shape = _array(archive, "shape", path)
        if shape.shape != (2,) or shape.dtype.kind not in "iu" or not 0 <= min(shape) <= max(shape) < 1 << 62:
            raise FileFormatError(
                f"{path} has shape {shape.tolist()}; a matrix has a number of rows and columns"
            )
        n, d = shape.tolist()
        if d > MOST_COLUMNS:
            raise FileFormatError(f"{path} has {d} columns; at most {MOST_COLUMNS} are read")
        with archive.open(_member(archive, "data", path)) as file:
            data = read_header(file, f"{path}, member data")
        # One more row pointer than rows must be in the file, so that a number of rows is no mere claim.
        with archive.open(_member(archive, "indptr", path)) as file:
            indptr = read_header(file, f"{path}, member indptr")
        if indptr.shape != (n + 1,):
            raise FileFormatError(f"{path} has {n} rows but indptr has shape {indptr.shape}; write it again")
        return (n, d), data.dtype.newbyteorder("=")


def _read(path: str, shape: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return row pointers, column numbers and entries of a shard, checked."""
    with _opened(path) as archive:
        indptr, indices, data = (_array(archive, name, path) for name in ("indptr", "indices", "data"))
    n, d = shape
    integers = indptr.dtype.kind == "i" and indices.dtype.kind == "i"
    if not integers or data.dtype.kind not in "fiub" or {indptr.ndim, indices.ndim, data.ndim} != {1}:
        raise FileFormatError(
            f"{path} has indptr, indices or data of the wrong type or shape; write it again"
        )
    if indptr.shape != (n + 1,) or indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any():
        raise FileFormatError(f"{path} has a malformed indptr: it must rise from 0 over {n + 1} entries")
    count = int(indptr[-1])
    if count > min(len(indices), len(data)):
        raise FileFormatError(
            f"{path} is cut off: indptr counts {count} entries, there are {min(len(indices), len(data))}"
        )
    indices, data = indices[:count], data[:count]
    if count and not 0 <= indices.min() <= indices.max() < d:
        at = int(np.argmax((indices < 0) | (indices >= d)))
        row = int(np.searchsorted(indptr, at, side="right")) - 1
        raise FileFormatError(
            f"{path}, row {row}, has an entry in column {indices[at]}; there are {d} columns"
        )
    # The loops that index with these are compiled for one width.
    width = np.result_type(indptr.dtype, indices.dtype, np.int32)
    return indptr.astype(width), indices.astype(width), data


def _member(archive: zipfile.ZipFile, name: str, path: str) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise FileFormatError(
            f"{path} has no member {name!r}; write it with scipy.sparse.save_npz(path, matrix.tocsr())"
        ) from None
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
        raise FileFormatError(f"{path}, member {name!r}, is encrypted or compressed in an unusual way")
    return member


def _array(archive: zipfile.ZipFile, name: str, path: str) -> NDArray[Any]:
    """Read an array that takes no more memory than its member claims, and the file is large enough for."""
    member, label = _member(archive, name, path), f"{path}, member {name!r}"
    require_plausible(label, member.file_size, path)
    with archive.open(member) as file:
        layout = read_header(file, label)
        size = layout.dtype.itemsize * prod(layout.shape)
        if min(layout.shape, default=0) < 0 or layout.offset + size != member.file_size:
            raise FileFormatError(
                f"{label} has shape {layout.shape} of {layout.dtype} but {member.file_size} bytes; write it "
                f"again"
            )
        array = np.empty(layout.shape, layout.dtype)
        left: Any = array.reshape(-1).view(np.uint8).data if size else b""
        while left:
            count = file.readinto(left[:PIECE_BYTES])  # type: ignore[attr-defined]
            if not count:
                raise FileFormatError(f"{label} is cut off; write it again")
            left = left[count:]
        # The checksum of a member is compared where it ends.
        file.read(1)
    return array


class SomeRows(Source):
    """The rows of another source that are kept, read where they are.

    Parameters
    ----------
    inner : Source, shape (n, ...)
    kept : ndarray of intp, shape (n_kept,)
        Their numbers, in increasing order.
    """

    def __init__(self, inner: Source, kept: NDArray[np.intp]) -> None:
        self._inner, self._rows = inner, kept
        edges = np.unique(np.searchsorted(kept, inner.edges)).astype(np.intp)
        shape = (len(kept), *inner.shape[1:])
        self.kind, self.sparse = inner.kind, inner.sparse
        super().__init__(
            (inner, kept), inner.name, shape, inner.dtype, edges, (), np.zeros(len(edges) - 1, dtype=np.intp)
        )

    @property
    def stored_rows(self) -> int:
        """Number of rows that are decoded together."""
        return self._inner.stored_rows

    def thread_copy(self) -> Self:
        """Return the source that another thread should read."""
        return type(self)(self._inner.thread_copy(), self._rows)

    def locate(self, row: int) -> str:
        """Return file and block of a row, for messages."""
        return self._inner.locate(int(self._rows[row]))

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others, as JSON has it."""
        return self._inner.fingerprint() | {"rows": str(checksum(self._rows))}

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        self._inner.close()

    def _read(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> Any:
        rows = self._rows[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        found = self._inner.read(first, last)[rows - first]
        if out is None or self.sparse:
            return found
        room = self._room(stop - start, out)
        room[:] = found
        return room

    def _take(self, rows: NDArray[np.intp]) -> Any:
        return self._inner.take(self._rows[rows])

    def _place(self, block: int) -> tuple[str, str]:
        row = int(self._rows[self.edges[block]])
        return self._inner.locate(row), f"row {row}"


def open_source(data: Any, columns: str | Sequence[str] | None = None) -> Source:
    """Open rows of numbers, or labels, that stay on disk.

    Parameters
    ----------
    data : path, list of paths or object
        An .npy file; an .npz file of ``scipy.sparse.save_npz``, a directory or a list of them (rows below
        each other, directories in the order 1, 2, 10); a Parquet file, a directory or a list of them; a zarr
        array in a directory or zip file. Also a ``numpy.memmap``, ``zarr.Array`` or
        ``pyarrow.dataset.Dataset``.
    columns : str or list of str, optional
        Columns of Parquet files; a single string gives a vector, of numbers or labels. Default: all, as a
        matrix.

    Raises
    ------
    FileNotFoundError
    FileFormatError
        If the files are malformed or hold anything else.
    TypeError
        If an object is not backed by files, or shows them otherwise than row by row.
    """
    source = _open(data, columns)
    if columns is not None and not isinstance(source, ParquetSource):
        raise ValueError(f"columns select from Parquet files, and {source.name} is none; leave columns out")
    return source


def _open(data: Any, columns: str | Sequence[str] | None) -> Source:
    if isinstance(data, np.memmap):
        return from_memmap(data)
    if isinstance(data, str | os.PathLike):
        return _open_path(os.fspath(data), columns)
    if isinstance(data, list | tuple):
        if not data or not all(isinstance(path, str | os.PathLike) for path in data):
            raise TypeError("a list of files must consist of paths, at least one")
        paths = tuple(os.fspath(path) for path in data)
        return _open_files(f"{paths[0]} and {len(paths) - 1} more", paths, columns)
    return _open_object(data, columns)


def _open_path(path: str, columns: str | Sequence[str] | None) -> Source:
    suffix = os.path.splitext(path)[1].lower()
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file or directory at {path}")
    if os.path.isdir(path):
        if is_zarr(path):
            return ZarrSource(path)
        paths = _files_in(path)
        if not paths:
            raise FileFormatError(f"{path} holds no .npz or .parquet files and is no zarr array")
        return _open_files(path, paths, columns)
    if suffix == ".npy":
        return NpySource(path)
    if suffix == ".zip":
        return ZarrSource(path)
    return _open_files(path, (path,), columns)


def _open_files(name: str, paths: tuple[str, ...], columns: str | Sequence[str] | None) -> Source:
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    if suffixes == {".npz"}:
        return ShardSource(name, paths)
    if suffixes <= {".parquet", ".pq"}:
        return ParquetSource(name, paths, columns)
    raise FileFormatError(
        f"{name} cannot be told by its ending; use .npy, .npz (CSR), .parquet or a zarr directory, and files "
        f"of one kind"
    )


def _files_in(directory: str) -> tuple[str, ...]:
    """Return the data files below a directory; part 10 comes after part 9."""
    found = []
    for at, _, files in os.walk(directory):
        found += [os.path.join(at, file) for file in files if file.endswith((".npz", ".parquet"))]
    # Writers keep what is no data, or not complete, under such names.
    kept = [path for path in found if not os.path.basename(path).startswith((".", "_"))]
    return tuple(
        sorted(kept, key=lambda path: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path)])
    )


def _open_object(data: Any, columns: str | Sequence[str] | None) -> Source:
    """Open what zarr or pyarrow opened: whoever has such an object has imported them."""
    module = type(data).__module__.partition(".")[0]
    if module == "zarr" and type(data).__name__ == "Array":
        return ZarrSource(data)
    if module == "pyarrow":
        files = _files_of(data)
        return _open_files(
            files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more", files, columns
        )
    raise TypeError(f"{type(data).__name__} is not read from disk; pass a path")


def _files_of(dataset: Any) -> tuple[str, ...]:
    """Return the files of a dataset of pyarrow, which must be all that it shows."""
    from pyarrow.fs import LocalFileSystem

    files = tuple(getattr(dataset, "files", ()))
    local = isinstance(getattr(dataset, "filesystem", None), LocalFileSystem)
    if not files or not local or getattr(dataset, "_scan_options", None):
        raise TypeError(
            f"{type(dataset).__name__} does not tell which local files it reads, or filters them; pass the "
            f"path"
        )
    return files
