"""What the model says against what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attnfit.plots.canvas import COLOURS, GREY, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More points are one blot: they are counted in hexagons instead.
MOST_POINTS = 5_000
# Spread in decades beyond which a linear axis shows one corner only.
WIDE = 1.5


def fitted_versus_observed(y: Any, fitted: Any = None, weights: Any = None, ax: Axes | None = None) -> Figure:
    """Plot fitted against observed values with the diagonal.

    Both axes are logarithmic where the values span several decades; zeros are then drawn at the edge. One-hot
    choices are drawn as a reliability curve: the share chosen among rows of similar fitted probability.

    Parameters
    ----------
    y : array_like, shape (n,), or fitted model
        Observed values; of a model those that it was fitted to, as long as it has them.
    fitted : array_like, shape (n,)
        Fitted values, from ``estimator.predict`` or ``problem.predict(result.x)``.
    weights : array_like, shape (n,), optional
        Row weights; the area of a point shows its weight.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure
    """
    if hasattr(y, "coef_"):
        y, fitted, of_rows = y.training_fit()
        weights = of_rows if weights is None else weights
    y, fitted = np.asarray(y, dtype=np.float64), np.asarray(fitted, dtype=np.float64)
    weights = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    ax = new_axes(ax)
    if len(y) > 2 and np.isin(y, (0.0, 1.0)).all():
        _reliability(ax, y, fitted, weights)
    else:
        _scatter(ax, y, fitted, weights)
    return ax.get_figure(root=True)  # type: ignore[return-value]


def _scatter(ax: Axes, y: Any, fitted: Any, weights: Any) -> None:
    logarithmic = _spans_decades(y) and fitted.min() > 0
    if logarithmic:
        floor = 0.5 * min(y[y > 0].min(), np.quantile(fitted, 0.01))
        y, fitted = np.maximum(y, floor), np.maximum(fitted, floor)
        ax.set_xscale("log")
        ax.set_yscale("log")
    low, high = min(y.min(), fitted.min()), max(y.max(), fitted.max())
    pad = 0.03 * (high - low)
    ends = (low / 1.15, high * 1.15) if logarithmic else (low - pad, high + pad)
    if len(y) > MOST_POINTS:
        scale: Literal["log", "linear"] = "log" if logarithmic else "linear"
        ax.hexbin(
            y,
            fitted,
            gridsize=45,
            bins="log",
            mincnt=1,
            cmap="Blues",
            linewidths=0.1,
            xscale=scale,
            yscale=scale,
        )
    else:
        area = 8.0 + 52.0 * weights / max(float(weights.max()), 1e-300) if np.ptp(weights) else 16.0
        ax.scatter(y, fitted, s=area, color=COLOURS[0], alpha=0.55, linewidths=0)
    ax.plot(ends, ends, color=GREY, linewidth=1.0, linestyle="--", zorder=0.5)
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    ax.set_xlabel("observed")
    ax.set_ylabel("fitted")
    ax.set_title("Fitted and observed", loc="left")


def _spans_decades(y: Any) -> bool:
    if (y < 0).any() or not (y > 0).any():
        return False
    low, high = np.quantile(y[y > 0], (0.05, 0.95))
    return bool(np.log10(high / low) > WIDE)


def _reliability(ax: Axes, y: Any, fitted: Any, weights: Any) -> None:
    order = np.argsort(fitted, kind="stable")
    bins = np.array_split(order, min(10, len(y)))
    mean, share, error = [], [], []
    for rows in bins:
        weight = np.maximum(weights[rows], 1e-300)
        p = np.average(fitted[rows], weights=weight)
        mean.append(p)
        share.append(np.average(y[rows], weights=weight))
        effective = weight.sum() ** 2 / (weight**2).sum()
        error.append(1.96 * np.sqrt(max(p * (1 - p), 0.0) / effective))
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1.0, linestyle="--", zorder=0.5)
    # A share lies between 0 and 1, so its interval does too.
    low, high = np.minimum(error, share), np.minimum(error, 1.0 - np.asarray(share))
    ax.errorbar(mean, share, yerr=(low, high), fmt="o", color=COLOURS[0], markersize=5, elinewidth=1.4)
    ax.set_xlim(-0.03, 1.03)
    ax.set_ylim(-0.06, 1.06)
    ax.set_xlabel("fitted probability, tenths of the rows")
    ax.set_ylabel("share chosen, 95 % interval")
    ax.set_title("Reliability", loc="left")
