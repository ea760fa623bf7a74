"""Model files come back as they were written, and nothing else gets in."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from attnfit.estimators import (
    ExponentialRegressor,
    ModelFileError,
    RescaledSoftmaxRegressor,
    SoftmaxRegressor,
    files,
    load,
)
from attnfit.solvers import GradientDescent, Newton

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 2))
GROUPS = np.repeat(["a", "b", "c"], 4)
U = np.exp(X @ [0.5, -1.0]) * RNG.uniform(0.5, 1.5, 12)
Y = U / np.repeat(U.reshape(3, 4).sum(axis=1), 4)


def models():
    frame = pd.DataFrame(X, columns=["price", "größe"])
    looked_at = SoftmaxRegressor("cross_entropy", random_state=1).fit(frame, Y, groups=GROUPS)
    looked_at.summary()
    return {
        "looked at": looked_at,
        "one group": SoftmaxRegressor("kl", ridge=0.1, row_penalty=np.full(12, 0.1)).fit(X, Y / 3),
        "outside good": SoftmaxRegressor(outside_good=True, solver=Newton("exact")).fit(
            X, Y / 2, groups=GROUPS
        ),
        "exponential": ExponentialRegressor("cosh", ridge=0.1).fit(X, 1 + Y),
        "rescaled": RescaledSoftmaxRegressor(solver=Newton()).fit(X, Y / 3),
        "not identified": SoftmaxRegressor().fit(np.c_[X[:, 0], X[:, 0]], Y, groups=GROUPS),
    }


@pytest.fixture(scope="module")
def fitted():
    return models()


NOT_SAVED = (
    "result_",
    "_training",
    "_basis",
    "_fitted",
    "_share_totals",
    "row_penalty",
    "certificate_",
    "_library",
    "_index",
)


def state(model):
    """Everything a model says of itself."""
    out = {k: v for k, v in vars(model).items() if k not in NOT_SAVED}
    report = {k: v for k, v in vars(model.result_).items() if k not in ("problem", "history", "unidentified")}
    report["unidentified"] = np.array(model.result_.unidentified)
    if "_covariance" in out:
        out["_covariance"] = vars(out["_covariance"])
    return {**out, "row_penalty": np.array(model.row_penalty), "report": report}


def assert_equal(model, other):
    assert type(model) is type(other)
    ours, theirs = state(model), state(other)
    for lazy in ("covariance_", "standard_errors_"):
        if lazy in ours:
            np.testing.assert_array_equal(getattr(other, lazy), ours.pop(lazy))
            theirs.pop(lazy, None)
    if np.isinf(ours.get("certified_radius_", 0.0)):
        ours.pop("certified_radius_")
    np.testing.assert_equal(theirs, ours)


@pytest.mark.parametrize(
    "name", ["looked at", "one group", "outside good", "exponential", "rescaled", "not identified"]
)
def test_round_trip(fitted, name, tmp_path):
    model = fitted[name]
    path = tmp_path / "model.safetensors"
    model.save(path)
    back = load(path)
    assert_equal(model, back)
    table = X
    if hasattr(model, "feature_names_in_"):
        table = pd.DataFrame(X, columns=model.feature_names_in_)
    where = {"groups": GROUPS} if getattr(model, "n_groups_", 1) > 1 else {}
    np.testing.assert_array_equal(back.predict(table, **where), model.predict(table, **where))
    assert back.result_.problem is None
    if name == "looked at":
        assert str(back.summary()) == str(model.summary())
    else:
        assert "standard errors: not computed" in str(back.summary())
        with pytest.raises(AttributeError, match="before pickling or saving"):
            _ = back.covariance_
    back.save(tmp_path / "again.safetensors")
    assert_equal(model, load(tmp_path / "again.safetensors"))


def test_writing_replaces_in_one_step(fitted, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    fitted["exponential"].save(path)
    before = path.read_bytes()
    monkeypatch.setattr("attnfit.writing.os.replace", _fail)
    with pytest.raises(OSError, match="disk"):
        fitted["rescaled"].save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def _fail(*_):
    raise OSError("disk full")


def test_what_json_cannot_hold_is_refused(fitted, tmp_path):
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        SoftmaxRegressor().save(tmp_path / "m")
    seeded = clone(fitted["rescaled"]).set_params(random_state=np.random.default_rng(0)).fit(X, Y / 3)
    with pytest.raises(ValueError, match="random_state by an int or None"):
        seeded.save(tmp_path / "m")

    class Own(Newton):
        pass

    own = SoftmaxRegressor(solver=Own()).fit(X, Y, groups=GROUPS)
    with pytest.raises(ValueError, match=r"solver Own cannot be stored; call set_params\(solver=None\)"):
        own.save(tmp_path / "m")
    own.set_params(solver=GradientDescent(step_size=0.5)).save(tmp_path / "m")
    assert load(tmp_path / "m").solver == GradientDescent(step_size=0.5)


@pytest.fixture(scope="module")
def written(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "m.safetensors"
    fitted["looked at"].save(path)
    return path, path.read_bytes()


@given(data=st.data())
def test_damage_is_found(fitted, written, data):
    path, good = written
    raw = bytearray(good)
    kind = data.draw(st.sampled_from(["cut", "bit", "append", "swap"]))
    where = data.draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        raw = raw[:where]
    elif kind == "bit":
        raw[where] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "append":
        raw += data.draw(st.binary(min_size=1, max_size=20))
    else:
        raw[where : where + 4] = data.draw(st.binary(min_size=4, max_size=4))
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(raw)
    try:
        back = load(damaged)
    except ModelFileError:
        return
    assert_equal(fitted["looked at"], back)


def test_every_cut_is_found(written):
    path, good = written
    damaged = path.with_name("cut.safetensors")
    for length in range(0, len(good), 37):
        damaged.write_bytes(good[:length])
        with pytest.raises(ModelFileError):
            load(damaged)


def contents(path):
    with safe_open(path, framework="numpy") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["attnfit"])  # noqa: SIM118


def put(*keys, value):
    def change(arrays, header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def put_array(name, value):
    def change(arrays, header):
        arrays[name] = np.array(value)

    return change


def drop(*keys):
    def change(arrays, header):
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


HOSTILE = {
    "other version": (put("format_version", value=4), "format version 4, this attnfit reads versions 1 to 3"),
    "true is not one": (put("format_version", value=True), "format version True"),
    "class": (put("class", value="os.system"), "unknown class 'os.system'"),
    "class is a list": (put("class", value=[]), "unknown class"),
    "other class": (
        put("class", value="ExponentialRegressor"),
        "params .* are not those of ExponentialRegressor",
    ),
    "missing entry": (drop("fit"), "the header has entries"),
    "additional entry": (put("code", value="x"), "the header has entries"),
    "params": (put("params", value=3), "params is not an object"),
    "loss": (put("params", "loss", value="hinge"), "parameter loss is 'hinge'"),
    "ridge": (put("params", "ridge", value="1"), "parameter ridge"),
    "outside good": (put("params", "outside_good", value=1), "parameter outside_good"),
    "seed": (put("params", "random_state", value=[1]), "parameter random_state"),
    "solver": (put("params", "solver", value={"class": "Result", "params": {}}), "unknown solver 'Result'"),
    "solver params": (
        put("params", "solver", value={"class": "Newton", "params": {"hessian": "evil"}}),
        "solver Newton: hessian must be one of",
    ),
    "features": (put("n_features_in", value=3), r"array coef has shape \(2,\)|list of 3 strings"),
    "negative features": (put("n_features_in", value=-1), "n_features_in is -1"),
    "names": (put("feature_names_in", value=["a"]), "feature_names_in is not a list of 2 strings"),
    "fit": (put("fit", value=[]), "fit is not an object"),
    "fit value": (put("fit", "loss_value_", value="low"), "loss_value_ of fit is 'low'"),
    "fit entry": (put("fit", "__class__", value="x"), "fit has entries"),
    "one group without normaliser": (put("fit", "n_groups_", value=1), "fit has entries"),
    "result": (drop("result", "status"), "result has not the entries"),
    "local values": (put("result", "local_values", value={"zero": "a"}), "local_values"),
    "NaN": (put_array("coef", [np.nan, 1.0]), "array coef contains NaN"),
    "shape": (put_array("coef", [[1.0, 1.0]]), r"array coef has shape \(1, 2\)"),
    "dtype": (put_array("coef", np.ones(2, np.float32)), "array coef has dtype float32"),
    "covariance": (put_array("covariance", np.ones(4)), "array covariance has shape"),
    "flat directions": (put_array("unidentified", np.ones((3, 1))), "array unidentified has shape"),
    "penalty twice": (put_array("row_penalty", np.ones(3)), "row_penalty is given twice"),
    "unknown array": (put_array("payload", np.ones(3)), "the arrays are"),
    "no coefficients": (lambda arrays, header: arrays.pop("coef"), "the arrays are"),
    "half a covariance": (lambda arrays, header: arrays.pop("identified"), "must come together"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(written, tmp_path, name):
    change, message = HOSTILE[name]
    arrays, header = contents(written[0])
    change(arrays, header)
    files.write(tmp_path / "m", arrays, json.dumps(header))
    with pytest.raises(ModelFileError, match=message):
        load(tmp_path / "m")


def test_penalty_of_two_dimensions_is_refused(fitted, tmp_path):
    fitted["one group"].save(tmp_path / "m")
    arrays, header = contents(tmp_path / "m")
    files.write(tmp_path / "m", {**arrays, "row_penalty": np.ones((2, 2))}, json.dumps(header))
    with pytest.raises(ModelFileError, match="array row_penalty has shape"):
        load(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": NaN}', "[" * 100_000])
def test_headers_that_are_not_headers(tmp_path, text):
    files.write(tmp_path / "m", {"coef": np.ones(2)}, text)
    with pytest.raises(ModelFileError, match="header"):
        load(tmp_path / "m")


def test_other_files_are_refused(tmp_path):
    save_file({"coef": np.ones(2)}, tmp_path / "weights")
    with pytest.raises(ModelFileError, match="not a model of attnfit"):
        load(tmp_path / "weights")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelFileError, match="not a readable safetensors file"):
        load(tmp_path / "text")
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no model file at"):
            load(missing)
