"""Fits where nothing can be written: containers, read-only installations, full disks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnfit

FIT = """
import warnings
import numpy as np
from scipy import sparse
import attnfit.data.matrix, attnfit.data.matrix
attnfit.data.matrix.DENSE_ENTRIES = attnfit.data.matrix.SPARSE_ENTRIES = 0
from attnfit import minimize, problems
from attnfit.data import open_source

rng = np.random.default_rng(0)
A = rng.standard_normal((400, 2))
b = np.exp(A @ [0.5, -0.2])
np.save("A.npy", A)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dense = minimize(problems.Exponential(A, b))
    csr = minimize(problems.Exponential(sparse.csr_array(A), b))
    stored = minimize(problems.Exponential(open_source("A.npy"), b))
assert dense.converged and csr.converged and stored.converged
assert abs(dense.x - [0.5, -0.2]).max() < 1e-6 and abs(stored.x - csr.x).max() < 1e-6
kept = [str(w.message) for w in caught if "compiled loops cannot be kept" in str(w.message)]
print(len(kept), len(caught) - len(kept))
"""


def run(tmp_path, before="", **environment):
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(attnfit.__file__).parents[1]),
    } | environment
    done = subprocess.run(
        [sys.executable, "-c", before + FIT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def nowhere(tmp_path):
    """A path below a file: nobody can write there, not even root."""
    file = tmp_path / "file"
    file.write_text("")
    return str(file / "below")


def test_installation_and_home_are_read_only(tmp_path, nowhere):
    # As root every directory can be written; to Numba neither the package nor the user's cache is a place.
    before = """
import numba.core.caching as caching
for name in ("InTreeCacheLocator", "_InTreeCacheLocator", "UserWideCacheLocator", "_UserWideCacheLocator"):
    locator = getattr(caching, name, None)
    if locator is not None:
        locator.ensure_cache_path = lambda self: (_ for _ in ()).throw(OSError("read-only file system"))
"""
    assert run(tmp_path, before, HOME=nowhere) == ["1", "0"]
    assert run(tmp_path, before, HOME=nowhere, NUMBA_CACHE_DIR=nowhere) == ["1", "0"]


def test_an_audit_runs_where_nothing_can_be_kept(tmp_path, nowhere):
    """What it learns about a model then lasts as long as the process."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "t.txt").write_text("A text.\n")
    (tmp_path / "spare").mkdir()
    words = ["audit", "tiny", "--texts", "t.txt", "--access", "hidden:1", "--defences", "none"]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(attnfit.__file__).parents[1]),
        "TMPDIR": str(tmp_path / "spare"),
        "HOME": nowhere,
    }
    done = subprocess.run(
        [sys.executable, "-m", "attnfit", *words, "--budget", "600"], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert told.count("nothing can be kept in") == 1, told
    assert "set ATTNFIT_CACHE to a folder that can be written" in told
    assert not list((tmp_path / "spare").glob("attnfit-*"))


def test_what_cannot_be_kept_lasts_as_long_as_the_process(nowhere, monkeypatch):
    from attnfit.audit.storage import cache_directory, kept

    calls = []

    def write(directory):
        calls.append(directory)
        (directory / "a").write_text("b")

    with pytest.warns(UserWarning, match="nothing can be kept in .* set ATTNFIT_CACHE"):
        first = kept(Path(nowhere, "x"), write)
    assert first == kept(Path(nowhere, "x"), write) and len(calls) == 1
    assert (first / "a").read_text() == "b"
    # A user of a container may have no home at all.
    for name in ("ATTNFIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert cache_directory() == first.parent


def test_the_disk_fills_up_while_loops_are_kept(tmp_path):
    # Beyond the limit a write fails like one on a full disk.
    # Python itself keeps half of a compiled module then, for all who import it later.
    before = """
import resource, signal, sys
sys.dont_write_bytecode = True
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
"""
    assert run(tmp_path, before, NUMBA_CACHE_DIR=str(tmp_path / "cache"), HOME=str(tmp_path)) == ["1", "0"]
