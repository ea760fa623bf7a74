"""Checkpoints are whole or refused, whatever happens to a file."""

import hashlib
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from checkpointed import Crash, Reads, assert_same, crashing, fit, forge, header_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from attnfit import problems, writing
from attnfit.solvers import CheckpointError, checkpoint, checkpoint_file
from benchmarks import faults


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr("attnfit.solvers.simplex.CHUNK", 8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fit.ckpt"


# ---- files ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "fit.ckpt"
    fit("sampled", path)
    return path.read_bytes()


A = np.arange(12.0).reshape(4, 3)
SHARES = np.array([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (problems.Softmax(A, SHARES, [0, 0, 1, 1], weights=SHARES, ridge=0.5), "8800ba66a99e59e6"),
        (problems.Rescaled(A, SHARES, "sinh"), "68b54ca06e3ddd17"),
        (problems.Attention(A, A[:2], np.full((4, 2), 0.5)), "88d4d395cab5cd98"),
        (problems.Attention(A, A[:2], np.full((4, 2), 0.5), rank=1), "bbdb68bcb1142cca"),
        (problems.Poisson(A, SHARES, absorb=[[0, 0, 1, 1]]), "d04f3fed111db21b"),
        (problems.Softmax(csr_array(A), SHARES), "7df85483658d5603"),
    ],
)
def test_files_of_the_version_before_are_known_again(problem, expected):
    """What a class keeps of its rows for its own use must not change what a file is of."""
    found = repr(sorted(checkpoint.fingerprint(problem).items())).encode()
    assert hashlib.blake2b(found, digest_size=8).hexdigest() == expected


def test_a_file_can_be_read_by_people(path):
    result = fit("auto", path)
    arrays, header = checkpoint_file.read(path)
    assert header["status"] == "converged"
    assert header["history"]["value"] == [r.value for r in result.history]
    assert header["last"]["iteration"] == result.n_iter
    assert header["last"]["radius"] is None
    np.testing.assert_array_equal(arrays["x"], result.x)
    np.testing.assert_array_equal(arrays["gradient"], result.gradient)


def test_a_missing_file_is_a_fresh_start(path):
    assert "resumed" not in fit("auto", path).message
    assert "resumed" in fit("auto", str(path)).message
    assert "resumed" not in fit("auto", path, resume=False).message


@given(st.data())
def test_damaged_files_are_refused(finished, tmp_path_factory, data):
    raw = bytearray(finished)
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "random"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        del raw[at:]
    elif kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        raw = data.draw(st.binary(max_size=99))
    path = tmp_path_factory.mktemp("damaged") / "fit.ckpt"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        fit("sampled", path)


FORGERIES = {
    "a later format": lambda h: h.update(format_version=2),
    "a format that is no number": lambda h: h.update(format_version=True),
    "another version": lambda h: h.update(attnfit_version="0.0.1"),
    "no entries": lambda h: h.pop("entries"),
    "entries that are no list": lambda h: h.update(entries=3),
    "an entry that is none": lambda h: h["entries"].insert(0, None),
    "an entry without arrays": lambda h: h["entries"][0].pop("arrays"),
    "arrays that do not exist": lambda h: h["entries"][0].update(arrays=["../../etc/passwd"]),
    "an evaluation without a value": lambda h: h["entries"][0]["arrays"].remove("value"),
    "reads that are no number": lambda h: h["entries"][0].update(n_passes="many"),
    "a draw that is none": lambda h: h["entries"][0].update(draw=[1]),
    "a generator that is none": lambda h: h["random_state"].update(bit_generator="os.system"),
    "a state that is none": lambda h: h["random_state"].update(state={"state": "0", "inc": None}),
    "an infinite state": lambda h: h["random_state"]["state"].update(state=1 << 4000),
    "a fit that is none": lambda h: h.update(fit=[1, 2]),
    "a fit with a nameless part": lambda h: h.update(fit=[[1, 2]]),
    "no status": lambda h: h.pop("status"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers_are_refused(name, finished, path):
    path.write_bytes(finished)
    forge(path, FORGERIES[name])
    with pytest.raises(CheckpointError, match="resume=False"):
        fit("sampled", path)


@pytest.mark.parametrize(
    "array", [np.zeros(4), np.zeros((3, 1)), np.zeros(0), np.zeros(3, dtype=np.int8), np.zeros(3) + 1.0]
)
def test_forged_arrays_are_refused(array, finished, path):
    path.write_bytes(finished)
    last = max(k for k, e in enumerate(header_of(path)["entries"]) if e["call"] == "evaluate")
    forge(path, change_arrays=lambda arrays: arrays.update({f"{last}.gradient": array}))
    with pytest.raises(CheckpointError, match="resume=False"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit("sampled", path)


def test_files_of_other_kinds_are_refused(path):
    save_file({"coef": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"is a safetensors file but not a checkpoint"):
        fit("auto", path)
    path.unlink()
    path.mkdir()
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="is not a file"):
            fit("auto", path, resume=resume)


@pytest.mark.parametrize("where", ["missing/fit.ckpt", "file/fit.ckpt"])
def test_where_nothing_can_be_written_the_fit_does_not_begin(where, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=rf"checkpoint .*{where} cannot be written .* there is none yet"):
        fit("auto", tmp_path / where)
    assert reads.count == 0


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "chmod"])
def test_a_full_disk_leaves_the_last_checkpoint(call, path, monkeypatch):
    reference = fit("exact")
    with pytest.raises(Crash):
        fit("exact", path, crashing(len(reference.history) - 2))
    known = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, handle, mode):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            writing.os.close(self.handle)

        write = full

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fdopen" if call == "write" else call, Full if call == "write" else full)
        with pytest.raises(OSError, match=r"\[Errno 28\] checkpoint .* the one before is intact; make room"):
            fit("exact", path)
    assert path.read_bytes() == known
    assert list(path.parent.iterdir()) == [path]
    assert_same(fit("exact", path), reference)


def test_an_answer_is_not_lost_to_a_full_disk(path, monkeypatch):
    reference = fit("exact")
    fit("exact", path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert_same(fit("exact", path), reference)


LIMITED = """
import os, resource, sys
sys.dont_write_bytecode = True
from attnfit.solvers import checkpoint
from benchmarks import faults
checkpoint.PAUSE = 0.0
def limit(seconds):
    size = os.path.getsize(sys.argv[1])
    if size > 5000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
faults.time.sleep = limit
try:
    faults.fit(faults.Job(5_000, 8, "exact"), sys.argv[1])
except OSError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files_leaves_the_last_checkpoint(path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    expected = r"\[Errno 27\] checkpoint .* \(File too large\) and the one before is intact"
    assert re.match(expected, done.stdout), done.stdout + done.stderr
    assert list(path.parent.iterdir()) == [path]
    job = faults.Job(5_000, 8, "exact")
    assert faults.fit(job, path).x == faults.fit(job).x


def test_what_killed_processes_left_is_removed(path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    prefix = writing._prefix(path)
    left = path.with_name(f"{prefix}{int(dead.stdout)}-abc")
    of_others = [
        path.with_name(f"{prefix}1-abc"),
        path.with_name(f".other{prefix}1-abc"),
        path.with_name(".x"),
    ]
    for file in [left, *of_others]:
        file.touch()
    fit("auto", path)
    assert sorted(path.parent.iterdir()) == sorted([path, *of_others])


def test_links_and_permissions_are_kept(path, tmp_path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    path.symlink_to(elsewhere / "real.ckpt")
    fit("auto", path)
    assert path.is_symlink()
    plain = tmp_path / "plain"
    plain.touch()
    assert (elsewhere / "real.ckpt").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_writing_takes_a_tenth_of_the_time(seconds, path, monkeypatch):
    now, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now[0])

    def write(*args):
        now[0] += seconds
        written.append(now[0])

    def wait(record):
        now[0] += 0.01

    monkeypatch.setattr(checkpoint, "write", write)
    result = fit("gradient descent", path, wait, tol=1e-8, max_iter=60)
    n = len(result.history)
    assert n > 30
    # The first and the last writing are not put off.
    if seconds:
        assert 1 <= len(written) - 2 <= 0.1 * now[0] / seconds
    else:
        assert len(written) >= n


# ---- kill -9 ----


def test_killed_fits_end_at_the_same_point(tmp_path):
    job = faults.Job(n=40_000, d=8, hessian="exact", pause=0.03)
    reference = faults.fit(job)
    for k, (moment, while_writing) in enumerate([(0.8, False), (0.6, True)]):
        path = tmp_path / str(k) / "fit.ckpt"
        path.parent.mkdir()
        survived = faults.kill_and_resume(job, reference, moment, path, while_writing=while_writing)
        assert survived.ended.x == reference.x
        assert "resumed from" in survived.ended.message
        assert list(path.parent.iterdir()) == [path]
