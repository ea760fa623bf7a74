"""Fixtures shared by the tests."""

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run, and no deadline: a compiled kernel or a loaded machine must not fail a test.
settings.register_profile(
    "attnfit", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("attnfit")


@pytest.fixture
def small_blocks(monkeypatch):
    """Shrink blocks to their floor of 64 rows, so that small groups are long ones."""
    shrink_blocks(monkeypatch)


def shrink_blocks(monkeypatch, size=1):
    monkeypatch.setattr("attnfit.designs.dense.BLOCK_BYTES", size)
    monkeypatch.setattr("attnfit.designs.sparse.BLOCK_ENTRIES", size)


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
