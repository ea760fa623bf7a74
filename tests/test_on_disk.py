"""Data on disk: read ahead, within a limit, watched for changes."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from instances import instance, relative
from scipy import sparse

from attnfit import minimize, problems
from attnfit.data import DriftError, open_source
from attnfit.data.on_disk import Column
from attnfit.data.parallel import Recent, available_threads, in_order, read_ahead
from attnfit.objectives.objective import CURVATURE, READING, parse_size


def saved(at, **columns):
    for name, values in columns.items():
        np.save(at / f"{name}.npy", values)
    return {name: open_source(at / f"{name}.npy") for name in columns}


@pytest.fixture
def compiled(monkeypatch):
    for name in ("DENSE_ENTRIES", "SPARSE_ENTRIES"):
        monkeypatch.setattr(f"attnfit.data.matrix.{name}", 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("groups", [False, True])
def test_compiled_reads(dtype, groups, compiled, tmp_path, monkeypatch):
    # Several runs of several blocks each.
    monkeypatch.setattr("attnfit.data.on_disk.RUN_BYTES", 1 << 17)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1 << 15)
    sizes = tuple(1 + k % 7 for k in range(5000)) if groups else (20_000,)
    inst, x = instance("Softmax", "cross_entropy", sizes=sizes, d=5)
    A = inst.A.astype(dtype)
    ids = {"groups": inst.groups} if groups else {}
    memory = problems.Softmax(A, inst.b, loss="cross_entropy", **ids)
    disk = problems.Softmax(**saved(tmp_path, A=A, b=inst.b, **ids), loss="cross_entropy")
    assert disk.design.on_disk
    assert disk.design.storage == "rows"
    for _ in range(3):
        before = disk.n_passes
        value, gradient = disk.value_and_gradient(x)
        # A long group is predicted from some of its rows.
        assert disk.n_passes - before == pytest.approx(1.0, abs=0.06)
        assert value == pytest.approx(memory.value(x), rel=1e-12)
        assert relative(gradient, memory.gradient(x)) < 1e-11
    assert relative(minimize(disk, random_state=0).x, minimize(memory, random_state=0).x) < 1e-6


def test_compiled_reads_of_shards(compiled, tmp_path):
    rng = np.random.default_rng(0)
    A = sparse.random_array((5000, 30), density=0.2, format="csr", random_state=rng)
    for k, first in enumerate(range(0, 5000, 1300)):
        sparse.save_npz(tmp_path / f"{k}.npz", A[first : first + 1300])
    b = rng.random(5000)
    disk = problems.Softmax(open_source(tmp_path), b / b.sum())
    assert disk.design.storage == "csr"
    x = rng.standard_normal(30)
    memory = problems.Softmax(A, b / b.sum())
    assert relative(disk.gradient(x), memory.gradient(x)) < 1e-11
    assert relative(disk.hessian(x), memory.hessian(x)) < 1e-11


def test_integers_and_columns_order(tmp_path, small_blocks):
    rng = np.random.default_rng(0)
    A, b = rng.integers(-2, 3, (300, 4)), np.full(300, 1 / 300)
    memory = problems.Softmax(A, b)
    x = np.full(4, 0.1)
    for k, matrix in enumerate(
        [A, np.asfortranarray(A, dtype=np.float32), A.astype(">f8"), A.astype(np.int8)]
    ):
        disk = problems.Softmax(saved(tmp_path, **{f"A{k}": matrix})[f"A{k}"], b)
        assert relative(disk.gradient(x), memory.gradient(x)) < 1e-12


def test_labels_out_of_order_are_sorted(tmp_path, small_blocks):
    inst, x = instance("Softmax", "squared", sizes=(100, 30, 70), d=3)
    order = np.random.default_rng(0).permutation(200)
    disk = problems.Softmax(**saved(tmp_path, A=inst.A[order], b=inst.b[order], groups=inst.groups[order]))
    assert relative(disk.gradient(x), inst.problem().gradient(x)) < 1e-12
    assert relative(disk.predict(x), inst.problem().predict(x)[order]) < 1e-12


def test_a_file_that_changes_is_named(tmp_path, monkeypatch):
    # What fits into three runs is read once.
    monkeypatch.setattr("attnfit.data.on_disk.RUN_BYTES", 1 << 15)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1 << 18)
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((30_000, 4)), np.full(30_000, 1 / 30_000)
    disk = problems.Softmax(**saved(tmp_path, A=A, b=b))
    disk.value(np.zeros(4))

    def spoil(record):
        if record.phase.startswith("fit"):
            with (tmp_path / "A.npy").open("r+b") as file:
                file.seek(500_000)
                file.write(b"\1\2\3\4\5\6\7")

    with pytest.raises(DriftError, match=r"A\.npy changed while it was being read: block 1 \(rows"):
        minimize(disk, random_state=0, callback=spoil)


def test_a_file_that_vanishes_is_named(tmp_path):
    disk = problems.Softmax(**saved(tmp_path, A=np.ones((100, 2)), b=np.full(100, 0.01)))
    (tmp_path / "A.npy").unlink()
    with pytest.raises(DriftError, match=r"A\.npy changed while it was being read"):
        disk.value(np.zeros(2))


def test_paths_are_no_data():
    with pytest.raises(ValueError, match=r"A is a path; pass attnfit\.data\.open_source\('a\.npy'\)"):
        problems.Softmax("a.npy", np.ones(2))


def test_columns_take_slices_rows_and_functions(tmp_path):
    values = np.arange(50, dtype=np.float32)
    column = Column(saved(tmp_path, b=values)["b"]).mapped(np.square).mapped(np.negative)
    assert np.array_equal(column[3:7], -(values[3:7] ** 2))
    assert np.array_equal(column[40:10:-5], -(values[40:10:-5] ** 2))
    assert np.array_equal(column[np.array([7, 7, 0])], [-49.0, -49.0, 0.0])
    assert np.array_equal(np.asarray(column), -(values.astype(float) ** 2))
    column.load(slice(10, 30))
    assert np.array_equal(column[12:15], -(values[12:15] ** 2))


def test_reading_ahead_keeps_the_order_and_tells_errors():
    loaded = []
    assert list(read_ahead(loaded.append, range(5))) == list(range(5)) == loaded
    assert list(read_ahead(loaded.append, [])) == []

    def fail(k):
        if k == 2:
            raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for k in read_ahead(fail, range(5)):
            seen.append(k)
    assert seen == [0, 1]


def test_a_piece_in_use_is_the_last_to_go():
    recent = Recent()
    for k in range(3):
        assert recent.make_room() is None
        recent.keep(10 * k, 10 * k + 10, f"piece {k}")
    assert recent.renew(slice(2, 5))
    assert not recent.renew(slice(25, 31))
    assert recent.make_room() == "piece 1"
    recent.keep(30, 40, "piece 3")
    assert recent.find(slice(0, 10)) == (0, "piece 0")
    assert recent.find(slice(12, 13)) is None


def test_threads_work_in_order():
    ready = threading.Barrier(2, timeout=10)

    def work(k):
        if k < 4:
            ready.wait()
        return k * k

    assert list(in_order(work, range(7), 2)) == [k * k for k in range(7)]
    assert list(in_order(lambda k: k, range(3), 1)) == [0, 1, 2]
    assert available_threads() >= 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [("1GB", 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), (12345, 12345), ("1e6", 10**6)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "-1GB", "much", "1XB", "1iB", 0, None, "1..2MB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="memory_limit must be a size such as '1GB'"):
        parse_size(size)


def test_a_fit_that_is_too_large_says_what_to_do(tmp_path):
    wide = problems.Softmax(np.eye(800), np.full(800, 1 / 800))
    assert wide.memory_estimate().parts[CURVATURE] == 6 * 8 * 800**2
    assert "total" in str(wide.memory_estimate())
    with pytest.raises(MemoryError, match=r"memory_limit is 1 MB; .* is the largest part"):
        minimize(wide, memory_limit="1MB")
    limit = wide.memory_estimate().total + 10**7
    assert minimize(wide, memory_limit=limit).converged


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell peak memory")
def test_a_limit_is_obeyed(tmp_path):
    """In a process of its own, whose peak is measured whole."""
    make = """
import numpy as np
from numpy.lib.format import open_memmap
rng = np.random.default_rng(0)
n, d = 2_500_000, 16
A = open_memmap("A.npy", "w+", np.float32, (n, d))
b = open_memmap("b.npy", "w+", np.float32, (n,))
for rows in (slice(k, k + 500_000) for k in range(0, n, 500_000)):
    A[rows] = rng.standard_normal((500_000, d), dtype=np.float32)
    b[rows] = np.exp(A[rows] @ np.linspace(-0.3, 0.3, d).astype(np.float32)) / n
"""
    (tmp_path / "make.py").write_text(make)
    fit = """
from attnfit import minimize, problems
from attnfit.data import open_source
problem = problems.Softmax(open_source("A.npy"), open_source("b.npy"))
result = minimize(problem, memory_limit="400MB", random_state=0)
# Unlike ru_maxrss this does not begin with what the parent process holds.
(peak,) = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(result.status, result.n_passes, peak, result.problem.memory_estimate().total)
"""
    (tmp_path / "fit.py").write_text(fit)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    # The first fit compiles, which takes more than it does.
    for name in ("make.py", "fit.py", "fit.py"):
        done = subprocess.run(
            [sys.executable, name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
    status, reads, peak, estimate = done.stdout.split()
    assert status == "converged"
    assert float(reads) < 12
    # The features alone are 160 MB, the interpreter with its libraries some 200 MB.
    assert float(peak) < 400e6
    assert 0.5 < float(peak) / float(estimate) < 1.1


def test_threads_that_share_a_problem_do_not_disturb_each_other(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("attnfit.data.on_disk.RUN_BYTES", 1 << 15)
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((60_000, 4)), np.full(60_000, 1 / 60_000)
    disk = problems.Softmax(**saved(tmp_path, A=A, b=b))
    points = [np.full(4, 0.1 * k) for k in range(8)]
    expected = [disk.gradient(x) for x in points]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(disk.gradient, points * 3))
    assert all(np.array_equal(f, e) for f, e in zip(found, expected * 3, strict=True))


def test_a_problem_on_disk_can_be_pickled(tmp_path):
    import pickle

    rng = np.random.default_rng(0)
    disk = problems.Softmax(**saved(tmp_path, A=rng.standard_normal((300, 4)), b=np.full(300, 1 / 300)))
    x = np.full(4, 0.3)
    expected = disk.gradient(x)
    assert np.array_equal(pickle.loads(pickle.dumps(disk)).gradient(x), expected)


def test_as_many_threads_read_as_there_is_memory_for(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr("attnfit.data.store.available_threads", lambda: 100)
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((400_000, 4)), rng.random(400_000)
    disk = problems.Softmax(**saved(tmp_path, A=A, b=b / b.sum()))
    assert disk.rows.n_readers == 101
    limit = disk.memory_estimate().total
    bounded = disk.with_memory_limit(limit)
    assert 2 < bounded.rows.n_readers < 100
    assert bounded.memory_estimate().parts[READING] < limit / 4
    assert relative(bounded.gradient(np.ones(4)), disk.gradient(np.ones(4))) < 1e-12
    assert problems.Softmax(A, b / b.sum()).rows.n_readers == 100


def test_many_threads_do_not_work_on_memory_that_is_read_into(compiled, tmp_path, monkeypatch):
    for module in ("objectives.part", "data.store"):
        monkeypatch.setattr(f"attnfit.{module}.available_threads", lambda: 16)
    monkeypatch.setattr("attnfit.data.on_disk.RUN_BYTES", 1 << 15)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", 1 << 18)
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((400_000, 4)), rng.random(400_000)
    disk = problems.Softmax(**saved(tmp_path, A=A, b=b / b.sum()))
    memory = problems.Softmax(A, b / b.sum())
    assert len(disk.rows.chunks) > 20
    for k in range(5):
        x = np.full(4, 0.1 * k)
        assert relative(disk.gradient(x), memory.gradient(x)) < 1e-10
