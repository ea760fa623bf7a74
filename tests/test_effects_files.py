"""Absorbed effects in model files and in the shell: what was fitted comes back, whatever the labels are."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_cli import messages, one_error, run

from attnfit import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor, load
from attnfit.estimators import ModelFileError
from attnfit.estimators.files import DIGEST, HEADER, _digest

N = 400
RNG = np.random.default_rng(0)
NUMBERS = RNG.integers(-3, 9, N)
WORDS = RNG.choice(["ä", "b", "c,d", "0"], N)
DAYS = pd.to_datetime("2020-02-27") + pd.to_timedelta(RNG.integers(0, 5, N), "D")
X = RNG.standard_normal((N, 2))
Y = RNG.poisson(np.exp(X @ [0.4, -0.3] + 0.1 * NUMBERS)).astype(float)

LABELS = {
    "whole numbers": NUMBERS,
    "short numbers": NUMBERS.astype(np.int8),
    "unsigned": (NUMBERS + 3).astype(np.uint16),
    "floats that are whole": NUMBERS.astype(float),
    "truth values": NUMBERS > 2,
    "text": WORDS,
    "objects": WORDS.astype(object),
    "categories": pd.Categorical(WORDS),
    "times": DAYS.to_numpy(),
    "days": DAYS.to_numpy().astype("M8[D]"),
    "lengths of time": (NUMBERS + 3).astype("m8[h]"),
    "pairs": (WORDS, NUMBERS),
    "pairs of times": (DAYS.to_numpy().astype("M8[us]"), NUMBERS > 2),
    "pairs of days": (DAYS.to_numpy().astype("M8[D]"), WORDS.astype(object)),
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_of_every_kind_come_back(tmp_path, labels):
    labels = np.asarray(labels) if isinstance(labels, pd.Categorical) else labels
    model = PoissonRegressor().fit(X, Y, absorb=[labels])
    model.save(tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    ours, theirs = model.result_.effects[0], back.result_.effects[0]
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.labels.dtype == theirs.labels.dtype
    np.testing.assert_array_equal(ours.values, theirs.values)
    np.testing.assert_array_equal(ours.component, theirs.component)
    np.testing.assert_array_equal(ours.identified, theirs.identified)
    expected = model.predict(X, absorb=[labels])
    np.testing.assert_array_equal(back.predict(X, absorb=[labels]), expected)
    assert np.isfinite(expected).all()


def test_components_zeros_and_levels_without_outcomes_come_back(tmp_path):
    one = np.array([0, 0, 1, 1, 2, 2, 3, 3, 0, 4, 4])
    other = np.array([0, 1, 0, 1, 2, 3, 2, 3, 2, 0, 1])
    y = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 1.0, 4.0, 2.0, 0.0, 0.0, 0.0])
    x = np.array([0.1, -0.3, 0.5, 0.2, -0.1, 0.4, 0.3, -0.2, 0.0, 0.2, 0.1])[:, None]
    model = PoissonRegressor().fit(x, y, absorb=[one, other])
    model.save(tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    found = back.predict(x, absorb=[one, other])
    np.testing.assert_array_equal(found, model.predict(x, absorb=[one, other]))
    assert found[8] == 0.0 and (found[9:] == 0.0).all()
    # Levels of two components cannot be compared, before and after.
    assert np.isnan(back.predict(x[:1], absorb=[[2], [0]])).all()
    assert back.result_.effects.n_components == model.result_.effects.n_components == 2


@pytest.mark.parametrize("kind", ["shares", "exponential", "formula"])
def test_predictions_know_their_columns(tmp_path, kind):
    frame = pd.DataFrame(X, columns=["a", "b"]).assign(y=Y, w=WORDS, k=NUMBERS)
    if kind == "formula":
        model = PoissonRegressor.from_formula("y ~ a + b", frame, absorb=["w", "k"])
        new, groups = frame, {}
    elif kind == "exponential":
        new, groups = frame[["a", "b", "w", "k"]], {}
        model = ExponentialRegressor(absorb=["w", "k"]).fit(new, Y + 1.0)
    else:
        new, groups = frame[["a", "b", "w"]], {"groups": np.arange(N) // 8}
        share = (Y + 1) / np.repeat((Y + 1).reshape(-1, 8).sum(axis=1), 8)
        model = SoftmaxRegressor(loss="kl").fit(new, share, absorb="w", **groups)
    summary = str(model.summary())
    model.save(tmp_path / "m.safetensors")
    back = load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(back.predict(new, **groups), model.predict(new, **groups))
    assert str(back.summary()).splitlines()[-6:] == summary.splitlines()[-6:]
    with pytest.raises(ValueError, match="absorb is missing"):
        back.predict(X, **groups)


def test_labels_that_no_file_holds(tmp_path):
    labels = np.array([complex(k) for k in NUMBERS])
    model = PoissonRegressor().fit(X, Y, absorb=[labels])
    with pytest.raises(ValueError, match=r"the labels of absorb\[0\] are complex.*make them text or numbers"):
        model.save(tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


def forged(path, **changes):
    """Write a file again with other entries of its effects, and a right digest."""
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()[HEADER])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    arrays |= {name: array for name, array in changes.items() if name.startswith("effects ")}
    header["effects"] |= {name: value for name, value in changes.items() if name in header["effects"]}
    if "sets" not in changes:
        one = header["effects"]["sets"][0]
        one |= {name: value for name, value in changes.items() if name in one}
    text = json.dumps(header)
    save_file(arrays, path, metadata={HEADER: text, DIGEST: _digest(arrays, text)})


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [1, 2]},
        {"labels": "x"},
        {"labels": ["a"] * 12},
        {"labels": [2**70] * 12},
        {"labels": [True] * 12},
        {"kind": "O"},
        {"kind": 3},
        {"kind": "nonsense"},
        {"kind": ["<i8"]},
        {"kind": "<f8"},
        {"name": None},
        {"columns": []},
        {"columns": [1]},
        {"sets": []},
        {"sets": 1},
        {"rank": -1},
        {"rank": 1.5},
        {"n_components": True},
        {"zero_pairs": [[0]]},
        {"zero_pairs": [[0, "a"]]},
        {"effects 0": np.zeros((12, 2))},
        {"effects 0": np.full((12, 3), 0.5)},
        {"effects 1": np.zeros((1, 3))},
    ],
    ids=str,
)
def test_forged_effects_are_refused(tmp_path, changes):
    path = tmp_path / "m.safetensors"
    model = PoissonRegressor().fit(X, Y, absorb=[NUMBERS])
    assert len(model.result_.effects[0]) == 12
    model.save(path)
    forged(path, **changes)
    with pytest.raises(ModelFileError):
        load(path)


# ---- the shell ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trade(tmp_path_factory):
    """Flows between places over four years; one place sends nothing."""
    rng = np.random.default_rng(5)
    n = 2000
    frame = pd.DataFrame(
        {
            "distance": rng.standard_normal(n).round(4),
            "origin": rng.integers(100, 120, n),
            "destination": rng.choice(list("abcdefgh"), n),
            "year": rng.integers(2000, 2004, n),
        }
    )
    frame["flow"] = rng.poisson(np.exp(1.0 - 0.5 * frame.distance + 0.02 * (frame.origin - 110)))
    frame.loc[frame.origin == 103, "flow"] = 0
    path = tmp_path_factory.mktemp("trade") / "trade.csv"
    frame.to_csv(path, index=False)
    return path


FIT = ("--target", "flow", "--features", "distance")
SETS = ("--absorb", "origin,destination*year")


def test_a_fit_in_the_shell_is_that_of_python(trade, tmp_path):
    frame = pd.read_csv(trade)
    model = PoissonRegressor(absorb=["origin", ("destination", "year")])
    model.fit(frame[["distance", "origin", "destination", "year"]], frame.flow, clusters=frame.origin)
    by_formula = ("--formula", "flow ~ distance")
    for columns in (FIT, by_formula):
        result = run(
            "fit", "poisson", trade, *columns, *SETS, "--cluster", "origin", "--json", tmp_path / "o.json",
            "--report", tmp_path / "o.md",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "o.json").read_text())
        (row,) = found["coefficients"]
        assert row["coefficient"] == pytest.approx(model.coef_[0], rel=1e-10)
        assert row["standard_error"] == pytest.approx(model.standard_errors_[0], rel=1e-8)
        told = "effects absorbed: origin (20 levels), destination x year (32 levels)"
        assert found["absorbed"][0] == told and told in re.sub(r"\s+", " ", result.output)
        assert "1 level of origin without outcomes" in found["absorbed"][1]
        assert told.replace(":", " |") in (tmp_path / "o.md").read_text()


def test_saved_effects_predict_and_score(trade, tmp_path):
    path = tmp_path / "m.safetensors"
    assert run("fit", "poisson", trade, *FIT, *SETS, "--save", path).exit_code == 0
    frame = pd.read_csv(trade)
    new = tmp_path / "new.csv"
    frame.head(6).assign(origin=[*frame.origin[:5], 999]).to_csv(new, index=False)
    result = run("predict", path, new, "--output", tmp_path / "p.csv")
    assert result.exit_code == 0
    assert "Without a prediction (nan): 1 of 6 rows" in " ".join(messages(result))
    predicted = pd.read_csv(tmp_path / "p.csv").predicted
    model = PoissonRegressor(absorb=["origin", ("destination", "year")])
    features = frame[["distance", "origin", "destination", "year"]]
    np.testing.assert_allclose(predicted[:5], model.fit(features, frame.flow).predict(features.head()))
    assert np.isnan(predicted[5])
    scored = run("score", path, new, "--target", "flow")
    assert scored.exit_code == 0 and "Not scored: 1 row," in " ".join(messages(scored))
    frame.head(3).assign(origin=7).to_csv(new, index=False)
    assert "No row has labels that the fit has seen" in one_error(run("score", path, new, "--target", "flow"))
    frame.head(3).drop(columns="year").to_csv(new, index=False)
    assert "no column 'year', which the model needs" in one_error(run("predict", path, new))
    assert "not available with absorbed effects" in one_error(
        run("elasticities", path, trade, "--variable", "distance")
    )


def test_rows_and_groups_are_held_out_with_effects(trade, tmp_path):
    result = run("fit", "poisson", trade, *FIT, *SETS, "--cluster", "origin", "--holdout", "0.1", "--cv", "3")
    assert result.exit_code == 0
    assert "Held out 200 of 2,000 rows" in result.output and "3 folds of rows" in result.output
    travel = tmp_path / "travel.csv"
    assert run("example", "travel", "--output", travel).exit_code == 0
    choice = ("--target", "choice", "--features", "gc,ttme", "--group", "traveller")
    out = tmp_path / "o.json"
    done = run("fit", "softmax", travel, *choice, "--absorb", "mode", "--holdout", "0.2", "--json", out)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    # The effects of modes are the constants of the alternatives (Greene's table of the travel modes).
    plain = run("fit", "softmax", travel, "--formula", "choice ~ gc + ttme + C(mode)", "--group", "traveller",
                "--holdout", "0.2", "--json", out)  # fmt: skip
    assert plain.exit_code == 0
    other = json.loads(out.read_text())
    for absorbed, dummy in zip(found["coefficients"], other["coefficients"][:2], strict=True):
        assert absorbed["coefficient"] == pytest.approx(dummy["coefficient"], rel=1e-6)
    for name, value in found["scores"][0]["values"].items():
        assert value == pytest.approx(other["scores"][0]["values"][name], rel=1e-6)


def test_columns_without_a_value_are_named_for_what_they_are(trade, tmp_path):
    """Not identified, or separated: the one has no row that goes to zero, the other has."""
    frame = pd.read_csv(trade)
    frame["twin"] = frame.distance
    frame["gone"] = ((frame.flow == 0) & (frame.distance > 0.5) & (frame.origin == 107)).astype(int)
    assert 0 < frame.gone.sum() < 20
    frame.to_csv(tmp_path / "t.csv", index=False)
    where = ("--target", "flow", "--absorb", "origin", "--features")
    same = run("fit", "poisson", tmp_path / "t.csv", *where, "distance,twin")
    told = re.sub(r"\s+", " ", same.output)
    assert "The data do not identify distance, twin" in told and "No finite value" not in told
    assert "distance, twin are collinear with the effects, or with one another" in told
    ends = run("fit", "poisson", tmp_path / "t.csv", *where, "distance,gone")
    told = re.sub(r"\s+", " ", ends.output)
    assert ends.exit_code == 1 and "do not identify" not in told
    assert f"No finite value: gone. The outputs of {frame.gone.sum()} rows go to zero" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--absorb", ""), "must name columns"),
        (("--absorb", "origin*origin"), "must name columns"),
        (("--absorb", "origin*"), "must name columns"),
        (("--absorb", "orgin"), "did you mean 'origin'"),
        (("--absorb", "flow"), "given to two options"),
        (("--absorb", "origin", "--constant"), "the effects hold the constant"),
        (("--absorb", "origin", "--memory-limit", "1GB"), "held in memory"),
        (("--absorb", "origin", "--dask", "local"), "held in memory"),
        (("--absorb", "origin", "--checkpoint", "c.ckpt"), "not recorded"),
    ],
)
def test_what_does_not_go_with_effects(trade, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    assert told in one_error(run("fit", "poisson", trade, *FIT, *options))
    assert not list(tmp_path.iterdir())
