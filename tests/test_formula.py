"""Formulas: published fits from data frames, what is dropped, new data, files, and every refusal."""

import json

import numpy as np
import pandas as pd
import polars as pl
import pytest

from attnfit import datasets
from attnfit.estimators import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor, load
from attnfit.estimators.files import write
from attnfit.estimators.model_header import ModelFileError
from attnfit.formulas.safe import require_safe
from benchmarks import inference_data

pytest.importorskip("formulaic")
CANADA = (
    'choice ~ cost + ivt + ovt + freq + C(alt, contr.treatment("train"))'
    ' + income:C(alt, contr.treatment("train"))'
)


def travel(seed=0):
    """Return Greene's travellers as a long table, with made-up labels."""
    data = datasets.load_travel_mode()
    rng = np.random.default_rng(seed)
    case = np.repeat(np.arange(210), 4)
    return pd.DataFrame(
        {
            "case": case,
            "mode": np.tile(["air", "train", "bus", "car"], 210),
            "choice": data.b,
            "gc": data.A[:, 3],
            "ttme": data.A[:, 4],
            "income": np.repeat(data.A[::4, 5], 4),
            "purpose": np.repeat(rng.choice(["work", "fun"], 210), 4),
            "rush": np.repeat(rng.random(210) < 0.4, 4),
            "code": np.tile([1, 2, 3, 4], 210),
        }
    )


def from_formula(formula, data=None, **options):
    data = travel() if data is None else data
    return SoftmaxRegressor.from_formula(
        formula, data, "case", alternatives="mode", loss="cross_entropy", **options
    )


def test_mode_canada():
    data = inference_data.mode_canada()
    model = SoftmaxRegressor.from_formula(CANADA, data, "case", alternatives="alt", loss="cross_entropy")
    expected = [
        *(-0.044962929, -0.009985967, -0.042911762, 0.093101148, -0.140948560),
        *(-3.817389468, -2.192520670, 0.036760076, -0.049970866, 0.009484114),
    ]
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-6)
    statistics = model.fit_statistics(data["alt"])
    assert statistics.log_likelihood == pytest.approx(-1930.565153406, rel=1e-10)
    assert statistics.log_likelihood_constants == pytest.approx(-2903.377317064, rel=1e-9)
    assert statistics.hit_rate == pytest.approx(0.733357323, rel=1e-8)
    expected = [
        *(0.004136118, 0.000738905, 0.002887194, 0.005230131, 0.484947194),
        *(0.641456518, 0.281898101, 0.004206961, 0.016269726, 0.003141832),
    ]
    errors = np.sqrt(np.diag(model.covariance("robust")))
    np.testing.assert_allclose(errors, expected, rtol=1e-6)
    ratio = model.ratio("ivt", "cost", method="delta", kind="robust")
    assert ratio.value[0] == pytest.approx(0.222093342, rel=1e-7)
    assert ratio.standard_error[0] == pytest.approx(0.030042544, rel=1e-6)
    own = model.elasticities("cost", pairs="own")
    found = dict(zip(own.names[0], own.value, strict=True))
    for name, value in (
        ("air", -2.127407984), ("bus", -1.088065040), ("car", -0.936293296), ("train", -1.642838402),
    ):  # fmt: skip
        assert found[name] == pytest.approx(value, rel=1e-6)
    assert "alt: reference level train" in model.notes_


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame])
def test_the_published_model_from_a_frame(library):
    published = datasets.load_travel_mode().references["cross_entropy"]
    data = library(travel().to_dict("list"))
    by_dummies = from_formula("choice ~ C(mode, contr.treatment('car')) + gc + ttme + income:mode", data)
    names = by_dummies.feature_names_in_.tolist()
    assert len(names) == 8 and by_dummies.fit_statistics().n_parameters == 8
    air = data["mode"].to_numpy() == "air"
    dummies = [data["mode"].to_numpy() == m for m in ("air", "train", "bus")]
    X = np.column_stack([*dummies, data["gc"], data["ttme"], air * data["income"].to_numpy()])
    same = SoftmaxRegressor("cross_entropy").fit(X, data["choice"], groups=data["case"])
    np.testing.assert_allclose(same.coef_, published.coefficients, atol=1e-6)
    np.testing.assert_allclose(
        by_dummies.predict(data), by_dummies.predict(data, groups=data["case"].to_numpy())
    )
    assert (
        type(by_dummies.elasticities("gc").to_frame()).__module__.split(".")[0]
        == library.__module__.split(".")[0]
    )
    label = data.with_columns if library is pl.DataFrame else None
    if label is None:
        chosen = data.assign(choice=data["case"].map(data[data.choice == 1].set_index("case")["mode"]))
        labelled = from_formula("choice ~ C(mode, contr.treatment('car')) + gc + ttme + income:mode", chosen)
        np.testing.assert_array_equal(labelled.coef_, by_dummies.coef_)


@pytest.mark.parametrize(
    ("terms", "n_columns"),
    [
        ("0 + C(mode)", 3),
        ("C(mode) + gc", 4),
        ("income:C(mode)", 3),
        ("C(mode) + income:C(mode) + rush:C(mode) + income:rush:C(mode) + gc + ttme", 14),
        ("C(code) + gc*rush", 5),
        ("mode*purpose", 6),
        ("gc + income + purpose", 1),
        ("poly(ttme, 2) + gc + gc:purpose", 4),
    ],
)
def test_every_column_is_identified(terms, n_columns):
    model = from_formula(f"choice ~ {terms}")
    assert len(model.coef_) == n_columns == model.fit_statistics().n_parameters
    if "income +" in terms:
        assert "income: the same for all rows of every group, dropped" in model.notes_
        assert "income: the same for all rows" in str(model.summary())


def test_constants_stay_beside_an_outside_good():
    data = travel()
    data["choice"] *= 0.5
    model = from_formula("choice ~ gc + income", data, outside_good=True)
    assert model.feature_names_in_.tolist() == ["Intercept", "gc", "income"]
    assert model.predict(data).shape == (840,)


FORMULAS = {
    "plain": "choice ~ mode + gc + ttme",
    "transforms": "choice ~ C(mode, contr.treatment('bus')) + bs(gc, df=4) + scale(ttme):rush",
    "functions": "choice ~ C(code) + np.log(gc) + log1p(ttme) + I(gc**2) + center(gc):rush",
}


@pytest.mark.parametrize("name", FORMULAS)
def test_new_data_and_files(name, tmp_path):
    data = travel()
    model = from_formula(FORMULAS[name], data)
    model.summary()
    model.save(tmp_path / "model")
    back = load(tmp_path / "model")
    expected = model.predict(data)
    some = data[data["case"] == 7][["ttme", "gc", "mode", "code", "rush", "purpose", "case"]]
    for one in (model, back):
        np.testing.assert_array_equal(one.predict(data), expected)
        # Levels, knots and scales are those of the training, whatever is in these rows.
        np.testing.assert_allclose(one.predict(some), expected[28:32], rtol=1e-12)
        np.testing.assert_allclose(
            one.predict(pl.DataFrame(some.to_dict("list"))), expected[28:32], rtol=1e-12
        )
        assert one.predict_interval(some).to_frame().index.tolist() == some.index.tolist()
        with pytest.raises(ValueError, match="groups is missing"):
            one.predict(some.drop(columns="case"))
        with pytest.raises(KeyError, match=r"no column 'gc'; did you mean 'gcc'"):
            one.predict(some.rename(columns={"gc": "gcc"}))
        with pytest.raises(ValueError, match="column 'gc' has a missing value at row 2"):
            one.predict(some.assign(gc=[1.0, 2.0, np.nan, 3.0]))
    assert str(back.summary()) == str(model.summary())
    back.save(tmp_path / "again")
    assert _read(tmp_path / "again")[1] == _read(tmp_path / "model")[1]


def test_unseen_levels():
    model = from_formula("choice ~ mode + gc")
    other = travel()[:8].assign(mode=["air", "train", "ferry", "car"] * 2)
    with pytest.raises(
        ValueError, match=r"'mode' has the level 'ferry' at row 2.*'air', 'bus', 'car', 'train'"
    ):
        model.predict(other)


def test_levels_without_a_row_are_said():
    kinds = pd.CategoricalDtype(["car", "tram", "air", "train", "bus"])
    data = travel().assign(mode=lambda d: d["mode"].astype(kinds))
    model = from_formula("choice ~ mode + gc", data)
    assert "mode: level tram has no row" in model.notes_ and "mode: reference level car" in model.notes_
    assert len(model.coef_) == 4
    enum = pl.DataFrame(travel().to_dict("list")).with_columns(
        pl.col("mode").cast(pl.Enum(["car", "air", "train", "bus"]))
    )
    np.testing.assert_allclose(from_formula("choice ~ mode + gc", enum).coef_, model.coef_, rtol=1e-9)


def test_effects_through_a_formula():
    data = travel()
    model = from_formula("choice ~ mode + log(gc + 1) + gc:rush + income:mode", data)
    v, slopes = model._formula.derivative(data, "gc")
    names = model.feature_names_in_.tolist()
    exact = np.zeros_like(slopes)
    exact[:, names.index("log(gc + 1)")] = 1 / (data.gc + 1)
    for j, name in enumerate(names):
        if name.startswith("gc:"):
            exact[:, j] = data.rush if "True" in name else ~data.rush
    np.testing.assert_allclose(slopes, exact, rtol=1e-9, atol=1e-12)
    found = model.elasticities("gc")
    by_hand = model.elasticities(v, data["mode"], derivative=exact, X=data)
    np.testing.assert_allclose(found.value, by_hand.value, rtol=1e-8)
    # A variable of persons moves all alternatives: effects on shares cancel.
    income = model.marginal_effects("income")
    assert income.value.shape == (4,) and income.value.sum() == pytest.approx(0.0, abs=1e-14)
    step = 1e-4
    up, down = (model.shares(data.assign(income=data.income + s * step)).value for s in (1, -1))
    np.testing.assert_allclose(income.value, (up - down) / (2 * step), rtol=1e-5)
    rows = model.marginal_effects("income", rows=True)
    np.testing.assert_allclose(
        np.bincount(np.arange(840) % 4, weights=rows.value) / 210, income.value, rtol=1e-9
    )
    contrast = model.marginal_effects("rush", levels=(False, True))
    change = [model.shares(data.assign(rush=level)).value for level in (False, True)]
    np.testing.assert_allclose(contrast.value, change[1] - change[0], rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match="'rush' is a category with levels False, True"):
        model.elasticities("rush")


def test_missing_values_leave_out_groups():
    data = travel()
    data.loc[5, "gc"] = np.nan
    data.loc[[9, 100], "ttme"] = np.nan
    with pytest.warns(UserWarning, match=r"left out 12 rows in 3 groups \(3 of them.*in gc, ttme"):
        model = from_formula("choice ~ mode + gc + ttme", data)
    assert model.n_groups_ == 207
    with pytest.warns(UserWarning, match="left out 3 rows"):
        assert from_formula("choice ~ mode + gc + ttme", data, missing="drop_rows").n_rows_ == 837
    with pytest.raises(ValueError, match="'gc' has a missing value at row 5"):
        from_formula("choice ~ mode + gc", data, missing="raise")
    assert from_formula("choice ~ mode + income:mode", data).n_rows_ == 840


def test_exponential_models():
    data = travel().assign(count=lambda d: np.round(d.gc / 20))
    model = PoissonRegressor.from_formula("count ~ mode + log(ttme + 1)", data, clusters="case")
    assert model.covariance_kind_ == "cluster" and model.n_units_ == 210
    assert model.feature_names_in_[0] == "Intercept"
    assert model.predict(data[:4]).shape == (4,)
    assert model.elasticities("ttme").value.shape == (1,)
    squared = ExponentialRegressor.from_formula("gc ~ mode", data)
    means = data.groupby("mode").gc.mean()
    np.testing.assert_allclose(squared.predict(data[:4]), means[data["mode"][:4]], rtol=1e-6)


def test_names_of_the_caller_are_allowed_but_not_saved(tmp_path):
    half = 0.5

    def damp(values):
        return values**half

    model = SoftmaxRegressor.from_formula("choice ~ mode + damp(gc)", travel(), "case", loss="cross_entropy")
    assert "damp(gc)" in model.feature_names_in_
    with pytest.raises(ValueError, match="cannot be saved: the formula holds 'damp'"):
        model.save(tmp_path / "model")


def test_refusals():
    data = travel()
    when = data.assign(when=pd.Timestamp("2020-01-01"))
    twice = pd.concat([data, data[:2]])
    yes = data.assign(choice=np.where(data.choice == 1, "yes", "no"))
    infinite = data.assign(gc=np.where(data.index == 3, np.inf, data.gc))
    for formula, table, error, told in (
        ("choice ~ cgc", data, KeyError, "no column 'cgc'; did you mean 'gc'"),
        ("choice ~ gc + when", when, ValueError, r"'when' holds dates.*data\['when'\]\.dt\.dayofyear"),
        ("choice ~ gc", twice, ValueError, "2 rows repeat an alternative.*after a join"),
        ("choice ~ gc", yes, ValueError, r"'no', which is no alternative.*== 'no'\) \* 1"),
        ("choice ~ gc", infinite, ValueError, "'gc' is infinite at row 3"),
        ("choice gc", data, ValueError, "must read 'target ~ terms'"),
        ("choice ~ income", data, ValueError, "no column of the formula varies within groups"),
        ("choice ~ C(code + 1)", data, ValueError, r"C\(\) takes the name of a column"),
        ("choice ~ code + C(code)", data, ValueError, "used as a number and as C"),
    ):
        with pytest.raises(error, match=told):
            from_formula(formula, table)
    never = data.assign(mode=data["mode"].where(data["mode"] != "bus", "coach"))
    never["choice"] = never.choice * (never["mode"] != "coach")
    with pytest.warns(Warning, match="separa"):
        model = from_formula("choice ~ mode + gc", never)
    assert "mode: coach is never chosen, its constant has no finite value" in model.notes_


EVIL = [
    "{__import__('os').getpid()*gc}",
    "__import__('os')",
    "gc + I(__import__('os').getpid())",
    "gc.__class__",
    "np.load(gc)",
    "np.__config__",
    "eval('1')",
    "(lambda: gc)()",
    "[gc for gc in gc]",
    "gc if gc else gc",
    "C(gc, eval('1'))",
    "C(gc, contr.treatment(__import__('os')))",
    "gc ** 9 ** 9",
    "poly(gc, 1000000)",
    "(gc + mode) ** 50",
    "`gc`",
    "'gc'",
    "gc; gc",
    "f'{gc}'",
    "log",
    "(" * 3000 + "gc" + ")" * 3000,
]


@pytest.mark.parametrize("formula", EVIL)
def test_evil_formulas_are_refused_before_they_are_read(formula, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="formula"):
        require_safe(formula, ["gc", "mode"])
    from_formula("choice ~ mode + gc").save(tmp_path / "model")
    arrays, header = _read(tmp_path / "model")
    header["formula"]["design"]["text"] = formula
    write(tmp_path / "evil", arrays, json.dumps(header))
    monkeypatch.setattr("formulaic.Formula.__call__", _never, raising=False)
    with pytest.raises(ModelFileError, match="formula"):
        load(tmp_path / "evil")


def _never(*_, **__):
    raise AssertionError("formulaic saw the formula")


def _read(path):
    from attnfit.estimators import files

    arrays, header = files._read(path)
    return arrays, json.loads(header)
