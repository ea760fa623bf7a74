"""``attnfit invert`` on files, good and bad."""

import io
import json

import numpy as np
import pytest
from layer_reference import planted
from rich.console import Console
from test_cli import one_error, run

from attnfit import problems
from attnfit.cli.progress import FitProgress
from attnfit.inversion.layer_files import save_layer


@pytest.fixture
def files(tmp_path):
    """A layer with its output, half of its tokens, a table that holds all of them, and the tokens."""
    problem, X = planted("half known", n=8, d=4, scale=1.0, seed=0)
    (head,) = problem.layer.heads
    table = np.vstack([np.random.default_rng(1).standard_normal((40, 4)), X.T])
    arrays = {"B": problem.B, "K": problem.known, "E": table, "narrow": table[:, :3]}
    arrays |= {"B3": problem.B[:, :3], "all": X, "B16": problem.B.astype(np.float16)}
    paths = {name: tmp_path / f"{name}.npy" for name in arrays}
    for name, path in paths.items():
        np.save(path, arrays[name])
    paths["layer"] = tmp_path / "layer.safetensors"
    save_layer(paths["layer"], W=head.M, V=head.V)
    return paths, X


def invert(paths, *arguments):
    return run("invert", *[paths.get(a, a) for a in arguments])


def test_known_tokens_make_the_others_certain(files, tmp_path):
    paths, X = files
    saved, report = tmp_path / "X.npy", tmp_path / "report.json"
    result = invert(paths, "layer", "B", "--known", "K", "--save", saved, "--json", report)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("recovered: one input gives this output")
    assert "4 of 8 tokens, 4 numbers each" in result.stdout
    assert "8 x 4: 32 numbers for 16" in result.stdout
    assert np.linalg.norm(np.load(saved) - X) < 1e-8 * np.linalg.norm(X)
    told = json.loads(report.read_text())
    assert told["verdict"] == "recovered"
    assert told["rank"] == told["unknowns"] == 16
    assert told["certificate"]["valid"] and told["certificate"]["radius"] < 1e-6
    assert told["tokens"] is None


@pytest.mark.parametrize("output", ["B", "B16"])
def test_rows_of_a_table(files, tmp_path, output):
    paths, _ = files
    report = tmp_path / "report.json"
    result = invert(paths, "layer", output, "--embedding", "E", "--json", report)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("recovered: 8 rows of the vocabulary reproduce the output")
    assert "residual with another" in result.stdout
    told = json.loads(report.read_text())
    assert told["tokens"] == list(range(40, 48))
    assert min(told["margins"]) > 1e-3


def test_what_is_not_certain_has_an_exit_code_of_its_own(files, tmp_path):
    paths, _ = files
    report = tmp_path / "report.json"
    result = invert(paths, "layer", "B", "--starts", 2, "--json", report)
    assert result.exit_code == 3, result.output
    assert json.loads(report.read_text())["verdict"] in ("ambiguous", "not recovered")
    assert "Error" not in result.output


def test_more_tokens_than_a_screen_holds(tmp_path):
    rng = np.random.default_rng(0)
    W, V, E = 0.3 * rng.standard_normal((3, 3)), rng.standard_normal((3, 3)), rng.standard_normal((10, 3))
    layer = problems.LayerInversion(W, V, np.zeros((50, 3)), mask="causal")
    save_layer(tmp_path / "layer.safetensors", W=W, V=V)
    np.save(tmp_path / "B.npy", layer.output(E[rng.integers(10, size=50)].T))
    np.save(tmp_path / "E.npy", E)
    result = run(
        "invert", tmp_path / "layer.safetensors", tmp_path / "B.npy", "--embedding", tmp_path / "E.npy",
        "--mask", "causal",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "10 more tokens are not shown; write all of them with --json" in result.output


def test_values_that_miss_directions_and_outputs_that_nothing_gives(tmp_path):
    rng = np.random.default_rng(0)
    V = rng.standard_normal((4, 2)) @ rng.standard_normal((2, 5))
    save_layer(tmp_path / "layer.safetensors", W=rng.standard_normal((4, 4)), V=V)
    np.save(tmp_path / "B.npy", rng.standard_normal((6, 5)))
    result = run("invert", tmp_path / "layer.safetensors", tmp_path / "B.npy", "--starts", 2)
    assert result.exit_code == 3, result.output
    assert result.stdout.startswith("not recovered: no input gives this output: a share")
    assert "2 of 4" in result.stdout


def test_plot(files, tmp_path):
    pytest.importorskip("matplotlib")
    paths, _ = files
    picture = tmp_path / "spectrum.png"
    result = invert(paths, "layer", "B", "--known", "K", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.safetensors", "B"], "There is no file nowhere.safetensors; check the path"),
        (["layer", "nowhere.npy"], "There is no file nowhere.npy; check the path"),
        (["B", "B"], "B.npy is not a whole safetensors file"),
        (["layer", "layer"], "is not an array in NumPy's format; write it again with numpy.save"),
        (["layer", "B3"], "OUTPUT has 3 columns but V has 4; pass one row a token and one column an output"),
        (["layer", "B", "--known", "all"], "known holds every token: nothing is left to recover"),
        (["layer", "B", "--known", "B"], "known has shape (8, 4); expected (d, n) = (4, 8)"),
        (["layer", "B", "--embedding", "narrow"], "--embedding has rows of 3 numbers, but tokens have 4"),
        (["layer", "B", "--precision", "2"], "precision must lie between 0 and 1, not 2.0"),
        (["layer", "B", "--mask", "full"], "--mask can be causal only, not 'full'"),
        (["layer", "B", "--save", "X.txt"], "--save writes an array; name the file X.npy"),
        (["layer", "B", "--plot", "a.xyz"], "--plot: no picture can be written as 'a.xyz'"),
    ],
)
def test_bad_input(files, arguments, expected):
    paths, _ = files
    assert expected in one_error(invert(paths, *arguments))


def test_non_finite_weights_are_named(files, tmp_path):
    paths, _ = files
    W = np.eye(4)
    W[2, 1] = np.inf
    from safetensors.numpy import save_file

    save_file({"W": W, "V": np.eye(4)}, paths["layer"])
    assert "W contains inf at row 2, column 1" in one_error(invert(paths, "layer", "B"))


def test_pickles_are_not_loaded(files, tmp_path):
    paths, _ = files
    np.save(paths["B"], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "is not an array in NumPy's format" in one_error(invert(paths, "layer", "B"))


def test_progress_counts_starts(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "attnfit.cli.progress.stderr", lambda: Console(file=screen, force_terminal=True, width=120)
    )
    progress = FitProgress()
    monkeypatch.setattr(progress._timer, "interval", 0.0)
    with progress:
        progress._timer.join()
        progress.count(3.7, 10)
    assert "3 of up to 10" in screen.getvalue()
