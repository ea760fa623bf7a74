"""Bad input: one sentence that names the column, the line and the remedy, and exit code 2."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_cli import CARS, one_error, run, write_data, write_rows

from attnfit import datasets

HEADER = ["g", "x", "y", "w"]
GOOD = [["a", 1, 0.4, 1], ["a", 2, 0.6, 1], ["b", 3, 0.1, 1], ["b", 1, 0.9, 1]]


def changed(row, column, value):
    rows = [list(r) for r in GOOD]
    rows[row][HEADER.index(column)] = value
    return rows


@pytest.fixture
def fit(tmp_path):
    """Fit ``rows`` and return the one error sentence."""

    def call(*options, rows=GOOD, header=HEADER, model="softmax", target="y", group="g"):
        path = write_rows(tmp_path / "d.csv", header, rows)
        grouped = () if group is None else ("--group", group)
        sentence = one_error(run("fit", model, path, "--target", target, *grouped, *options))
        return sentence.removeprefix("Error: ").replace(str(path), "d.csv")

    return call


def test_the_good_rows_are_good(tmp_path):
    path = write_rows(tmp_path / "d.csv", HEADER, GOOD)
    result = run("fit", "softmax", path, "--target", "y", "--group", "g", "--features", "x", "--weight", "w")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "Y1"}, "d.csv has no column 'Y1', which --target needs; did you mean 'y'?"),
        ({"group": "zzz"}, "d.csv has no column 'zzz', which --group needs; its columns are: g, x, y, w"),
        ({"target": "g", "group": None}, "Column 'g' is not numeric: line 2 holds 'a'; encode it as numbers"),
        ({"target": "g"}, "Column 'g' is given to two options"),
        ({"model": "sofmax"}, "There is no model 'sofmax'; did you mean 'softmax'?"),
        ({"model": "exponential"}, "--group belongs to softmax and rescaled; leave it out for exponential"),
    ],
)
def test_names(fit, options, expected):
    assert fit(**options).startswith(expected)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--features", "x,q"], "d.csv has no column 'q', which --features needs; its columns are"),
        (["--features", "x,y"], "Column 'y' is --target and a feature; take it out of --features"),
        (["--features", "x,x"], "Column 'x' is twice in --features; name it once"),
        (["--loss", "square"], "There is no loss 'square'; did you mean 'squared'?"),
        (["--function", "cosh"], "--function belongs to exponential and rescaled; leave it out for softmax"),
        (["--tol", "-1"], "tol must be a number in"),
        (["--ridge", "-1"], "ridge must be a finite number >= 0"),
        (["--save", "nowhere/m.safetensors"], "--save: there is no folder nowhere; make it first"),
        (["--plot", "fit.docx"], "--plot: no picture can be written as 'fit.docx'; it must be one of: "),
    ],
)
def test_options(fit, options, expected):
    assert fit(*options).startswith(expected)


@pytest.mark.parametrize(
    ("row", "column", "value", "expected"),
    [
        (1, "x", "", "Column 'x' has no value in line 3; fill it in"),
        (1, "x", "NA", "Column 'x' has no value in line 3; fill it in"),
        (3, "x", "inf", "Column 'x' has inf in line 5"),
        (2, "y", "nan", "Column 'y' has no value in line 4"),
        (2, "y", -0.1, "Column 'y' is negative in line 4 (-0.1); --target needs numbers >= 0"),
        (0, "w", -1, "Column 'w' is negative in line 2 (-1); --weight needs numbers >= 0"),
        (2, "g", "", "Column 'g' has no value in line 4; give the row a group or delete it"),
        (2, "x", "1,5", "Column 'x' is not numeric: line 4 holds '1,5'; write decimals with a point"),
        (2, "x", "n.a", "Column 'x' is not numeric: line 4 holds 'n.a'; encode it as numbers"),
    ],
)
def test_cells(fit, row, column, value, expected):
    sentence = fit("--features", "x", "--weight", "w", rows=changed(row, column, value))
    assert sentence.startswith(expected)


def test_several_missing_values_are_counted(fit):
    rows = [[g, "", y, w] for g, _, y, w in GOOD]
    assert fit("--features", "x", rows=rows).startswith("Column 'x' has no value in line 2 (and 3 more);")


def test_all_weights_zero(fit):
    sentence = fit("--features", "x", "--weight", "w", rows=[[g, x, y, 0] for g, x, y, _ in GOOD])
    assert sentence.startswith("--weight is zero for every row; give at least one row a positive weight")


def test_shares_above_one_with_an_outside_good(fit):
    sentence = fit("--features", "x", "--outside-good", rows=changed(0, "y", 0.8))
    assert "1.4" in sentence and "in group a" in sentence
    assert sentence.endswith("or leave --outside-good out")


def test_separable_data_name_the_column(tmp_path):
    rows = [["a", 1.5, 1], ["a", 2, 0], ["b", 3, 1], ["b", 4, 0]]
    path = write_rows(tmp_path / "d.csv", ["g", "cost", "y"], rows)
    sentence = one_error(run("fit", "softmax", path, "--target", "y", "--group", "g"), code=1)
    assert (
        sentence.startswith("Error: the data are separable")
        and "cost: -1" in sentence
        and "ridge" in sentence
    )
    assert run("fit", "softmax", path, "--target", "y", "--group", "g", "--ridge", "0.1").exit_code == 0


def test_too_few_steps(tmp_path):
    path = write_data(tmp_path / "cars.csv", datasets.load_car_shares())
    sentence = one_error(run("fit", "softmax", path, *CARS, "--max-iter", "1"), code=1)
    assert sentence.startswith("Error: not converged after --max-iter 1 steps")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "d.csv is empty; give a file with a header line and data"),
        (b"\n\nx,y\n1,2\n", "The first line of d.csv is empty; put the names of the columns there"),
        (b"x,y\n", "d.csv has a header but no rows; give a file with data"),
        (b"1,2\n3,4\n", "The first line of d.csv holds numbers; put the names of the columns there"),
        (b"x,x,y\n1,2,3\n", "d.csv has two columns named 'x'; rename one"),
        (b"x,y\n1,2\n3\n", "d.csv: the header names 2 columns but line 3 has 1"),
        (b"\xff\xfex\x00,\x00y\x00", "d.csv has a header but no rows; give a file with data"),
        (b"PAR1\x15\x04\n", "d.csv is not a readable parquet file"),
        (
            b"name,y\nred,1\nblue,2\n",
            "d.csv has no numeric column left for a feature; left out because they hold",
        ),
    ],
)
def test_files(tmp_path, content, expected):
    path = tmp_path / "d.csv"
    path.write_bytes(content)
    sentence = one_error(run("fit", "softmax", path, "--target", "y"))
    assert sentence.removeprefix("Error: ").replace(str(path), "d.csv").startswith(expected)


def test_no_file_a_folder_and_a_false_parquet(tmp_path):
    assert "There is no file" in one_error(run("fit", "softmax", tmp_path / "no.csv", "--target", "y"))
    assert "is a folder" in one_error(run("fit", "softmax", tmp_path, "--target", "y"))
    (tmp_path / "d.parquet").write_text("x,y\n1,2\n")
    sentence = one_error(run("fit", "softmax", tmp_path / "d.parquet", "--target", "y"))
    assert "is not a readable parquet file" in sentence


def test_parquet_without_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("attnfit.cli.sources.find_spec", lambda name: None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    sentence = one_error(run("fit", "softmax", tmp_path / "d.parquet", "--target", "y"))
    assert sentence == "Error: Parquet files need pyarrow or polars; type: python -m pip install pyarrow"


def test_parquet_with_text_and_missing_values(tmp_path):
    pl = pytest.importorskip("polars")
    path = tmp_path / "d.parquet"
    frame = pl.DataFrame(
        {
            "g": ["a", "a", "b", "b"],
            "x": [1, None, 2, 3],
            "t": [None, "u", "v", "w"],
            "y": [0.5, 0.5, 0.5, 0.5],
        }
    )
    frame.write_parquet(path)
    common = ("fit", "softmax", path, "--target", "y", "--group", "g", "--features")
    assert "Column 'x' has no value in row 2;" in one_error(run(*common, "x"))
    assert "Column 't' is not numeric: row 2 holds 'u'" in one_error(run(*common, "t"))


# ---- predict -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    path = write_rows(folder / "d.csv", HEADER, GOOD)
    model = folder / "m.safetensors"
    options = ("--target", "y", "--group", "g", "--features", "x", "--save", model)
    assert run("fit", "softmax", path, *options).exit_code == 0
    return model, path


def test_predict_refuses(saved, tmp_path):
    model, path = saved
    assert "There is no model file" in one_error(run("predict", tmp_path / "no", path))
    assert "give a file written by attnfit fit --save" in one_error(run("predict", path, path))
    assert "was fitted on 2 groups; name their column with --group" in one_error(run("predict", model, path))
    other = write_rows(tmp_path / "other.csv", ["g", "z"], [["a", 1]])
    sentence = one_error(run("predict", model, other, "--group", "g"))
    assert "has no column 'x', which the model needs" in sentence
    again = write_rows(tmp_path / "again.csv", ["g", "x", "predicted"], [["a", 1, 2]])
    assert "already has a column 'predicted'" in one_error(run("predict", model, again, "--group", "g"))
    out = tmp_path / "out.parquet"
    assert "give a name that ends in .csv" in one_error(
        run("predict", model, path, "--group", "g", "--output", out)
    )


def test_damaged_model(saved, tmp_path):
    model, path = saved
    damaged = tmp_path / "m.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert "is damaged" in one_error(run("predict", damaged, path, "--group", "g"))


def test_nothing_is_written_after_a_refusal(tmp_path):
    path = write_rows(tmp_path / "d.csv", HEADER, changed(0, "x", ""))
    outputs = [tmp_path / name for name in ("m.safetensors", "r.json", "p.png")]
    options = [x for pair in zip(("--save", "--json", "--plot"), outputs, strict=True) for x in pair]
    one_error(run("fit", "softmax", path, "--target", "y", "--group", "g", "--features", "x,w", *options))
    assert not any(output.exists() for output in outputs)


def test_debug_shows_where(tmp_path):
    result = run("fit", "softmax", tmp_path / "no.csv", "--target", "y", "--debug")
    assert result.exit_code == 2
    assert "InputError: There is no file" in result.stderr and "Traceback" in result.stderr


def test_the_unexpected_is_still_one_sentence(saved, monkeypatch):
    _, path = saved

    def broken(*_, **__):
        raise RuntimeError("wheels came off")

    monkeypatch.setattr("attnfit.cli.fit.read_rows", broken)
    sentence = one_error(run("fit", "softmax", path, "--target", "y"), code=70)
    assert sentence.startswith("Error: RuntimeError: wheels came off (unexpected; the traceback is in ")
    told = Path(re.search(r"is in (\S+);", sentence)[1])
    assert "in broken" in told.read_text() and told.stat().st_mode & 0o077 == 0
    told.unlink()


def test_a_stumble_is_no_bad_input(saved, monkeypatch):
    _, path = saved
    for stumble in (lambda *_, **__: int("wheels"), lambda *_, **__: np.zeros(3).reshape(2)):
        monkeypatch.setattr("attnfit.cli.fit.read_rows", stumble)
        sentence = one_error(run("fit", "softmax", path, "--target", "y"), code=70)
        Path(re.search(r"is in (\S+);", sentence)[1]).unlink()
