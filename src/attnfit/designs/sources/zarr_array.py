"""Arrays in chunks: zarr 3, and zarr's older format 2."""

from __future__ import annotations

import os
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.designs.sources.base import even_edges, require_rows
from attnfit.designs.sources.blocks import DenseBlockSource
from attnfit.designs.sources.errors import FileFormatError
from attnfit.designs.sources.zarr_metadata import (
    files_of,
    metadata_path,
    most_bytes,
    read_metadata,
    require_known_codecs,
    require_sizes,
)

LARGEST_CHUNK = 1 << 31
MOST_BLOCKS = 1 << 24


class ZarrSource(DenseBlockSource):
    """A zarr array in a directory, in a zip file, or as zarr opened it; a block is a row of chunks."""

    kind = "zarr"
    _array: Any = None

    def __init__(self, given: Any) -> None:
        path = given if isinstance(given, str) else _local_path(given)
        array = _open(path) if path is not None else given
        name = path if path is not None else str(given.store_path)
        if path is None:
            require_known_codecs(given.metadata.to_dict(), name)
        try:
            chunks = tuple(int(length) for length in array.chunks)
            stored = tuple(int(length) for length in array.shards or chunks)
            shape, dtype = array.shape, np.dtype(array.dtype)
        except Exception as error:  # chunks of unequal length, types of zarr's own
            raise FileFormatError(
                f"{name} cannot be read by rows: {error}; store it in equal chunks"
            ) from error
        shape = require_rows(name, shape, dtype)
        whole = stored if array.shards and len(array.metadata.codecs) > 1 else chunks
        if min(chunks) < 1 or prod(whole) * dtype.itemsize > LARGEST_CHUNK:
            raise FileFormatError(f"{name} has chunks of shape {whole}; store it in chunks of at most 2 GiB")
        if shape[0] // chunks[0] > MOST_BLOCKS or prod(stored) // prod(chunks) > MOST_BLOCKS:
            raise FileFormatError(
                f"{name} has {shape[0]} rows in chunks of shape {chunks}, stored by {stored}; store it in "
                f"larger chunks"
            )
        if path is not None:
            array.store.close()
            require_sizes(path, most_bytes(stored, dtype.itemsize, chunks))
        edges = even_edges(shape[0], min(chunks[0], shape[0]))
        paths = () if path is None else (metadata_path(path),)
        self._path = path
        super().__init__((given,), name, shape, dtype, edges, paths, np.zeros(len(edges) - 1, dtype=np.intp))

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others; sizes and times are those of all chunks together."""
        found = super().fingerprint()
        if self._path is not None and os.path.isdir(self._path):
            files = [os.stat(file) for file in files_of(self._path)]
            found["sizes"] = [sum(file.st_size for file in files)]
            found["mtimes_ns"] = [max(file.st_mtime_ns for file in files)]
        return found

    def close(self) -> None:
        super().close()
        if self._path is not None and self._array is not None:
            self._array.store.close()
        self._array = None

    def _decode(self, first: int, last: int, rows: NDArray[Any]) -> None:
        from zarr.core.buffer import default_buffer_prototype

        if self._array is None:
            from attnfit.designs.sources.zarr_chunks import bounded

            self._array = bounded(_open(self._path) if self._path is not None else self._given[0])
        everything = (slice(None),) * (len(self.shape) - 1)
        self._array.get_basic_selection(
            (slice(int(self.edges[first]), int(self.edges[last])), *everything),
            out=default_buffer_prototype().nd_buffer.from_numpy_array(rows),
        )

    def _place(self, block: int) -> tuple[str, str]:
        return self.name, f"chunk {block}"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_array": None}


def _open(path: str) -> Any:
    """Open a zarr array whose metadata name nothing but known codecs."""
    try:
        import zarr
        from zarr.storage import LocalStore, ZipStore
    except ImportError as error:
        raise ImportError(f"reading {path} needs zarr 3: pip install attnfit[dask]") from error
    file = metadata_path(path)
    try:
        version, document = read_metadata(path)
        require_known_codecs(document, path)
        store = LocalStore(path, read_only=True) if os.path.isdir(path) else ZipStore(file, mode="r")
        return zarr.open_array(store, mode="r", zarr_format=version)
    except FileFormatError:
        raise
    except Exception as error:  # zarr's parser lets through whatever hostile metadata provoke
        raise FileFormatError(f"{path} is not a readable zarr array: {error}") from error


def _local_path(array: Any) -> str | None:
    """Return the directory of an array that zarr opened; None if it is somewhere else."""
    from zarr.storage import LocalStore

    store = array.store
    return os.path.join(str(store.root), array.path) if isinstance(store, LocalStore) else None
