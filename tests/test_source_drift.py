"""Files that change under a fit are found and named."""

import os
import pickle
import shutil
import time

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from stored_files import ALL, N, dense, matrix, small_pieces, write_npy, write_zarr

from attnfit.data.sources import DriftError, open_source
from attnfit.data.sources.base import checksum, first_difference


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    small_pieces(monkeypatch)


# ---------------------------------------------------------------------------------------------- files


def rewrite(name, at, a, row):
    """Change one entry of what is stored, as a program that updates its data does."""
    b = a.copy()
    b[row, 2] += 1.0
    if name == "memmap":
        whole = np.load(at / "a.npy", mmap_mode="r+")
        whole[13 + row] = b[row]
        whole.flush()
    elif name in ("zarr", "sharded", "zarr2"):
        zarr.open_array(at / "a.zarr")[row] = b[row]
    else:
        for left in (at / "a", at / "a.zarr"):
            shutil.rmtree(left, ignore_errors=True)
        ALL[name](at, b)


PLACES = {
    "npy": r"a\.npy .*block 31 \(rows 496 to 511\)",
    "fortran": r"a\.npy .*block 31 \(rows 496 to 511\)",
    "memmap": r"a\.npy .*block 31 \(rows 496 to 511\)",
    "zarr": r"a\.zarr .*chunk 5 \(rows 500 to 599\)",
    "sharded": r"a\.zarr .*chunk 10 \(rows 500 to 549\)",
    "zarr2": r"a\.zarr .*chunk 5 \(rows 500 to 599\)",
    "zip": r"a\.zip .*chunk 5 \(rows 500 to 599\)",
    "parquet": r"part-11\.parquet .*row group 1 \(rows 493 to 582\)",
    "csr": r"11\.npz .*shard 3 \(rows 403 to 1002\)",
}


@pytest.mark.parametrize("name", ALL)
def test_changed_blocks_are_named(name, tmp_path):
    a = matrix()
    source = open_source(ALL[name](tmp_path, a))
    source.read(0, N)
    rewrite(name, tmp_path, a, 507)
    with pytest.raises(
        DriftError, match=rf"{PLACES[name]}.*differs from the first read; leave the file alone"
    ):
        for low in range(0, N, 100):
            source.read(low, min(low + 100, N))
    source.close()


@pytest.mark.parametrize("name", ALL)
def test_changes_behind_the_clock_are_found(name, tmp_path):
    """Sizes and times of all files stay as they were: only the contents tell."""
    a = matrix()
    source = open_source(ALL[name](tmp_path, a))
    source.read(0, N)
    seen = {file: file.stat() for file in tmp_path.rglob("*") if file.is_file()}
    data = {file: bytearray(file.read_bytes()) for file in seen}
    rewrite(name, tmp_path, a, 507)
    for file, stat in seen.items():
        changed = file.read_bytes()
        # In place, so that the inode is kept as well.
        file.write_bytes(data[file])
        with open(file, "r+b") as open_file:
            open_file.write(changed[: len(data[file])].ljust(len(data[file]), b"\0"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DriftError, match="changed while it was being read"):
        for low in range(0, N, 37):
            source.read(low, min(low + 37, N))
    source.close()


def test_one_block_that_is_read_again_and_again_is_compared(tmp_path):
    a = matrix(90, 3)
    source = open_source(write_zarr(tmp_path, a, chunks=(100, 3)))
    source.read(0, 40)
    zarr.open_array(tmp_path / "a.zarr")[5, 1] = 0.0
    with pytest.raises(DriftError, match="chunk 0"):
        source.read(0, 40)


def files_of(at):
    return [file for file in at.rglob("*") if file.is_file() and file.name not in (".zattrs",)]


@pytest.mark.parametrize("name", ALL)
def test_touched_files_have_not_drifted(name, tmp_path):
    a = matrix()
    source = open_source(ALL[name](tmp_path, a))
    source.read(0, 500)
    for file in files_of(tmp_path):
        os.utime(file, ns=(1, time.time_ns()))
    assert np.array_equal(dense(source.read(0, N)), a)
    for file in files_of(tmp_path):
        # The same bytes in another inode.
        shutil.copy(file, tmp_path / "copy")
        os.replace(tmp_path / "copy", file)
    assert np.array_equal(dense(source.take(np.arange(N))), a)
    source.close()


@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "directory", "other shape", "other data"])
@pytest.mark.parametrize("name", ALL)
def test_lost_and_replaced_files_are_named(name, how, tmp_path):
    a = matrix()
    source = open_source(ALL[name](tmp_path, a))
    source.read(0, N)
    for file in files_of(tmp_path):
        if how == "delete":
            file.unlink()
        elif how == "truncate":
            os.truncate(file, file.stat().st_size // 2)
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "directory":
            file.unlink()
            file.mkdir()
        else:
            file.unlink()
    if how.startswith("other"):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        ALL[name](tmp_path, a[:-1] if how == "other shape" else a[::-1])
    for act in (
        lambda: source.read(0, N),
        lambda: source.read(700, 710),
        lambda: source.take(np.array([3, 900])),
    ):
        with pytest.raises(DriftError, match="changed while it was being read"):
            act()
    source.close()


def test_a_file_that_is_lost_before_it_was_read(tmp_path):
    """Workers open what they are sent, perhaps much later."""
    a = matrix()
    data = pickle.dumps(open_source(write_npy(tmp_path, a)))
    write_npy(tmp_path, a[:50])
    with pytest.raises(DriftError, match=r"had shape \(1003, 7\) .* now it has shape \(50, 7\)"):
        pickle.loads(data).read(0, 10)
    os.unlink(tmp_path / "a.npy")
    with pytest.raises(DriftError, match="cannot be opened any more"):
        pickle.loads(data).read(0, 10)


def test_checksums_travel(tmp_path):
    a = matrix()
    source = open_source(write_npy(tmp_path, a))
    source.read(0, N)
    data = pickle.dumps(source)
    rewrite("npy", tmp_path, a, 507)
    with pytest.raises(DriftError, match="block 31"):
        pickle.loads(data).read(0, 10)


@pytest.mark.parametrize("name", ALL)
def test_threads_compare_with_what_others_read(name, tmp_path):
    a = matrix()
    source = open_source(ALL[name](tmp_path, a))
    apart = source.thread_copy()
    apart.read(0, N)
    rewrite(name, tmp_path, a, 507)
    for make in (lambda: source, source.thread_copy, lambda: apart):
        with pytest.raises(DriftError, match=PLACES[name]):
            each = make()
            for low in range(0, N, 100):
                each.read(low, min(low + 100, N))
    source.close()
    apart.close()


def test_threads_find_out_once_that_a_file_was_touched(tmp_path, monkeypatch):
    a = matrix()
    source = open_source(write_npy(tmp_path, a))
    source.read(0, N)
    os.utime(tmp_path / "a.npy", ns=(1, time.time_ns()))
    first = source.thread_copy()

    def renew(*_):
        raise AssertionError("compared again")

    monkeypatch.setattr(type(source), "_renew", renew)
    for each in (source, first, source.thread_copy()):
        assert np.array_equal(each.read(0, N), a)
        each.close()


def test_a_missing_chunk_is_drift(tmp_path):
    a = matrix()
    source = open_source(write_zarr(tmp_path, a))
    source.read(0, N)
    (tmp_path / "a.zarr" / "c" / "5" / "1").unlink()
    with pytest.raises(DriftError, match="chunk 5"):
        source.read(0, N)


# ------------------------------------------------------------------------------------------------ checksums


@given(data=st.binary(min_size=1, max_size=300), at=st.integers(0, 10**6), change=st.integers(1, 255))
def test_checksums_see_every_byte(data, at, change):
    a = np.frombuffer(data, np.uint8).copy()
    before = checksum(a)
    assert before > 0
    a[at % len(a)] ^= change
    assert checksum(a) != before
    assert checksum(np.append(a, np.uint8(0))) != checksum(a)


def test_checksums_see_order_and_signs():
    a = matrix(64, 8)
    seen = {checksum(a)}
    for b in (a[::-1].copy(), a[np.r_[1, 0, 2:64]], a[:, ::-1].copy(), -a, a * np.array([-1.0] + [1.0] * 7)):
        seen.add(checksum(b))
    for i in range(0, 512, 8):
        b = a.reshape(-1).copy()
        b[[3, i if i != 3 else 4]] *= -1.0
        seen.add(checksum(b))
    assert len(seen) == 1 + 5 + 64
    zeros = {checksum(np.zeros(n, np.uint8)) for n in range(200)}
    assert len(zeros) == 200


def test_checksums_of_several_blocks():
    rows = np.random.default_rng(0).integers(0, 256, (1000, 3), dtype=np.uint8)
    edges = np.array([7, 24, 280, 281, 1007])
    known = np.zeros(4, np.uint64)
    assert first_difference(rows, edges, 3, known) == -1
    assert len(set(known)) == 4 and first_difference(rows, edges, 3, known) == -1
    for block, row in [(0, 16), (1, 17), (2, 273), (3, 999)]:
        changed = rows.copy()
        changed[row, 1] ^= 64
        assert first_difference(changed, edges, 3, known) == block
