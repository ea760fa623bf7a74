"""Absorbed effects as they are used: softmax losses, names of columns, formulas, predictions, bad input."""

import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from attnfit import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor, minimize, problems
from attnfit.data import open_source
from benchmarks.effects_data import bipartite, dummies, matched, statsmodels_fit


def frame(seed=3):
    X, y, (worker, firm) = matched(60, 12, seed, reach=3)
    table = pd.DataFrame(X, columns=["a", "b", "c"])
    return table.assign(y=y, worker=worker, firm=[f"f{k:02d}" for k in firm], year=np.tile(np.arange(5), 60))


# ---- cross entropy and KL


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_a_softmax_is_that_with_dummies(loss):
    X, y, (group, destination) = bipartite(40, 9, 400, 1)
    b = y / np.bincount(group, y, minlength=40)[group].clip(1.0)
    w = np.random.default_rng(0).uniform(0.5, 2.0, 400)
    options = {"loss": loss, "weights": w, "ridge": 0.0}
    ours = minimize(problems.Softmax(X, b, group, absorb=[destination], **options))
    columns = np.column_stack([X, np.equal.outer(destination, np.arange(1, 9))])
    theirs = minimize(problems.Softmax(columns, b, group, **options))
    assert ours.converged and ours.n_passes <= 6
    np.testing.assert_allclose(ours.x, theirs.x[:1], atol=1e-9)
    assert ours.value == pytest.approx(theirs.value, rel=1e-11)
    (effects,) = ours.effects
    np.testing.assert_allclose([effects.contrast(k, 0) for k in range(1, 9)], theirs.x[1:], atol=1e-8)


def test_a_softmax_of_counts_is_the_poisson_model_with_its_groups():
    X, y, (group, destination) = bipartite(40, 9, 400, 1)
    share = minimize(problems.Softmax(X, y, group, loss="cross_entropy", absorb=[destination]))
    count = minimize(problems.Poisson(X, y, absorb=[group, destination]))
    np.testing.assert_allclose(share.x, count.x, atol=1e-10)


def test_errors_of_choices_are_those_of_the_fit_with_dummies():
    rng = np.random.default_rng(0)
    group, mode = np.repeat(np.arange(300), 5), np.tile(np.arange(5), 300)
    X = rng.standard_normal((1500, 2))
    utility = X @ [0.5, -0.7] + 0.2 * mode + rng.gumbel(size=1500)
    y = (utility == np.repeat(utility.reshape(300, 5).max(axis=1), 5)).astype(float)
    ours = SoftmaxRegressor(loss="cross_entropy").fit(X, y, groups=group, absorb=[mode])
    columns = np.column_stack([X, np.equal.outer(mode, np.arange(1, 5))])
    theirs = SoftmaxRegressor(loss="cross_entropy").fit(columns, y, groups=group)
    assert ours.covariance_kind_ == theirs.covariance_kind_ == "classic"
    clusters = group // 3
    for options in ({"kind": "classic"}, {"kind": "robust"}, {"kind": "row"}, {"clusters": clusters}):
        for correction in (False, True):
            np.testing.assert_allclose(
                ours.covariance(**options, correction=correction),
                theirs.covariance(**options, correction=correction)[:2, :2],
                rtol=1e-7,
                err_msg=str(options),
            )
    one, other = ours.fit_statistics(), theirs.fit_statistics()
    for name in ("log_likelihood", "aic", "bic", "hit_rate", "brier", "log_loss", "n_parameters"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9), name
    predicted = ours.predict(X, groups=group, absorb=[mode])
    np.testing.assert_allclose(predicted, theirs.predict(columns, groups=group), rtol=1e-8)
    assert ours.r2_ == pytest.approx(theirs.r2_, rel=1e-9)
    assert "classic" in str(ours.summary()) and ours.loss_value_ == pytest.approx(theirs.loss_value_)


# ---- names, formulas, predictions


def test_columns_by_name_and_new_labels():
    table = frame()
    y = table.pop("y")
    model = PoissonRegressor(absorb=["worker", ("firm", "year")]).fit(table, y)
    np.testing.assert_array_equal(model.feature_names_in_, ["a", "b", "c"])
    pairs = table.firm + table.year.astype(str)
    arrays = PoissonRegressor().fit(table[["a", "b", "c"]].to_numpy(), y, absorb=[table.worker, pairs])
    np.testing.assert_allclose(model.coef_, arrays.coef_, atol=1e-10)
    assert [e.name for e in model.result_.effects] == ["worker", "firm x year"]
    assert model.result_.effects[1].labels[0] == ("f00", 0)
    ours = model.predict(table)
    theirs = arrays.predict(table[["a", "b", "c"]].to_numpy(), absorb=[table.worker, pairs])
    np.testing.assert_allclose(ours, theirs, rtol=1e-8)
    assert model.score(table, y) > 0.3
    new = table.head(4).assign(firm=["f00", "new", "f01", "newer"])
    with pytest.warns(UserWarning, match=r"firm x year has \d rows? with labels .*new, 1"):
        assert np.isnan(model.predict(new)[[1, 3]]).all()
    kept = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(kept.predict(table), ours, rtol=1e-12)
    with pytest.raises(ValueError, match=r"absorb is missing.*absorb\[0\]"):
        arrays.predict(table[["a", "b", "c"]].to_numpy())
    with pytest.raises(NotImplementedError, match="not available with absorbed effects"):
        model.elasticities("a")


def test_levels_that_cannot_be_compared_and_outputs_of_zero():
    one = np.array([0, 0, 1, 1, 2, 2, 3, 3, 0])
    other = np.array([0, 1, 0, 1, 2, 3, 2, 3, 2])
    y = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 1.0, 4.0, 2.0, 0.0])
    X = np.array([0.1, -0.3, 0.5, 0.2, -0.1, 0.4, 0.3, -0.2, 0.0])[:, None]
    model = PoissonRegressor().fit(X, y, absorb=[one, other])
    np.testing.assert_array_equal(model.result_.dropped["separated"], [8])
    predicted = model.predict(X, absorb=[one, other])
    assert predicted[8] == 0.0 and (predicted[:8] > 0.0).all()
    assert np.isnan(model.predict(X[:1], absorb=[[2], [0]])).all()


def test_a_formula_with_effects():
    table = frame()
    model = PoissonRegressor.from_formula("y ~ a + b + c", table, absorb=["worker", "firm"])
    plain = PoissonRegressor(absorb=["worker", "firm"]).fit(table[["a", "b", "c", "worker", "firm"]], table.y)
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-10)
    np.testing.assert_allclose(model.predict(table), plain.predict(table[["a", "b", "c", "worker", "firm"]]))
    assert list(model.feature_names_in_) == ["a", "b", "c"]
    holes = table.assign(firm=table.firm.where(np.arange(len(table)) != 7))
    with pytest.warns(UserWarning, match="left out 1 rows: missing values in firm"):
        fewer = PoissonRegressor.from_formula("y ~ a + b + c", holes, absorb=["worker", ("firm", "year")])
    assert fewer.n_rows_ == len(table) - 1
    with pytest.raises(ValueError, match="no column but the constant"):
        PoissonRegressor.from_formula("y ~ 1", table, absorb="firm")
    shares = SoftmaxRegressor.from_formula("y ~ a + b", table, groups="worker", absorb="firm", loss="kl")
    np.testing.assert_allclose(
        shares.coef_,
        SoftmaxRegressor(loss="kl")
        .fit(table[["a", "b"]], table.y, groups=table.worker, absorb=table.firm)
        .coef_,
        atol=1e-10,
    )


# ---- storage


@pytest.mark.parametrize("in_order", [True, False])
def test_on_disk(tmp_path, in_order):
    X, y, sets = matched(60, 12, 3, reach=3)
    X = np.random.default_rng(0).standard_normal((300, 7)) + np.arange(7) * 100.0
    order = np.arange(300)[::-1] if in_order else np.random.default_rng(1).permutation(300)
    X, y, sets = X[order], y[order], [s[order] for s in sets]
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", y)
    here = PoissonRegressor().fit(X, y, absorb=sets)
    there = PoissonRegressor().fit(
        open_source(tmp_path / "X.npy"), open_source(tmp_path / "y.npy"), absorb=sets
    )
    np.testing.assert_allclose(there.coef_, here.coef_, atol=1e-9)
    np.testing.assert_allclose(there.standard_errors_, here.standard_errors_, rtol=1e-7)
    reads = there.result_.n_passes / here.result_.n_passes
    assert reads == pytest.approx(1.0 if in_order else 2.0, rel=0.25)


def test_sparse_columns_and_types_of_labels():
    X, y, (worker, firm) = matched(60, 12, 3, reach=3)
    X[np.abs(X) < 0.5] = 0.0
    expected = minimize(problems.Poisson(X, y, absorb=[worker, firm])).x
    names = pd.Categorical([f"f{k}" for k in firm])
    days = np.datetime64("2020-01-01") + worker
    for labels in (
        [days, names],
        [worker * 1.0, firm.astype(object)],
        pd.DataFrame({"w": worker, "f": names}),
    ):
        result = minimize(problems.Poisson(sparse.csr_array(X), y, absorb=labels))
        np.testing.assert_allclose(result.x, expected, atol=1e-9)
    flag = minimize(problems.Poisson(X, y, absorb=np.column_stack([worker, firm > 5])))
    both = minimize(problems.Poisson(X, y, absorb=[worker, firm > 5]))
    np.testing.assert_allclose(flag.x, both.x, atol=1e-10)


def test_a_set_with_one_level_is_a_constant():
    X, y, (worker, firm) = matched(60, 12, 3, reach=3)
    result = minimize(problems.Poisson(X, y, absorb=[worker, np.ones(300, int), firm]))
    np.testing.assert_allclose(
        result.x, minimize(problems.Poisson(X, y, absorb=[worker, firm])).x, atol=1e-10
    )
    assert "absorb[1] has one level" in result.message and result.effects[1].values[0] == 0.0


# ---- what is refused


def test_bad_labels_are_refused_by_name_and_index():
    X, y, (worker, firm) = matched(60, 12, 3, reach=3)
    broken, holes, text = worker * 1.0, worker * 1.0, firm.astype(object)
    broken[4], holes[6], text[8] = 1.5, np.nan, None
    cases = [
        ([worker[:-1], firm], "absorb\\[0\\] has 299 labels.* 300"),
        ([broken, firm], "absorb\\[0\\] has the label .*1.5.* at index 4"),
        ([worker, holes], "absorb\\[1\\] has no label at index 6.*'missing'"),
        ([worker, text], "absorb\\[1\\] has no label at index 8"),
        ([worker, firm, (firm * 7) % 12 + 100], "absorb\\[2\\] and absorb\\[1\\] are the same set of 12"),
        ([], "absorb is empty"),
        ([worker, np.array(["a", 1] * 150, dtype=object)], "several types"),
    ]
    for sets, told in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=told):
                problems.Poisson(X, y, absorb=sets)
    with pytest.raises(ValueError, match="absorb\\[0\\] and groups are the same set"):
        problems.Softmax(X, y, worker, loss="kl", absorb=[worker])
    with pytest.raises(ValueError, match=r"b.*index 3"):
        problems.Poisson(X, np.where(np.arange(300) == 3, -1.0, y), absorb=[worker])
    with pytest.raises(ValueError, match="1 row to fit"):
        problems.Poisson(X, (np.arange(300) == 3) * 1.0, absorb=[np.arange(300)])
    with pytest.raises(ValueError, match="singletons must be one of"):
        problems.Poisson(X, y, absorb=[worker], singletons="leave")


def test_what_has_no_form_with_effects_is_refused_by_name(tmp_path):
    X, y, (worker, firm) = matched(60, 12, 3, reach=3)
    problem = problems.Poisson(X, y, absorb=[worker, firm])
    for call, told in [
        (
            lambda: problems.Poisson(X, y, absorb=[worker], row_penalty=0.1),
            "row_penalty does not go with absorb",
        ),
        (lambda: PoissonRegressor(row_penalty=0.1).fit(X, y, absorb=[worker]), "row_penalty"),
        (
            lambda: problems.Exponential(X, y, function="cosh", absorb=[worker]),
            "function='exp' only, not 'cosh'",
        ),
        (
            lambda: problems.Softmax(X, y, worker, loss="entropy", absorb=[firm]),
            "absorb has no form for Entropy",
        ),
        (lambda: minimize(problem, memory_limit="1GB"), "memory_limit does not go with absorb"),
        (lambda: minimize(problem, checkpoint=tmp_path / "c"), "checkpoint does not go with absorb"),
    ]:
        with pytest.raises(NotImplementedError, match=told):
            call()
    with pytest.raises(ValueError, match="outside_good=True does not go with absorb"):
        SoftmaxRegressor(outside_good=True, loss="kl").fit(X, y / 1e3, groups=worker, absorb=[firm])
    with pytest.raises(ValueError, match="sample_weight repeats rows"):
        SoftmaxRegressor(loss="kl").fit(X, y, sample_weight=y + 1, absorb=[firm])
    with pytest.raises(ValueError, match="absorb='firm' names a column, but X is no data frame"):
        PoissonRegressor(absorb=["firm"]).fit(X, y)
    with pytest.raises(ValueError, match="fitted without"):
        ExponentialRegressor().fit(X, y).predict(X, absorb=[firm])


def test_dask_is_refused_with_the_remedy():
    array = pytest.importorskip("dask.array")
    X, y, (worker, _) = matched(60, 12, 3, reach=3)
    chunks = array.from_array(X, chunks=(100, 3)), array.from_array(y, chunks=100)
    for call in (
        lambda: problems.Poisson(*chunks, absorb=[worker]),
        lambda: PoissonRegressor().fit(*chunks, absorb=[worker]),
        lambda: problems.Poisson(X, y, absorb=[array.from_array(worker, chunks=100)]),
    ):
        with pytest.raises(NotImplementedError, match=r"Dask.*call .compute\(\)"):
            call()


def test_the_helper_that_truth_rests_on():
    X, y, sets = matched(40, 8, 3, reach=3)
    assert np.linalg.matrix_rank(dummies(sets)) == dummies(sets).shape[1]
    assert np.abs(statsmodels_fit(X, y, sets).fittedvalues.sum() - y.sum()) < 1e-8
