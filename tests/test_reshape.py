"""From wide tables to long ones and back."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from attnfit.estimators import SoftmaxRegressor
from attnfit.reshape import explode_rankings, long_to_wide, wide_to_long
from benchmarks import inference_data

MODES = ["train", "sm", "car"]


def test_swissmetro():
    wide = inference_data.swissmetro_wide()
    free = wide.GA != 0
    wide = wide.assign(
        train_cost=np.where(free, 0, wide.TRAIN_CO) / 100,
        sm_cost=np.where(free, 0, wide.SM_CO) / 100,
        car_cost=wide.CAR_CO / 100,
    )
    able = {m: wide[f"{m.upper()}_AV"] * (wide.SP != 0) for m in ("train", "car")}
    long = wide_to_long(
        wide, "CHOICE", MODES,
        {"time": {m: f"{m.upper()}_TT" for m in MODES}, "cost": {m: f"{m}_cost" for m in MODES}},
        availability={**able, "sm": "SM_AV"},
        codes={1: "train", 2: "sm", 3: "car"}, keep=["ID"],
    )  # fmt: skip
    assert len(long) == 19_143 and long["case"].nunique() == 6_768
    expected = inference_data.swissmetro()
    np.testing.assert_array_equal(long["choice"], expected["choice"])
    np.testing.assert_allclose(long["time"] / 100, expected["time"])
    np.testing.assert_allclose(long["cost"], expected["cost"])
    assert (long["ID"] == expected["person"]).all() and long["alternative"].tolist() == expected[
        "mode"
    ].tolist()
    long["time"] /= 100
    model = SoftmaxRegressor.from_formula(
        "choice ~ C(alternative, contr.treatment('sm')) + time + cost", long, "case",
        alternatives="alternative", clusters="ID", loss="cross_entropy",
    )  # fmt: skip
    found = dict(zip(model.feature_names_in_, model.coef_, strict=True))
    assert found["time"] == pytest.approx(-1.277860255, rel=1e-7)
    errors = dict(zip(model.feature_names_in_, model.standard_errors_, strict=True))
    assert errors["cost"] == pytest.approx(0.161276370, rel=1e-6)


def wide(library=pd.DataFrame):
    return library(
        {
            "id": [11, 12, 13],
            "pick": ["choice2", "choice1", "choice3"],
            "price1": [1.0, 2.0, 3.0],
            "price2": [4.0, 5.0, 6.0],
            "price3": [7.0, 8.0, 9.0],
            "size": ["s", "m", "l"],
        }
    )


@pytest.mark.parametrize("library", [pd.DataFrame, pl.DataFrame])
def test_there_and_back(library):
    long = wide_to_long(
        wide(library), "pick", [1, 2, 3], ["price"], case="id", codes="choice", keep=["size"], sep=""
    )
    assert isinstance(long, library)
    assert list(long.columns) == ["id", "alternative", "choice", "price", "size"]
    assert long["price"].to_list() == [1, 4, 7, 2, 5, 8, 3, 6, 9]
    assert long["choice"].to_list() == [0, 1, 0, 1, 0, 0, 0, 0, 1]
    back = long_to_wide(long, ["price"], case="id", keep=["size"], sep="")
    assert isinstance(back, library)
    for name in ("id", "price1", "price2", "price3", "size"):
        assert back[name].to_list() == wide(library)[name].to_list()
    assert back["choice"].to_list() == [2, 1, 3]
    assert back["available2"].to_list() == [1, 1, 1]


def test_absent_alternatives():
    long = wide_to_long(
        wide(), "pick", [1, 2, 3], {"price": {1: "price1", 2: "price2"}}, codes="choice", fill=0.0,
        availability={2: [1, 0, 1]},
    )  # fmt: skip
    assert long["case"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert long["price"].tolist() == [1, 4, 0, 2, 0, 3, 6, 0]
    back = long_to_wide(long, ["price"])
    assert back["available.2"].tolist() == [1, 0, 1] and np.isnan(back["price.2"][1])


def test_rows_without_a_choice():
    data = wide().assign(pick=[2, 0, np.nan])
    with pytest.raises(ValueError, match="2 rows have no choice in column 'pick', first row 1"):
        wide_to_long(data, "pick", [1, 2, 3], ["price"], sep="")
    with pytest.warns(UserWarning, match="left out 2 rows without a choice"):
        assert len(wide_to_long(data, "pick", [1, 2, 3], ["price"], sep="", missing="drop")) == 3


def test_refusals():
    data = wide()
    arguments = {"alternatives": [1, 2, 3], "varying": ["price"], "sep": "", "codes": "choice"}
    for changed, error, told in (
        ({"availability": {2: [0, 1, 1]}}, ValueError, "1 cases chose what is not available, first case .*0"),
        ({"codes": {"choice1": 1, "choice2": 2}}, ValueError, "row 2 has the unknown choice 'choice3'"),
        ({"codes": {"choice1": 9}}, ValueError, "codes name 9"),
        ({"varying": ["prize"]}, KeyError, "no column 'prize1'; did you mean 'price1'"),
        ({"varying": {"price": {1: "price1"}}}, ValueError, "no column for 2; name one, or pass fill="),
        ({"varying": {"price": {7: "price1"}}}, ValueError, "names 7, which is no alternative"),
        ({"availability": {7: "id"}}, ValueError, "availability names 7"),
        ({"alternatives": [1, 1]}, ValueError, "different labels"),
        ({"case": "double"}, ValueError, "case 1 has more than one row"),
    ):
        with pytest.raises(error, match=told):
            wide_to_long(data.assign(double=[1, 1, 2]), "pick", **{**arguments, **changed})
    long = wide_to_long(data, "pick", **arguments)
    with pytest.raises(ValueError, match="has 1 twice"):
        long_to_wide(pd.concat([long, long[:1]]), ["price"])
    with pytest.raises(ValueError, match="has 0 choices"):
        long_to_wide(long.assign(choice=0), ["price"])


def test_rankings_are_products_of_choices():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"case": np.repeat(np.arange(30), 4), "x": rng.standard_normal(120)})
    u = data.x + rng.gumbel(size=120)
    data["rank"] = u.groupby(data["case"]).rank(ascending=False)
    long = explode_rankings(data, "case", "rank")
    model = SoftmaxRegressor.from_formula(
        "choice ~ x", long, "stage_case", clusters="case", loss="cross_entropy"
    )
    assert model.n_groups_ == 90 and model.n_units_ == 30
    value = 0.0
    for _, one in data.groupby("case"):
        z = one.sort_values("rank").x.to_numpy() * model.coef_[0]
        value += sum(z[k] - np.log(np.exp(z[k:]).sum()) for k in range(3))
    assert model.log_likelihood_ == pytest.approx(value)
    partly = explode_rankings(data.assign(rank=data["rank"].where(data["rank"] <= 2)), "case", "rank")
    assert partly["stage"].max() == 2
    with pytest.raises(ValueError, match="has rank 1 twice"):
        explode_rankings(data.assign(rank=1.0), "case", "rank")
