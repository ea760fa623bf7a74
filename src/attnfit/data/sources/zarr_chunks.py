"""Chunks of zarr arrays that may not decode to more than a chunk holds. Importing this imports zarr.

A decompressor believes what it is given: a kilobyte can say that it holds a terabyte, or be one. Compressed
chunks tell their size in front, which is compared before anything is allocated for it, or are decompressed
here and no further than that.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from zarr import Array
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import ShardingCodec

from attnfit.data.sources.zarr_store import most_bytes

# Where the first bytes tell the size that their decoder makes room for.
CLAIMED = {"blosc": slice(4, 8), "lz4": slice(0, 4)}


def bounded(array: Array[Any]) -> Array[Any]:
    """Return a zarr array that decodes nothing to more than `most_bytes`."""
    found = copy.copy(array._async_array)
    codecs = _bounded(found.codec_pipeline, array.shards or array.chunks, array.dtype.itemsize)
    object.__setattr__(found, "codec_pipeline", type(found.codec_pipeline).from_codecs(codecs))
    return Array(found)


def _bounded(codecs: Iterable[Any], shape: tuple[int, ...], itemsize: int) -> list[Codec]:
    codecs = list(codecs)
    inner = next((codec.chunk_shape for codec in codecs if isinstance(codec, ShardingCodec)), None)
    most, found = most_bytes(shape, itemsize, inner), []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            codec = replace(codec, codecs=_bounded(codec.codecs, codec.chunk_shape, itemsize))
        elif isinstance(codec, BytesBytesCodec):
            codec = _Bounded(codec, most)
        elif hasattr(codec, "compressor"):  # format 2
            compressor, filters = codec.compressor, codec.filters
            codec = replace(
                codec,
                compressor=None if compressor is None else _BoundedV2(compressor, most),
                filters=None if filters is None else tuple(_BoundedV2(each, most) for each in filters),
            )
        found.append(codec)
    return found


@dataclass(frozen=True)
class _Bounded(BytesBytesCodec):
    """A codec of format 3."""

    codec: Any
    most: int

    is_fixed_size = False

    def evolve_from_array_spec(self, array_spec: Any) -> _Bounded:
        return replace(self, codec=self.codec.evolve_from_array_spec(array_spec))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return int(self.codec.compute_encoded_size(input_byte_length, chunk_spec))

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        contents = decompressed(self.codec.to_dict()["name"], chunk_data.as_numpy_array(), self.most)
        if contents is None:
            (found,) = await self.codec.decode([(chunk_data, chunk_spec)])
            return found
        return chunk_spec.prototype.buffer.from_bytes(contents)


@dataclass(frozen=True)
class _BoundedV2:
    """A compressor or filter of format 2."""

    codec: Any
    most: int

    def decode(self, chunk: Any) -> Any:
        contents = decompressed(self.codec.codec_id, chunk, self.most)
        return self.codec.decode(chunk) if contents is None else contents


def decompressed(name: str, chunk: Any, most: int) -> bytes | None:
    """Return the contents of a compressed chunk, or None where its codec can be trusted with it.

    Raises
    ------
    ValueError
        If the chunk holds more than ``most`` bytes.
    """
    name = name.removeprefix("numcodecs.")
    data, contents, size = memoryview(chunk).cast("B"), None, 0
    if name in CLAIMED:
        size = int.from_bytes(data[CLAIMED[name]], "little")
    elif name in STREAMS:
        contents = STREAMS[name](data, most + 1)
        size = len(contents)
    if size > most:
        raise ValueError(f"it decompresses to more than the {most} bytes that a chunk can take")
    return contents


def _zstd(data: memoryview, most: int) -> bytes:
    import pyarrow as pa

    with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
        return bytes(stream.read(most))


# The first ``most`` bytes of what they hold. A zstd frame need not tell its size, and others may follow.
STREAMS: dict[str, Callable[[memoryview, int], bytes]] = {
    "bz2": lambda data, most: bz2.BZ2File(io.BytesIO(data)).read(most),
    "gzip": lambda data, most: gzip.GzipFile(fileobj=io.BytesIO(data)).read(most),
    "zlib": lambda data, most: zlib.decompressobj().decompress(data, most),
    "zstd": _zstd,
}
