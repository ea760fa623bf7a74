"""Find the source for what a user names: a file, a directory, several files, an object of another library."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnfit.designs.sources.base import Source
from attnfit.designs.sources.errors import FileFormatError
from attnfit.designs.sources.npy import NpySource, from_memmap
from attnfit.designs.sources.parquet import ParquetSource
from attnfit.designs.sources.shards import ShardSource
from attnfit.designs.sources.zarr_array import ZarrSource
from attnfit.designs.sources.zarr_metadata import is_zarr


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
