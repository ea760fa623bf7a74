"""Fixtures shared by the tests."""

import pickle
import signal
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run, and no deadline: a compiled kernel or a loaded machine must not fail a test.
settings.register_profile(
    "attnfit", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("attnfit")


# What the extras bring.
OPTIONAL = (
    *("torch", "transformers", "gguf", "accelerate", "psutil", "tokenizers"),
    *("dask", "distributed", "zarr", "pyarrow", "numcodecs"),
    *("matplotlib", "typer", "rich", "pandas", "polars", "statsmodels", "mpmath", "filelock", "formulaic"),
)


class Absent:
    """Skips the tests that need a package of an extra which is not installed: the core must pass without."""

    def __init__(self):
        self.missing = {name for name in OPTIONAL if PathFinder.find_spec(name) is None}

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        # Elsewhere the library has its own answer to an import that fails.
        asked_by = "" if frame is None else Path(frame.f_code.co_filename).parent.as_posix()
        skips = asked_by.endswith(("/tests", "/benchmarks")) or "/attnfit/audit" in asked_by
        if name.partition(".")[0] in self.missing and skips:
            pytest.skip(f"{name} is not installed", allow_module_level=True)


sys.meta_path.append(Absent())

# What a shell without a terminal runs in the background ignores Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def small_blocks(monkeypatch):
    """Shrink blocks to their floor of 64 rows, so that small groups are long ones."""
    shrink_blocks(monkeypatch)


def shrink_blocks(monkeypatch, size=1):
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_BYTES", size)
    monkeypatch.setattr("attnfit.data.matrix.BLOCK_ENTRIES", size)


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def bomb(tmp_path):
    mark = tmp_path / "exploded"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    mark.unlink()
    yield Bomb(mark)
    assert not mark.exists()
