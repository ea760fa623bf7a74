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
    "workers, folder": ("parts", ["--dask", "{address}"]),
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


# What is wrong with a file that stays where it is, and what is said of it in memory and elsewhere alike.
BROKEN = {
    "text in the target": (lambda d: d.assign(y="high"), "Column 'y'", "not numeric"),
    "text in a feature": (lambda d: d.assign(price="dear"), "Column 'price'", "not numeric"),
    "a label that stands for none": (
        lambda d: d.assign(market=d["market"].replace("m03", "NA")), "Column 'market' has no value", "'NA'"
    ),
    "a negative target": (lambda d: d.assign(y=-d["y"]), "negative in", "row"),
    "no rows": (lambda d: d.iloc[:0], "", "row"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["memory", *PLACES])
@pytest.mark.parametrize("fault", BROKEN)
def test_bad_input_is_bad_input_everywhere(place, fault, frame, address, tmp_path):
    """One sentence and the exit code 2, never that of an error of attnfit itself."""
    spoil, *words_told = BROKEN[fault]
    name, options = PLACES.get(place, ("d.parquet", []))
    data = spoil(frame.drop(columns=["note", "share"]).dropna().astype({"seats": "int64"}))
    if name == "parts":
        (tmp_path / name).mkdir()
        data.iloc[:40].to_parquet(tmp_path / name / "a.parquet")
        data.iloc[40:].to_parquet(tmp_path / name / "b.parquet")
    elif name == "d.csv":
        data.to_csv(tmp_path / name, index=False)
    else:
        data.to_parquet(tmp_path / name)
    command = ["fit", "softmax", tmp_path / name, "--target", "y", "--group", "market", "--features", "price"]
    sentence = one_error(run(*command, *(option.format(address=address) for option in options)))
    if fault == "a label that stands for none" and place.startswith("workers"):
        assert "groups has no label" in sentence
    elif place == "workers, CSV" and fault == "no rows":
        assert "not numeric" in sentence or "no rows" in sentence
    else:
        assert all(word in sentence for word in words_told), sentence


@pytest.mark.parametrize("place", ["disk", "workers", "workers, CSV"])
@pytest.mark.parametrize("damage", ["cut", "empty", "another format", "UTF-16", "ragged"])
def test_damaged_files_are_bad_input(place, damage, stored, address, tmp_path):
    name, _ = PLACES[place]
    whole = (stored / name).read_bytes()
    data = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "another format": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "UTF-16": "market,price,share\na,1,0.5\n".encode("utf-16"),
        "ragged": b"market,price,share\na,1,0.5\nb,1,2,3,4\n",
    }[damage]
    if name == "d.csv" and damage == "cut":
        # In the middle of a number: nobody can see it.
        pytest.skip("a CSV file that is cut at a line is a CSV file")
    (tmp_path / name).write_bytes(data)
    one_error(run(*SOFTMAX, *words(place, tmp_path, address)))


def test_a_folder_without_files_is_bad_input(address, tmp_path):
    (tmp_path / "parts").mkdir()
    for option in (["--memory-limit", "1GB"], ["--dask", address]):
        one_error(run(*SOFTMAX, tmp_path / "parts", *option))


@pytest.mark.parametrize("place", ["folder", "workers"])
def test_files_without_rows_come_first(place, stored, frame, address, tmp_path):
    """What a column is, the first rows tell, wherever they are."""
    (tmp_path / "parts").mkdir()
    whole = frame.dropna().drop(columns="note")
    whole.iloc[:0].to_parquet(tmp_path / "parts" / "a.parquet")
    whole.to_parquet(tmp_path / "parts" / "b.parquet")
    options = [option.format(address=address) for option in PLACES[place][1]]
    command = ["fit", "softmax", tmp_path / "parts", "--target", "share", "--group", "market"]
    result = run(*command, "--exclude", "y", *options)
    assert result.exit_code == 0, result.output
    assert "Features: price, seats" in " ".join(messages(result))


def test_decimals_are_numbers_on_disk_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    price = pa.array(rng.standard_normal(90).round(3)).cast(pa.decimal128(10, 3), safe=False)
    columns = {"market": np.repeat(np.arange(30), 3), "price": price, "share": np.tile([0.5, 0.3, 0.2], 30)}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    command = ["fit", "softmax", tmp_path / "d.parquet", "--target", "share", "--group", "market"]
    reports = []
    for options in ([], ["--memory-limit", "100GB"]):
        report, said = told(run(*command, *options, "--json", tmp_path / "r.json"), tmp_path / "r.json")
        assert "Features: price." in said
        reports.append(report["coefficients"][0]["coefficient"])
    assert reports[0] == pytest.approx(reports[1], abs=1e-9)


def test_a_decimal_mark_is_for_files_in_memory(stored, address):
    sentence = one_error(run(*SOFTMAX, stored / "d.csv", "--dask", address, "--decimal", ","))
    assert "--decimal is for files in memory" in sentence


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
