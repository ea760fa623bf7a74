"""The commands: what they print, write and refuse to do."""

import csv
import io
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from attnfit import datasets
from attnfit.cli.app import app
from attnfit.cli.sources import READERS

CARS = ["--target", "share", "--group", "market", "--features", "const,hpwt,air,mpd,space,prices"]


def run(*arguments, width="120", **environment):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": width, **environment})


def messages(result):
    """Notes and errors, each on one line: the width that `run` gives wraps them at spaces."""
    sentences = []
    for line in result.stderr.splitlines():
        if line.startswith(("Note:", "Error:")):
            sentences.append(line)
        else:
            sentences[-1] += f" {line}"
    return sentences


def one_error(result, code=2):
    """The only sentence on stderr that is not a note."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    sentences = [line for line in messages(result) if not line.startswith("Note: ")]
    assert len(sentences) == 1 and sentences[0].startswith("Error: "), sentences
    return sentences[0]


def write_rows(path, header, rows, delimiter=","):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([header, *rows])
    return path


def write_data(path, data, outside=True):
    rows = []
    for market, features, share in zip(data.groups, data.A, data.b, strict=True):
        if outside or features.any():
            rows.append([f"{market:03d}", *map(float, features), float(share)])
    return write_rows(path, ["market", *data.feature_names, "share"], rows)


def read_columns(path):
    with path.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    return dict(zip(header, zip(*rows, strict=True), strict=True))


@pytest.fixture(scope="module")
def cars(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("cars") / "cars.csv", datasets.load_car_shares())


@pytest.fixture(scope="module")
def travel(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("travel") / "travel.csv", datasets.load_travel_mode())


# ---- fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_fit_reproduces_the_published_car_shares(cars, tmp_path, loss):
    report = tmp_path / "report.json"
    result = run("fit", "softmax", cars, *CARS, "--loss", loss, "--json", report)
    assert result.exit_code == 0, result.output
    assert "2,237 rows in 20 groups" in result.stdout and "certified within" in result.stdout
    content = json.loads(report.read_text())
    coefficients = [row["coefficient"] for row in content["coefficients"]]
    reference = datasets.load_car_shares().references[loss]
    np.testing.assert_allclose(coefficients, reference.coefficients, atol=5e-7)
    assert content["converged"] and content["certificate"]["valid"] and content["groups"] == 20


def test_fit_prints_the_published_standard_errors(travel):
    result = run("fit", "softmax", travel, "--target", "share", "--group", "market")
    assert result.exit_code == 0
    assert "Features: air, train, bus, gc, ttme, air_hinc." in result.stderr
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[3:9]}
    assert table["air"][:3] == ["5.20744", "0.7791", "6.68"]
    assert table["gc"][:2] == ["-0.0155015", "0.004408"]
    assert "loss 199.1283687; 840 rows in 210 groups; " in result.stdout


def test_outside_good_equals_written_rows_of_zeros(cars, tmp_path):
    inside = write_data(tmp_path / "inside.csv", datasets.load_car_shares(), outside=False)
    reports = []
    for path, extra in ((cars, ()), (inside, ("--outside-good",))):
        reports.append(tmp_path / f"{path.stem}.json")
        assert run("fit", "softmax", path, *CARS, *extra, "--json", reports[-1]).exit_code == 0
    written, added = (json.loads(report.read_text())["coefficients"] for report in reports)
    np.testing.assert_allclose(
        [row["coefficient"] for row in written], [row["coefficient"] for row in added], rtol=1e-6
    )


def test_weights_and_offset_reach_the_model(tmp_path):
    data = datasets.load_austrian_flows()
    rows = np.column_stack([data.groups, data.A[:, 0], -0.00727113 * data.A[:, 1], data.b, data.weights])
    path = write_rows(tmp_path / "flows.csv", ["origin", "log_mass", "shift", "share", "out"], rows.tolist())
    result = run(
        *("fit", "softmax", path, "--target", "share", "--group", "origin"),
        *("--weight", "out", "--offset", "shift", "--json", tmp_path / "r.json"),
    )
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "r.json").read_text())["coefficients"]
    assert row["coefficient"] == pytest.approx(0.89278717, abs=1e-6)


@pytest.mark.parametrize(("function", "loss"), [("exp", np.exp), ("sinh", np.sinh)])
def test_exponential_with_a_constant(tmp_path, function, loss):
    x = np.linspace(0.0, 1.0, 20)
    path = write_rows(tmp_path / "d.csv", ["x", "y"], np.column_stack([x, loss(0.5 - 2.0 * x)]).tolist())
    model = tmp_path / "m.safetensors"
    arguments = ("fit", "exponential", path, "--target", "y", "--function", function)
    assert "add --constant" in run(*arguments).stderr
    result = run(*arguments, "--constant", "--save", model)
    assert result.exit_code == 0
    words = result.stdout.split()
    assert float(words[words.index("(constant)") + 1]) == pytest.approx(0.5, abs=1e-5)
    predicted = csv.DictReader(io.StringIO(run("predict", model, path).stdout))
    for row in predicted:
        assert float(row["predicted"]) == pytest.approx(float(row["y"]), abs=1e-6)


def test_rescaled(cars):
    result = run("fit", "rescaled", cars, "--target", "share", "--group", "market", "--features", "hpwt,mpd")
    assert result.exit_code == 0, result.output
    assert "rescaled regression of share, function exp" in result.stdout


def test_several_local_minima_are_listed(tmp_path):
    rows = [[0.6, 0.01], [0.7, 0.43], [-3.9, 0.08], [0.6, 0.47]]
    path = write_rows(tmp_path / "two.csv", ["x", "y"], rows)
    result = run("fit", "softmax", path, "--target", "y", "--loss", "squared", "--features", "x")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith(
        "2 local minima of the objective, of which the lowest is shown: "
    )


def test_default_features_name_the_text_columns_left_out(tmp_path):
    rows = [["a", "red", 1, 0.4], ["a", "blue", 2, 0.6], ["b", "red", 2, 0.3], ["b", "blue", 0, 0.7]]
    path = write_rows(tmp_path / "d.csv", ["g", "colour", "x", "y"], rows)
    result = run("fit", "softmax", path, "--target", "y", "--group", "g")
    assert "Features: x; left out because they hold text: colour ('red' in line 2)." in result.stderr


def test_semicolons_words_and_byte_order_mark(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("\ufeffg;x;y\n7;TRUE;0.4\n7;false;0.6\n\n8;true;0.3\n8;FALSE;0.7\n", encoding="utf-8")
    result = run("fit", "softmax", path, "--target", "y", "--group", "g")
    assert result.exit_code == 0 and "4 rows in 2 groups" in result.stdout


def test_long_identifiers_are_not_rounded(tmp_path):
    # These two differ by one beyond the 53 bits of a float.
    rows = [[str(2**60 + k), x, y] for k in (0, 1) for x, y in ((0.0, 0.4), (1.0, 0.6))]
    path = write_rows(tmp_path / "d.csv", ["id", "x", "y"], rows)
    assert "in 2 groups" in run("fit", "softmax", path, "--target", "y", "--group", "id").stdout


@pytest.mark.parametrize("backend", ["polars", "pyarrow"])
def test_parquet_gives_the_numbers_of_csv(cars, tmp_path, monkeypatch, backend):
    import narwhals as nw

    monkeypatch.setitem(READERS, "parquet", ((backend,),))
    path = tmp_path / "cars.parquet"
    nw.read_csv(str(cars), backend=backend).write_parquet(str(path))
    first, second = (run("fit", "softmax", p, *CARS) for p in (cars, path))
    assert first.exit_code == second.exit_code == 0, second.output
    assert first.stdout.splitlines()[:9] == second.stdout.splitlines()[:9]
    model, out = tmp_path / "m.safetensors", tmp_path / "out.parquet"
    run("fit", "softmax", path, *CARS, "--save", model)
    assert run("predict", model, path, "--group", "market", "--output", out).exit_code == 0
    assert nw.read_parquet(str(out), backend=backend)["predicted"].sum() == pytest.approx(20.0)
    printed = run("predict", model, path, "--group", "market").stdout.splitlines()
    assert len(printed) == 2238 and printed[0].endswith(",predicted")


# ---- predict -----------------------------------------------------------------------------------------------


def test_predict_copies_the_file_with_one_more_column(cars, tmp_path):
    model, out = tmp_path / "m.safetensors", tmp_path / "out.csv"
    assert run("fit", "softmax", cars, *CARS, "--save", model).exit_code == 0
    result = run("predict", model, cars, "--group", "market", "--output", out)
    assert result.exit_code == 0 and "2,237 rows" in result.stderr
    before, after = read_columns(cars), read_columns(out)
    assert after["market"] == before["market"] and after["share"] == before["share"]
    predicted = np.array(after["predicted"], dtype=float)
    data = datasets.load_car_shares()
    np.testing.assert_allclose(np.bincount(data.groups, weights=predicted), 1.0)
    assert ((predicted - data.b) ** 2).sum() == pytest.approx(0.0037557, abs=5e-8)
    assert run("predict", model, cars, "--group", "market").stdout == out.read_text()


def test_fit_writes_a_picture(cars, tmp_path):
    picture = tmp_path / "fit.png"
    assert run("fit", "softmax", cars, *CARS, "--plot", picture).exit_code == 0
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000


def test_warmup(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "attnfit.objectives.compiled.warm_up", lambda everything: asked.append(everything) or 7
    )
    assert run("warmup").stdout.startswith("8 loops compiled in ")
    run("warmup", "--all")
    assert asked == [False, True]


# ---- demo and bench ----------------------------------------------------------------------------------------


def test_demo_agrees_with_every_reference():
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "All 42 numbers agree" in result.stdout
    assert "70.547" in result.stdout


def test_demo_fails_when_a_reference_differs(monkeypatch):
    data = datasets.load_travel_mode()
    data.references["cross_entropy"].coefficients[0] += 1e-5
    monkeypatch.setattr("attnfit.cli.demo.load_travel_mode", lambda: data)
    error = one_error(run("demo"), code=1)
    assert error == (
        "Error: 1 of 42 numbers differ in a printed digit of the reference: "
        "air of Travel mode choice (cross entropy)"
    )


def test_bench_runs_the_folder_it_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no benchmarks/ folder" in one_error(run("bench", "dense"))
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "run.py").write_text("import sys\nopen('seen', 'a').write(' '.join(sys.argv[1:]) + '\\n')\n")
    assert run("bench", "dense", "logit", "--seeds", "1", "--quick").exit_code == 0
    assert (tmp_path / "seen").read_text() == "dense --seeds 1 --quick\nlogit --seeds 1 --quick\n"
    (folder / "run.py").write_text("raise SystemExit(3)\n")
    assert run("bench", "dense").exit_code == 1
    # Of another length: bytecode is told apart by size and second.
    (folder / "run.py").write_text("raise SystemExit(2)  # usage\n")
    assert run("bench", "dense").exit_code == 2
