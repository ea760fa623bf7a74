"""How the gradient fell with every read of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnfit.plots.canvas import COLOURS, GREY, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnfit.solvers.result import Record


def convergence(history: Sequence[Record] | Any, tol: float | None = None, ax: Axes | None = None) -> Figure:
    """Plot the relative gradient against the reads of the data.

    Parameters
    ----------
    history : sequence of Record, Result or fitted model
        ``result.history``.
    tol : float, optional
        Mark this relative gradient.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure
    """
    history = getattr(history, "result_", history)
    history = getattr(history, "history", history)
    ax = new_axes(ax)
    phases = list(dict.fromkeys(record.phase for record in history))
    for k, phase in enumerate(phases):
        # A gradient of exactly zero has no logarithm.
        points = [(r.n_passes, max(r.gradient_norm, 1e-17), r.accepted) for r in history if r.phase == phase]
        reads, norms, _ = zip(*points, strict=True)
        colour = COLOURS[k % len(COLOURS)]
        ax.plot(reads, norms, color=colour, marker="o", markersize=4, linewidth=1.4, label=phase)
        rejected = [(x, y) for x, y, good in points if not good]
        if rejected:
            ax.plot(*zip(*rejected, strict=True), "o", color="white", markeredgecolor=colour, markersize=5)
    if not all(record.accepted for record in history):
        ax.plot([], [], "o", color="white", markeredgecolor=GREY, markersize=5, label="rejected step")
    if tol is not None:
        ax.axhline(tol, color=GREY, linewidth=1.0, linestyle="--")
        ax.annotate(
            f"{tol:.0e}",
            (0.0, tol),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
        )
    ax.set_yscale("log")
    ax.set_xlim(left=0)
    ax.set_xlabel("reads of the data")
    ax.set_ylabel("relative gradient")
    ax.set_title("Convergence", loc="left")
    if phases:
        ax.legend(frameon=False, fontsize=8)
    return ax.get_figure(root=True)  # type: ignore[return-value]
