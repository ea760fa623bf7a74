"""``attnfit fit attention`` on files, good and bad."""

import json

import numpy as np
import pytest
from attention_reference import softmax_rows
from test_cli import one_error, run


@pytest.fixture
def files(tmp_path):
    """Queries, keys, maps and a held-out text in files, and the X behind them."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((6, 2)) @ rng.standard_normal((2, 6)) / 3
    paths = {}
    for name, n in (("", 50), ("2", 30)):
        A = rng.standard_normal((n, 6))
        for kind, array in (("q", A), ("k", A), ("maps", softmax_rows(A @ X @ A.T).astype(np.float16))):
            paths[kind + name] = tmp_path / f"{kind}{name}.npy"
            np.save(paths[kind + name], array)
    return paths, X


def test_low_rank_with_a_held_out_text(files, tmp_path):
    paths, X = files
    report, saved = tmp_path / "report.json", tmp_path / "X.npy"
    held_out = ("--holdout", paths["q2"], paths["k2"], paths["maps2"])
    out = ("--json", report, "--save", saved)
    result = run("fit", "attention", paths["q"], paths["k"], paths["maps"], "--rank", 2, *held_out, *out)
    assert result.exit_code == 0, result.output
    assert "6 x 6, rank 2" in result.output
    assert "relative error, held out" in result.output
    told = json.loads(report.read_text())
    assert told["converged"]
    assert told["loss"] == "log_ratio"
    assert told["held_out_relative_error"] < 2e-3
    assert np.linalg.norm(np.load(saved) - X) < 5e-3 * np.linalg.norm(X)


def test_without_a_held_out_text_it_says_what_is_missing(files):
    paths, _ = files
    result = run("fit", "attention", paths["q"], paths["k"], paths["maps"])
    assert result.exit_code == 0, result.output
    assert "add --holdout QUERIES KEYS MAPS" in result.output


def test_causal_maps(files, tmp_path):
    paths, X = files
    A = np.load(paths["q"])
    maps = softmax_rows(np.where(np.tri(50, dtype=bool), A @ X @ A.T, -np.inf))
    np.save(paths["maps"], maps)
    np.save(tmp_path / "mask.npy", np.tri(50, dtype=bool))
    for mask in (("--causal",), ("--mask", tmp_path / "mask.npy")):
        result = run(
            "fit", "attention", paths["q"], paths["k"], paths["maps"], *mask, "--save", tmp_path / "X.npy"
        )
        assert result.exit_code == 0, result.output
        assert np.allclose(np.load(tmp_path / "X.npy"), X, atol=1e-6)


def test_plot(files, tmp_path):
    pytest.importorskip("matplotlib")
    paths, _ = files
    picture = tmp_path / "maps.png"
    result = run("fit", "attention", paths["q"], paths["k"], paths["maps"], "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.npy", "k", "maps"], "There is no file nowhere.npy; check the path"),
        (["q", "k", "maps2"], "MAPS has shape (30, 30); expected (queries, keys) = (50, 50)"),
        (["q", "k", "maps", "--rank", "7"], "rank must be an integer from 1 to min(d1, d2) = 6, not 7"),
        (["q", "k", "maps", "--loss", "sqared"], "There is no loss 'sqared'; did you mean 'squared'?"),
        (["q", "k", "maps", "--causal", "--mask", "k"], "--causal is a mask; give it or --mask, not both"),
        (["q", "k", "maps", "--save", "X.txt"], "--save writes an array; name the file X.npy"),
        (["text", "k", "maps"], "is not an array in NumPy's format; write it again with numpy.save"),
    ],
)
def test_bad_input(files, tmp_path, arguments, expected):
    paths, _ = files
    paths["text"] = tmp_path / "text.npy"
    paths["text"].write_text("1,2,3\n")
    sentence = one_error(run("fit", "attention", *[paths.get(a, a) for a in arguments]))
    assert expected in sentence


def test_negative_maps_are_named(files):
    paths, _ = files
    maps = np.load(paths["maps"])
    maps[3, 5] = -0.5
    np.save(paths["maps"], maps)
    sentence = one_error(run("fit", "attention", paths["q"], paths["k"], paths["maps"]))
    assert "MAPS is negative at row 3, column 5 (-0.5)" in sentence
