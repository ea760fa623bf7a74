"""The shipped data equal their upstream packages, and a fit without attnfit confirms the references."""

import csv
import dataclasses
import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

from attnfit.datasets import load_austrian_flows, load_car_shares, load_travel_mode

LOADERS = {
    "cars": load_car_shares,
    "flows": load_austrian_flows,
    "flows with dummies": lambda: load_austrian_flows(dummies=True),
    "travel mode": load_travel_mode,
}
SHAPES = {
    "cars": (2237, 6, 20),
    "flows": (72, 2, 9),
    "flows with dummies": (72, 10, 9),
    "travel mode": (840, 6, 210),
}
# Half a unit of the last digit that the reference gives for a coefficient.
ROUNDING = {
    ("cars", "cross_entropy"): 5e-7,
    ("cars", "squared"): 5e-7,
    ("flows", "cross_entropy"): 5e-9,
    ("flows", "squared"): 5e-7,
    ("flows with dummies", "cross_entropy"): 5e-9,
    ("flows with dummies", "squared"): 5e-8,
    ("travel mode", "cross_entropy"): [5e-7, 5e-7, 5e-7, 5e-8, 5e-8, 5e-7],
    ("travel mode", "squared"): 5e-7,
}


# Newton's method doubles the digits of a start that is good to half of them.
POLISH = 3
# Directions that the data do not identify have eigenvalues of rounding, 1e-15; the others are above 1e-4.
IDENTIFIED = 1e-10


class Fit:
    """Autodiff and SciPy's trust region on standardised columns, with the answer in the units of the data.

    A trust region compares values, and so sees gradients only down to ``sqrt(2 lambda_max eps value)``, near
    1e-8 here, wherever the processor's rounding lets it stop; Newton steps on the gradient alone do the rest.
    """

    def __init__(self, data, loss, start=None, noise=0.0):
        scale = data.A.std(axis=0)
        scale[scale == 0] = 1.0
        A, b, groups = torch.tensor(data.A / scale), torch.tensor(data.b), torch.tensor(data.groups)
        n_groups = int(groups.max()) + 1
        weights = torch.ones_like(b) if data.weights is None else torch.tensor(data.weights)
        total = float((weights * b).sum())

        def log_softmax(x):
            z = A @ x
            top = torch.full((n_groups,), -torch.inf, dtype=z.dtype)
            z = z - top.scatter_reduce(0, groups, z.detach(), "amax")[groups]
            return z - torch.log(torch.zeros(n_groups, dtype=z.dtype).index_add(0, groups, z.exp()))[groups]

        def objective(x):
            if loss == "cross_entropy":
                return -(weights * b * log_softmax(x)).sum() / total
            return ((log_softmax(x).exp() - b) ** 2).sum()

        def gradient(x):
            return torch.func.grad(objective)(torch.tensor(x)).numpy()

        def hessian(x):
            return torch.func.hessian(objective)(torch.tensor(x)).numpy()

        rounding = np.random.default_rng(0)
        x = scipy.optimize.minimize(
            lambda x: objective(torch.tensor(x)).item() * (1.0 + noise * rounding.uniform(-1.0, 1.0)),
            np.zeros(data.A.shape[1]) if start is None else start * scale,
            jac=gradient,
            hess=hessian,
            method="trust-exact",
            options={"gtol": 1e-9, "maxiter": 200},
        ).x
        for _ in range(POLISH):
            inverse = np.linalg.pinv(hessian(x), rcond=IDENTIFIED, hermitian=True)
            step = inverse @ gradient(x)
            x = x - step
        # A minimum, as far as the data identify one, and reached.
        assert np.linalg.eigvalsh(hessian(x))[0] > -IDENTIFIED
        assert (np.abs(step / scale) <= 1e-10).all()
        self.coefficients = x / scale
        self.squared_error = float(((log_softmax(torch.tensor(x)).exp() - b) ** 2).sum())
        if loss == "cross_entropy":
            self.log_likelihood = -total * objective(torch.tensor(x)).item()
            self.standard_errors = np.sqrt(np.diag(inverse / total)) / scale


@pytest.fixture(params=LOADERS)
def name(request):
    return request.param


@pytest.fixture
def data(name):
    return LOADERS[name]()


def test_shapes_and_group_sums(name, data):
    n, d, n_groups = SHAPES[name]
    assert data.A.shape == (n, d) and data.A.dtype == np.float64 and data.A.flags.c_contiguous
    assert data.b.shape == data.groups.shape == (n,)
    assert data.weights is None or data.weights.shape == (n,)
    assert len(data.feature_names) == len(set(data.feature_names)) == d
    np.testing.assert_array_equal(np.unique(data.groups), np.arange(n_groups))
    assert (np.diff(data.groups) >= 0).all()
    assert (data.b >= 0).all()
    np.testing.assert_allclose(np.bincount(data.groups, weights=data.b), 1.0, rtol=1e-14)


def test_references_match_the_columns(data):
    assert set(data.references) == {"cross_entropy", "squared"}
    for reference in data.references.values():
        assert reference.coefficients.shape == (data.A.shape[1],)
        if reference.standard_errors is not None:
            np.testing.assert_array_equal(
                np.isnan(reference.standard_errors), np.isnan(reference.coefficients)
            )


def test_data_sets_are_frozen(data):
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "another"


def test_each_call_returns_fresh_arrays(name, data):
    expected = data.A.copy()
    data.A[:] = np.nan
    np.testing.assert_array_equal(LOADERS[name]().A, expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_references_hold_for_an_independent_fit(name, data, loss):
    start = Fit(data, "cross_entropy").coefficients if loss == "squared" else None
    fit, reference = Fit(data, loss, start), data.references[loss]
    known = ~np.isnan(reference.coefficients)
    error = np.abs(fit.coefficients - reference.coefficients)
    allowed = np.broadcast_to(ROUNDING[name, loss], error.shape)
    assert (error[known] <= 1.01 * allowed[known]).all(), f"off by {error[known]}"
    if reference.squared_error is not None:
        assert fit.squared_error == pytest.approx(reference.squared_error, rel=2e-5)
    if reference.log_likelihood is not None:
        assert fit.log_likelihood == pytest.approx(reference.log_likelihood, abs=5e-6)
    if reference.standard_errors is not None:
        np.testing.assert_allclose(fit.standard_errors[known], reference.standard_errors[known], rtol=2e-4)


def test_the_independent_fit_does_not_depend_on_rounding():
    """Values good to 1e-12 only, a thousand times the rounding of any processor, give the same answer."""
    data = load_austrian_flows()
    exact, noisy = Fit(data, "squared"), Fit(data, "squared", noise=1e-12)
    np.testing.assert_allclose(noisy.coefficients, exact.coefficients, rtol=0, atol=1e-11)


def test_log_ols_baseline_of_the_docstring():
    data = load_car_shares()
    outside = np.flatnonzero(~data.A.any(axis=1))
    np.testing.assert_array_equal(data.groups[outside], np.arange(20))
    cars = np.setdiff1d(np.arange(len(data.b)), outside)
    log_ratio = np.log(data.b[cars] / data.b[outside][data.groups[cars]])
    x = np.linalg.lstsq(data.A[cars], log_ratio, rcond=None)[0]
    np.testing.assert_allclose(x, [-10.0716, -0.1243, -0.0343, 0.2650, 2.3421, -0.0886], atol=5e-5)
    u = np.exp(data.A @ x)
    f = u / np.bincount(data.groups, weights=u)[data.groups]
    assert ((f - data.b) ** 2).sum() == pytest.approx(0.033444, abs=5e-7)


def test_car_shares_equal_pyblp():
    pyblp = _import_quietly("pyblp")
    with open(pyblp.data.BLP_PRODUCTS_LOCATION, newline="") as file:
        rows = list(csv.DictReader(file))
    data = load_car_shares()
    cars = data.A.any(axis=1)
    ours = np.column_stack([data.A[cars, 1:], data.b[cars], data.groups[cars] + 1971])
    names = [*data.feature_names[1:], "shares", "market_ids"]
    np.testing.assert_array_equal(ours, [[float(row[name]) for name in names] for row in rows])


def test_austrian_flows_equal_spint():
    upstream = _import_quietly("spint.tests.test_gravity").TestGravity()
    upstream.setUp()
    data = load_austrian_flows(dummies=True)
    np.testing.assert_allclose(data.b * data.weights, upstream.f, rtol=1e-15)
    np.testing.assert_array_equal(data.A[:, 0], np.log(upstream.d_var))
    np.testing.assert_array_equal(data.A[:, 1], upstream.dij)
    regions = np.unique(upstream.o)
    np.testing.assert_array_equal(regions[data.groups], upstream.o)
    for column, region in zip(data.A.T[2:], regions[1:], strict=True):
        np.testing.assert_array_equal(column == 1, upstream.d == region)


def test_travel_mode_equals_statsmodels():
    table = _import_quietly("statsmodels.datasets.modechoice").load_pandas().data
    data = load_travel_mode()
    mode = table["mode"].to_numpy()
    constants = [mode == 1, mode == 2, mode == 3]
    np.testing.assert_array_equal(
        data.A, np.column_stack([*constants, table["gc"], table["ttme"], (mode == 1) * table["hinc"]])
    )
    np.testing.assert_array_equal(data.b, table["choice"])
    np.testing.assert_array_equal(data.groups + 1, table["individual"])


def _import_quietly(module):
    # Warnings of other packages say nothing about our data.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module)
