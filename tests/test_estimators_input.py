"""Bad input is refused with argument, place and remedy; callbacks see and stop a fit."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.exceptions import DataConversionWarning

from attnfit.estimators import ExponentialRegressor, RescaledSoftmaxRegressor, SoftmaxRegressor

X = np.random.default_rng(0).standard_normal((6, 2))
Y = np.array([0.5, 0.25, 0.25, 0.5, 0.25, 0.25])
GROUPS = np.array(["u", "u", "u", "v", "v", "v"])


def with_bad(array, index, value):
    array = np.array(array, dtype=float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ({}, {"X": with_bad(X, (2, 1), np.nan)}, "X contains NaN at row 2, column 1; remove or impute"),
        ({}, {"X": with_bad(X, (2, 1), np.inf)}, "X contains inf at row 2, column 1"),
        ({}, {"X": X[0]}, "Reshape your data"),
        ({}, {"X": X[:, :0]}, "0 feature"),
        ({}, {"X": X[:0]}, "0 sample"),
        ({}, {"X": X.astype(complex)}, "Complex data not supported"),
        ({}, {"X": pl.DataFrame({"a": list("abcdef")})}, "column 'a' of X has type String; encode it"),
        ({}, {"X": pd.DataFrame({"a": list("abcdef")})}, "column 'a' of X has type String; encode it"),
        ({}, {"y": None}, "requires y to be passed"),
        ({}, {"y": Y[:5]}, r"y has shape \(5,\)"),
        ({}, {"y": with_bad(Y, 4, np.nan)}, "y contains .* at index 4|Input y contains NaN"),
        ({}, {"y": np.array(list("abcdef"), dtype=object)}, "y is not numeric.*convert"),
        ({}, {"y": np.c_[Y, Y]}, "y should be a 1d array"),
        ({"loss": "kl"}, {"y": with_bad(Y, 4, -0.1)}, "y is negative at index 4 .*loss='squared' takes any"),
        ({}, {"groups": GROUPS[:5]}, "groups has length 5"),
        ({}, {"groups": [0, 3, 3, 6]}, "group 1 is empty"),
        ({}, {"groups": [None, "u", "u", "v", "v", "v"]}, "groups has no label at index 0"),
        ({}, {"sample_weight": with_bad(np.ones(6), 2, -1)}, "sample_weight is negative at index 2"),
        ({}, {"sample_weight": with_bad(np.ones(6), 2, np.inf)}, "sample_weight contains inf at index 2"),
        ({}, {"sample_weight": np.zeros(6)}, "sample_weight is zero for every row; give at least one"),
        ({}, {"sample_weight": np.ones(2), "groups": None}, r"sample_weight has shape \(2,\)"),
        ({}, {"sample_weight": np.ones((6, 2))}, r"sample_weight has shape \(6, 2\)"),
        ({}, {"offset": np.ones(5)}, r"offset has shape \(5,\)"),
        ({}, {"offset": with_bad(np.ones(6), 1, np.nan)}, "offset contains (nan|NaN) at index 1"),
        ({"outside_good": True}, {"y": 1.2 * Y}, "y sums to 1.2 in group u: .*set outside_good=False"),
        ({"loss": "hinge"}, {}, "loss must be one of 'squared'"),
        ({"ridge": -1.0}, {}, "ridge must be a finite number >= 0"),
        ({"row_penalty": np.ones(5)}, {}, r"row_penalty has shape \(5,\)"),
        ({"tol": 0.0}, {}, "tol must be a number in"),
        ({"max_iter": -1}, {}, "max_iter must not be negative"),
        ({"loss": "entropy"}, {"sample_weight": np.ones(6), "groups": None}, "has no form; pass groups"),
    ],
)  # fmt: skip
def test_refused_by_fit(params, arguments, message):
    arguments = {"X": X, "y": Y, "groups": GROUPS, **arguments}
    with pytest.raises(ValueError, match=message):
        SoftmaxRegressor(**params).fit(**arguments)


def test_refused_by_the_other_estimators():
    with pytest.raises(ValueError, match="function must be one of 'exp'"):
        ExponentialRegressor("tan").fit(X, Y)
    with pytest.raises(ValueError, match="function must be one of 'exp'"):
        RescaledSoftmaxRegressor("tan").fit(X, Y)
    with pytest.raises(ValueError, match="function='sinh' has no form; pass groups"):
        RescaledSoftmaxRegressor("sinh").fit(X, Y, sample_weight=np.ones(6))
    with pytest.raises(ValueError, match="sample_weight is negative at index 0"):
        ExponentialRegressor().fit(X, Y, sample_weight=-np.ones(6))


def test_refused_by_predict():
    model = SoftmaxRegressor().fit(X, Y, groups=GROUPS)
    with pytest.raises(ValueError, match=r"3 features.*expecting 2"):
        model.predict(np.ones((4, 3)))
    with pytest.raises(ValueError, match="groups has length 2"):
        model.predict(X, groups=[1, 2])
    with pytest.raises(ValueError, match="offset has shape"):
        model.predict(X, groups=GROUPS, offset=[1.0])
    model.coef_ = np.array([10.0, 10.0])
    with pytest.raises(OverflowError, match="coef_ overflows"):
        model.predict(np.full((2, 2), 1e308), groups=[0, 0])
    exponential = ExponentialRegressor().fit(X, np.exp(X @ [1.0, 0.5]))
    with pytest.raises(OverflowError, match=r"exp\(1500\) of row 1 overflows"):
        exponential.predict([[0.0, 0.0], [1000.0, 1000.0]])
    rescaled = RescaledSoftmaxRegressor().fit(X, Y, groups=np.zeros(6))
    with pytest.raises(OverflowError, match="the share of row 0 is not finite"):
        rescaled.predict(1e5 * np.sign(rescaled.coef_)[None, :], groups=[0])


def test_a_column_of_targets_is_accepted_with_a_warning():
    with pytest.warns(DataConversionWarning):
        model = SoftmaxRegressor().fit(X, Y[:, None], groups=GROUPS)
    np.testing.assert_array_equal(model.coef_, SoftmaxRegressor().fit(X, Y, groups=GROUPS).coef_)


def test_integers_booleans_and_groups_of_one_row_are_data():
    flags = np.eye(6, 3, dtype=bool)
    model = SoftmaxRegressor(ridge=0.1).fit(flags, np.array([1, 0, 0, 0, 0, 0]), groups=[0, 0, 0, 1, 2, 3])
    same = SoftmaxRegressor(ridge=0.1).fit(flags[:3].astype(float), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(model.coef_, same.coef_, rtol=1e-6)
    assert model.predict(flags, groups=[0, 0, 0, 1, 2, 3])[3:].tolist() == [1.0, 1.0, 1.0]


class Recorder:
    """A callback of scikit-learn's protocol that stops the fit after some evaluations."""

    def __init__(self, stop_after=None):
        self.stop_after, self.records, self.events = stop_after, [], []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
        if context.parent is None:
            self.events.append(("begin", X is not None, sorted(metadata)))

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
        if context.parent is None:
            self.events.append(("end", fitted_estimator.predict(X, groups=GROUPS).shape))
            return False
        self.records.append(metadata["record"])
        return self.stop_after is not None and len(self.records) >= self.stop_after


def test_callbacks_see_every_evaluation_and_can_stop():
    pytest.importorskip("sklearn.callback")
    watch = Recorder()
    model = SoftmaxRegressor().set_callbacks(watch).fit(X, Y, groups=GROUPS)
    assert len(watch.records) == len(model.result_.history)
    assert watch.events == ["setup", ("begin", True, ["groups"]), ("end", (6,)), "teardown"]
    stop = Recorder(stop_after=2)
    model = SoftmaxRegressor().set_callbacks(stop).fit(X, Y, groups=GROUPS)
    assert model.result_.status == "interrupted"
    assert 2 <= len(stop.records) < len(watch.records)
    failing = Recorder()
    with pytest.raises(ValueError, match="tol"):
        ExponentialRegressor(tol=-1).set_callbacks(failing).fit(X, Y)
    assert failing.events[-1] == "teardown"


def test_nothing_breaks_without_the_callback_protocol(monkeypatch):
    import importlib
    import sys

    from attnfit.estimators import base as callbacks

    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    old = importlib.reload(callbacks)
    try:
        assert old.with_callbacks(len) is len
        assert not old.has_callbacks(old.CallbackSupportMixin())
    finally:
        monkeypatch.undo()
        importlib.reload(callbacks)


@pytest.mark.parametrize("option", ["weight_type", "covariance"])
def test_options_of_inference_are_refused_before_any_work(monkeypatch, option):
    monkeypatch.setattr("attnfit.estimators.base.minimize", lambda *_, **__: pytest.fail("fitted first"))
    with pytest.raises(ValueError, match=f"{option} must be one of"):
        SoftmaxRegressor(**{option: "x"}).fit(np.eye(3), np.full(3, 1 / 3))
