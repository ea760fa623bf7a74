"""Effects against published numbers, other software and automatic differentiation."""

import numpy as np
import pytest
import statsmodels.api as sm
from conftest import shrink_blocks

from attnfit import datasets
from attnfit.estimators import ExponentialRegressor, PoissonRegressor, SoftmaxRegressor
from benchmarks import inference_data as data

COLUMNS = ["asc_train", "asc_car", "time", "cost"]
ROBUST = {"kind": "robust", "df": "normal"}
MODES = ["train", "sm", "car"]


@pytest.fixture(scope="module")
def swissmetro():
    d = data.swissmetro()
    model = SoftmaxRegressor("cross_entropy").fit(d[COLUMNS], d.choice, groups=d.case, clusters=d.person)
    return d, model


def close(found, expected, rtol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=rtol)


def test_swissmetro_elasticities(swissmetro):
    d, model = swissmetro
    found = model.elasticities("time", d["mode"], **ROBUST)
    assert found.names == (MODES, MODES)
    expected = [
        [-1.591475094, 0.610408175, 0.343667537],
        [0.260420055, -0.361596116, 0.355996558],
        [0.214656136, 0.522416663, -0.998913020],
    ]
    close(found.value, expected)
    close(np.diag(found.standard_error), [0.111508181, 0.026378234, 0.064617555])
    own = model.elasticities("time", d["mode"], pairs="own", **ROBUST)
    close(own.value, np.diag(expected))
    close(own.standard_error, np.diag(found.standard_error), 1e-10)
    assert list(found.to_frame().columns) == [
        *("share_of", "changed", "value", "standard_error", "lower", "upper"),
    ]


def test_swissmetro_diversion(swissmetro):
    d, model = swissmetro
    found = model.diversion(alternatives=d["mode"], **ROBUST)
    close(found.value[1:, 0], [0.741173950, 0.258826050])
    close(found.standard_error[1:, 0], [0.004012771] * 2)
    close(np.nansum(found.value, axis=0), 1.0)
    close(model.diversion("cost", d["mode"], **ROBUST).value, found.value)


def test_swissmetro_value_of_time(swissmetro):
    _, model = swissmetro
    for kind, error, interval in (
        ("classic", 0.069499582, None),
        ("robust", 0.101740613, (0.988753307, 1.391234160)),
        ("cluster", 0.230734065, (0.765812559, 1.719960573)),
    ):
        found = model.ratio("time", "cost", kind=kind, df="normal")
        assert found.value[0] == pytest.approx(1.179065582, rel=1e-7)
        assert found.standard_error[0] == pytest.approx(error, rel=1e-6)
        if interval:
            assert (found.lower[0], found.upper[0]) == pytest.approx(interval, rel=1e-6)
    simulated = model.ratio("time", "cost", method="simulation", random_state=0, **ROBUST)
    # Percentiles of 10,000 draws: a few hundredths of the interval's width.
    assert (simulated.lower[0], simulated.upper[0]) == pytest.approx((0.98875, 1.39123), abs=0.03)


def test_swissmetro_scenario(swissmetro):
    d, model = swissmetro
    after = d[COLUMNS].assign(cost=np.where(d["mode"] == "sm", 1.2 * d.cost, d.cost))
    found = model.compare_scenarios(after=after, alternatives=d["mode"], **ROBUST)
    close(found.before.value, [0.134160757, 0.604314421, 0.261524823])
    close(found.after.value, [0.149034214, 0.558734990, 0.292230796])
    close(found.change.standard_error, [0.000938315, 0.002408588, 0.001568308], 2e-6)
    close([found.after.lower[1], found.after.upper[1]], [0.546358522, 0.571038903])
    close(model.shares(alternatives=d["mode"]).value, found.before.value)
    surplus = model.surplus(after=after, cost="cost", **ROBUST).mean
    close([surplus.value[0], surplus.standard_error[0]], [-0.104240834, 0.001631596])
    by_person = model.surplus(after=after, cost="cost", df="normal").mean
    close(by_person.standard_error[0], 0.003514070)
    by_group = model.surplus(d[COLUMNS], after, cost="cost", groups=d.case, **ROBUST)
    close(by_group.mean.value[0], -0.104240834)
    assert by_group.value.shape == (6768,) and len(found.to_frame()) == 3


def test_swissmetro_rows(swissmetro):
    d, model = swissmetro
    found = model.predict_interval(d[COLUMNS], d.case, **ROBUST)
    assert d["mode"][2] == "car"
    close([found.value[2], found.lower[2], found.upper[2]], [0.226176289, 0.212292335, 0.240690804])
    assert found.to_frame().index.equals(d.index)
    own = model.elasticities("time", rows=True)
    close(own.value[0], (1 - found.value[0]) * d.time[0] * model.coef_[2])


def test_travel_mode():
    travel = datasets.load_travel_mode()
    model = SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    modes = np.arange(840) % 4
    own = model.elasticities(3, modes, pairs="own")
    close(own.value, [-0.741520220, -0.865576572, -1.027476919, -0.903714032])
    close(own.standard_error, [0.214315415, 0.206392468, 0.278997681, 0.242581449])
    effects = model.marginal_effects(3, modes, pairs="own")
    close(effects.value, [-0.001890716, -0.002119098, -0.001327110, -0.002625583])
    ratio = model.ratio(4, 3)
    close([ratio.value[0], ratio.standard_error[0]], [6.200989525, 1.893842573])
    close([ratio.lower[0], ratio.upper[0]], [3.728179118, 14.283277132])
    robust = model.ratio(4, 3, **ROBUST)
    close([robust.lower[0], robust.upper[0]], [3.283541660, 17.470153082])
    unbounded = model.ratio(4, 5, level=0.999999)
    assert (unbounded.lower[0], unbounded.upper[0]) == (-np.inf, np.inf)
    assert "not significantly different from zero" in unbounded.notes[0]


def test_randhie():
    table = sm.datasets.randhie.load_pandas()
    X, y = sm.add_constant(table.exog, prepend=False), table.endog
    model = PoissonRegressor().fit(X, y)
    raw = {"kind": "robust", "correction": False, "df": "normal"}
    for name, value, error in (
        ("lncoins", -0.150272807, 0.020707039),
        ("idp", -0.706773479, 0.077219179),
        ("lpi", 0.100945009, 0.013239511),
    ):
        found = model.marginal_effects(name, **raw)
        close([found.value[0], found.standard_error[0]], [value, error])
    found = model.elasticities("lncoins", **ROBUST)
    close([found.value[0], found.standard_error[0]], [-0.081770477, 0.010457405])
    first = model.predict_interval(X, **ROBUST)
    close([first.value[0], first.lower[0], first.upper[0]], [2.479437822, 2.257384568, 2.723333896])
    rows = model.marginal_effects("idp", rows=True, **raw)
    close(rows.value.mean(), -0.706773479)


# ---- gradients against automatic differentiation

torch = pytest.importorskip("torch")


def instance(seed=0):
    """Return unbalanced groups with repeated alternatives, an offset, weights, and a variable that enters
    two columns.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(6), [2, 5, 3, 4, 1, 6])
    n = len(groups)
    v = rng.uniform(0.5, 2, n)
    X = np.column_stack([v, np.log(v) * rng.standard_normal(n), rng.standard_normal(n)])
    slopes = np.column_stack([np.ones(n), X[:, 1] / (np.log(v) * v), np.zeros(n)])
    return {
        "X": X, "groups": groups, "offset": 0.5 * rng.standard_normal(n), "v": v, "slopes": slopes,
        "alternatives": rng.integers(0, 3, n), "weights": rng.uniform(1, 3, 6)[groups],
        "y": rng.dirichlet(np.ones(n)) * n,
    }  # fmt: skip


def fit(p, loss="cross_entropy"):
    # A penalty, so that gradients and not only flat ones are compared.
    model = SoftmaxRegressor(loss, ridge=0.3)
    return model.fit(p["X"], p["y"], groups=p["groups"], sample_weight=p["weights"], offset=p["offset"])


def gradient_errors(model, function):
    """Return values and delta-method errors of a function of the coefficients by autodiff."""
    x = torch.tensor(model.coef_, requires_grad=True)
    value = function(x)
    J = torch.autograd.functional.jacobian(function, x).reshape(-1, len(x)).numpy()
    V = model.covariance_
    return value.detach().numpy(), np.sqrt(np.einsum("ij,jk,ik->i", J, V, J)).reshape(value.shape)


def torch_shares(p, x, shift=0.0):
    z = torch.tensor(p["X"]) @ x + torch.tensor(p["offset"]) + shift
    f = torch.zeros(len(z), dtype=torch.float64)
    for g in np.unique(p["groups"]):
        rows = torch.tensor(p["groups"] == g)
        f = torch.where(rows, torch.exp(z - torch.logsumexp(z[rows], 0)), f)
    return f


def torch_response(p, x, kind):
    """Return the response of totals to each alternative's variable, by differentiating the shares."""
    G, J = int(p["groups"].max()) + 1, 3
    W = torch.tensor([p["weights"][p["groups"] == g][0] for g in range(G)])
    member = torch.tensor((p["alternatives"][:, None] == np.arange(J)).astype(float))
    v, h = torch.tensor(p["v"]), torch.tensor(p["slopes"])
    size = v if kind == "elasticity" else torch.ones_like(v)

    def totals(steps):
        f = torch_shares(p, x, (member @ steps) * size * (h @ x))
        return (W[torch.tensor(p["groups"])] * f) @ member

    N = torch.autograd.functional.jacobian(totals, torch.zeros(J, dtype=torch.float64), create_graph=True)
    S = totals(torch.zeros(J, dtype=torch.float64))
    return N / W.sum() if kind == "marginal" else N / S[:, None]


CALLS = {
    "elasticity": SoftmaxRegressor.elasticities,
    "semi": SoftmaxRegressor.semi_elasticities,
    "marginal": SoftmaxRegressor.marginal_effects,
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("blocks", [False, True])
def test_responses_against_autodiff(kind, blocks, monkeypatch):
    p = instance()
    if blocks:
        shrink_blocks(monkeypatch)
        for name in ("X", "offset", "v", "slopes", "alternatives", "weights", "y", "groups"):
            p[name] = np.concatenate([p[name]] * 8)
        assert np.bincount(p["groups"]).max() < 64
        p["groups"] = np.minimum(p["groups"], 1)
        p["weights"] = np.where(p["groups"] == 0, 1.0, 2.5)
    model = fit(p)
    found = CALLS[kind](model, p["v"], p["alternatives"], derivative=p["slopes"])
    value, errors = gradient_errors(model, lambda x: torch_response(p, x, kind))
    order = [found.names[0].index(j) for j in range(3)]
    np.testing.assert_allclose(found.value[np.ix_(order, order)], value, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.standard_error[np.ix_(order, order)], errors, rtol=1e-8, atol=1e-12)
    own = CALLS[kind](model, p["v"], p["alternatives"], derivative=p["slopes"], pairs="own")
    np.testing.assert_allclose(own.value, np.diag(found.value), rtol=1e-9)
    np.testing.assert_allclose(own.standard_error, np.diag(found.standard_error), rtol=1e-9)


def test_rows_and_log_sums_against_autodiff():
    p = instance(1)
    model = fit(p, "squared")
    v, h = torch.tensor(p["v"]), torch.tensor(p["slopes"])
    forms = {
        "elasticity": lambda x: (1 - torch_shares(p, x)) * v * (h @ x),
        "semi": lambda x: (1 - torch_shares(p, x)) * (h @ x),
        "marginal": lambda x: torch_shares(p, x) * (1 - torch_shares(p, x)) * (h @ x),
    }
    for kind, form in forms.items():
        found = CALLS[kind](model, p["v"], derivative=p["slopes"], rows=True)
        value, errors = gradient_errors(model, form)
        np.testing.assert_allclose(found.value, value, rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(found.standard_error, errors, rtol=1e-8, atol=1e-14)
    shares = model.predict_interval()
    value, errors = gradient_errors(model, lambda x: torch_shares(p, x))
    np.testing.assert_allclose(shares.standard_error, errors, rtol=1e-8, atol=1e-14)
    assert ((shares.lower <= value) & (value <= shares.upper)).all()

    def log_sums(x):
        z = torch.tensor(p["X"]) @ x + torch.tensor(p["offset"])
        return torch.stack([torch.logsumexp(z[torch.tensor(p["groups"] == g)], 0) for g in range(6)])

    value, errors = gradient_errors(model, log_sums)
    found = model.log_sums()
    np.testing.assert_allclose(found.value, value, rtol=1e-10)
    np.testing.assert_allclose(found.standard_error, errors, rtol=1e-8)
    other = model.log_sums(p["X"], p["groups"], offset=p["offset"])
    np.testing.assert_allclose(other.standard_error, errors, rtol=1e-8)
    assert other.mean.value[0] == pytest.approx(value.mean())


@pytest.mark.parametrize("function", ["exp", "cosh"])
def test_outcomes_against_autodiff(function):
    p = instance(2)
    model = ExponentialRegressor(function, ridge=0.1).fit(p["X"], 1 + p["y"], offset=p["offset"])
    v, h, X = (torch.tensor(p[name]) for name in ("v", "slopes", "X"))

    def u(x, step=0.0):
        return getattr(torch, function)(X @ x + torch.tensor(p["offset"]) + step)

    def slope(x):
        return (
            torch.exp(X @ x + torch.tensor(p["offset"]))
            if function == "exp"
            else torch.sinh(X @ x + torch.tensor(p["offset"]))
        )

    for call, form in (
        (model.elasticities, lambda x: (slope(x) * v * (h @ x)).sum()[None] / u(x).sum()),
        (model.semi_elasticities, lambda x: (slope(x) * (h @ x)).sum()[None] / u(x).sum()),
        (model.marginal_effects, lambda x: (slope(x) * (h @ x)).mean()[None]),
    ):
        found = call(p["v"], derivative=p["slopes"])
        value, errors = gradient_errors(model, form)
        np.testing.assert_allclose(found.value, value, rtol=1e-9)
        np.testing.assert_allclose(found.standard_error, errors, rtol=1e-8)
    rows = model.elasticities(p["v"], derivative=p["slopes"], rows=True)
    _, errors = gradient_errors(model, lambda x: v * (h @ x) * slope(x) / u(x))
    np.testing.assert_allclose(rows.standard_error, errors, rtol=1e-8)


def test_outside_goods_are_an_alternative():
    p = instance(3)
    y = 0.8 * p["y"] / np.bincount(p["groups"], weights=p["y"])[p["groups"]]
    model = SoftmaxRegressor(outside_good=True).fit(p["X"], y, groups=p["groups"])
    shares = model.shares(alternatives=p["alternatives"])
    assert shares.names[0][-1] == "outside" and shares.value.sum() == pytest.approx(1.0)
    again = model.shares(p["X"], p["groups"], p["alternatives"])
    np.testing.assert_allclose(again.value, shares.value)
    np.testing.assert_allclose(again.standard_error, shares.standard_error)


def test_effects_on_a_cluster():
    da = pytest.importorskip("dask.array")
    p = instance(5)
    X, y, groups = (np.concatenate([p[name]] * 5) for name in ("X", "y", "groups"))
    groups = groups + 6 * np.repeat(np.arange(5), 21)
    alternatives = np.concatenate([p["alternatives"]] * 5)
    here = SoftmaxRegressor(ridge=0.1).fit(X, y, groups=groups)
    arrays = [da.from_array(v, chunks=(37, 3)[: v.ndim]) for v in (X, y, groups)]
    there = SoftmaxRegressor(ridge=0.1).fit(arrays[0], arrays[1], groups=arrays[2])
    ours, theirs = (one.elasticities(0, alternatives) for one in (there, here))
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-6)
    np.testing.assert_allclose(ours.standard_error, theirs.standard_error, rtol=1e-5)
    with pytest.raises(ValueError, match="needs the rows in memory; pass X and groups"):
        there.predict_interval()
    again = there.predict_interval(X, groups)
    np.testing.assert_allclose(again.standard_error, here.predict_interval().standard_error, rtol=1e-5)


def test_refusals():
    p = instance(4)
    model = fit(p)
    for call, told in (
        (lambda: model.elasticities("x0"), "alternatives is missing"),
        (
            lambda: model.elasticities("price", p["alternatives"]),
            "'price' is no column of X; its columns are x0",
        ),
        (lambda: model.elasticities(5, p["alternatives"]), "X has 3 columns"),
        (lambda: model.elasticities(0, p["alternatives"][1:]), "pass one label a row"),
        (lambda: model.elasticities(0, np.arange(21) + 100 * np.arange(21), X=p["X"]), "groups is missing"),
        (
            lambda: model.elasticities(p["v"], p["alternatives"], derivative=p["slopes"][:, :2]),
            "derivative has",
        ),
        (lambda: model.ratio(0, 1, method="bootstrap"), "method must be 'delta', 'fieller' or 'simulation'"),
        (lambda: model.surplus(after=p["X"], cost=int(np.argmax(model.coef_))), "higher costs attract"),
        (lambda: model.compare_scenarios(alternatives=p["alternatives"]), "after is missing"),
        (
            lambda: model.surplus(p["X"], p["X"][:-6], cost=int(np.argmin(model.coef_)), groups=p["groups"]),
            "groups has length",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    many = np.arange(120) % 60
    big = SoftmaxRegressor(ridge=1.0).fit(
        np.random.default_rng(0).standard_normal((120, 2)), many / many.sum()
    )
    assert big.elasticities(0, many).value.shape == (60,)
    with pytest.raises(ValueError, match=r"all pairs of 60 alternatives need .* MB"):
        big.elasticities(0, many, pairs="all")
