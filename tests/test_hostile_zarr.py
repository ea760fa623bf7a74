"""Zarr arrays that are damaged or hostile: a named error, never code, a crash or a giant allocation."""

import bz2
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numcodecs
import numpy as np
import pyarrow as pa
import pytest
import zarr
from hostile import A, read_all, write_zarr

from attnfit.data.sources import FileFormatError, open_source

NONSENSE = [
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    "",
    "nonsense",
    [],
    [-1],
    [0, 0],
    [1, 2, 3],
    ["a", "b"],
    {},
    {"name": 1},
]


def paths_within(document, at=()):
    """Return the places of all entries of a JSON document."""
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    return [place for key, value in items for place in ((*at, key), *paths_within(value, (*at, key)))]


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_metadata_of_wrong_types(version, tmp_path):
    path = write_zarr(tmp_path, zarr_format=version)
    file = path / {2: ".zarray", 3: "zarr.json"}[version]
    whole = json.loads(file.read_text())
    refused = 0
    for place in paths_within(whole):
        for value in NONSENSE:
            document = json.loads(json.dumps(whole))
            entry = document
            for key in place[:-1]:
                entry = entry[key]
            entry[place[-1]] = value
            file.write_text(json.dumps(document))
            refused += read_all(path) is not None
    assert refused > 100
    for text in (
        "",
        "[]",
        "7",
        "null",
        "{",
        "[" * 100_000,
        '{"shape": NaN}',
        "\xff\xfe",
        json.dumps({"node_type": "array"}),
    ):
        file.write_text(text, encoding="latin1")
        assert read_all(path) is not None


def change(path, **entries):
    file = path / "zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return path


def test_zarr_absurd_shapes(tmp_path):
    grid = {"name": "regular", "configuration": {"chunk_shape": [2**61, 5]}}
    assert "at most 2 GiB" in read_all(change(write_zarr(tmp_path), shape=[2**62, 5], chunk_grid=grid))
    assert "larger chunks" in read_all(change(write_zarr(tmp_path), shape=[2**62, 5]))
    assert "a row does not fit" in read_all(change(write_zarr(tmp_path), shape=[50, 2**60]))
    assert read_all(change(write_zarr(tmp_path), shape=[-50, 5])) is not None
    assert "larger than the metadata" in read_all(
        change(write_zarr(tmp_path), attributes={"a": "x" * (1 << 24)})
    )


def test_zarr_codecs(tmp_path):
    codecs = json.loads((write_zarr(tmp_path) / "zarr.json").read_text())["codecs"]
    for name in ("nonsense", "pickle", "numcodecs.pickle", "vlen-utf8"):
        made = change(write_zarr(tmp_path), codecs=[*codecs, {"name": name, "configuration": {}}])
        assert f"encoded with {name!r}, which is not read" in read_all(made)
        hidden = {
            "name": "sharding_indexed",
            "configuration": {"chunk_shape": [5, 5], "codecs": [{"name": name}]},
        }
        assert name in read_all(change(write_zarr(tmp_path), codecs=[hidden]))


def test_zarr_chunks_with_pickled_objects(tmp_path, bomb):
    for dtype in ("<f8", "|O"):
        for where in (
            {"filters": [{"id": "pickle", "protocol": 5}]},
            {"compressor": {"id": "pickle", "protocol": 5}},
        ):
            path = write_zarr(tmp_path, zarr_format=2)
            document = json.loads((path / ".zarray").read_text()) | {
                "dtype": dtype,
                "filters": None,
                "compressor": None,
            }
            (path / ".zarray").write_text(json.dumps(document | where))
            for chunk in path.glob("[0-9]*"):
                chunk.write_bytes(pickle.dumps(bomb))
            assert "encoded with 'pickle'" in read_all(path)
            archive = shutil.make_archive(str(tmp_path / "a"), "zip", path)
            assert "encoded with 'pickle'" in read_all(archive)


def test_zarr_arrays_in_hand_are_checked_too(tmp_path):
    path = write_zarr(tmp_path, zarr_format=2)
    document = json.loads((path / ".zarray").read_text()) | {"filters": [{"id": "base64"}]}
    (path / ".zarray").write_text(json.dumps(document))
    store = zarr.storage.MemoryStore()
    for file in (".zarray", ".zattrs"):
        zarr.core.sync.sync(
            store.set(file, zarr.core.buffer.cpu.Buffer.from_bytes((path / file).read_bytes()))
        )
    with pytest.raises(FileFormatError, match="encoded with 'base64', which is not read"):
        open_source(zarr.open_array(store, mode="r"))


# ---------------------------------------------------------------------------------------- chunks that grow

BOMB = 1 << 28
CODECS = {
    "blosc": (zarr.codecs.BloscCodec, numcodecs.Blosc),
    "bz2": (zarr.codecs.numcodecs.BZ2, numcodecs.BZ2),
    "gzip": (zarr.codecs.GzipCodec, numcodecs.GZip),
    "lz4": (zarr.codecs.numcodecs.LZ4, numcodecs.LZ4),
    "zlib": (zarr.codecs.numcodecs.Zlib, numcodecs.Zlib),
    "zstd": (zarr.codecs.ZstdCodec, numcodecs.Zstd),
}
PACKERS = {
    "bz2": bz2.BZ2Compressor,
    "gzip": lambda: zlib.compressobj(9, zlib.DEFLATED, 31),
    "zlib": lambda: zlib.compressobj(9),
}


@cache
def bomb_of(name):
    """Return 256 MiB of zeros, compressed without the size in front that some formats have."""
    piece, out = bytes(1 << 22), io.BytesIO()
    if name == "zstd":
        with pa.CompressedOutputStream(out, "zstd") as file:
            for _ in range(BOMB >> 22):
                file.write(piece)
            file.flush()
            return out.getvalue()
    packer = PACKERS[name]()
    return b"".join(packer.compress(piece) for _ in range(BOMB >> 22)) + packer.flush()


def bombs(name, honest):
    """Return what says that it holds more than a chunk of 1,000 bytes, or does, alone or after another."""
    if name in ("blosc", "lz4"):
        at = 4 if name == "blosc" else 0
        return [honest[:at] + BOMB.to_bytes(4, "little") + honest[at + 4 :]]
    found = [bomb_of(name)]
    if name != "zlib":
        found.append(honest + bomb_of(name))
    if name == "zstd":
        found.append(CODECS[name][1]().encode(bytes(BOMB)))
    return found


def peak_while(call, *args):
    """Return what a function returns, and by how many bytes the process was larger meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    found = call(*args)
    return found, resident("VmHWM") - before


def resident(what):
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) << 10


def require_refused(path, chunk, contents):
    chunk.write_bytes(contents)
    message, grown = peak_while(read_all, path)
    assert "chunk 0 cannot be decoded: it decompresses to more than the" in message
    assert grown < BOMB / 8


def in_shard(inner):
    """Return a shard of chunks that are all the same bytes: its index, at its end, tells where they lie."""
    index = np.array([[0, len(inner)]] * 2, "<u8").tobytes()
    return inner + bytes(numcodecs.CRC32C().encode(index))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak size of a process is set back in /proc only")
@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("name", CODECS)
def test_chunks_that_decompress_to_more_than_they_claim(name, tmp_path):
    codec, older = (make() for make in CODECS[name])
    path = write_zarr(tmp_path, compressors=[codec])
    assert read_all(path) is None
    chunk = path / "c" / "0" / "0"
    every = bombs(name, chunk.read_bytes())
    for bomb in every:
        require_refused(path, chunk, bomb)
    # In a shard, around a shard, in format 2 as compressor and as filter, in a zip file.
    path = write_zarr(tmp_path, compressors=[codec], shards=(50, 5))
    for bomb in every:
        require_refused(path, path / "c" / "0" / "0", in_shard(bomb))
    document = json.loads((path / "zarr.json").read_text())
    change(path, codecs=[*document["codecs"], codec.to_dict()])
    zarr.open_array(path)[:] = A
    assert read_all(path) is None
    for bomb in every:
        require_refused(path, path / "c" / "0" / "0", bomb)
    for options in ({"compressors": [older]}, {"compressors": None, "filters": [older]}):
        path = write_zarr(tmp_path, zarr_format=2, **options)
        assert read_all(path) is None
        for bomb in every:
            require_refused(path, path / "0.0", bomb)
    archive = shutil.make_archive(str(tmp_path / "a"), "zip", path)
    message, grown = peak_while(read_all, archive)
    assert "decompresses to more than the" in message
    assert grown < BOMB / 8


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("name", CODECS)
def test_every_codec_reads_what_zarr_wrote(name, tmp_path):
    """Chunks over edges, shards, filters, and arrays in memory."""
    codec, older = (make() for make in CODECS[name])
    transpose, delta = zarr.codecs.TransposeCodec(order=(1, 0)), zarr.codecs.numcodecs.Delta(dtype="f8")
    stores = [
        write_zarr(tmp_path / "a", compressors=[codec]),
        write_zarr(tmp_path / "b", compressors=[codec], chunks=(7, 2), shards=(21, 4)),
        write_zarr(tmp_path / "c", compressors=[codec, codec], filters=[transpose]),
        write_zarr(tmp_path / "d", compressors=[codec], filters=[delta]),
        write_zarr(tmp_path / "e", compressors=[older], zarr_format=2, filters=[numcodecs.Delta("f8")]),
        zarr.create_array({}, data=A, chunks=(25, 5), compressors=[codec]),
        zarr.create_array({}, data=A, chunks=(25, 5), compressors=[older], zarr_format=2),
    ]
    for store in stores:
        source = open_source(store)
        np.testing.assert_allclose(source.read(0, 60), A, atol=1e-14)
        again = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(again.read(3, 50), source.read(3, 50))


def test_arrays_in_memory_are_bounded_and_left_as_they_are(tmp_path):
    array = zarr.create_array({}, data=A, chunks=(25, 5))
    source = open_source(array)
    buffer = zarr.core.buffer.cpu.Buffer.from_bytes(bomb_of("zstd"))
    zarr.core.sync.sync(array.store.set("c/0/0", buffer))
    with pytest.raises(FileFormatError, match="chunk 0 cannot be decoded: it decompresses to more than the"):
        source.read(0, 60)
    assert zarr.codecs.ZstdCodec in {type(codec) for codec in array.async_array.codec_pipeline}


def test_chunk_files_that_are_longer_than_any_chunk(tmp_path):
    """A hole of a terabyte takes no room on the disk, and would all be read."""
    path = write_zarr(tmp_path, compressors=None)
    os.truncate(path / "c" / "0" / "0", 1 << 40)
    assert "takes 1099511627776 bytes, a chunk of this array at most" in read_all(path)
    path = write_zarr(tmp_path, compressors=None)
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path / "zarr.json", "zarr.json")
        with archive.open("c/0/0", "w", force_zip64=True) as member:
            for _ in range(BOMB >> 22):
                member.write(bytes(1 << 22))
    assert "member c/0/0 takes 268435456 bytes" in read_all(tmp_path / "b.zip")


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
def test_shards_that_cannot_be(tmp_path):
    def sharded(shape, *more):
        path = write_zarr(tmp_path, shards=(50, 5))
        codecs = json.loads((path / "zarr.json").read_text())["codecs"]
        grid = {"name": "regular", "configuration": {"chunk_shape": shape}}
        return change(path, codecs=[*codecs, *more], chunk_grid=grid)

    assert "larger chunks" in read_all(sharded([25 * 2**30, 5]))
    assert "at most 2 GiB" in read_all(
        sharded([25 * 2**22, 5], {"name": "zstd", "configuration": {"level": 1}})
    )
