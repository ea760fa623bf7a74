"""Figures: what is drawn, from what, and that nothing needs a display."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from attnfit import ExponentialRegressor, SoftmaxRegressor, datasets, minimize, plots, problems


@pytest.fixture(scope="module")
def cars():
    data = datasets.load_car_shares()
    problem = problems.Softmax(data.A, data.b, data.groups)
    result = minimize(problem)
    return data, problem.predict(result.x), result


def test_fitted_versus_observed_spans_decades(cars):
    data, fitted, _ = cars
    figure = plots.fitted_versus_observed(data.b, fitted)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlim() == ax.get_ylim()
    offsets = ax.collections[0].get_offsets()
    assert len(offsets) == len(data.b)
    np.testing.assert_allclose(offsets[:, 0], data.b)


def test_zeros_are_drawn_at_the_edge(cars):
    data, fitted, _ = cars
    y = data.b.copy()
    y[:3] = 0.0
    (ax,) = plots.fitted_versus_observed(y, fitted).axes
    assert (ax.collections[0].get_offsets()[:, 0] > 0).all()


def test_narrow_values_get_linear_axes_and_weights_areas():
    y = np.linspace(-1.0, 1.0, 30)
    (ax,) = plots.fitted_versus_observed(y, y + 0.1, weights=np.arange(30.0)).axes
    assert ax.get_xscale() == "linear"
    sizes = ax.collections[0].get_sizes()
    assert (np.diff(sizes) > 0).all()


def test_many_points_are_counted_in_hexagons():
    y = np.random.default_rng(0).uniform(0.2, 0.8, 20_000)
    (ax,) = plots.fitted_versus_observed(y, y).axes
    assert ax.collections[0].get_array().sum() == 20_000


def test_choices_become_a_reliability_curve():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, 4000)
    y = (rng.uniform(size=4000) < p).astype(float)
    (ax,) = plots.fitted_versus_observed(y, p).axes
    assert ax.get_title(loc="left") == "Reliability"
    mean, share = ax.lines[1].get_data()
    assert len(mean) == 10
    np.testing.assert_allclose(np.array(share, float), np.array(mean, float), atol=0.08)


def test_convergence_draws_each_phase_and_the_tolerance(cars):
    *_, result = cars
    (ax,) = plots.convergence(result.history, tol=1e-8).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    phases = list(dict.fromkeys(record.phase for record in result.history))
    assert labels[: len(phases)] == phases
    assert ax.get_yscale() == "log"
    last = ax.lines[len(ax.lines) - 1].get_ydata()
    assert last[0] == pytest.approx(1e-8)


def test_coefficients_in_standard_errors():
    (ax,) = plots.coefficients(["a", "b", "c"], [1.0, -4.0, 3.0], [0.5, 2.0, np.nan]).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    np.testing.assert_allclose(ax.lines[1].get_xdata(), [2.0, -2.0, np.nan])
    assert "standard error" in ax.get_xlabel()


def test_coefficients_without_standard_errors():
    (ax,) = plots.coefficients(["a", "b"], [1.0, -4.0]).axes
    assert ax.get_xlabel() == "coefficient"


def test_only_the_largest_of_many_coefficients_are_shown():
    coef = np.arange(100.0)
    (ax,) = plots.coefficients([f"x{k}" for k in range(100)], coef, np.ones(100)).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"x{k}" for k in range(70, 100)]


def test_given_axes_are_used(cars):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.convergence(cars[2].history, ax=left) is figure
    assert plots.coefficients(["a"], [1.0], [1.0], ax=right) is figure


def test_figures_need_neither_pyplot_nor_a_display(tmp_path):
    code = (
        "import sys; from attnfit import plots;"
        f"plots.coefficients(['a'], [1.0], [0.5]).savefig({str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_missing_matplotlib_is_one_sentence():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
from attnfit import plots
try:
    plots.coefficients(["a"], [1.0])
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'plots need matplotlib; type: python -m pip install "attnfit[plot]"\n'


def test_attention_maps():
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(6), size=5)
    maps[0, 0] = 0.0
    figure = plots.attention_maps(maps, maps + 1e-3, labels=list("abcdef"))
    assert [ax.get_title() for ax in figure.axes[:3]] == ["observed", "fitted", "fitted - observed"]
    with pytest.raises(ValueError, match="of one shape"):
        plots.attention_maps(maps, maps[:2])
    with pytest.raises(ValueError, match="no positive entry"):
        plots.attention_maps(np.zeros((2, 2)), np.zeros((2, 2)))


# ---- fitted models -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def travel_model():
    travel = datasets.load_travel_mode()
    return SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)


def test_coefficients_of_a_model_in_their_units(travel_model):
    figure = plots.coefficients(travel_model, units=True, level=0.9)
    ends = travel_model.conf_int(level=0.9)
    assert len(figure.axes) == 6 and "90 %" in figure.get_suptitle()
    for ax, x, interval in zip(figure.axes, travel_model.coef_, ends, strict=True):
        zero, bar, dot = ax.lines
        assert dot.get_xdata()[0] == x and zero.get_xdata() == [0.0, 0.0]
        np.testing.assert_array_equal(bar.get_xdata(), interval)
        low, high = ax.get_xlim()
        assert low < min(0.0, interval[0]) and high > max(0.0, interval[1])


def test_coefficients_of_a_model_over_their_errors(travel_model):
    figure = plots.coefficients(travel_model, level=0.9)
    (ax,) = figure.axes
    dots = ax.lines[1].get_xdata()
    np.testing.assert_allclose(dots, travel_model.coef_ / travel_model.standard_errors_)
    segments = ax.collections[0].get_segments()
    np.testing.assert_allclose(np.diff(segments[0][:, 0]), 2 * 1.6448536, rtol=1e-6)


def test_what_has_no_finite_value_is_said():
    figure = plots.coefficients(["a", "b"], [np.inf, 1.0], [np.nan, 0.5], units=True)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finite value"]
    with pytest.raises(ValueError, match="leave ax out"):
        plots.coefficients(["a"], [1.0], ax=figure.axes[0], units=True)


def test_fitted_values_of_a_model():
    data = datasets.load_car_shares()
    model = SoftmaxRegressor().fit(data.A, data.b, groups=data.groups)
    offsets = plots.fitted_versus_observed(model).axes[0].collections[0].get_offsets()
    expected = plots.fitted_versus_observed(data.b, model.predict(data.A, groups=data.groups))
    np.testing.assert_allclose(offsets, expected.axes[0].collections[0].get_offsets(), rtol=1e-12)
    weighted = ExponentialRegressor().fit(data.A[:50], data.b[:50], sample_weight=np.arange(1, 51))
    y, fitted, weights = weighted.training_fit()
    np.testing.assert_array_equal(weights, np.arange(1, 51))
    np.testing.assert_allclose(fitted, weighted.predict(data.A[:50]), rtol=1e-12)
    np.testing.assert_array_equal(y, data.b[:50])
    import pickle

    with pytest.raises(AttributeError, match="training_fit needs the training data"):
        pickle.loads(pickle.dumps(model)).training_fit()


def test_convergence_of_a_model_and_a_result(travel_model):
    lines = [
        plots.convergence(of).axes[0].lines[0].get_ydata()
        for of in (travel_model, travel_model.result_, travel_model.result_.history)
    ]
    assert (lines[0] == lines[1]).all() and (lines[1] == lines[2]).all()


def test_a_result_is_a_table_in_a_notebook(travel_model):
    from dataclasses import replace

    result = replace(travel_model.result_, message="<b>&", local_values={"a<b": 1.0})
    told = result._repr_html_()
    assert "converged: &lt;b&gt;&amp;" in told and "1 (a&lt;b)" in told and "<b>" not in told
    assert f"{result.value:.10g}" in told
