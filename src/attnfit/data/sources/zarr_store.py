"""Arrays in chunks: zarr 3, and zarr's older format 2.

Metadata are checked before zarr is asked to believe them. A decompressor believes what it is given: a
kilobyte can say that it holds a terabyte, or be one. Compressed chunks tell their size in front, which is
compared before anything is allocated for it, or are decompressed here and no further than that.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.data.sources.base import FileFormatError, even_edges, require_file, require_rows
from attnfit.data.sources.npy import DenseBlockSource

METADATA = {"zarr.json": 3, ".zarray": 2}
LARGEST_METADATA = 1 << 24
# Filters may keep twice the bytes of a value; checksums, indices of shards and headers come on top.
SLACK = 1 << 16
PER_CHUNK = 64
# Metadata choose the decoder of every chunk, and one of those that can be installed unpickles: only codecs
# that do nothing but arithmetic, and of those only such as do not decode to more than can be told beforehand.
CODECS = frozenset(
    {
        *("bytes", "endian", "transpose", "sharding_indexed", "packbits", "astype"),
        *("blosc", "bz2", "gzip", "lz4", "shuffle", "zlib", "zstd"),
        *("bitround", "delta", "fixedscaleoffset", "quantize"),
        *("adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"),
    }
)
LARGEST_CHUNK = 1 << 31
MOST_BLOCKS = 1 << 24


def is_zarr(path: str) -> bool:
    """Whether a directory is a zarr array or group."""
    return any(os.path.exists(os.path.join(path, name)) for name in (*METADATA, ".zgroup"))


def metadata_path(path: str) -> str:
    """Return the file whose change means that this is another array."""
    if not os.path.isdir(path):
        require_file(path)
        return path
    for name in METADATA:
        if os.path.exists(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileFormatError(f"{path} is not a zarr array: it has no zarr.json")


def read_metadata(path: str) -> tuple[int, Any]:
    """Return format version and metadata of an array in a directory or zip file."""
    file = metadata_path(path)
    if os.path.isdir(path):
        require_file(file)
        if os.path.getsize(file) > LARGEST_METADATA:
            raise FileFormatError(f"{file} is larger than the metadata of any array")
        with open(file, "rb") as text:
            return METADATA[os.path.basename(file)], json.load(text)
    with zipfile.ZipFile(file) as archive:
        for name, version in METADATA.items():
            if name in archive.namelist():
                if archive.getinfo(name).file_size > LARGEST_METADATA:
                    raise FileFormatError(f"{file}, member {name} is larger than the metadata of any array")
                return version, json.loads(archive.read(name))
    raise FileFormatError(f"{file} is not a zarr array: it has no zarr.json")


def files_of(path: str) -> Iterator[str]:
    """Return every file of a directory."""
    return (os.path.join(at, file) for at, _, files in os.walk(path) for file in files)


def most_bytes(shape: tuple[int, ...], itemsize: int, inner: tuple[int, ...] | None = None) -> int:
    """Return the most bytes that an honest chunk, or shard of chunks of shape ``inner``, takes undecoded."""
    chunks = prod(-(-n // k) for n, k in zip(shape, inner, strict=True)) if inner else 1
    return 2 * prod(shape) * itemsize + PER_CHUNK * chunks + SLACK


def require_sizes(path: str, most: int) -> None:
    """Raise unless the file, or member of a zip file, of every chunk has at most so many bytes."""
    sizes: Iterable[tuple[str, int]]
    if os.path.isdir(path):
        sizes = ((file, os.path.getsize(file)) for file in files_of(path))
    else:
        with zipfile.ZipFile(path) as archive:
            sizes = [(f"{path}, member {info.filename}", info.file_size) for info in archive.infolist()]
    for name, size in sizes:
        if size > max(most, LARGEST_METADATA):
            raise FileFormatError(
                f"{name} takes {size} bytes, a chunk of this array at most {most}; write it again"
            )


def require_known_codecs(document: Any, name: str) -> None:
    """Raise unless these are the metadata of an array that known codecs decode."""
    if not isinstance(document, dict):
        raise FileFormatError(f"{name} is not a zarr array: its metadata are not a JSON object")
    if document.get("node_type") == "group":
        raise FileFormatError(f"{name} is a zarr group; name one of the arrays within, for example {name}/A")
    older = [document.get("compressor"), *(document.get("filters") or ())]
    for codec in _codecs([*document.get("codecs", ()), *older]):
        if codec.removeprefix("numcodecs.") not in CODECS:
            raise FileFormatError(
                f"{name} is encoded with {codec!r}, which is not read; store it with another codec, for "
                f"example zstd"
            )


def _codecs(specifications: Any) -> list[str]:
    """Return the names of codecs and of those within them."""
    names = []
    for codec in specifications:
        if codec is None:
            continue
        names.append(str(codec if isinstance(codec, str) else codec.get("name", codec.get("id"))))
        within = {} if isinstance(codec, str) else codec.get("configuration") or {}
        names += _codecs([*within.get("codecs", ()), *within.get("index_codecs", ())])
    return names


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
            from attnfit.data.sources.zarr_chunks import bounded

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
