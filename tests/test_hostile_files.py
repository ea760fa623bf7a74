"""Data files that are damaged or hostile: a named error, never code, a crash or a giant allocation."""

import io
import os
import resource
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hostile import FORMATS, read_all, write_zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfit.data.sources import open_source

# ------------------------------------------------------------------------------------------------ any format


@pytest.mark.parametrize("name", FORMATS)
def test_cut_off_anywhere(name, tmp_path):
    path = FORMATS[name](tmp_path)
    target = path / "c" / "1" / "0" if path.is_dir() else path
    whole = target.read_bytes()
    lengths = {*range(200), *range(0, len(whole), 37), *range(len(whole) - 60, len(whole))}
    for length in sorted(length for length in lengths if 0 <= length < len(whole)):
        target.write_bytes(whole[:length])
        assert read_all(path) is not None, length
    target.write_bytes(whole)
    assert read_all(path) is None


@given(
    data=st.binary(max_size=400),
    suffix=st.sampled_from([".npy", ".npz", ".parquet", ".zip"]),
    head=st.booleans(),
)
def test_random_bytes(tmp_path_factory, data, suffix, head):
    path = tmp_path_factory.mktemp("random") / f"a{suffix}"
    magic = {".npy": b"\x93NUMPY\x01\x00", ".parquet": b"PAR1"}.get(suffix, b"PK\x03\x04")
    path.write_bytes(magic + data + magic if head else data)
    assert read_all(path) is not None


@pytest.mark.parametrize("name", ["npy", "npz", "compressed"])
@given(data=st.data())
@settings(max_examples=150)
def test_changed_bytes(name, tmp_path_factory, data):
    at = tmp_path_factory.mktemp("changed")
    path = FORMATS[name](at)
    contents = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        contents[data.draw(st.integers(0, len(contents) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(contents)
    read_all(path)
    shutil.rmtree(at)


CHANGE = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
import numpy as np
from pathlib import Path
import test_hostile_files as hostile
path, target = Path(sys.argv[1]), Path(sys.argv[2])
whole, rng, refused = target.read_bytes(), np.random.default_rng(int(sys.argv[3])), 0
hostile.read_all(path)
for k in range(int(sys.argv[4])):
    contents = bytearray(whole)
    # Every byte of what describes the data, one after another; then several anywhere.
    places = [len(whole) - 1 - k] if k < len(whole) and k % 2 else rng.integers(0, len(whole), 3)
    for place in places:
        contents[place] = rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))])
    target.write_bytes(contents)
    refused += hostile.read_all(path) is not None
target.write_bytes(whole)
assert hostile.read_all(path) is None
# Unlike ru_maxrss this does not begin with what the parent process holds.
status = Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else ["VmHWM 0"]
print(refused, *[line.split()[1] for line in lines if line.startswith("VmHWM")])
"""


@pytest.mark.parametrize(
    ("name", "part", "rounds"),
    [
        ("parquet", ".", 500),
        ("zarr", "c/1/0", 120),
        ("zarr", "zarr.json", 300),
        ("gzip", "c/1/0", 60),
        ("shards", "c/0/0", 100),
    ],
)
def test_changed_bytes_do_not_crash(name, part, rounds, tmp_path):
    """Compiled decoders read these: a crash is one of another process."""
    options = {
        "zarr": {},
        "gzip": {"compressors": zarr.codecs.GzipCodec()},
        "shards": {"chunks": (10, 5), "shards": (30, 5)},
    }
    path = write_zarr(tmp_path, **options[name]) if name in options else FORMATS[name](tmp_path)
    script = CHANGE.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, path, path / part if part != "." else path, "0", str(rounds)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, peak = map(int, done.stdout.split())
    assert refused > rounds / 20
    assert peak < 1 << 20, f"{peak} KiB"


# ------------------------------------------------------------------------------------------------ npy


def npy(path, header, body=b"\0" * 4096):
    text = header.encode("latin1")
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)
    return path


@pytest.mark.parametrize(
    ("descr", "shape", "message"),
    [
        ("'<f8'", "(4611686018427387904, 4)", "truncated"),
        ("'<f8'", "(2, 4611686018427387904)", "a row does not fit"),
        ("'<f8'", "(99999999999999999999999, 3)", "truncated"),
        ("'<f8'", "(-1, 4)", "impossible shape"),
        ("'<f8'", "(-4611686018427387904, -4)", "impossible shape"),
        ("'<f8'", "(10**9, 4)", "not a readable"),
        ("'<f8'", "(1.5, 4)", "not a readable"),
        ("'<f8'", "[3, 4]", "not a readable"),
        ("'<f8'", "None", "not a readable"),
        ("'|O'", "(3, 4)", "Python objects"),
        ("[('a', '<f8'), ('b', '|O')]", "(3, 4)", "Python objects"),
        ("[('a', '<f8')]", "(3, 4)", "dtype"),
        ("('<f8', (3,))", "(3, 4)", "dtype|not a readable"),
        ("'|V8'", "(3, 4)", "dtype"),
        ("'<U0'", "(3,)", "dtype"),
        ("'|S999999999'", "(3,)", "truncated"),
        ("'nonsense'", "(3, 4)", "not a readable"),
        ("__import__('os').abort()", "(3, 4)", "not a readable"),
        ("'<f8'", "(" * 3000, "not a readable"),
        ("'<f8'", "-" * 3000 + "1", "not a readable"),
        ("'<f8'", " " * 50000 + "(3, 4)", "not a readable"),
    ],
)
def test_npy_headers(descr, shape, message, tmp_path):
    path = npy(tmp_path / "a.npy", f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")
    assert message.replace("|", "") and any(part in read_all(path) for part in message.split("|"))


def test_npy_with_pickled_objects(tmp_path, bomb):
    np.save(tmp_path / "a.npy", np.array([bomb, bomb], dtype=object), allow_pickle=True)
    assert "holds Python objects" in read_all(tmp_path / "a.npy")


def test_npy_that_is_mostly_a_hole(tmp_path):
    path = npy(tmp_path / "a.npy", "{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000, 16), }\n")
    os.truncate(path, 128 + 2 * 10**9 * 128)
    source = open_source(path)
    assert source.read(10**9, 10**9 + 3).shape == (3, 16) and len(source.edges) < 1 << 21
    source.close()


# ------------------------------------------------------------------------------------------------ npz


def shard(path, compression=zipfile.ZIP_STORED, **members):
    """Write the members of a CSR matrix of 3 rows and 4 columns, some of them replaced."""
    parts = {
        "format": np.array(b"csr"),
        "shape": np.array([3, 4]),
        "indptr": np.array([0, 1, 2, 3], np.int32),
        "indices": np.array([0, 1, 3], np.int32),
        "data": np.ones(3),
    } | members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in parts.items():
            if value is not None:
                file = io.BytesIO()
                np.lib.format.write_array(file, np.asarray(value), allow_pickle=True)
                archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else file.getvalue())
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"indptr": None}, "no member 'indptr'"),
        ({"format": None}, "no member 'format'"),
        ({"format": np.array(b"csc")}, "not a CSR matrix"),
        ({"format": np.array(7)}, "not a CSR matrix"),
        ({"shape": np.array([3, 4, 5])}, "number of rows and columns"),
        ({"shape": np.array([3.0, 4.0])}, "number of rows and columns"),
        ({"shape": np.array([-3, 4])}, "number of rows and columns"),
        ({"shape": np.array([2**62, 4])}, "number of rows and columns"),
        ({"shape": np.array([2**61, 4])}, "rows but indptr has shape"),
        ({"shape": np.array([3, 2**40])}, "at most"),
        ({"shape": np.array([2, 4])}, "rows but indptr has shape"),
        ({"indptr": np.array([0, 2, 1, 3])}, "malformed indptr"),
        ({"indptr": np.array([1, 1, 2, 3])}, "malformed indptr"),
        ({"indptr": np.array([-1, 1, 2, 3])}, "malformed indptr"),
        ({"indptr": np.array([0, 2**63 - 1, -(2**63), 3])}, "malformed indptr"),
        ({"indptr": np.array([0, 1, 2, 2**40])}, "cut off"),
        ({"indptr": np.array([0.0, 1.0, 2.0, 3.0])}, "wrong type"),
        ({"indptr": np.array([[0], [1], [2], [3]])}, "indptr has shape"),
        ({"indices": np.array([0, 1, 4])}, "row 2, has an entry in column 4"),
        ({"indices": np.array([0, -1, 3])}, "row 1, has an entry in column -1"),
        ({"indices": np.array([0, 1])}, "cut off"),
        ({"indices": np.array([[0, 1, 3]])}, "wrong type"),
        ({"indices": np.array([0, 1, 2**63], np.uint64)}, "wrong type"),
        ({"data": np.ones(2)}, "cut off"),
        ({"data": np.ones((3, 1))}, "wrong type"),
        ({"data": np.array(["a", "b", "c"])}, "dtype"),
        ({"data": np.ones(3, complex)}, "dtype"),
        ({"data": b"\x93NUMPY\x01\x00"}, "not a readable .npy"),
        ({"data": b""}, "not a readable .npy"),
    ],
)
def test_npz_members(members, message, tmp_path):
    assert message in read_all(shard(tmp_path / "a.npz", **members))


def test_npz_with_pickled_objects(tmp_path, bomb):
    objects = np.array([bomb] * 3, dtype=object)
    for name in ("format", "shape", "indptr", "indices", "data"):
        assert "Python objects" in read_all(shard(tmp_path / "a.npz", **{name: objects}))


def test_npz_bombs(tmp_path):
    """A megabyte of zeros of zeros, and members that promise what they do not hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = shard(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, data=np.zeros(2 * 10**7, np.uint8))
    assert read_all(path) is None
    n = 2**33
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({n},), }}".ljust(117) + "\n"
    with zipfile.ZipFile(path, "r") as archive:
        names = {name: archive.read(name) for name in archive.namelist() if name != "data.npy"}
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(1 << 20)
    start = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()
    packed = deflate.compress(start) + b"".join(deflate.compress(piece) for _ in range(64)) + deflate.flush()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, contents in names.items():
            archive.writestr(name, contents)
        archive.writestr("data.npy", packed)
    # The directory says what the header says, so that only the size of the file speaks against both.
    contents = bytearray(path.read_bytes())
    at = contents.rfind(b"PK\x01\x02")
    contents[at + 10 : at + 12] = (8).to_bytes(2, "little")
    for claim in (2**32 - 2, 1 << 26):
        contents[at + 24 : at + 28] = claim.to_bytes(4, "little")
        path.write_bytes(contents)
        assert read_all(path) is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_npz_members_in_unusual_codings(tmp_path):
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert "unusual way" in read_all(shard(tmp_path / "a.npz", compression))
    path = shard(tmp_path / "a.npz")
    contents = bytearray(path.read_bytes())
    at = contents.find(b"PK\x01\x02")
    contents[at + 8] |= 1
    path.write_bytes(contents)
    assert "encrypted" in read_all(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../data.npy", b"")
    assert "no member" in read_all(path)


# ------------------------------------------------------------------------------------------------ Parquet


def test_parquet_row_groups_that_cannot_be(tmp_path):
    """A million rows of one repeated value are honest and small, two thousand million are not believed."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.zeros(10**6)}), path)
    assert read_all(path) is None
    contents = path.read_bytes()
    # Row counts are varints: a million becomes 2e9 with one more byte.
    small, large = varint(2 * 10**6), varint(4 * 10**9)
    footer = int.from_bytes(contents[-8:-4], "little")
    described = contents[-8 - footer : -8].replace(small, large)
    path.write_bytes(contents[: -8 - footer] + described + len(described).to_bytes(4, "little") + b"PAR1")
    assert "takes 16000000000 bytes of memory according to a file of" in read_all(path)


def varint(n):
    parts = []
    while n > 127:
        parts.append(n & 127 | 128)
        n >>= 7
    return bytes([*parts, n])
