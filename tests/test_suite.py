"""How `make test` runs the suite itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()
FILE = """
import os, pathlib, pytest

@pytest.fixture(scope="module")
def costly():
    with open(os.environ["MADE"], "a") as made:
        made.write(pathlib.Path(__file__).name + "\\n")

@pytest.mark.parametrize("k", range(8))
def test_uses_it(costly, k):
    pass
"""


def test_a_file_is_run_by_one_worker(tmp_path):
    """Else every worker makes what a file prepares for its tests, and compiles the same loops."""
    pytest.importorskip("xdist")
    options = re.search(r"^SPREAD := (.*)$", MAKEFILE, re.MULTILINE)[1].replace("$(WORKERS)", "2")
    assert MAKEFILE.count(" -n ") == 1 and MAKEFILE.count("$(SPREAD)") == 4
    names = ["test_a.py", "test_b.py"]
    for name in names:
        (tmp_path / name).write_text(FILE)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own |= {"MADE": str(tmp_path / "made"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", *options.split(), "."],
        cwd=tmp_path, env=own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "16 passed" in done.stdout, done.stdout + done.stderr
    assert sorted((tmp_path / "made").read_text().split()) == names
