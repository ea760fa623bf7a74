"""Estimates with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.plots.canvas import COLOURS, GREY, new_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this many the names overlap; the largest z-values are what a reader looks for.
MOST = 30


def coefficients(
    names: Any,
    coef: Any = None,
    se: Any = None,
    ax: Axes | None = None,
    *,
    units: bool = False,
    level: float = 0.95,
) -> Figure:
    """Plot each coefficient over its standard error, comparable between features, with its interval; or in
    its own units.

    Parameters
    ----------
    names : sequence of str, or fitted model
        Of a model, names, coefficients and errors are taken from its summary.
    coef : array_like, shape (d,)
    se : array_like, shape (d,), optional
        Standard errors. Without them, or where none is finite, the coefficients themselves are drawn.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.
    units : bool
        Give each coefficient an axis of its own, in its units.
    level : float
        Cover of the intervals; 0.95 where only names, coefficients and errors are given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If ``units`` is asked for in one given pair of axes.

    Examples
    --------
    >>> from attnfit import SoftmaxRegressor, datasets, plots
    >>> travel = datasets.load_travel_mode()
    >>> model = SoftmaxRegressor("cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    >>> figure = plots.coefficients(model, units=True)
    >>> len(figure.axes)
    6
    """
    if hasattr(names, "coef_"):
        table = names.summary(level=level).columns()
        names, coef, se = table["name"], table["coefficient"], table["standard_error"]
        ends = np.asarray(table["lower"]), np.asarray(table["upper"])
    else:
        coef = np.asarray(coef, dtype=np.float64)
        se = np.full(coef.shape, np.nan) if se is None else np.asarray(se, dtype=np.float64)
        ends, level = (coef - 1.96 * se, coef + 1.96 * se), 0.95
    known = np.isfinite(se) & (se > 0) & np.isfinite(coef)
    scaled = bool(known.any())
    size = np.divide(coef, se, out=np.full(coef.shape, np.nan), where=known) if scaled else coef
    shown = np.arange(len(coef))
    if len(coef) > MOST:
        shown = np.sort(np.argsort(-np.abs(np.nan_to_num(size)))[:MOST])
    left_out = f", {MOST} largest of {len(coef)}" if len(coef) > MOST else ""
    named = [names[int(k)] for k in shown]
    if units:
        if ax is not None:
            raise ValueError("units=True makes axes of its own: leave ax out")
        interval = f", {100 * level:g} % interval" if scaled else ""
        title = f"Coefficients in their units{interval}{left_out}"
        return _in_units(named, coef[shown], ends[0][shown], ends[1][shown], title)
    ax = new_axes(ax, height=max(2.4, 0.32 * len(shown) + 1.2))
    at = np.arange(len(shown))
    half = np.divide(ends[1] - coef, se, out=np.full(coef.shape, np.nan), where=known)[shown]
    ax.axvline(0.0, color=GREY, linewidth=1.0)
    ax.errorbar(
        size[shown],
        at,
        xerr=half if scaled else None,
        fmt="o",
        color=COLOURS[0],
        markersize=5,
        elinewidth=1.6,
    )
    _name_rows(ax, at, named)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel(f"coefficient / standard error, {100 * level:g} % interval" if scaled else "coefficient")
    ax.set_title(f"Coefficients{left_out}", loc="left")
    return ax.get_figure(root=True)  # type: ignore[return-value]


def _in_units(names: Sequence[str], coef: Any, lower: Any, upper: Any, title: str) -> Figure:
    """Draw one axis a coefficient: what is measured in minutes and what in dollars share none."""
    figure = new_figure(6.4, 0.55 * len(names) + 0.7)
    rows = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for ax, name, x, low, high in zip(rows, names, coef, lower, upper, strict=True):
        ax.spines[["top", "right", "left"]].set_visible(False)
        _name_rows(ax, [0.0], [name])
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8)
        ax.set_ylim(-1.0, 1.0)
        if not np.isfinite(x):
            ax.set_xticks([])
            ax.text(0.5, 0.0, "no finite value", ha="center", va="center", transform=ax.get_yaxis_transform())
            continue
        ax.axvline(0.0, color=GREY, linewidth=1.0)
        known = np.isfinite([low, high]).all()
        if known:
            ax.plot([low, high], [0.0, 0.0], color=COLOURS[0], linewidth=1.8)
        ax.plot([x], [0.0], "o", color=COLOURS[0], markersize=5)
        ends = [0.0, x, *([low, high] if known else [])]
        pad = 0.06 * (max(ends) - min(ends)) or 1.0
        ax.set_xlim(min(ends) - pad, max(ends) + pad)
        ax.locator_params(axis="x", nbins=6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _name_rows(ax: Axes, at: Any, names: Sequence[str]) -> None:
    ax.set_yticks(at, list(names))
    for label in ax.get_yticklabels():
        # A dollar in a name is no formula.
        label.set_parse_math(False)
