"""Groups are not forgotten: by predictions, scores, searches, or where data are elsewhere."""

import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attnfit import datasets
from attnfit.estimators import RescaledSoftmaxRegressor, ShareScorer, ShareTotals, SoftmaxRegressor

TRAVEL = datasets.load_travel_mode()
MODELS = [SoftmaxRegressor(loss="cross_entropy"), RescaledSoftmaxRegressor(ridge=0.01)]


@pytest.fixture(autouse=True)
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


def fitted(model=MODELS[0]):
    return sklearn.clone(model).fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.predict(TRAVEL.A),
        lambda m: m.score(TRAVEL.A, TRAVEL.b),
        lambda m: m.score(TRAVEL.A, TRAVEL.b, sample_weight=np.ones(840)),
        lambda m: ShareScorer("brier")(m, TRAVEL.A, TRAVEL.b),
        lambda m: ShareScorer()(m, TRAVEL.A, TRAVEL.b, sample_weight=np.ones(840)),
        lambda m: permutation_importance(m, TRAVEL.A, TRAVEL.b, n_repeats=1),
        lambda m: sklearn.metrics.get_scorer("r2")(m, TRAVEL.A, TRAVEL.b),
    ],
)
def test_forgotten_groups_are_refused_with_the_remedy(model, use):
    with pytest.raises(ValueError, match=r"was fitted on 210 groups.*pass one label a row"):
        use(fitted(model))


@pytest.mark.parametrize("label", [None, float("nan"), pd.NA, pd.NaT], ids=str)
@pytest.mark.parametrize("argument", ["groups", "clusters"])
def test_a_row_without_a_label_is_named(label, argument):
    labels = TRAVEL.groups.astype(object)
    labels[5] = label
    given = {"groups": TRAVEL.groups, argument: labels}
    with pytest.raises(ValueError, match=f"{argument} has no label at index 5"):
        sklearn.clone(MODELS[0]).fit(TRAVEL.A, TRAVEL.b, **given).covariance()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_groups_that_a_search_does_not_hand_on_are_missed(model):
    """Without metadata routing they reach the splitter only, and each fit is one of a single group."""
    with (
        sklearn.config_context(enable_metadata_routing=False),
        pytest.warns(UserWarning, match=r"y sums to 1\d\d, and the shares of one group to 1: pass groups"),
    ):
        cross_val_score(model, TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups, cv=GroupKFold(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sklearn.clone(model).fit(TRAVEL.A[:4], [0.2, 0.3, 0.4, 0.1])
        sklearn.clone(model).set_params(ridge=1.0).fit(TRAVEL.A[:4], [0.2, 0.3, 4.0, 7.0])
        sklearn.clone(model).set_params(ridge=1.0).fit(TRAVEL.A[:4], [0.5, 0.5, 0.5, 0.5], groups=np.zeros(4))


def test_labels_of_several_types_are_refused():
    labels = np.array([str(g) if k % 2 else int(g) for k, g in enumerate(TRAVEL.groups)], dtype=object)
    with pytest.raises(ValueError, match=r"groups has labels of several types \(int, str\)"):
        sklearn.clone(MODELS[0]).fit(TRAVEL.A, TRAVEL.b, groups=labels)


def test_no_choice_at_all_gives_no_warning_of_numpy():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sklearn.clone(MODELS[0]).fit(TRAVEL.A, np.zeros(840), groups=TRAVEL.groups)
        assert "all y are zero" in str(model.fit_statistics().notes)
        model.summary()


def test_one_group_may_be_left_out():
    model = SoftmaxRegressor().fit(TRAVEL.A[:4], [0.1, 0.2, 0.3, 0.4], groups=["a"] * 4)
    assert model.predict(TRAVEL.A[:4]).shape == (4,)
    assert np.isfinite(model.score(TRAVEL.A[:4], [0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_groups_are_a_column_of_a_frame(frame):
    columns = dict(zip(TRAVEL.feature_names, TRAVEL.A.T, strict=True))
    table = frame({"traveller": [f"t{g}" for g in TRAVEL.groups], **columns})
    model = SoftmaxRegressor(loss="cross_entropy").fit(table, TRAVEL.b, groups="traveller")
    assert model.feature_names_in_.tolist() == list(TRAVEL.feature_names)
    np.testing.assert_array_equal(model.coef_, fitted().coef_)
    np.testing.assert_array_equal(
        model.predict(table, groups="traveller"), fitted().predict(TRAVEL.A, groups=TRAVEL.groups)
    )
    assert model.score(table, TRAVEL.b, groups="traveller") == pytest.approx(
        fitted().score(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups)
    )
    told = ShareScorer()(model, table, TRAVEL.b, groups="traveller")
    assert told == pytest.approx(-199.12837 / 210, abs=1e-6)
    with pytest.raises(ValueError, match="groups='person' is no column of X; its columns are traveller, air"):
        model.fit(table, TRAVEL.b, groups="person")
    with pytest.raises(ValueError, match="groups='traveller' names a column, but X is no data frame"):
        model.fit(TRAVEL.A, TRAVEL.b, groups="traveller")


# ---- scorers ----------------------------------------------------------------------------------------------


def by_hand(metric, y, f, groups, weights=None, outside=False):
    losses, sizes = [], []
    for g in np.unique(groups):
        rows = groups == g
        target, shares = y[rows], f[rows]
        if outside:
            target, shares = np.append(target, 1 - target.sum()), np.append(shares, 1 - shares.sum())
        w = 1.0 if weights is None else weights[rows][0]
        squared = metric == "brier"
        losses.append(w * (np.sum((target - shares) ** 2) if squared else -np.sum(target * np.log(shares))))
        sizes.append(w)
    return -np.sum(losses) / np.sum(sizes)


@pytest.mark.parametrize("metric", ["log_loss", "brier"])
@pytest.mark.parametrize("outside", [False, True])
def test_scorers_against_their_definition(metric, outside):
    y = 0.8 * TRAVEL.b + 0.01
    model = SoftmaxRegressor(loss="cross_entropy", outside_good=outside).fit(
        TRAVEL.A, y, groups=TRAVEL.groups
    )
    f = model.predict(TRAVEL.A, groups=TRAVEL.groups)
    scorer = ShareScorer(metric)
    plain = scorer(model, TRAVEL.A, y, groups=TRAVEL.groups)
    assert plain == pytest.approx(by_hand(metric, y, f, TRAVEL.groups, outside=outside))
    per_group = np.random.default_rng(0).uniform(0.5, 2.0, 210)
    weights = per_group[TRAVEL.groups]
    expected = by_hand(metric, y, f, TRAVEL.groups, weights, outside)
    for given in (weights, per_group):
        told = scorer(model, TRAVEL.A, y, groups=TRAVEL.groups, sample_weight=given)
        assert told == pytest.approx(expected)
    with pytest.raises(ValueError, match="metric must be one of"):
        ShareScorer("accuracy")(model, TRAVEL.A, y, groups=TRAVEL.groups)


def test_a_share_of_zero_is_finite():
    model = fitted()
    model.coef_ = 1e4 * model.coef_
    assert np.isfinite(ShareScorer()(model, TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups))


@pytest.mark.parametrize("pipeline", [False, True])
def test_groups_are_routed_through_cross_validation_and_searches(pipeline):
    model = SoftmaxRegressor(loss="cross_entropy").set_fit_request(groups=True)
    if pipeline:
        model = make_pipeline(StandardScaler(), model.set_predict_request(groups=True))
    scorer = ShareScorer("log_loss").set_score_request(groups=True)
    folds = GroupKFold(5)
    if pipeline:
        scores = cross_val_score(
            model, TRAVEL.A, TRAVEL.b, scoring=scorer, cv=folds, params={"groups": TRAVEL.groups}
        )
    else:
        search = GridSearchCV(model, {"ridge": [0.0, 1e3]}, scoring=scorer, cv=folds)
        search.fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups)
        assert search.best_params_ == {"ridge": 0.0}
        scores = [search.cv_results_[f"split{k}_test_score"][0] for k in range(5)]
    expected = []
    for train, test in folds.split(TRAVEL.A, groups=TRAVEL.groups):
        part = SoftmaxRegressor(loss="cross_entropy")
        part.fit(TRAVEL.A[train], TRAVEL.b[train], groups=TRAVEL.groups[train])
        shares = part.predict(TRAVEL.A[test], groups=TRAVEL.groups[test])
        expected.append(by_hand("log_loss", TRAVEL.b[test], shares, TRAVEL.groups[test]))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


# ---- data that are elsewhere ------------------------------------------------------------------------------


@pytest.fixture
def shares(tmp_path):
    """Shares that sum to one, less and more, on disk, with their groups next to each other."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 2)), rng.uniform(0.1, 1.0, 60)
    groups = np.repeat(np.arange(20), 3)
    y /= np.bincount(groups, weights=y)[groups]
    y[groups == 4] *= 0.5
    y[groups == 7] *= 1.25
    frame = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "g": groups, "y": y})
    frame.to_parquet(tmp_path / "d.parquet", row_group_size=13)
    return frame, tmp_path / "d.parquet"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("place", ["disk", "dask frame", "dask array", "limited"])
def test_the_same_report_wherever_the_data_are(shares, model, place):
    frame, path = shares
    X, y, groups = frame[["a", "b"]], frame["y"].to_numpy(), frame["g"].to_numpy()
    here = sklearn.clone(model).fit(X, y, groups=groups)
    options = {}
    if place == "disk":
        from attnfit.data import open_source

        arguments = [open_source(path, ["a", "b"]), open_source(path, "y"), open_source(path, "g")]
        options = {"memory_limit": "32GB"}
    elif place == "limited":
        arguments, options = [X, y, groups], {"memory_limit": "32GB"}
    else:
        dd = pytest.importorskip("dask.dataframe")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = dd.from_pandas(frame, npartitions=4)
        columns = [table[["a", "b"]], table["y"], table["g"]]
        if place == "dask array":
            columns = [column.to_dask_array(lengths=True) for column in columns]
        arguments = columns
    there = sklearn.clone(model).fit(arguments[0], arguments[1], groups=arguments[2], **options)
    np.testing.assert_allclose(there.coef_, here.coef_, rtol=1e-6)
    np.testing.assert_allclose(there.standard_errors_, here.standard_errors_, rtol=1e-5)
    assert (there.n_rows_, there.n_groups_, there.n_features_in_) == (60, 20, 2)
    assert there.n_unbalanced_groups_ == here.n_unbalanced_groups_ == 2
    (above,), (below,) = there.share_totals_.above, there.share_totals_.below
    assert above == (7, pytest.approx(1.25)) and below == (4, pytest.approx(0.5))
    assert there.loss_value_ == pytest.approx(here.loss_value_)
    assert str(there.summary())
    if place == "dask frame":
        assert there.feature_names_in_.tolist() == ["a", "b"]
    np.testing.assert_allclose(
        there.predict(X if hasattr(there, "feature_names_in_") else X.to_numpy(), groups=groups),
        here.predict(X, groups=groups),
        rtol=1e-6,
    )


def test_what_needs_all_rows_is_refused_elsewhere(shares):
    from attnfit.data import open_source

    _, path = shares
    X, y, groups = open_source(path, ["a", "b"]), open_source(path, "y"), open_source(path, "g")
    for model, more, told in (
        (SoftmaxRegressor(outside_good=True), {"groups": groups}, "outside_good=True needs the whole table"),
        (SoftmaxRegressor(row_penalty=np.ones(60)), {"groups": groups}, "a row_penalty of each row"),
        (SoftmaxRegressor(), {"sample_weight": y}, "sample_weight repeats rows where there are no groups"),
    ):
        with pytest.raises(ValueError, match=told):
            model.fit(X, y, **more)


def test_an_estimator_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "fit.ckpt"
    model = SoftmaxRegressor(loss="cross_entropy")
    first = model.fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups, checkpoint=path).coef_.copy()
    assert path.is_file()
    model.fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups, checkpoint=path)
    assert "resumed from" in model.result_.message
    np.testing.assert_array_equal(model.coef_, first)
    model.fit(TRAVEL.A, TRAVEL.b, groups=TRAVEL.groups, checkpoint=path, resume=False)
    assert "resumed from" not in model.result_.message


def test_totals_name_the_farthest():
    found = ShareTotals.of(np.array([1.0, 2.0, 1.1, 1.5, 1.2, 0.9]), list("abcdef"))
    assert (found.n_above, found.n_below, found.n_unbalanced) == (4, 1, 5)
    assert [label for label, _ in found.above] == ["b", "d", "e"]
