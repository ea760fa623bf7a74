"""Rows that stay on disk read as NumPy, zarr, pyarrow and SciPy read them."""

import copy
import json
import os
import pickle
import shutil
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from stored_files import (
    ALL,
    DENSE,
    D,
    N,
    dense,
    matrix,
    small_pieces,
    write_fortran,
    write_memmap,
    write_npy,
    write_parquet,
    write_shards,
    write_zarr,
)

from attnfit.data.sources import FileFormatError, Source, open_source


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    small_pieces(monkeypatch)


@pytest.fixture(params=ALL)
def stored(request, tmp_path):
    """Return a matrix and the source that has it."""
    a = matrix()
    a[a < -20] = 0.0
    source = open_source(ALL[request.param](tmp_path, a))
    yield a, source
    source.close()


# ------------------------------------------------------------------------------------------ the same numbers


def test_reads_what_was_written(stored):
    a, source = stored
    assert source.shape == a.shape and source.dtype == a.dtype and source.name
    assert 1 <= source.stored_rows <= len(a)
    assert source.edges[0] == 0 and source.edges[-1] == N and (np.diff(source.edges) > 0).all()
    for low, high in [(0, N), (0, 1), (N - 1, N), (5, 700), (399, 404), (100, 200), (101, 150), (99, 301)]:
        rows = source.read(low, high)
        assert rows.shape == (high - low, D) and rows.dtype == a.dtype
        assert np.array_equal(dense(rows), a[low:high])


def test_takes_rows_in_any_order(stored):
    a, source = stored
    rng = np.random.default_rng(1)
    for rows in (
        rng.integers(0, N, 300),
        np.arange(N)[::-1],
        [5],
        [7, 7, 7],
        np.arange(0, N, 3),
        [],
        [N - 1, 0],
    ):
        assert np.array_equal(dense(source.take(np.array(rows, dtype=np.intp))), a[np.array(rows, dtype=int)])


def test_rows_that_do_not_exist_are_refused(stored):
    _, source = stored
    for low, high in [(0, N + 1), (-1, 5), (5, 5), (6, 5)]:
        with pytest.raises(IndexError, match=f"rows {low} to {high} .* has {N} rows"):
            source.read(low, high)
    for row in (-1, N):
        with pytest.raises(IndexError, match=f"row {row} of"):
            source.take(np.array([0, row]))


@given(data=st.data())
def test_any_sequence_of_reads(tmp_path_factory, data):
    at = tmp_path_factory.mktemp("reads")
    n = data.draw(st.integers(1, 230))
    a = matrix(n, 5, seed=n)
    source = open_source(data.draw(st.sampled_from(list(ALL.values())))(at, a))
    for _ in range(data.draw(st.integers(1, 8))):
        low = data.draw(st.integers(0, n - 1))
        high = data.draw(st.integers(low + 1, n))
        assert np.array_equal(dense(source.read(low, high)), a[low:high])
    source.close()
    shutil.rmtree(at)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", ">f8", ">f4", "i8", "i4", "u1", "u8", ">i2", "?"])
@pytest.mark.parametrize("write", DENSE.values(), ids=DENSE)
def test_types_pass_through(write, dtype, tmp_path):
    a = matrix(230, 4, dtype=dtype)
    if dtype.startswith(">") and write is write_parquet:
        a = a.astype(a.dtype.newbyteorder("="))
    source = open_source(write(tmp_path, a))
    assert source.dtype.kind == a.dtype.kind and source.dtype.itemsize == a.dtype.itemsize
    rows = source.read(0, 230, np.empty(a.nbytes + 16, np.uint8))
    assert rows.dtype == source.dtype and np.array_equal(rows, a)
    for low in (1, 3, 5):
        # Blocks that begin anywhere in memory have the checksums of those that begin at a word.
        assert np.array_equal(source.read(low, 229), a[low:229])
    source.close()


@pytest.mark.parametrize("write", [write_npy, write_fortran, write_memmap, write_zarr, write_shards])
@pytest.mark.parametrize("n", [1, 2, 500])
def test_vectors_and_single_columns(write, n, tmp_path):
    vector = matrix(n, 1)[:, 0]
    source = open_source(write(tmp_path, vector))
    assert source.shape == (n,) and np.array_equal(source.read(0, n), vector)
    assert np.array_equal(source.take(np.array([n - 1, 0])), vector[[n - 1, 0]])
    source.close()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    source = open_source(write(tmp_path, vector[:, None]))
    assert source.shape == (n, 1) and np.array_equal(source.read(0, n), vector[:, None])
    source.close()


@pytest.mark.parametrize("write", DENSE.values(), ids=DENSE)
def test_out_is_filled_and_viewed(write, tmp_path):
    a = matrix()
    source = open_source(write(tmp_path, a))
    out = np.full(a.nbytes, 255, np.uint8)
    for low, high in [(0, N), (33, 150), (150, 151)]:
        rows = source.read(low, high, out)
        assert np.shares_memory(rows, out) and rows.flags.c_contiguous and np.array_equal(rows, a[low:high])
    for wrong in (out[:-1], out.view(float), out.reshape(-1, 8)):
        with pytest.raises(ValueError, match=f"one-dimensional uint8 array of at least {a.nbytes} bytes"):
            source.read(0, N, wrong)
    source.close()


def test_wide_rows_are_blocks_of_their_own(tmp_path):
    a = matrix(9, 300)
    source = open_source(write_npy(tmp_path, a))
    assert np.array_equal(source.edges, np.arange(10)) and np.array_equal(source.read(2, 7), a[2:7])
    source.close()


def test_labels(tmp_path):
    labels = np.array(["Wien", "Linz", "", "Graz ö"] * 60)
    np.save(tmp_path / "labels.npy", labels)
    assert np.array_equal(open_source(tmp_path / "labels.npy").read(0, 240), labels)
    table = pa.table(
        {"market": labels, "category": pa.array(labels).dictionary_encode(), "x": np.arange(240.0)}
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    for column in ("market", "category"):
        source = open_source(tmp_path / "a.parquet", columns=column)
        assert source.shape == (240,) and source.dtype == object
        for _ in range(2):
            assert source.read(0, 240).tolist() == labels.tolist()
        assert source.checksums.all()
        assert source.take(np.array([200, 3])).tolist() == labels[[200, 3]].tolist()
    pq.write_table(pa.table({"market": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(FileFormatError, match="numbers in some files and labels in others, column 'market'"):
        open_source([tmp_path / "a.parquet", tmp_path / "b.parquet"], columns="market")
    x = open_source(tmp_path / "a.parquet", columns="x")
    assert x.shape == (240,) and np.array_equal(x.read(10, 99), np.arange(10.0, 99.0))


# ------------------------------------------------------------------------------ what is particular to formats


def test_npy_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    a = matrix(4000, 4)
    source = open_source(write_npy(tmp_path, a))
    fetched, fetch = [], type(source)._fetch

    def spy(self, into, position):
        fetched.append(into.nbytes)
        fetch(self, into, position)

    monkeypatch.setattr(type(source), "_fetch", spy)
    rows = np.array([7, 8, 9, 10, 2000, 2002, 3999])
    assert np.array_equal(source.take(rows), a[rows])
    assert fetched == [4 * 32, 3 * 32, 32]
    source.close()


def test_memory_maps_by_region(tmp_path):
    a = matrix(5000, 6)
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "f.npy", np.asfortranarray(a))
    a.tofile(tmp_path / "a.bin")
    mapped, fortran = np.load(tmp_path / "a.npy", mmap_mode="r"), np.load(tmp_path / "f.npy", mmap_mode="r")
    bare = np.memmap(tmp_path / "a.bin", dtype=float, mode="r+", offset=48 * 200, shape=(4000, 6))
    for view in (
        mapped,
        mapped[1000:],
        mapped[1234:2345],
        fortran,
        bare,
        bare[900:],
        bare[17],
        mapped.T[:, 3:3000].T,
    ):
        source = open_source(view)
        assert isinstance(source, Source) and source.name.endswith(("a.npy", "f.npy", "a.bin"))
        assert np.array_equal(source.read(0, len(view)), view)
        source.close()
    bare[5] = -1.0
    source = open_source(bare)
    assert np.array_equal(source.read(5, 6), bare[5:6])
    source.close()
    for view in (mapped[::2], mapped[:, :3], fortran[10:20], np.load(tmp_path / "a.npy", mmap_mode="c")):
        with pytest.raises(TypeError, match="memory map"):
            open_source(view)
    for array in (mapped + 1.0, mapped.copy(), mapped[[1, 2]], a):
        with pytest.raises(TypeError, match=r"without a file|not read from disk"):
            open_source(array)


def test_chunks_are_decoded_once_a_pass(tmp_path, monkeypatch):
    a = matrix()
    for name in ("zarr", "parquet", "csr"):
        (tmp_path / name).mkdir()
        source = open_source(ALL[name](tmp_path / name, a))
        decoded = []
        method = "_load" if name == "csr" else "_decode"
        original = getattr(type(source), method)

        def spy(self, first, *rest, original=original, decoded=decoded):
            decoded.extend([first] if not rest else range(first, rest[0]))
            return original(self, first, *rest)

        monkeypatch.setattr(type(source), method, spy)
        for _ in range(2):
            decoded.clear()
            for low in range(0, N, 37):
                source.read(low, min(low + 37, N))
            assert decoded == list(range(len(source.edges) - 1))
        decoded.clear()
        source.take(np.random.default_rng(0).integers(0, N, 400))
        assert len(decoded) == len(set(decoded))
        source.close()


def test_zarr_objects_groups_and_fill_values(tmp_path):
    group = zarr.open_group(tmp_path / "all.zarr", mode="w")
    made = group.create_array("features", shape=(250, 4), chunks=(60, 3), dtype="f4", fill_value=2.5)
    made[60:120] = matrix(60, 4)
    for given_ in (tmp_path / "all.zarr" / "features", made):
        source = open_source(given_)
        assert np.array_equal(source.read(0, 250), made[:])
        again = pickle.loads(pickle.dumps(source))
        assert np.array_equal(again.read(0, 250), made[:])
        source.close()
    with pytest.raises(FileFormatError, match="is a zarr group; name one of the arrays"):
        open_source(tmp_path / "all.zarr")
    held = zarr.create_array(zarr.storage.MemoryStore(), shape=(90, 2), chunks=(40, 2), dtype="f8")
    held[:] = matrix(90, 2)
    assert np.array_equal(open_source(held).read(30, 90), held[30:])


def test_parquet_columns(tmp_path):
    table = pa.table({"a": [1, 2, 3], "b": [0.5, 1.5, 2.5], "c": [True, False, True], "d": ["x", "y", "z"]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    source = open_source(path, columns=["c", "b", "a"])
    assert source.dtype == np.float64
    assert source.read(0, 3).tolist() == [[1.0, 0.5, 1.0], [0.0, 1.5, 2.0], [1.0, 2.5, 3.0]]
    assert open_source(path, columns=["a"]).shape == (3, 1) and open_source(path, columns="a").shape == (3,)
    assert open_source(path, columns=["a", "c"]).dtype == np.int64
    with pytest.raises(
        FileFormatError, match=r"column 'd' of .*t.parquet has type string; encode it as numbers"
    ):
        open_source(path)
    with pytest.raises(FileFormatError, match=r"no column 'e'.*; its columns are 'a', 'b', 'c', 'd'"):
        open_source(path, columns=["a", "e"])
    with pytest.raises(FileFormatError, match="without any columns"):
        open_source(path, columns=[])
    pq.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(FileFormatError, match="is empty"):
        open_source(tmp_path / "empty.parquet", columns="d")
    with pytest.raises(ValueError, match="columns select from Parquet"):
        open_source(write_npy(tmp_path, matrix()), columns=["a"])


def test_parquet_missing_values_are_located(tmp_path):
    column = [float(i) for i in range(50)]
    column[37] = None
    pq.write_table(pa.table({"a": range(50), "b": column}), tmp_path / "t.parquet", row_group_size=20)
    source = open_source(tmp_path / "t.parquet")
    assert source.read(0, 20).shape == (20, 2)
    with pytest.raises(
        FileFormatError, match=r"t.parquet, row group 1 .* missing value at row 37, column 'b'"
    ):
        source.read(0, 50)


def test_parquet_datasets(tmp_path):
    a = matrix()
    dataset = pyarrow.dataset.dataset(write_parquet(tmp_path, a), format="parquet")
    source = open_source(dataset)
    assert source.shape == a.shape
    with pytest.raises(TypeError, match="pass the path"):
        open_source(dataset.filter(pyarrow.dataset.field("x0") > 0))
    files = [tmp_path / "a" / f"part-{k}.parquet" for k in (11, 8)]
    assert np.array_equal(open_source(files).read(0, 603), np.concatenate([a[403:], a[:3]]))
    with pytest.raises(TypeError, match="pass the path"):
        open_source(pq.ParquetFile(files[0]))


def test_shards_must_agree(tmp_path):
    for name, (n, d) in {"1.npz": (5, 3), "2.npz": (4, 2)}.items():
        sparse.save_npz(tmp_path / name, sparse.csr_array(np.ones((n, d))))
    with pytest.raises(FileFormatError, match=r"2.npz has 2 columns but .*1.npz has 3"):
        open_source(tmp_path)
    sparse.save_npz(tmp_path / "c.npz", sparse.csc_array(np.ones((3, 3))))
    with pytest.raises(FileFormatError, match=r"c.npz is not a CSR matrix; .*tocsr"):
        open_source(tmp_path / "c.npz")


def test_shards_with_spare_room_and_other_types(tmp_path):
    matrix_ = sparse.csr_array(np.eye(4, dtype=np.float32))
    matrix_.indices, matrix_.data = np.append(matrix_.indices, 99), np.append(matrix_.data, np.float32(7.0))
    sparse.save_npz(tmp_path / "a.npz", matrix_)
    sparse.save_npz(tmp_path / "b.npz", sparse.csr_matrix(np.eye(4, dtype=int)))
    source = open_source([tmp_path / "a.npz", tmp_path / "b.npz"])
    assert source.dtype == np.float64 and source.sparse and source.name.endswith("a.npz and 1 more")
    assert source.read(0, 4).dtype == np.float64
    assert np.array_equal(source.read(0, 8).toarray(), np.vstack([np.eye(4)] * 2))


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    paths = {"zarr": write_zarr(tmp_path, matrix()), "pyarrow.parquet": write_parquet(tmp_path, matrix())}
    for module, path in paths.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install attnfit\[dask\]"):
            open_source(path)


def test_rows_are_located(tmp_path):
    a = matrix()
    for name in ALL:
        (tmp_path / name).mkdir()
    where = {name: open_source(write(tmp_path / name, a)).locate(402) for name, write in ALL.items()}
    assert where["npy"].endswith("a.npy, block 25")
    assert where["zarr"].endswith("a.zarr, chunk 4")
    assert where["parquet"].endswith("part-10.parquet, row group 0")
    assert where["csr"].endswith("10.npz, shard 2")


def test_what_cannot_be_opened(tmp_path):
    np.save(tmp_path / "empty.npy", np.empty((0, 3)))
    np.save(tmp_path / "narrow.npy", np.empty((3, 0)))
    np.save(tmp_path / "cube.npy", np.empty((3, 3, 3)))
    np.save(tmp_path / "complex.npy", np.ones((3, 2), complex))
    np.save(tmp_path / "dates.npy", np.array(["2020-01-01"], "M8[D]"))
    np.save(tmp_path / "object.npy", np.array([{}, 1], object), allow_pickle=True)
    zarr.create_array(tmp_path / "empty.zarr", shape=(0, 3), dtype="f8")
    pq.write_table(pa.table({"a": pa.array([], pa.float64())}), tmp_path / "empty.parquet")
    sparse.save_npz(tmp_path / "empty.npz", sparse.csr_array((0, 3)))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a.csv").write_text("1,2")
    os.mkfifo(tmp_path / "pipe.npy")
    for name, message in {
        "empty.npy": r"is empty: shape \(0, 3\)",
        "narrow.npy": r"is empty: shape \(3, 0\)",
        "empty.zarr": "is empty",
        "empty.parquet": "is empty",
        "empty.npz": "is empty",
        "cube.npy": r"shape \(3, 3, 3\); store one row an observation",
        "complex.npy": "dtype complex128; convert it to real numbers",
        "dates.npy": "dtype datetime64",
        "object.npy": "holds Python objects; save plain numbers",
        "nothing": "holds no .npz or .parquet files",
        "a.csv": "cannot be told by its ending",
        "pipe.npy": "is not a regular file",
    }.items():
        with pytest.raises(FileFormatError, match=message) as caught:
            open_source(tmp_path / name)
        assert name in str(caught.value)
    for name in ("none.npy", "none.npz", "none.parquet", "none.zarr", "a.csv/none.npy"):
        with pytest.raises(FileNotFoundError, match="no file"):
            open_source(tmp_path / name)
    for nonsense in (7, None, [], [1, 2], {"a": 1}):
        with pytest.raises(TypeError, match=r"paths|pass a path"):
            open_source(nonsense)


# ------------------------------------------------------------------------------------------------ travelling


def test_pickled_sources_open_their_files_anew(stored):
    a, source = stored
    source.read(0, 500)
    data = pickle.dumps(source)
    assert len(data) < 8000
    for again in (pickle.loads(data), copy.copy(source)):
        assert np.array_equal(dense(again.read(0, N)), a) and again.fingerprint() == source.fingerprint()
        again.close()
    source.close()
    assert np.array_equal(dense(source.read(0, N)), a)


def test_sources_of_many_blocks_travel_light(tmp_path):
    source = open_source(write_npy(tmp_path, np.zeros((200_000, 16))))
    assert len(source.edges) > 20_000 and len(pickle.dumps(source)) < 8000
    source.close()


def test_fingerprints(stored):
    a, source = stored
    found = json.loads(json.dumps(source.fingerprint()))
    assert found["shape"] == [N, D] and found["dtype"] == a.dtype.str
    assert sum(found["sizes"]) > 0 and all(t > 0 for t in found["mtimes_ns"])


def test_threads_share_a_source(stored):
    a, source = stored
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            low = int(rng.integers(0, N - 1))
            high = int(rng.integers(low + 1, N + 1))
            wrong.append(not np.array_equal(dense(source.read(low, high)), a[low:high]))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60 and not any(wrong)
