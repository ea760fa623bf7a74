"""What the metadata of a zarr array say, before zarr is asked to believe them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from attnfit.designs.sources.base import require_file
from attnfit.designs.sources.errors import FileFormatError

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
