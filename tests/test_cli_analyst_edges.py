"""What an analyst meets less often: clusters on disk, units that cut across groups, models without errors."""

import json

import numpy as np
import pandas as pd
import pytest
from test_cli import messages, one_error, run

from attnfit import SoftmaxRegressor, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edges")
    assert run("example", "travel", "--output", folder / "travel.csv").exit_code == 0
    travel = pd.read_csv(folder / "travel.csv")
    travel["party"] = "p" + (travel.traveller // 7).astype(str)
    travel["across"] = travel.index % 9
    travel.to_csv(folder / "travel.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def frame(folder):
    return pd.read_csv(folder / "travel.csv")


@pytest.fixture(scope="module")
def coded(folder):
    """A model of codes of modes."""
    path = folder / "coded.safetensors"
    options = ("--formula", "choice ~ gc + C(mode)", "--group", "traveller", "--save", path)
    assert run("fit", "softmax", folder / "travel.csv", *options).exit_code == 0
    return path


ABOUT = ("--target", "choice", "--group", "traveller", "--features", "gc,ttme", "--cluster", "party")


def test_clusters_of_data_on_disk(folder, frame, tmp_path):
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "travel.parquet")
    errors = []
    for more in ((), ("--memory-limit", "64GB")):
        out = tmp_path / "out.json"
        result = run("fit", "softmax", tmp_path / "travel.parquet", *ABOUT, *more, "--json", out)
        assert result.exit_code == 0, result.output
        assert "unit cluster (party), 31 units" in result.stdout
        errors.append([row["standard_error"] for row in json.loads(out.read_text())["coefficients"]])
    np.testing.assert_allclose(*errors, rtol=1e-8)
    two = (*ABOUT[:-1], "party,across", "--memory-limit", "64GB")
    assert "--cluster takes one column where the data stay on disk" in one_error(
        run("fit", "softmax", tmp_path / "travel.parquet", *two)
    )


def test_clusters_without_a_label_are_missing_values(folder, frame, tmp_path):
    holes = frame.assign(party=frame.party.where(frame.traveller != 3, ""))
    holes.to_csv(tmp_path / "holes.csv", index=False)
    assert "Column 'party' has no value in line 10" in one_error(
        run("fit", "softmax", tmp_path / "holes.csv", *ABOUT)
    )
    result = run("fit", "softmax", tmp_path / "holes.csv", *ABOUT, "--missing", "drop")
    assert "836 rows in 209 groups" in result.stdout
    assert any("Dropped 4 of 840 rows" in line and "party: 4" in line for line in messages(result))


def test_clusters_that_cut_across_groups_leave_groups_whole(folder):
    about = ("fit", "softmax", folder / "travel.csv", *ABOUT[:-1], "across", "--holdout", "0.1", "--cv", "2")
    told = run(*about).stdout
    assert "Held out 21 of 210 groups" in told and "2 folds of groups" in told
    assert "unit cluster (across), 9 units" in told


def test_the_group_may_be_the_cluster(folder):
    about = ("fit", "softmax", folder / "travel.csv", *ABOUT[:-1], "traveller")
    assert "unit cluster (traveller), 210 units" in run(*about).stdout
    twice = ("fit", "softmax", folder / "travel.csv", *ABOUT[:-1], "choice")
    assert "Column 'choice' is given to two options" in one_error(run(*twice))


def test_one_cluster_has_no_errors(folder, frame, tmp_path):
    frame.assign(party="all").to_csv(tmp_path / "one.csv", index=False)
    out = tmp_path / "out.json"
    result = run("fit", "softmax", tmp_path / "one.csv", *ABOUT, "--json", out)
    assert result.exit_code == 0 and "note: one cluster" in result.stdout
    assert [row["standard_error"] for row in json.loads(out.read_text())["coefficients"]] == [None, None]


def test_codes_are_levels(coded, folder, frame, tmp_path):
    model = load(coded)
    assert model.feature_names_in_.tolist() == ["gc", "C(mode)[T.2]", "C(mode)[T.3]", "C(mode)[T.4]"]
    out = tmp_path / "out.csv"
    assert run("predict", coded, folder / "travel.csv", "--output", out).exit_code == 0
    plain = SoftmaxRegressor.from_formula("choice ~ gc + C(mode)", frame, "traveller", loss="cross_entropy")
    np.testing.assert_allclose(pd.read_csv(out).predicted, plain.predict(frame), rtol=1e-8)
    frame.assign(mode=frame["mode"].replace(4, 7)).to_csv(tmp_path / "seven.csv", index=False)
    sentence = one_error(run("predict", coded, tmp_path / "seven.csv"))
    assert (
        "Column 'mode' has 7 in line 5, which the training data did not have; it had: 1, 2, 3, 4" in sentence
    )
    assert "no column 'gc'" in one_error(run("predict", coded, without(frame, "gc", tmp_path)))


def without(frame, name, folder):
    frame.drop(columns=name).to_csv(folder / "without.csv", index=False)
    return folder / "without.csv"


def test_rows_of_new_data_without_a_value(coded, frame, tmp_path):
    holes = frame.astype({"gc": float})
    holes.loc[4, "gc"] = np.nan
    holes.to_csv(tmp_path / "holes.csv", index=False)
    assert "Column 'gc' has no value in line 6" in one_error(run("score", coded, tmp_path / "holes.csv"))
    assert "839 rows, 210 groups" in run("score", coded, tmp_path / "holes.csv", "--missing", "drop").stdout


def test_weights_enter_scores(coded, folder, frame, tmp_path):
    from attnfit import metrics

    weights = 1.0 + frame.traveller % 3
    frame.assign(w=weights).to_csv(tmp_path / "w.csv", index=False)
    out = tmp_path / "out.json"
    assert run("score", coded, tmp_path / "w.csv", "--weight", "w", "--json", out).exit_code == 0
    fitted = load(coded).predict(frame)
    expected = metrics.log_loss(frame.choice, fitted, frame.traveller, weights)
    assert json.loads(out.read_text())["scores"]["log loss"] == pytest.approx(expected, rel=1e-10)


def test_negative_weights_are_refused(folder, frame, tmp_path):
    frame.assign(w=-1).to_csv(tmp_path / "w.csv", index=False)
    about = ("fit", "softmax", tmp_path / "w.csv", "--formula", "choice ~ gc", "--group", "traveller")
    assert "Column 'w' is negative in line 2 (-1); --weight needs" in one_error(run(*about, "--weight", "w"))


def test_frequency_weights_count_copies(folder, frame, tmp_path):
    copies = frame.traveller % 3 + 1
    frame.assign(w=copies).to_csv(tmp_path / "w.csv", index=False)
    repeated = frame.loc[frame.index.repeat(copies)].copy()
    repeated["traveller"] = repeated.traveller * 10 + repeated.groupby(level=0).cumcount()
    repeated.to_csv(tmp_path / "repeated.csv", index=False)
    rows = []
    for data, more in (("w.csv", ("--weight", "w", "--weight-type", "frequency")), ("repeated.csv", ())):
        about = ("--formula", "choice ~ gc + ttme", "--group", "traveller", "--json", tmp_path / "out.json")
        assert run("fit", "softmax", tmp_path / data, *about, *more).exit_code == 0
        rows.append(json.loads((tmp_path / "out.json").read_text())["coefficients"])
    for name in ("coefficient", "standard_error"):
        one, other = ([row[name] for row in of] for of in rows)
        np.testing.assert_allclose(one, other, rtol=1e-8)


def test_models_without_elasticities(folder, tmp_path):
    path = tmp_path / "m.safetensors"
    about = ("--target", "choice", "--group", "traveller", "--features", "gc,ttme", "--save", path)
    assert run("fit", "rescaled", folder / "travel.csv", *about).exit_code in (0, 1)
    asked = ("elasticities", path, folder / "travel.csv", "--variable", "gc", "--group", "traveller")
    assert "RescaledSoftmaxRegressor has none" in one_error(run(*asked))
    model = SoftmaxRegressor("cross_entropy")
    frame = pd.read_csv(folder / "travel.csv")
    model.fit(frame[["gc", "ttme"]], frame.choice, groups=frame.traveller).save(path)
    assert "no standard errors; fit it again" in one_error(run(*asked))
    assert "does not know what it explains" in one_error(
        run("score", path, folder / "travel.csv", "--group", "traveller")
    )
    assert "name their column with --group" in one_error(run("score", path, folder / "travel.csv"))


def test_many_values_are_told_by_their_spread(coded, folder, frame, tmp_path):
    out = tmp_path / "out.csv"
    result = run("elasticities", coded, folder / "travel.csv", "--variable", "gc", "--output", out)
    value = pd.read_csv(out).value
    model = load(coded)
    expected = (1.0 - model.predict(frame)) * frame.gc * model.coef_[0]
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    lines = dict(line.split() for line in result.stdout.splitlines() if line.startswith(("least", "median")))
    assert float(lines["median"]) == pytest.approx(np.median(value), rel=1e-4)
    assert any("840 rows; --output FILE.csv writes all" in line for line in messages(result))


def test_a_test_that_is_not_defined_says_why(folder, frame, tmp_path):
    """Two clusters allow one restriction."""
    frame.assign(party=frame.traveller % 2).to_csv(tmp_path / "two.csv", index=False)
    page = tmp_path / "r.md"
    result = run("fit", "softmax", tmp_path / "two.csv", *ABOUT, "--report", page)
    assert result.exit_code == 0, result.output
    assert "not defined: the 2 restrictions have rank 1" in page.read_text()
