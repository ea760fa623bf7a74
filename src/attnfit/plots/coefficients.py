"""Estimates with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.plots.canvas import COLOURS, GREY, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond this many the names overlap; the largest z-values are what a reader looks for.
MOST = 30


def coefficients(names: Sequence[str], coef: Any, se: Any = None, ax: Axes | None = None) -> Figure:
    """Plot each coefficient over its standard error, comparable between features, with its 95 % interval.

    Parameters
    ----------
    names : sequence of str
    coef : array_like, shape (d,)
    se : array_like, shape (d,), optional
        Standard errors. Without them, or where none is finite, the coefficients themselves are drawn.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure
    """
    coef = np.asarray(coef, dtype=np.float64)
    se = np.full(coef.shape, np.nan) if se is None else np.asarray(se, dtype=np.float64)
    known = np.isfinite(se) & (se > 0)
    scaled = bool(known.any())
    size = np.divide(coef, se, out=np.full(coef.shape, np.nan), where=known) if scaled else coef
    shown = np.arange(len(coef))
    if len(coef) > MOST:
        shown = np.sort(np.argsort(-np.abs(np.nan_to_num(size)))[:MOST])
    ax = new_axes(ax, height=max(2.4, 0.32 * len(shown) + 1.2))
    at = np.arange(len(shown))
    ax.axvline(0.0, color=GREY, linewidth=1.0)
    ax.errorbar(
        size[shown],
        at,
        xerr=1.96 if scaled else None,
        fmt="o",
        color=COLOURS[0],
        markersize=5,
        elinewidth=1.6,
    )
    ax.set_yticks(at, [names[int(k)] for k in shown])
    for label in ax.get_yticklabels():
        # A dollar in a name is no formula.
        label.set_parse_math(False)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel("coefficient / standard error, 95 % interval" if scaled else "coefficient")
    left_out = f", {MOST} largest of {len(coef)}" if len(coef) > MOST else ""
    ax.set_title(f"Coefficients{left_out}", loc="left")
    return ax.get_figure(root=True)  # type: ignore[return-value]
