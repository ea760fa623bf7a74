"""Every shell line of the README runs as printed: the first in an empty folder, the rest on files that a user
would have.
"""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_cli import run, write_rows

README = (Path(__file__).parent.parent / "README.md").read_text()
# The first lines go on from what lines before them have written.
IN_AN_EMPTY_FOLDER, WITH_FILES = (
    re.findall(r"^    (attnfit .*)$", part, re.MULTILINE) for part in README.split("With files of your own:")
)
LINES = IN_AN_EMPTY_FOLDER + WITH_FILES
# What a gate may end with: good news, leaks found, not all tested.
ENDS = {"audit": (0, 1, 3)}
OWN = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
PACKAGES = {"--dask": "distributed", ".parquet": "pyarrow", "audit": "torch", "--formula": "formulaic"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the second block."""
    from layer_reference import planted

    from attnfit.inversion.layer_files import save_layer

    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for names, n in ((("queries", "keys", "maps"), 12), (("q2", "k2", "maps2"), 9)):
        tokens = rng.standard_normal((n, 3))
        logits = tokens @ np.diag([1.0, -0.5, 0.0]) @ tokens.T
        maps = np.exp(logits)
        for name, array in zip(names, (tokens, tokens, maps / maps.sum(1, keepdims=True)), strict=True):
            np.save(folder / f"{name}.npy", array)
    write_rows(folder / "signatures.csv", ["s", "t"], [[1, 0], [0, 1], [1, 1]])
    write_rows(folder / "spectra.csv", ["u"], [[0.3], [0.7], [1.0]])
    problem, tokens = planted("half known", n=4, d=2, scale=1.0, seed=0)
    (head,) = problem.layer.heads
    save_layer(folder / "layer.safetensors", W=head.M, V=head.V)
    np.save(folder / "output.npy", problem.B)
    np.save(
        folder / "table.npy", np.vstack([np.asarray(tokens).reshape(2, 4).T, rng.standard_normal((6, 2))])
    )
    return folder


def words_of(line):
    """The arguments, and the file that the shell writes what is printed to."""
    words = shlex.split(line)[1:]
    return (words[:-2], words[-1]) if ">" in words else (words, None)


def test_there_are_lines_of_both_kinds():
    assert len(LINES) >= 12
    assert not [line for line in LINES if "|" in line or "<" in line]


def missing(line):
    """The packages that a line needs and that are not installed."""
    return [name for mark, name in PACKAGES.items() if mark in line and find_spec(name) is None]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_the_first_lines_run_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lacking = [line for line in IN_AN_EMPTY_FOLDER if missing(line)]
    for line in IN_AN_EMPTY_FOLDER:
        if line not in lacking and not (lacking and "travel.safetensors" in line):
            run_line(line)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("line", WITH_FILES, ids=[" ".join(line.split()[1:4]) for line in WITH_FILES])
def test_the_line_runs(line, folder, monkeypatch):
    if missing(line):
        pytest.skip(f"{missing(line)[0]} is not installed")
    monkeypatch.chdir(folder)
    run_line(line)


def run_line(line):
    if ".parquet" in line and not Path("sales.parquet").exists():
        import pyarrow as pa
        import pyarrow.parquet as pq

        rng = np.random.default_rng(1)
        shares = rng.dirichlet(np.ones(4), 30).reshape(-1)
        columns = {"market": np.repeat(np.arange(30), 4), "price": rng.random(120), "size": rng.random(120)}
        pq.write_table(pa.table(columns | {"share": shares}), "sales.parquet")
    words, target = words_of(line)
    if "--memory-limit" in words:
        # A limit on memory counts what the process holds already.
        done = subprocess.run(
            [sys.executable, "-m", "attnfit", *words], capture_output=True, text=True, check=False, env=OWN
        )
        assert done.returncode == 0, done.stderr
        return
    result = run(*words)
    assert result.exit_code in ENDS.get(words[0], (0,)), result.output
    if target is not None:
        Path(target).write_text(result.stdout)
    for option in ("--report", "--save", "--output"):
        if option in words:
            assert Path(words[words.index(option) + 1]).stat().st_size > 0
