"""Every reader of files against random damage, and against all that was ever found: see ``fuzz/``."""

import sys
from pathlib import Path

import numpy as np
import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.append(str(FUZZ))

from targets import complaint, damaged, targets  # noqa: E402

KNOWN = targets()
# A model of torch takes a while to load.
N_FILES = dict.fromkeys(KNOWN, 60) | {"config": 6, "weights": 6, "checkpoint": 30}
KEPT = sorted(path for path in (FUZZ / "kept").glob("*/*") if path.is_file())


@pytest.mark.parametrize("name", KNOWN)
def test_sound_files_are_read(name, tmp_path):
    _, path = KNOWN[name].write(tmp_path)
    if name != "gguf":
        KNOWN[name].read(path)


@pytest.mark.parametrize("name", KNOWN)
def test_damaged_files_give_an_error_of_their_reader(name, tmp_path):
    file, path = KNOWN[name].write(tmp_path)
    whole, rng = file.read_bytes(), np.random.default_rng(7)
    for _ in range(N_FILES[name]):
        file.write_bytes(damaged(whole, rng))
        assert complaint(KNOWN[name], path) is None


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found_before(kept, tmp_path):
    file, path = KNOWN[kept.parent.name].write(tmp_path)
    file.write_bytes(kept.read_bytes())
    assert complaint(KNOWN[kept.parent.name], path) is None
