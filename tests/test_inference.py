"""Covariances: the same wherever the data are, invariances, and every refusal."""

import warnings

import numpy as np
import pytest
from conftest import shrink_blocks
from scipy import sparse

from attnfit import datasets
from attnfit.estimators import (
    ExponentialRegressor,
    PoissonRegressor,
    RescaledSoftmaxRegressor,
    SoftmaxRegressor,
)
from attnfit.inference.covariance import nearest_covariance

TRAVEL = datasets.load_travel_mode()


def panel(seed=0, n_groups=40, n_clusters=12, *, choices=False, d=3):
    """Return groups of unequal size, shares or choices, and clusters of whole groups."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), rng.integers(2, 6, n_groups))
    X = rng.standard_normal((len(groups), d))
    u = np.exp(X @ np.linspace(-0.5, 0.5, d) + 0.3 * rng.standard_normal(len(groups)))
    y = u / np.bincount(groups, weights=u)[groups]
    if choices:
        y = np.zeros(len(groups))
        for g in range(n_groups):
            y[rng.choice(np.flatnonzero(groups == g))] = 1.0
    return X, y, groups, (groups * 7) % n_clusters


def covariances(model, *, row=True):
    yield model.covariance("robust")
    yield model.covariance("cluster")
    if row:
        yield model.covariance("row")


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "squared"])
def test_the_same_wherever_the_data_are(loss, tmp_path, monkeypatch):
    from attnfit.data import open_source

    da = pytest.importorskip("dask.array")
    X, y, groups, clusters = panel()
    here = SoftmaxRegressor(loss).fit(X, y, groups=groups, clusters=clusters)
    expected = list(covariances(here))
    np.save(tmp_path / "X.npy", X)
    np.save(tmp_path / "y.npy", y)
    places = {
        "sparse": (sparse.csr_array(X), y, groups, clusters),
        "disk": (open_source(tmp_path / "X.npy"), open_source(tmp_path / "y.npy"), groups, clusters),
        "dask": tuple(da.from_array(v, chunks=(37, 3)[: v.ndim]) for v in (X, y, groups, clusters)),
    }
    order = np.random.default_rng(1).permutation(len(y))
    places["shuffled"] = (X[order], y[order], groups[order], clusters[order])
    for name, (A, b, g, c) in places.items():
        there = SoftmaxRegressor(loss).fit(A, b, groups=g, clusters=c)
        for ours, theirs in zip(covariances(there), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9, err_msg=name)
        ours, theirs = there.fit_statistics(), here.fit_statistics()
        assert (ours.brier, ours.log_loss) == pytest.approx((theirs.brier, theirs.log_loss), rel=1e-6), name
    shrink_blocks(monkeypatch)
    long = np.arange(len(y)) % 2
    blocks = SoftmaxRegressor(loss).fit(X, y, groups=long, clusters=clusters)
    assert blocks.result_.problem.rows.n_long == 2
    found = [*covariances(blocks), blocks.fit_statistics().brier]
    monkeypatch.undo()
    whole = SoftmaxRegressor(loss).fit(X, y, groups=long, clusters=clusters)
    for ours, theirs in zip(found, [*covariances(whole), whole.fit_statistics().brier], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_at_most_two_reads():
    X, y, groups, clusters = panel(n_groups=400, choices=True)
    model = SoftmaxRegressor("cross_entropy").fit(X, y, groups=groups, clusters=clusters)
    before = model.result_.problem.n_passes
    for kind in ("cluster", "robust", "classic"):
        model.covariance(kind)
    model.fit_statistics()
    assert model.result_.problem.n_passes - before <= 1.0 + 1e-9


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_frequency_weights_repeat_groups(loss):
    X, y, groups, clusters = panel(2)
    copies = np.random.default_rng(3).integers(1, 4, groups.max() + 1)
    weighted = SoftmaxRegressor(loss, weight_type="frequency")
    weighted.fit(X, y, groups=groups, sample_weight=copies[groups], clusters=clusters)
    rows = [np.flatnonzero(groups == g) for g in range(len(copies)) for _ in range(copies[g])]
    labels = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    rows = np.concatenate(rows)
    repeated = SoftmaxRegressor(loss).fit(X[rows], y[rows], groups=labels, clusters=clusters[rows])
    for kind in ("robust", "cluster", "row"):
        np.testing.assert_allclose(weighted.covariance(kind), repeated.covariance(kind), rtol=1e-6)
    assert weighted._find_covariance("robust").n_units == copies.sum()


def test_clusters_against_statsmodels():
    sm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(5)
    X = np.column_stack([np.ones(90), rng.standard_normal((90, 2))])
    clusters = np.arange(90) % 13
    y = rng.poisson(np.exp(X @ [0.5, 0.4, -0.3] + 0.3 * rng.standard_normal(13)[clusters])).astype(float)
    peer = sm.GLM(y, X, family=sm.families.Poisson())
    theirs = peer.fit(tol=1e-14, cov_type="cluster", cov_kwds={"groups": clusters})
    model = PoissonRegressor().fit(X, y, clusters=clusters)
    factor = 13 / 12 * 89 / 87
    np.testing.assert_allclose(model.covariance(correction=factor), theirs.cov_params(), rtol=1e-8)
    restriction = model.wald_test("x1 = 0, x2 = 0", correction=factor)
    assert restriction.statistic == pytest.approx(
        float(np.squeeze(theirs.wald_test(np.eye(3)[1:], use_f=False, scalar=True).statistic)), rel=1e-8
    )
    raw = peer.fit(tol=1e-14)
    found = model.fit_statistics()
    expected = raw.llf, raw.aic, raw.deviance, raw.null_deviance, raw.llnull
    ours = found.log_likelihood, found.aic, found.deviance, found.null_deviance, found.log_likelihood_null
    assert ours == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("cls", [ExponentialRegressor, PoissonRegressor])
def test_frequency_weights_repeat_rows(cls):
    rng = np.random.default_rng(4)
    X = np.column_stack([np.ones(60), rng.standard_normal((60, 2))])
    y = rng.poisson(np.exp(X @ [0.5, 0.4, -0.3])).astype(float)
    copies, clusters = rng.integers(1, 4, 60), np.arange(60) % 9
    often = np.repeat(np.arange(60), copies)
    weighted = cls(weight_type="frequency").fit(X, y, sample_weight=copies, clusters=clusters)
    repeated = cls(weight_type="frequency").fit(X[often], y[often], clusters=clusters[often])
    for kind in ("robust", "cluster", "classic"):
        np.testing.assert_allclose(weighted.covariance(kind), repeated.covariance(kind), rtol=1e-6)
    for name, value in repeated.fit_statistics().values().items():
        ours = getattr(weighted.fit_statistics(), name)
        assert ours is None if value is None else ours == pytest.approx(value, rel=1e-8), name


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
@pytest.mark.parametrize("outside_good", [False, True])
def test_frequency_weights_repeat_rows_of_one_group(loss, outside_good):
    rng = np.random.default_rng(18)
    X, y = rng.standard_normal((30, 2)), 0.1 * rng.dirichlet(np.ones(30))
    copies, clusters = rng.integers(0, 4, 30), np.arange(30) % 6
    often = np.repeat(np.arange(30), copies)
    options = {"outside_good": outside_good, "weight_type": "frequency"}
    weighted = SoftmaxRegressor(loss, **options).fit(X, y, sample_weight=copies, clusters=clusters)
    repeated = SoftmaxRegressor(loss, **options).fit(X[often], y[often], clusters=clusters[often])
    for kind in ("robust", "cluster"):
        np.testing.assert_allclose(weighted.covariance(kind), repeated.covariance(kind), rtol=1e-5)
    ours, theirs = weighted.fit_statistics(), repeated.fit_statistics()
    assert (ours.log_loss, ours.brier) == pytest.approx((theirs.log_loss, theirs.brier), rel=1e-6)


def test_scores_of_many_units_go_to_a_file(monkeypatch):
    X, y, groups, clusters = panel(19)
    model = SoftmaxRegressor().fit(X, y, groups=groups)
    expected = model.covariance(clusters=clusters)
    monkeypatch.setattr("attnfit.inference.sweep.SCORES_IN_MEMORY", 0)
    monkeypatch.setattr("attnfit.inference.sweep.DENSE_UNITS", 0)
    again = SoftmaxRegressor().fit(X, y, groups=groups)
    np.testing.assert_allclose(again.covariance(clusters=clusters), expected, rtol=1e-12)


def test_sampling_weights_have_no_unit():
    X, y, groups, clusters = panel(5)
    weights = np.random.default_rng(6).uniform(0.5, 2, groups.max() + 1)[groups]
    one, many = (
        SoftmaxRegressor().fit(X, y, groups=groups, sample_weight=c * weights, clusters=clusters)
        for c in (1.0, 7.0)
    )
    for ours, theirs in zip(covariances(one), covariances(many), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_units_of_columns(loss):
    X, y, groups, clusters = panel(7)
    units = np.array([1e-6, 1.0, 1e5])
    plain, scaled = (
        SoftmaxRegressor(loss).fit(X * unit, y, groups=groups, clusters=clusters)
        for unit in (np.ones(3), units)
    )
    for ours, theirs in zip(covariances(plain), covariances(scaled), strict=True):
        np.testing.assert_allclose(ours, theirs * units * units[:, None], rtol=1e-5, atol=1e-12)


def test_rescaled_scores_of_rows_add_up_to_those_of_groups():
    X, y, groups, _ = panel(8)
    model = RescaledSoftmaxRegressor().fit(X, y, groups=groups)
    by_group = model.covariance("cluster", clusters=groups)
    np.testing.assert_allclose(by_group, model.covariance("robust"), rtol=1e-9)
    assert (np.diag(model.covariance("row")) > 0).all()


def test_outside_goods_belong_to_the_cluster_of_their_group():
    X, y, groups, clusters = panel(9)
    model = SoftmaxRegressor(outside_good=True).fit(X, 0.5 * y, groups=groups, clusters=clusters)
    n = groups.max() + 1
    first = np.searchsorted(groups, np.arange(n))
    by_hand = SoftmaxRegressor().fit(
        np.vstack([X, np.zeros((n, 3))]),
        np.append(0.5 * y, np.full(n, 0.5)),
        groups=np.append(groups, np.arange(n)),
        clusters=np.append(clusters, clusters[first]),
    )
    for ours, theirs in zip(covariances(model), covariances(by_hand), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    products = np.arange(len(groups)) % 6
    shared = model.covariance("cluster", clusters=products)
    alone = by_hand.covariance("cluster", clusters=np.append(products, np.full(n, 6)))
    np.testing.assert_allclose(shared, alone, rtol=1e-6)


def test_auto():
    X, y, groups, clusters = panel(10, choices=True)
    fit = {"groups": groups}
    model = SoftmaxRegressor("cross_entropy").fit(X, y, **fit)
    assert model.covariance_kind_ == "classic" and np.isinf(model.df_)
    assert "auto: every group holds one choice" in str(model.summary())
    weighted = SoftmaxRegressor("cross_entropy").fit(X, y, sample_weight=2.0 + groups, **fit)
    assert "auto: weights are sampling weights" in str(weighted.summary())
    weighted.set_params(weight_type="frequency").fit(X, y, sample_weight=2.0 + groups, **fit)
    assert weighted.covariance_kind_ == "classic"
    counts = SoftmaxRegressor("cross_entropy").fit(X, 3 * y, **fit)
    assert counts.covariance_kind_ == "robust" and counts.n_units_ == 40
    assert np.isfinite(counts.covariance("classic")).all()
    clustered = SoftmaxRegressor("cross_entropy").fit(X, y, clusters=clusters, **fit)
    assert (clustered.covariance_kind_, clustered.n_units_, clustered.df_) == ("cluster", 12, 11)
    text = str(clustered.summary())
    assert "cluster, unit cluster, 12 units, t with 11 degrees of freedom" in text and "below 30" in text
    assert (
        SoftmaxRegressor("cross_entropy", covariance="robust").fit(X, y, **fit).covariance_kind_ == "robust"
    )


def test_inverse_information_of_car_shares_is_wrong_by_a_factor_of_29():
    cars = datasets.load_car_shares()
    model = SoftmaxRegressor("cross_entropy").fit(cars.A, cars.b, groups=cars.groups)
    raw = np.sqrt(np.diag(model.covariance("robust", correction=False)))[5]
    assert raw == pytest.approx(0.0109, abs=5e-5)
    assert np.sqrt(model._fitted.bread.inverse[5, 5]) == pytest.approx(0.314, abs=5e-4)
    percent = SoftmaxRegressor("cross_entropy").fit(cars.A, 100 * cars.b, groups=cars.groups)
    np.testing.assert_allclose(percent.covariance_, model.covariance_, rtol=1e-6)


def test_groups_without_a_choice_are_no_units():
    X, y, groups, _ = panel(11, choices=True)
    y[groups < 5] = 0.0
    model = SoftmaxRegressor("cross_entropy", covariance="robust").fit(X, y, groups=groups)
    assert model.n_units_ == 35
    assert model._find_covariance("cluster", groups).n_units == 35


def test_one_cluster_has_no_error():
    X, y, groups, _ = panel(12)
    model = SoftmaxRegressor().fit(X, y, groups=groups)
    found = model._find_covariance("cluster", np.zeros(len(y)))
    assert np.isnan(found.matrix).all() and "one cluster" in found.notes[0]
    few = model._find_covariance("cluster", groups % 3)
    assert "fewer clusters than coefficients: at most 2 joint restrictions" in few.notes[0]
    with pytest.raises(ValueError, match=r"3 restrictions have rank 2: .*more than the 2 that 3 units allow"):
        model.wald_test(np.eye(3), clusters=groups % 3)


def test_refusals():
    pytest.importorskip("formulaic")
    X, y, groups, clusters = panel(13)
    model = SoftmaxRegressor().fit(X, y, groups=groups)
    halves = np.arange(len(y)) % 2
    entropy = SoftmaxRegressor("linear_cross_entropy", ridge=0.1).fit(X, y, groups=groups)
    for call, told in (
        (lambda: model.covariance("classic"), "y are shares, not choices: one market is not one draw; use"),
        (lambda: model.covariance("HC0"), "kind must be one of 'auto', 'classic'"),
        (lambda: model.covariance("cluster"), "needs clusters: one label a row"),
        (lambda: model.covariance("robust", clusters), "clusters go with kind='cluster'"),
        (lambda: model.covariance(clusters=clusters[:-1]), "one label a row"),
        (lambda: model.covariance(clusters=np.where(clusters > 3, np.nan, clusters)), "no label at index"),
        (lambda: model.covariance(clusters=np.zeros((len(y), 3))), "3 columns; one or two sets"),
        (lambda: model.covariance(correction="stata"), "correction must be True, False, 'fixest'"),
        (lambda: entropy.covariance("row"), "rows have no noise of their own"),
        (lambda: entropy.covariance(clusters=halves), "clusters split .* groups, whose rows have no scores"),
        (lambda: model.conf_int(level=95), "level must lie between 0 and 1"),
        (lambda: model.conf_int(df="t"), "df must be 'units', 'normal'"),
        (lambda: model.wald_test([[1, 0, 0], [2, 0, 0]]), "2 restrictions have rank 1: some follow"),
        (lambda: model.wald_test("x0 = z"), "no linear equation between x0, x1, x2"),
        (lambda: model.wald_test(np.eye(2)), "with 3 coefficients pass"),
        (lambda: model.likelihood_ratio_test(model), "no likelihood ratio .*use wald_test"),
        (lambda: SoftmaxRegressor(covariance="HC1").fit(X, y, groups), "covariance must be one of"),
        (lambda: SoftmaxRegressor(weight_type="fweight").fit(X, y, groups), "weight_type must be one of"),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_mixed_weights_are_refused():
    X, y, groups, _ = panel(14)
    rng = np.random.default_rng(0)
    uneven = rng.integers(1, 5, len(y))
    model = SoftmaxRegressor(weight_type="frequency").fit(X, y, groups=groups, sample_weight=uneven)
    with pytest.raises(ValueError, match=r"weights of rows differ within .* groups"):
        model.covariance("robust")
    model.fit(X, y, groups=groups, sample_weight=0.5 + groups)
    with pytest.raises(ValueError, match=r"whole numbers of copies.*weight_type='sampling'"):
        model.covariance("robust")


def test_likelihood_ratio_refusals():
    fit = {"groups": TRAVEL.groups}
    full = SoftmaxRegressor("cross_entropy").fit(TRAVEL.A, TRAVEL.b, **fit)
    less = SoftmaxRegressor("cross_entropy").fit(TRAVEL.A[:, :4], TRAVEL.b, **fit)
    assert full.likelihood_ratio_test(less).df == 2
    other = TRAVEL.b.copy()
    other[:4] = np.roll(other[:4], 1)
    cases = (
        (less, full, "call the method of the larger model"),
        (
            full,
            SoftmaxRegressor("cross_entropy").fit(TRAVEL.A[:, :4], other, **fit),
            "different data: y differ",
        ),
        (full, SoftmaxRegressor("cross_entropy", ridge=1.0).fit(TRAVEL.A[:, :4], TRAVEL.b, **fit), "penalty"),
        (
            full,
            SoftmaxRegressor("cross_entropy", covariance="robust").fit(TRAVEL.A[:, :4], TRAVEL.b, **fit),
            "asked for robust errors",
        ),
    )
    for one, restricted, told in cases:
        with pytest.raises(ValueError, match=told):
            one.likelihood_ratio_test(restricted)


def test_two_way_covariances_are_positive_semidefinite():
    rng = np.random.default_rng(0)
    X, y, groups, _ = panel(15, n_groups=6, d=5)
    model = SoftmaxRegressor(ridge=0.1).fit(X, y, groups=groups)
    truncated = 0
    for _ in range(20):
        labels = np.column_stack([groups % 3, rng.integers(0, 3, len(y))])
        found = model._find_covariance("cluster", labels)
        values = np.linalg.eigvalsh(found.matrix)
        assert values[0] >= -1e-10 * values[-1]
        truncated += any("negative eigenvalues" in note for note in found.notes)
    assert truncated
    proper = np.diag([1.0, 2.0, -1.0, 3.0])
    proper[0, 1] = proper[1, 0] = 0.5
    fixed, changed = nearest_covariance(proper)
    assert changed and np.linalg.eigvalsh(fixed)[0] >= -1e-15
    np.testing.assert_allclose(fixed[:2, :2], proper[:2, :2])


def test_summary_tables():
    X, y, groups, clusters = panel(16, choices=True)
    model = SoftmaxRegressor("cross_entropy").fit(np.c_[X, X[:, 0]], y, groups=groups)
    summary = model.summary(kind="cluster", clusters=clusters, level=0.9)
    columns = summary.columns()
    assert list(columns) == ["name", "coefficient", "standard_error", "t", "p_value", "lower", "upper"]
    np.testing.assert_allclose(
        model.conf_int(0.9, clusters=clusters), np.column_stack([columns["lower"], columns["upper"]])
    )
    assert str(summary).count("not identified") == 3
    pd = pytest.importorskip("pandas")
    assert isinstance(summary.to_frame(), pd.DataFrame) and len(summary.to_frame()) == 4
    assert summary.to_markdown().count("\n") == 5 and "90 % from" in summary.to_markdown()
    assert r"\toprule" in summary.to_latex() and r"90 \% from" in summary.to_latex()
    assert summary._repr_html_().count("<tr>") == 5


def test_intervals_cover():
    """Cover of 95 % intervals of noisy shares with 20 markets: 0.925 of many draws."""
    rng = np.random.default_rng(1)
    n_groups, n_draws = 20, 120
    groups = np.repeat(np.arange(n_groups), 10)
    X, x = rng.standard_normal((200, 2)), np.array([0.5, -0.5])
    covered = np.zeros(2)
    for _ in range(n_draws):
        u = np.exp(X @ x + 0.5 * rng.standard_normal(200))
        y = u / np.bincount(groups, weights=u)[groups]
        model = SoftmaxRegressor("cross_entropy").fit(X, y, groups=groups)
        interval = model.conf_int()
        covered += (interval[:, 0] < x) & (x < interval[:, 1])
    # Three standard errors of a share of 120 draws about 0.925 are 0.072.
    assert (covered / n_draws > 0.85).all() and (covered / n_draws < 0.99).all()


def test_a_loaded_model_keeps_its_covariance(tmp_path):
    pytest.importorskip("formulaic")
    from attnfit.estimators import load

    X, y, groups, clusters = panel(17)
    model = SoftmaxRegressor().fit(X, y, groups=groups, clusters=clusters)
    model.summary()
    model.save(tmp_path / "m")
    back = load(tmp_path / "m")
    np.testing.assert_array_equal(back.conf_int(), model.conf_int())
    assert (back.covariance_kind_, back.n_units_, back.df_) == ("cluster", 12, 11)
    assert back.wald_test("x0 = 0") == model.wald_test("x0 = 0")
    assert back.fit_statistics() == model.fit_statistics()
    with pytest.raises(AttributeError, match="needs the training data"):
        back.covariance("robust")
    for again in (lambda: back.bootstrap(5), back.jackknife):
        with pytest.raises(AttributeError, match=r"(bootstrap|jackknife) needs the training data"):
            again()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(back.summary()) == str(model.summary())
