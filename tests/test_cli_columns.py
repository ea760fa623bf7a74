"""Which columns and rows of a file make up a fit: features, codes, totals, missing values."""

import json

import numpy as np
import pandas as pd
import pytest
from test_cli import messages, one_error, run, write_rows
from test_cli_formats import FRAME, ROLES, coefficients

from attnfit import datasets
from attnfit.cli.suspects import refuse_codes, suspicion

pytest.importorskip("pyarrow")

# ---- columns that are no features -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("", [1.5, 2.5, 2.5], "no name"),
        ("Unnamed: 0", [0.5, 0.5, 0.2], "no name"),
        ("k", [0, 1, 2, 3], "row numbers"),
        ("k", [1, 2, 3, 4], "row numbers"),
        ("code", [17, 3, 99, 4], "whole numbers that are all different"),
        ("firm_id", [1, 1, 2, 2], "an identifier by its name"),
        ("firm ids", [1, 1, 2, 2], "an identifier by its name"),
        ("clientId", [1, 1, 2, 2], "an identifier by its name"),
        ("ID", [1, 1, 2, 2], "an identifier by its name"),
        ("traveller", np.repeat(np.arange(1, 13), 4), "numbers of blocks of rows"),
        ("mode", [1, 2, 3, 4, 1, 2, 3, 4, 1], "row numbers that begin again and again"),
        ("dose", np.repeat([0, 1, 2], 4), None),
        ("air", [0, 1, 0, 1, 0, 1], None),
        ("firm_id", [1, np.nan, 2, 2], "an identifier by its name"),
        ("code", [17, np.nan, 99, 4], "whole numbers that are all different"),
        ("empty", [np.nan, np.nan, np.nan], "no values"),
        ("air", [0, np.nan, 1, 1], None),
        ("price", [1.5, 2.5, 3.5, 4.5], None),
        ("air", [0, 1, 0, 0], None),
        ("one", [1, 1, 1, 1], None),
        ("paid", [1, 1, 2, 2], None),
        ("grid", [1, 1, 2, 2], None),
    ],
)
def test_suspicion(name, values, why):
    assert suspicion(name, np.array(values, dtype=float), None) == why


def test_numbers_within_groups_are_suspect_and_dummies_of_pairs_are_not():
    groups = np.repeat(["a", "b", "c"], [3, 3, 2])
    assert (
        suspicion("mode", np.array([1.0, 2, 3, 1, 2, 3, 1, 2]), groups) == "numbers of the rows of each group"
    )
    # In any order, of the rows and within the groups.
    shuffled = np.array([7, 2, 5, 0, 3, 6, 1, 4])
    numbers = np.array([2.0, 1, 0, 1, 2, 0, 1, 0])
    assert suspicion("j", numbers[shuffled], groups[shuffled]) == "numbers of the rows of each group"
    assert suspicion("j", np.array([2.0, 1, 0, 1, 2, 1, 1, 0]), groups) is None
    pairs = np.repeat(["a", "b", "c"], 2)
    assert suspicion("d", np.array([0.0, 1, 0, 1, 0, 1]), pairs) is None


@pytest.mark.parametrize("place", [[], ["--memory-limit", "32GB"], ["--checkpoint", "c"]])
def test_default_features_are_told_and_can_be_excluded(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    frame = FRAME.assign(
        person_id=np.repeat(np.arange(30), 2), code=np.arange(60)[::-1] * 3, alt=[1, 2, 3] * 20
    )
    frame.to_csv("d.csv", index=True)
    frame.reset_index(names="Unnamed: 0").to_parquet("d.parquet", row_group_size=7)
    for file in ("d.csv", "d.parquet"):
        words = ["fit", "softmax", file, "--target", "share", "--group", "market", *place, "--afresh"]
        result = run(*words, "--exclude", "size", width="10000")
        assert result.exit_code == 0, result.output
        (told,) = [line for line in messages(result) if "Features:" in line]
        assert told == (
            "Note: Features: price; left out: Unnamed: 0 (no name), person_id (an identifier by its name), "
            "code (whole numbers that are all different), alt (numbers of the rows of each group)."
        )
    assert "is --target; take it out of --exclude" in one_error(run(*words, "--exclude", "share"))
    assert "has no column 'sise', which --exclude needs" in one_error(run(*words, "--exclude", "sise"))
    assert "leave it or --features out" in one_error(run(*words, "--exclude", "size", "--features", "price"))
    # Named, a column is taken at its word.
    assert run(*words, "--features", "price,code").exit_code == 0


def test_names_with_commas_stand_in_quotes(tmp_path):
    write_rows(tmp_path / "d.csv", ["g", "x, y", "s"], [[0, 1, 0.4], [0, 2, 0.6], [1, 3, 0.1], [1, 1, 0.9]])
    result = run(
        "fit",
        "softmax",
        tmp_path / "d.csv",
        "--target",
        "s",
        "--group",
        "g",
        "--features",
        '"x, y"',
        width="200",
    )
    assert result.exit_code == 0 and "x, y " in result.stdout


# ---- codes, totals and single rows ------------------------------------------------------------------------


def wide():
    """As Swissmetro ships: one row a choice, attributes by alternative, the choice a code from 0 to 3."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"ID": np.repeat(np.arange(30), 9), "PURPOSE": rng.integers(1, 9, 270)})
    for alternative in ("TRAIN", "SM", "CAR"):
        frame[f"{alternative}_TT"] = rng.integers(20, 400, 270)
        frame[f"{alternative}_CO"] = rng.integers(10, 300, 270)
    frame["CHOICE"] = rng.integers(0, 4, 270)
    return frame


@pytest.mark.parametrize("place", [[], ["--memory-limit", "32GB"]])
@pytest.mark.parametrize("model", ["softmax", "rescaled"])
def test_codes_are_no_shares(tmp_path, model, place):
    frame = wide()
    for low in (0, 1):
        data = frame[low <= frame["CHOICE"]]
        data.to_csv(tmp_path / "w.csv", index=False)
        data.to_parquet(tmp_path / "w.parquet", index=False)
        for file in ("w.csv", "w.parquet"):
            for more in ([], ["--group", "ID"]):
                words = ["fit", model, tmp_path / file, "--target", "CHOICE", *more, *place]
                sentence = one_error(run(*words))
                assert f"'CHOICE' holds whole numbers from {low} to 3, not shares" in sentence
                assert "the table is wide (" in sentence and "--counts" in sentence
    result = run("fit", "softmax", tmp_path / "w.csv", "--target", "CHOICE", "--group", "ID", "--counts")
    assert "not shares" not in result.stderr


def test_counts_and_choices_are_no_codes():
    rng = np.random.default_rng(0)
    refuse_codes(np.tile([0.0, 1.0, 0.0], 50), "y", ["y"])
    refuse_codes(rng.poisson(300.0, 400).astype(float), "y", ["y"])
    refuse_codes(rng.dirichlet([1.0, 1.0], 50).ravel(), "y", ["y"])
    refuse_codes(np.array([0.0, 1.0, 2.0]), "y", ["y"])


@pytest.mark.parametrize("place", ["memory", "disk", "limit", "dask", "checkpoint"])
def test_totals_are_told_apart_and_named(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    frame = FRAME.copy()
    frame.loc[frame["market"] == "m03", "share"] *= 0.5
    frame = pd.concat([frame, frame[frame["market"] == "m07"].head(2)]).sort_values("market", kind="stable")
    single = pd.DataFrame({"market": ["m99"], "price": [1.0], "size": [0.5], "share": [1.0]})
    frame = pd.concat([frame, single])
    frame.to_parquet("d.parquet", index=False, row_group_size=11)
    frame.to_csv("d.csv", index=False)
    file, more = {
        "memory": ("d.csv", []),
        "disk": ("d.parquet", ["--memory-limit", "32GB"]),
        "limit": ("d.csv", ["--memory-limit", "32GB"]),
        "dask": ("d.parquet", ["--dask", "local"]),
        "checkpoint": ("d.csv", ["--checkpoint", "c"]),
    }[place]
    if place == "dask":
        pytest.importorskip("distributed")
        from distributed import LocalCluster

        cluster = LocalCluster(n_workers=1, processes=False, dashboard_address=":0", protocol="tcp")
        more = ["--dask", cluster.scheduler_address]
    result = run("fit", "softmax", file, *ROLES, *more, "--json", "r.json", width="10000")
    if place == "dask":
        cluster.close()
    assert result.exit_code == 0, result.output
    extra = FRAME[FRAME["market"] == "m07"]["share"].head(2).sum()
    assert f"more than one in 1 of 21 groups (m07: {1 + extra:.6g}); 2 rows there repeat" in result.stdout
    assert "less than one in 1 of 21 groups (m03: 0.5); add --outside-good" in result.stdout
    assert "1 group has one row, whose share is one whatever the features" in result.stdout
    told = json.loads((tmp_path / "r.json").read_text())
    assert (told["groups_above_one"], told["groups_below_one"], told["groups_of_one_row"]) == (1, 1, 1)


# ---- missing values ---------------------------------------------------------------------------------------


def test_missing_values_are_dropped_and_counted(tmp_path):
    frame = FRAME.astype({"price": object, "market": object})
    frame.loc[3, "price"], frame.loc[4, "size"], frame.loc[10, "market"] = "#N/A", np.nan, ""
    frame["other"] = "NA"
    path = tmp_path / "d.csv"
    frame.to_csv(path, index=False)
    sentence = one_error(run("fit", "softmax", path, *ROLES))
    assert "Column 'market' has no value in line 12" in sentence and "(--missing drop)" in sentence
    sentence = one_error(run("fit", "softmax", path, *ROLES[:2], "--features", "price"))
    assert "Column 'price' has no value in line 5" in sentence and "or add --missing drop" in sentence
    found, result = coefficients(path, "--missing", "drop")
    told = "Dropped 3 of 60 rows in which a value is missing (price: 1, size: 1, market: 1)"
    assert told in " ".join(messages(result))
    whole = FRAME.drop([3, 4, 10])
    whole.to_csv(tmp_path / "whole.csv", index=False)
    assert found == pytest.approx(coefficients(tmp_path / "whole.csv")[0])
    assert "--missing must be drop or error" in one_error(
        run("fit", "softmax", path, *ROLES, "--missing", "skip")
    )


# ---- starts and separation --------------------------------------------------------------------------------


def test_starts_reach_the_solver(tmp_path):
    rows = [[0.6, 0.01], [0.7, 0.43], [-3.9, 0.08], [0.6, 0.47]]
    path = write_rows(tmp_path / "two.csv", ["x", "y"], rows)
    words = ["fit", "softmax", path, "--target", "y", "--loss", "squared", "--json", tmp_path / "r.json"]
    minima = []
    for starts in (1, 12):
        assert run(*words, "--starts", starts).exit_code == 0
        minima.append(len(json.loads((tmp_path / "r.json").read_text())["local_values"]))
    assert minima[0] == 1 and minima[1] > 1
    assert run(*words, "--starts", 0).exit_code == 2


@pytest.fixture
def separable(tmp_path):
    """Mode 0 has a constant of its own and is never chosen."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(40):
        chosen = 1 + int(rng.integers(2))
        rows += [[k, int(j == 0), rng.normal(), int(j == chosen)] for j in range(3)]
    return write_rows(tmp_path / "d.csv", ["person", "never", "cost", "y"], rows)


def test_the_rest_of_separable_data_is_offered_and_fitted(separable, tmp_path):
    words = ["fit", "softmax", separable, "--target", "y", "--group", "person", "--features", "never,cost"]
    sentence = one_error(run(*words), code=1)
    assert "never" in sentence and sentence.endswith("; add --separation drop to fit the remaining rows")
    model, report = tmp_path / "m", tmp_path / "r.json"
    result = run(*words, "--separation", "drop", "--save", model, "--json", report, width="10000")
    assert result.exit_code == 0 and result.stderr == ""
    assert "Dropped 40 rows." in result.stdout and "No finite value: never." in result.stdout
    assert "80 rows in 40 groups" in result.stdout and "certified" in result.stdout
    told = json.loads(report.read_text())
    assert told["converged"] and told["dropped_rows"] == 40 and told["rows"] == 80
    rest = write_rows(
        tmp_path / "rest.csv",
        ["person", "never", "cost", "y"],
        [line.split(",") for line in separable.read_text().split()[1:] if line.split(",")[1] == "0"],
    )
    alone, _ = coefficients(rest, roles=["--target", "y", "--group", "person", "--features", "cost"])
    by_name = {row["name"]: row["coefficient"] for row in told["coefficients"]}
    assert by_name["cost"] == pytest.approx(alone["cost"], abs=1e-6) and by_name["never"] is None
    shares = run("predict", model, separable, "--group", "person").stdout.splitlines()[1:]
    assert all(float(row.split(",")[-1]) == 0.0 for row in shares[::3])
    assert "--separation must be warn or drop" in one_error(run(*words, "--separation", "skip"))


def test_nothing_remains_of_separable_data(tmp_path):
    rows = [["a", 1.5, 1], ["a", 2, 0], ["b", 3, 1], ["b", 4, 0]]
    path = write_rows(tmp_path / "d.csv", ["g", "cost", "y"], rows)
    words = ["fit", "softmax", path, "--target", "y", "--group", "g", "--separation", "drop"]
    result = run(*words)
    assert result.exit_code == 1
    assert (
        "separable" in result.stderr and "--separation drop cannot help here: no coefficient" in result.stderr
    )


def test_travel_mode_as_it_ships_by_default(tmp_path):
    """A table with row numbers, traveller numbers and mode codes gives the published coefficients."""
    data = datasets.load_travel_mode()
    frame = pd.DataFrame(data.A, columns=data.feature_names)
    frame.insert(0, "individual", data.groups + 1)
    frame.insert(1, "mode", np.tile([1, 2, 3, 4], 210))
    frame["choice"] = data.b
    frame.to_csv(tmp_path / "t.csv")
    found, _ = coefficients(tmp_path / "t.csv", roles=["--target", "choice", "--group", "individual"])
    assert list(found) == list(data.feature_names)
    np.testing.assert_allclose(list(found.values()), data.references["cross_entropy"].coefficients, atol=6e-7)
