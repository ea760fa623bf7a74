"""Missing values, a constant and a picture where the rows stay on disk or on workers, as in memory."""

import json

import numpy as np
import pandas as pd
import pytest
from test_cli import messages, one_error, run

from attnfit.data import open_source

pytest.importorskip("pyarrow")
pytest.importorskip("distributed")

N_GROUPS, N_ROWS = 40, 3


@pytest.fixture(scope="module")
def frame():
    """Outcomes of groups with missing values of every kind: of numbers, of integers, of labels."""
    rng = np.random.default_rng(0)
    n = N_GROUPS * N_ROWS
    data = pd.DataFrame({
        "market": np.repeat([f"m{k:02}" for k in range(N_GROUPS)], N_ROWS),
        "price": rng.standard_normal(n), "seats": rng.integers(1, 9, n), "y": rng.random(n) + 0.1,
        "share": np.tile([0.5, 0.25, 0.25], N_GROUPS), "note": "text",
    })  # fmt: skip
    data["seats"] = data["seats"].astype("Int64")
    data.loc[[3, 50], "price"] = np.nan
    data.loc[[7, 50], "seats"] = pd.NA
    data.loc[11, "market"] = None
    data.loc[20, "share"] = np.nan
    return data


@pytest.fixture(scope="module")
def stored(frame, tmp_path_factory):
    """The same rows in a file and in a folder whose files are numbered without zeros in front."""
    folder = tmp_path_factory.mktemp("stored")
    frame.to_parquet(folder / "d.parquet", row_group_size=17)
    frame.drop(columns="note").to_csv(folder / "d.csv", index=False)
    (folder / "parts").mkdir()
    for k, start in enumerate(range(0, len(frame), 11)):
        frame.iloc[start : start + 11].to_parquet(folder / "parts" / f"part-{k}.parquet")
    return folder


PLACES = {
    "disk": ("d.parquet", ["--memory-limit", "100GB"]),
    "folder": ("parts", ["--memory-limit", "100GB"]),
    "workers": ("d.parquet", ["--dask", "{address}"]),
    "workers, CSV": ("d.csv", ["--dask", "{address}"]),
}


@pytest.fixture(scope="module")
def address():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, processes=False, dashboard_address=":0", protocol="tcp") as cluster:
        yield cluster.scheduler_address


def words(place, stored, address):
    name, options = PLACES[place]
    return [stored / name, *(option.format(address=address) for option in options)]


SOFTMAX = ["fit", "softmax", "--target", "share", "--group", "market", "--features", "price,seats"]
EXPONENTIAL = ["fit", "exponential", "--target", "y", "--features", "price,seats"]


def told(result, path):
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), " ".join(" ".join(messages(result)).split())


@pytest.mark.parametrize("place", PLACES)
def test_rows_with_missing_values_are_dropped(place, stored, address, tmp_path, frame):
    """Against the fit of the rows that pandas leaves."""
    options = ["--missing", "drop", "--json", tmp_path / "r.json"]
    report, said = told(run(*SOFTMAX, *words(place, stored, address), *options), tmp_path / "r.json")
    whole = frame.dropna()
    whole.to_csv(tmp_path / "whole.csv", index=False)
    truth, _ = told(run(*SOFTMAX, tmp_path / "whole.csv", "--json", tmp_path / "t.json"), tmp_path / "t.json")
    assert (report["rows"], report["groups"]) == (len(whole), whole["market"].nunique())
    for found, expected in zip(report["coefficients"], truth["coefficients"], strict=True):
        # Both stop where the next step moves no logit by 1e-8.
        assert found["coefficient"] == pytest.approx(expected["coefficient"], abs=1e-6)
    assert f"Dropped {len(frame) - len(whole)} of {len(frame)} rows in which a value is missing" in said
    for count in ("price: 2", "seats: 2", "market: 1", "share: 1"):
        assert count in said


@pytest.mark.parametrize("place", ["disk", "folder"])
def test_missing_values_are_errors_otherwise(place, stored, address):
    sentence = one_error(run(*SOFTMAX, *words(place, stored, address)))
    assert "missing value" in sentence and "--missing drop" in sentence


def test_nothing_is_left(stored, tmp_path):
    pd.DataFrame({"x": [1.0, None], "y": [None, 1.0]}).to_parquet(tmp_path / "d.parquet")
    command = ["fit", "exponential", tmp_path / "d.parquet", "--target", "y", "--features", "x"]
    sentence = one_error(run(*command, "--memory-limit", "100GB", "--missing", "drop"))
    assert "is complete (missing: x: 1, y: 1); leave a column out" in sentence


@pytest.mark.parametrize("place", PLACES)
def test_a_constant_is_stored_nowhere(place, stored, address, tmp_path, frame):
    options = ["--constant", "--missing", "drop", "--json", tmp_path / "r.json"]
    saved = ["--save", tmp_path / "m.safetensors"]
    report, _ = told(run(*EXPONENTIAL, *words(place, stored, address), *options, *saved), tmp_path / "r.json")
    assert [row["name"] for row in report["coefficients"]] == ["(constant)", "price", "seats"]
    whole = frame[["price", "seats", "y"]].dropna()
    whole.insert(0, "one", 1.0)
    whole.to_csv(tmp_path / "whole.csv", index=False)
    command = ["fit", "exponential", tmp_path / "whole.csv", "--target", "y", "--features", "one,price,seats"]
    truth, _ = told(run(*command, "--json", tmp_path / "t.json"), tmp_path / "t.json")
    for found, expected in zip(report["coefficients"], truth["coefficients"], strict=True):
        assert found["coefficient"] == pytest.approx(expected["coefficient"], abs=1e-6)
    # The model knows its constant.
    rows = run("predict", tmp_path / "m.safetensors", tmp_path / "whole.csv", "--output", tmp_path / "p.csv")
    assert rows.exit_code == 0, rows.output


def test_a_fit_with_a_constant_goes_on_from_its_checkpoint(stored, tmp_path):
    """It is another fit than that without one, and than that of all rows."""
    command = [*EXPONENTIAL, stored / "d.parquet", "--memory-limit", "100GB", "--missing", "drop"]
    command += ["--checkpoint", tmp_path / "fit.ckpt"]
    assert run(*command, "--constant").exit_code == 0
    again = run(*command, "--constant")
    assert again.exit_code == 0 and "resumed from" in " ".join(again.output.split())
    assert "another" in one_error(run(*command))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", [SOFTMAX, EXPONENTIAL])
def test_a_picture_of_some_rows(place, command, stored, address, tmp_path, monkeypatch, frame):
    """Of whole groups, so that the shares shown are those of the model."""
    pytest.importorskip("matplotlib")
    from attnfit import plots
    from attnfit.cli import rows

    monkeypatch.setattr(rows, "SHOWN", 30)
    seen = []
    monkeypatch.setattr(plots, "fitted_versus_observed", lambda y, fitted, *_, **__: seen.append((y, fitted)))
    options = ["--missing", "drop", "--plot", tmp_path / "p.png", "--json", tmp_path / "r.json"]
    _, said = told(run(*command, *words(place, stored, address), *options), tmp_path / "r.json")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    ((y, fitted),) = seen
    assert f"The picture shows {len(y)} of the rows." in said
    if command is SOFTMAX:
        whole = frame.dropna()
        shown = whole["market"].unique()[: 30 * whole["market"].nunique() // len(whole)]
        assert sorted(y) == sorted(whole["share"][whole["market"].isin(shown)])
        assert fitted.sum() == pytest.approx(len(shown))
    else:
        assert 1 < len(y) <= 30 and len(fitted) == len(y)


def test_a_picture_that_needs_all_rows_is_refused_before_any_work(stored, tmp_path):
    command = ["fit", "softmax", stored / "d.parquet", "--target", "share", "--features", "price"]
    options = ["--missing", "drop", "--memory-limit", "100GB", "--plot", tmp_path / "p.png"]
    sentence = one_error(run(*command, *options))
    assert "name the column of the market, or leave out --dask and --memory-limit" in sentence


def test_predictions_without_rows_that_miss_a_value(stored, tmp_path, frame):
    whole = frame.dropna()
    whole.to_csv(tmp_path / "whole.csv", index=False)
    whole.to_parquet(tmp_path / "whole.parquet")
    model = tmp_path / "m.safetensors"
    assert run(*SOFTMAX, tmp_path / "whole.csv", "--save", model).exit_code == 0
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_csv(tmp_path / "d.csv", index=False)
    for kind in ("csv", "parquet"):
        read = pd.read_csv if kind == "csv" else pd.read_parquet
        data, out = tmp_path / f"d.{kind}", tmp_path / f"out.{kind}"
        command = ["predict", model, data, "--group", "market", "--output", out]
        assert "--missing drop" in one_error(run(*command))
        done = run(*command, "--missing", "drop")
        assert done.exit_code == 0, done.output
        # The target is not needed: its row stays.
        kept = frame.dropna(subset=["market", "price", "seats"])
        assert f"Dropped {len(frame) - len(kept)} of {len(frame)} rows" in " ".join(messages(done))
        found = read(out)
        assert found["price"].tolist() == pytest.approx(kept["price"].tolist())
        assert found.groupby("market")["predicted"].sum().tolist() == pytest.approx([1.0] * N_GROUPS)
        assert "--missing must be drop or error" in one_error(run(*command, "--missing", "no"))


def test_columns_are_read_with_a_one_in_front(stored, frame):
    from attnfit.data.sources.with_constant import WithConstant

    pd.DataFrame({"a": np.arange(20, dtype=np.float32), "b": np.arange(20) % 3}).to_parquet(
        stored / "plain.parquet", row_group_size=6
    )
    inner = open_source(stored / "plain.parquet", ["a", "b"])
    source = WithConstant(inner)
    expected = np.column_stack([np.ones(20), np.arange(20), np.arange(20) % 3])
    np.testing.assert_array_equal(source.read(2, 15), expected[2:15])
    np.testing.assert_array_equal(source.take(np.array([9, 0, 9])), expected[[9, 0, 9]])
    room = np.empty(20 * 3 * source.dtype.itemsize, dtype=np.uint8)
    read = source.read(0, 20, room)
    np.testing.assert_array_equal(read, expected)
    assert np.shares_memory(read, room)
    assert source.fingerprint() != inner.fingerprint()
    assert "row group 1" in source.locate(7)
