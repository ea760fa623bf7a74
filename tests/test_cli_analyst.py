"""The analyst's day in the shell: formulas, errors of clusters, held-out rows, scores, elasticities."""

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from test_cli import messages, one_error, run

from attnfit import PoissonRegressor, SoftmaxRegressor, datasets, load, metrics
from attnfit.cli.example import EXAMPLES

FORMULA = ("--formula", "choice ~ gc + ttme + C(mode) + hinc:C(mode)", "--group", "traveller")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples as the shell writes them; each traveller has a party of seven, and modes have names."""
    folder = tmp_path_factory.mktemp("examples")
    for name in EXAMPLES:
        assert run("example", name, "--output", folder / f"{name}.csv").exit_code == 0
    travel = pd.read_csv(folder / "travel.csv")
    travel["party"] = travel.traveller // 7
    travel["word"] = travel["mode"].map({1: "air", 2: "train", 3: "bus", 4: "car"})
    travel["chosen"] = np.repeat(travel.word[travel.choice == 1].to_numpy(), 4)
    travel.to_csv(folder / "travel.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def frame(folder):
    return pd.read_csv(folder / "travel.csv")


@pytest.fixture(scope="module")
def saved(folder):
    path = folder / "named.safetensors"
    formula = "choice ~ gc + ttme + C(word, contr.treatment('car'))"
    options = ["--formula", formula, "--group", "traveller", "--alternatives", "word", "--cluster", "party"]
    assert run("fit", "softmax", folder / "travel.csv", *options, "--save", path).exit_code == 0
    return path


def report(tmp_path, *arguments):
    path = tmp_path / "out.json"
    result = run(*arguments, "--json", path)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def numbers(found, name):
    return np.array([row[name] for row in found["coefficients"]], dtype=float)


# ---- fit ---------------------------------------------------------------------------------------------------


def test_a_formula_is_that_of_python(folder, frame, tmp_path):
    found = report(tmp_path, "fit", "softmax", folder / "travel.csv", *FORMULA, "--cluster", "party")
    model = SoftmaxRegressor.from_formula(
        FORMULA[1], frame, "traveller", clusters="party", loss="cross_entropy"
    )
    assert [row["name"] for row in found["coefficients"]] == list(model.feature_names_in_)
    np.testing.assert_allclose(numbers(found, "coefficient"), model.coef_, rtol=1e-12)
    np.testing.assert_allclose(numbers(found, "standard_error"), model.standard_errors_, rtol=1e-10)
    assert found["standard_errors"][0].startswith("standard errors: cluster, unit cluster (party), 31 units")
    assert found["statistics"]["hit_rate"] == model.fit_statistics().hit_rate


def test_poisson_is_that_of_statsmodels(folder, tmp_path):
    options = ("--formula", "flow ~ log(destination_mass) + distance + C(origin)", "--cluster", "origin")
    found = report(tmp_path, "fit", "poisson", folder / "flows.csv", *options)
    flows = pd.read_csv(folder / "flows.csv")
    peer = sm.GLM.from_formula(
        "flow ~ np.log(destination_mass) + distance + C(origin)", flows, family=sm.families.Poisson()
    ).fit(tol=1e-12, cov_type="cluster", cov_kwds={"groups": flows.origin, "use_correction": False})
    np.testing.assert_allclose(numbers(found, "coefficient")[:3], peer.params.iloc[[0, -2, -1]], rtol=1e-8)
    factor = np.sqrt(9 / 8)
    expected = peer.bse.iloc[[-2, -1]] * factor
    np.testing.assert_allclose(numbers(found, "standard_error")[1:3], expected, rtol=1e-7)
    assert found["statistics"]["deviance"] == pytest.approx(peer.deviance, rel=1e-10)


def test_columns_and_formulas_are_one_path(folder, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", "--group", "traveller", "--se", "robust")
    by_formula = report(tmp_path, *about, "--formula", "choice ~ gc + ttme", "--level", "0.9")
    by_column = report(tmp_path, *about, "--target", "choice", "--features", "gc,ttme", "--level", "0.9")
    for name in ("coefficient", "standard_error", "p_value", "lower"):
        np.testing.assert_allclose(numbers(by_formula, name), numbers(by_column, name), rtol=1e-10)
    assert by_formula["standard_errors"] == by_column["standard_errors"]
    row, z = by_formula["coefficients"][0], 1.6524  # t(209), 90 %
    assert (row["upper"] - row["lower"]) / row["standard_error"] == pytest.approx(2 * z, abs=1e-3)


def test_robust_errors_of_clusters_are_clustered(folder, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", *FORMULA, "--cluster", "party")
    one, other = (report(tmp_path, *about, "--se", kind) for kind in ("robust", "cluster"))
    assert one["coefficients"] == other["coefficients"] and "31 units" in one["standard_errors"][0]


def test_two_sets_of_clusters(folder, frame, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", "--target", "choice", "--group", "traveller")
    found = report(tmp_path, *about, "--features", "gc,ttme", "--cluster", "party,mode")
    model = SoftmaxRegressor("cross_entropy").fit(
        frame[["gc", "ttme"]].to_numpy(), frame.choice, groups=frame.traveller,
        clusters=frame[["party", "mode"]].to_numpy(),
    )  # fmt: skip
    np.testing.assert_allclose(numbers(found, "standard_error"), model.standard_errors_, rtol=1e-10)


def test_a_name_can_be_the_choice(folder, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", "--group", "traveller", "--alternatives", "word")
    named, coded = (
        report(tmp_path, *about, "--formula", f"{y} ~ gc + C(word)") for y in ("chosen", "choice")
    )
    assert named["coefficients"] == coded["coefficients"]


def test_missing_values_leave_out_groups(folder, frame, tmp_path):
    holes = frame.astype({"gc": float}).copy()
    holes.loc[[5, 6, 40], "gc"] = np.nan
    holes.to_csv(tmp_path / "holes.csv", index=False)
    about = ("fit", "softmax", tmp_path / "holes.csv", *FORMULA)
    assert "Column 'gc' has no value in line 7 (and 2 more)" in one_error(run(*about))
    result = run(*about, "--missing", "drop")
    assert "832 rows in 208 groups" in result.stdout
    assert any("left out 8 rows in 2 groups" in line for line in messages(result))


# ---- rows that were not fitted -----------------------------------------------------------------------------


def test_the_rest_is_held_out(folder, frame, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", *FORMULA, "--holdout", "0.2", "--seed", "3")
    found = report(tmp_path, *about)
    assert found["groups"] == 168 and found["scores"][0]["title"].startswith("Held out 42 of 210 groups")
    out = np.random.default_rng(3).permutation(210)[:42]
    # Labels are text, and numbered as text.
    order = np.unique(frame.traveller.astype(str))
    held = frame.traveller.astype(str).isin(order[out])
    model = SoftmaxRegressor.from_formula(FORMULA[1], frame[~held], "traveller", loss="cross_entropy")
    np.testing.assert_allclose(numbers(found, "coefficient"), model.coef_, rtol=1e-8)
    rest = frame[held]
    expected = metrics.log_loss(rest.choice, model.predict(rest), rest.traveller)
    assert found["scores"][0]["values"]["log loss"] == [pytest.approx(expected, rel=1e-8)]
    assert found["scores"][0]["values"]["log loss of equal shares"] == [pytest.approx(np.log(4))]


def test_clusters_are_held_out_whole(folder, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", *FORMULA, "--cluster", "party")
    found = report(tmp_path, *about, "--holdout", "0.1", "--cv", "3")
    assert [one["title"] for one in found["scores"]] == [
        "Held out 3 of 31 clusters at random (seed 0)", "Cross-validated, 3 folds of clusters",
    ]  # fmt: skip
    assert len(found["scores"][1]["values"]["hit rate"]) == 3
    result = run(*about, "--cv", "3", "--json", tmp_path / "all.json")
    values = json.loads((tmp_path / "all.json").read_text())["scores"][0]["values"]["log loss"]
    told = f"log loss {np.mean(values):.6g} (standard error {np.std(values, ddof=1) / np.sqrt(3):.2g})"
    assert told in result.stdout and "equal shares 1.38629, hit rate" in result.stdout


def test_folds_are_those_of_scikit_learn(folder, frame, tmp_path):
    from sklearn.model_selection import GroupKFold

    about = ("fit", "softmax", folder / "travel.csv", "--target", "choice", "--group", "traveller")
    found = report(tmp_path, *about, "--features", "gc,ttme", "--cv", "4")
    X, y, groups = frame[["gc", "ttme"]].to_numpy(), frame.choice, frame.traveller.astype(str)
    numbered = np.unique(groups, return_inverse=True)[1]
    losses = []
    for train, test in GroupKFold(4).split(X, groups=numbered):
        model = SoftmaxRegressor("cross_entropy").fit(X[train], y[train], groups=groups[train])
        f = model.predict(X[test], groups=groups[test])
        losses.append(metrics.log_loss(y[test], f, groups[test]))
    np.testing.assert_allclose(found["scores"][0]["values"]["log loss"], losses, rtol=1e-8)


def test_the_ridge_is_chosen(folder, tmp_path):
    about = ("fit", "softmax", folder / "travel.csv", "--target", "choice", "--group", "traveller")
    found = report(tmp_path, *about, "--features", "gc,ttme", "--ridge", "auto", "--cv", "3")
    assert found["scores"][0]["title"].startswith("Ridge ") and "of 21 by 3 folds of groups" in str(found)


def test_outcomes_have_scores_too(folder, tmp_path):
    for model, names in (("poisson", "explained deviance"), ("exponential", "r2")):
        formula = ("--formula", "flow ~ log(destination_mass) + distance")
        found = report(tmp_path, "fit", model, folder / "flows.csv", *formula, "--holdout", "0.25")
        assert found["rows"] == 54 and names in found["scores"][0]["values"]
        assert found["scores"][0]["title"].startswith("Held out 18 of 72 rows")


def test_counts_are_taken_at_their_word(folder):
    about = ("fit", "softmax", folder / "flows.csv", "--formula", "flow ~ distance", "--group", "origin")
    told = "The target sums to more than one in 9 of 9 groups"
    assert told in run(*about).stdout and told not in run(*about, "--counts").stdout


def test_several_ones_can_be_given(folder, frame, tmp_path):
    """Against statsmodels, which conditions on their number."""
    from statsmodels.discrete.conditional_models import ConditionalLogit

    twice = frame.assign(taken=((frame.choice == 1) | (frame["mode"] == 4)).astype(float))
    twice.to_csv(tmp_path / "twice.csv", index=False)
    about = (
        "fit",
        "softmax",
        tmp_path / "twice.csv",
        "--group",
        "traveller",
        "--formula",
        "taken ~ gc + ttme",
    )
    assert any("--ties exact" in line for line in messages(run(*about)))
    found = report(tmp_path, *about, "--ties", "exact")
    peer = ConditionalLogit(twice.taken, twice[["gc", "ttme"]], groups=twice.traveller).fit(disp=False)
    np.testing.assert_allclose(numbers(found, "coefficient"), peer.params, rtol=1e-4)


# ---- a saved model -----------------------------------------------------------------------------------------


def test_a_saved_formula_predicts(saved, folder, frame):
    result = run("predict", saved, folder / "travel.csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    model = load(saved)
    np.testing.assert_allclose([float(r["predicted"]) for r in rows], model.predict(frame), rtol=1e-14)


def test_scores_of_a_saved_model(saved, folder, frame, tmp_path):
    found = report(tmp_path, "score", saved, folder / "travel.csv")
    model = SoftmaxRegressor.from_formula(
        "choice ~ gc + ttme + C(word, contr.treatment('car'))", frame, "traveller", loss="cross_entropy"
    )
    statistics = model.fit_statistics()
    assert (found["rows"], found["groups"]) == (840, 210)
    for name, told in (("log loss", "log_loss"), ("Brier score", "brier"), ("hit rate", "hit_rate")):
        assert found["scores"][name] == pytest.approx(getattr(statistics, told), rel=1e-10)
    by_name = report(tmp_path, "score", saved, folder / "travel.csv", "--target", "chosen")
    assert by_name["scores"] == found["scores"]


@pytest.mark.parametrize("effect", ["elasticity", "semi-elasticity", "marginal"])
def test_elasticities_of_a_saved_model(saved, folder, frame, tmp_path, effect):
    from attnfit.cli.elasticities import EFFECTS

    out = tmp_path / "out.csv"
    about = ("elasticities", saved, folder / "travel.csv", "--variable", "gc", "--effect", effect)
    result = run(*about, "--output", out, "--level", "0.9")
    assert result.exit_code == 0 and "cluster, unit cluster, 31 units" in result.stdout
    found = pd.read_csv(out)
    model = SoftmaxRegressor.from_formula(
        "choice ~ gc + ttme + C(word, contr.treatment('car'))", frame, "traveller", "word", "party",
        loss="cross_entropy",
    )  # fmt: skip
    peer = getattr(model, EFFECTS[effect][0])("gc", level=0.9).to_frame()
    assert found.share_of.tolist() == peer.share_of.tolist()
    for name in ("value", "standard_error", "lower", "upper"):
        np.testing.assert_allclose(found[name], peer[name], rtol=1e-8)


def test_elasticities_of_rows_and_outcomes(folder, tmp_path):
    path, out = tmp_path / "cars.safetensors", tmp_path / "out.csv"
    cars = ("--formula", "share ~ prices + log(space)", "--group", "year", "--outside-good", "--save", path)
    assert run("fit", "softmax", folder / "cars.csv", *cars).exit_code == 0
    result = run("elasticities", path, folder / "cars.csv", "--variable", "prices", "--output", out)
    assert "median" in result.stdout
    data, model = pd.read_csv(folder / "cars.csv"), load(path)
    share = model.predict(data)
    value = pd.read_csv(out).value
    np.testing.assert_allclose(value, model.coef_[1] * data.prices * (1.0 - share), rtol=1e-10)
    flows = ("--formula", "flow ~ distance", "--save", path)
    assert run("fit", "poisson", folder / "flows.csv", *flows).exit_code == 0
    found = report(tmp_path, "elasticities", path, folder / "flows.csv", "--variable", "distance")
    data, model = pd.read_csv(folder / "flows.csv"), load(path)
    assert isinstance(model, PoissonRegressor)
    u = model.predict(data)
    assert found["value"] == [pytest.approx((u * model.coef_[1] * data.distance).sum() / u.sum())]


# ---- examples ----------------------------------------------------------------------------------------------


def test_examples_are_the_packaged_data(folder):
    cars = datasets.load_car_shares()
    inside = cars.A.any(axis=1)
    np.testing.assert_array_equal(pd.read_csv(folder / "cars.csv").share, cars.b[inside])
    printed = run("example").stdout
    assert all(f"{name}: " in printed for name in EXAMPLES)
    assert run("example", "flows").stdout == (folder / "flows.csv").read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_fitted_as_it_is_told(name, folder, monkeypatch):
    import shlex

    monkeypatch.chdir(folder)
    line = next(line for line in run("example", width="500").stdout.splitlines() if line.startswith(name))
    words = shlex.split(line[line.index("attnfit ") :])
    result = run(*words[1:])
    assert result.exit_code == 0 and "certified within" in result.stdout, result.output


# ---- what is wrong -----------------------------------------------------------------------------------------


FIT, GROUPED = ("fit", "softmax", "travel.csv"), ("--group", "traveller")
CHANGE = ("elasticities", "named.safetensors", "travel.csv", "--variable")
WRONG = {
    "no target": ((*FIT, *GROUPED), "Name the column to explain with --target"),
    "no tilde": ((*FIT, *GROUPED, "--formula", "choice"), 'must read "target ~ terms"'),
    "both": ((*FIT, *FORMULA, "--target", "choice"), "--formula says what --target says"),
    "a column": ((*FIT, *GROUPED, "--formula", "choice ~ gcc"), "no column 'gcc', which --formula"),
    "code": ((*FIT, *GROUPED, "--formula", "choice ~ __import__('os')"), "may not"),
    "braces": ((*FIT, *GROUPED, "--formula", "choice ~ {gc}"), "the formula"),
    "a level": (
        (*FIT, *GROUPED, "--formula", "choice ~ C(mode, contr.treatment('ship'))"),
        "--formula cannot be evaluated",
    ),
    "codes": ((*FIT, *GROUPED, "--formula", "mode ~ gc"), "holds whole numbers from 1 to 4"),
    "words": ((*FIT, *GROUPED, "--formula", "chosen ~ gc"), "chosen is text"),
    "ties": ((*FIT, *FORMULA, "--ties", "efron"), "--ties must be counts or exact"),
    "no ties": (("fit", "poisson", "flows.csv", "--target", "flow", "--ties", "exact"), "--ties belongs to"),
    "kind": ((*FIT, *FORMULA, "--se", "hc1"), "--se must be one of auto, classic"),
    "cluster kind": ((*FIT, *FORMULA, "--se", "cluster"), "--se cluster needs --cluster"),
    "classic": ((*FIT, *FORMULA, "--se", "classic", "--cluster", "party"), "no meaning with --se classic"),
    "no cluster": ((*FIT, *FORMULA, "--cluster", "prty"), "no column 'prty', which --cluster needs; did you"),
    "three": ((*FIT, *FORMULA, "--cluster", "party,mode,hinc"), "one column or two, not 3"),
    "holdout": ((*FIT, *FORMULA, "--holdout", "20"), "--holdout is a share between 0 and 1, not 20"),
    "none held": ((*FIT, *FORMULA, "--holdout", "0.001"), "leaves none on one side"),
    "folds": ((*FIT, *FORMULA, "--cv", "300"), "--cv 300 needs as many groups; there are 210"),
    "level": ((*FIT, *FORMULA, "--level", "95"), "--level must lie between 0 and 1"),
    "weights": ((*FIT, *FORMULA, "--weight-type", "copies"), "--weight-type must be sampling or frequency"),
    "ridge": ((*FIT, *FORMULA, "--ridge", "some"), "--ridge must be a number or auto"),
    "report": ((*FIT, *FORMULA, "--report", "r.docx"), "should end in .html, .md or .tex"),
    "memory": ((*FIT, *FORMULA, "--memory-limit", "1GB"), "--formula needs the rows in memory"),
    "effect": ((*CHANGE, "gc", "--effect", "x"), "no effect"),
    "variable": ((*CHANGE, "gcc"), "did you mean 'gc'"),
    "category": (
        (*CHANGE, "word"),
        "'word' is a category with levels",
    ),
    "unseen": (("predict", "named.safetensors", "ship.csv"), "Column 'word' has 'ship' in line 4, which"),
    "example": (("example", "car"), "There is no example 'car'; did you mean 'cars'?"),
    "no groups": (("score", "named.safetensors", "cars.csv"), "no column 'traveller'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(case, saved, folder, frame, monkeypatch):
    monkeypatch.chdir(folder)
    if case == "unseen":
        frame.assign(word=frame.word.where(frame.index != 2, "ship")).to_csv("ship.csv", index=False)
    words, told = WRONG[case]
    assert told in one_error(run(*words))
