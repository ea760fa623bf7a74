"""Covariances, tests and fit statistics against published data sets and other software.

Numbers: statsmodels 0.15.0, pyfixest 0.60.0, xlogit 0.2.7, biogeme 3.3.2 on the same rows.
"""

import numpy as np
import pytest
import statsmodels.api as sm

from attnfit import datasets
from attnfit.estimators import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor
from benchmarks import inference_data as data

COLUMNS = ["asc_train", "asc_car", "time", "cost"]
TIGHT = {"rtol": 1e-6, "atol": 0}


def errors(model, *args, **options):
    return np.sqrt(np.diag(model.covariance(*args, **options)))


@pytest.fixture(scope="module")
def swissmetro():
    return data.swissmetro()


@pytest.fixture(scope="module")
def train_and_car(swissmetro):
    d = swissmetro
    return SoftmaxRegressor("cross_entropy").fit(d[COLUMNS], d.choice, groups=d.case, clusters=d.person)


SWISSMETRO = [
    ("classic", True, [0.054873933, 0.043235472, 0.056883345, 0.051830192]),
    ("robust", False, [0.082562036, 0.058163428, 0.104254484, 0.068225058]),
    ("robust", True, [0.082568136, 0.058167726, 0.104262187, 0.068230099]),
    ("robust", "fixest", [0.082576765, 0.058173804, 0.104273082, 0.068237228]),
    ("row", False, [0.076580134, 0.051859504, 0.099388905, 0.061189335]),
    ("cluster", True, [0.183592068, 0.128994125, 0.237885360, 0.161276370]),
    ("auto", True, [0.183592068, 0.128994125, 0.237885360, 0.161276370]),
]


@pytest.mark.parametrize(("kind", "correction", "expected"), SWISSMETRO)
def test_swissmetro(train_and_car, kind, correction, expected):
    np.testing.assert_allclose(errors(train_and_car, kind, correction=correction), expected, **TIGHT)


def test_swissmetro_factors_of_fixest(train_and_car):
    for kind, factor in (("classic", 1.547328429), ("row", 1.547409264), ("cluster", 1.001540844)):
        raw = train_and_car.covariance(kind, correction=False)
        np.testing.assert_allclose(
            train_and_car.covariance(kind, correction="fixest"), factor * raw, rtol=1e-9
        )


def test_swissmetro_statistics_and_tests(swissmetro, train_and_car):
    model = train_and_car
    expected = [-0.701186712, -0.154632422, -1.277860255, -1.083790651]
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-7)
    found = model.fit_statistics(swissmetro["mode"])
    for name, value in {
        "log_likelihood": -5331.252007, "log_likelihood_null": -6964.662979,
        "log_likelihood_constants": -5864.998303, "aic": 10670.504014, "hit_rate": 0.6764184,
        "log_loss": 0.78771454,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(value, rel=1e-7)
    assert found.rho2 == pytest.approx(0.2345283, abs=6e-8)
    assert model.wald_test("time = cost", kind="robust").statistic == pytest.approx(3.384136638, rel=1e-6)
    R = np.eye(4)[:2]
    assert model.wald_test(R, kind="robust").statistic == pytest.approx(125.019394536, rel=1e-6)
    by_person = model.wald_test("asc_train = 0, asc_car = 0")
    assert by_person.statistic == pytest.approx(27.238931432, rel=1e-6)
    assert (by_person.distribution, by_person.df) == ("F", (2, 751))
    assert by_person.p_value == pytest.approx(1.5483981e-6, rel=1e-6)
    p = model.summary().columns()["p_value"][1], model.summary(df="normal").columns()["p_value"][1]
    assert p == (pytest.approx(0.23100113, rel=1e-6), pytest.approx(0.23062301, rel=1e-6))
    d = swissmetro
    full, less = (
        SoftmaxRegressor("cross_entropy").fit(d[c], d.choice, groups=d.case) for c in (COLUMNS, COLUMNS[2:])
    )
    assert full.likelihood_ratio_test(less).statistic == pytest.approx(190.051504583, rel=1e-8)


def test_swissmetro_with_all_constants(swissmetro, train_and_car):
    d = swissmetro.assign(asc_sm=(swissmetro["mode"] == "sm") * 1.0)
    model = SoftmaxRegressor("cross_entropy").fit(d[["asc_sm", *COLUMNS]], d.choice, groups=d.case)
    found = errors(model, "robust")
    assert found[3:] == pytest.approx(errors(train_and_car, "robust")[2:], rel=1e-9)
    assert np.isnan(model.standard_errors_[:3]).all() and np.isfinite(model.standard_errors_[3:]).all()
    assert model.fit_statistics().n_parameters == 4
    q = np.array([0.0, 1, -1, 0, 0])
    robust = model._find_covariance("robust")
    assert robust.errors(q) == pytest.approx(0.048961033, rel=1e-6)
    assert np.isnan(robust.errors(np.eye(5)[0]))
    with pytest.raises(ValueError, match=r"restriction 0 .*not identified"):
        model.wald_test("asc_sm = 0")


def test_swissmetro_weights(swissmetro):
    d = swissmetro
    weights = 1 + d.person % 3
    offset = 0.3 * ((d["mode"] == "sm") & (d.person % 2 == 1))
    models = {
        kind: SoftmaxRegressor("cross_entropy", weight_type=kind).fit(
            d[COLUMNS], d.choice, groups=d.case, sample_weight=weights, offset=offset
        )
        for kind in ("sampling", "frequency")
    }
    for model in models.values():
        expected = [-0.566298520, 0.009333424, -1.236813210, -1.008322287]
        np.testing.assert_allclose(model.coef_, expected, rtol=1e-6)
        assert model.log_likelihood_ == pytest.approx(-10754.733112, rel=1e-9)
    sampling, frequency = models.values()
    assert sampling.covariance_kind_ == "robust"
    expected = [0.097168529, 0.069631802, 0.123322698, 0.073187562]
    np.testing.assert_allclose(sampling.standard_errors_, expected, **TIGHT)
    assert frequency.covariance_kind_ == "classic"
    expected = [0.038789548, 0.030466221, 0.039714016, 0.035879378]
    np.testing.assert_allclose(frequency.standard_errors_, expected, **TIGHT)
    expected = [0.061635370, 0.043843211, 0.077720832, 0.047572721]
    np.testing.assert_allclose(errors(frequency, "robust"), expected, **TIGHT)
    assert frequency._find_covariance("robust").n_units == 13_527
    with pytest.raises(ValueError, match="sampling weights are not"):
        sampling.covariance("classic")


def test_swissmetro_ridge(swissmetro):
    d = swissmetro
    model = SoftmaxRegressor("cross_entropy", ridge=50.0).fit(d[COLUMNS], d.choice, groups=d.case)
    expected = [-0.711602643, -0.152308025, -1.162338803, -0.930771019]
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-7)
    expected = [0.048357765, 0.039117663, 0.049101622, 0.046702919]
    np.testing.assert_allclose(model.standard_errors_, expected, **TIGHT)
    expected = [0.043467753, 0.036094958, 0.043980234, 0.043916901]
    np.testing.assert_allclose(errors(model, "classic", posterior=False), expected, **TIGHT)
    expected = [0.061113479, 0.045234277, 0.077672576, 0.054735947]
    np.testing.assert_allclose(errors(model, "robust"), expected, **TIGHT)
    assert model.fit_statistics().n_parameters == pytest.approx(3.576960153, rel=1e-7)


def test_travel_mode():
    travel = datasets.load_travel_mode()
    model = SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    expected = [0.98115468, 0.518694736, 0.547563238, 0.004959377, 0.015096189, 0.009295564]
    np.testing.assert_allclose(errors(model, "robust"), expected, **TIGHT)
    found = model.fit_statistics(np.arange(840) % 4)
    for name, value in {
        "log_likelihood": -199.128368716, "log_likelihood_null": -291.121816, "hit_rate": 0.690476190,
        "log_likelihood_constants": -283.758768436, "aic": 410.256737, "bic": 430.339383,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(value, rel=1e-8)


def test_separated_travel_mode():
    table = sm.datasets.modechoice.load_pandas().data
    travel = datasets.load_travel_mode()
    bus_party = (table["mode"] == 3) & (table.psize >= 4)
    assert bus_party.sum() == 18
    X = np.column_stack([travel.A, bus_party])
    with pytest.warns(Warning, match="separat"):
        model = SoftmaxRegressor("cross_entropy").fit(X, travel.b, groups=travel.groups)
    assert np.isneginf(model.coef_[6]) and np.isnan(model.standard_errors_[6])
    expected = [5.1506649136, 3.8289829745, 3.157807198, -0.0151815978, -0.0951507098, 0.013179894]
    np.testing.assert_allclose(model.coef_[:6], expected, rtol=1e-7)
    expected = [0.7775277, 0.4428300, 0.4481635, 0.0044006554, 0.010427741, 0.010238579]
    np.testing.assert_allclose(model.standard_errors_[:6], expected, rtol=2e-7)
    expected = [0.981935897, 0.520766585, 0.543059854, 0.004951103, 0.015098526, 0.009304679]
    np.testing.assert_allclose(errors(model, "robust")[:6], expected, **TIGHT)
    assert model.fit_statistics().log_likelihood == pytest.approx(-198.551613928, rel=1e-10)
    assert "separated" in str(model.summary())


NEVO_RAW = [0.117170335, 0.862227829, 0.004563313, 0.049049943]
NEVO = [
    ("auto", None, True, [0.117798599, 0.866851067, 0.004587781, 0.049312947]),
    ("robust", None, False, NEVO_RAW),
    ("cluster", 1, False, [0.362939737, 3.129072109, 0.015840856, 0.208399400]),
    ("cluster", 2, True, [0.373105500, 3.186189041, 0.016256362, 0.211641313]),
]


@pytest.fixture(scope="module")
def cereals():
    return data.nevo()


@pytest.mark.parametrize("unit", [1.0, 100.0])
def test_nevo(cereals, unit):
    X, y, markets, products = cereals
    model = SoftmaxRegressor("cross_entropy").fit(X, unit * y, groups=markets)
    expected = [-2.575993014, -8.343464910, 0.033337026, 0.081013364]
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-7)
    sets = {None: None, 1: products, 2: np.column_stack([markets, products])}
    for kind, clusters, correction, expected in NEVO:
        np.testing.assert_allclose(errors(model, kind, sets[clusters], correction), expected, **TIGHT)
    assert (model.covariance_kind_, model.n_units_, model.df_) == ("robust", 94, 93)
    with pytest.raises(ValueError, match="shares, not choices: one market is not one draw"):
        model.covariance("classic")


def test_nevo_squared(cereals):
    X, y, markets, _ = cereals
    model = SoftmaxRegressor().fit(X, y, groups=markets)
    expected = [-2.214942677, -11.917466482, 0.041199920, 0.051327742]
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-6)
    assert model.loss_value_ == pytest.approx(1.231484998, rel=1e-8)
    expected = [0.205591604, 1.959225646, 0.006245448, 0.065085202]
    np.testing.assert_allclose(model.standard_errors_, expected, **TIGHT)


@pytest.fixture(scope="module")
def randhie():
    table = sm.datasets.randhie.load_pandas()
    return sm.add_constant(table.exog, prepend=False), table.endog


def test_randhie_poisson(randhie):
    X, y = randhie
    model = PoissonRegressor().fit(X, y)
    classic = errors(model, "classic")
    assert [classic[0], classic[-1]] == pytest.approx([0.002883989, 0.011162667], rel=1e-6)
    expected = [
        *(0.007204999, 0.026835279, 0.004606875, 0.004137111, 0.033072101),
        *(0.001576942, 0.022424219, 0.042478337, 0.077008177, 0.028552705),
    ]
    np.testing.assert_allclose(errors(model, "robust", correction=False), expected, **TIGHT)
    found = model.fit_statistics()
    for name, value in {
        "log_likelihood": -62419.588564449, "log_likelihood_null": -66647.181687959,
        "deviance": 83934.237860467, "null_deviance": 92389.424107487,
    }.items():  # fmt: skip
        assert getattr(found, name) == pytest.approx(value, rel=1e-10)


def test_randhie_exponential(randhie):
    X, y = randhie
    model = ExponentialRegressor().fit(X, y)
    expected = [0.007828069, 0.031583996, 0.005966468]
    np.testing.assert_allclose(errors(model, "robust", correction=False)[:3], expected, **TIGHT)


def test_exponential_classic_is_that_of_curve_fit():
    from scipy.optimize import curve_fit

    rng = np.random.default_rng(3)
    X = np.column_stack([np.ones(80), rng.standard_normal((80, 2))])
    y = np.exp(X @ [0.3, 0.5, -0.4]) + 0.3 * rng.standard_normal(80)
    model = ExponentialRegressor().fit(X, y)
    _, covariance = curve_fit(
        lambda A, *x: np.exp(A @ np.array(x)),
        X,
        y,
        p0=model.coef_,
        jac=lambda A, *x: np.exp(A @ x)[:, None] * A,
    )
    np.testing.assert_allclose(model.covariance("classic"), covariance, rtol=1e-6)


def test_gravity():
    X, y, origins, destinations = data.gravity()
    assert y.sum() == pytest.approx(1584.517)
    dummies = np.eye(25)[destinations][:, 1:]
    model = SoftmaxRegressor("cross_entropy").fit(np.column_stack([X, dummies]), y, groups=origins)
    np.testing.assert_allclose(model.coef_[:2], [-0.637889293, 0.476438946], rtol=1e-8)
    both = np.column_stack([origins, destinations])
    for kind, clusters, correction, expected in (
        ("robust", None, True, [0.089601209, 0.090003161]),
        ("cluster", destinations, True, [0.063723084, 0.083764699]),
        ("cluster", both, True, [0.065305841, 0.080035446]),
        ("cluster", both, False, [0.063652260, 0.078008903]),
        ("row", None, False, [0.086449719, 0.091356529]),
    ):
        found = errors(model, kind, clusters, correction)[:2]
        np.testing.assert_allclose(found, expected, **TIGHT)
