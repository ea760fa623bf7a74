"""How the input of an attention layer was found, and how well its output determines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.plots.canvas import COLOURS, GREY, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attnfit.inversion import Identifiability
    from attnfit.solvers import Result

# Zero has no logarithm; float64 resolves nothing below this share.
FLOOR = 1e-17


def inversion_progress(result: Result, errors: Any = None, ax: Axes | None = None) -> Figure:
    """Plot the residual of the output against the steps, one line a start.

    Starts that descend together share a line: that of the best of them.

    Parameters
    ----------
    result : Result
        Of `attnfit.minimize` on a `attnfit.problems.LayerInversion`.
    errors : array_like, shape (len(result.history),), optional
        Relative error of the input at each record, where the truth is known, drawn dashed; NaN where it was
        not computed.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is not one error a record.
    """
    records = list(result.history)
    if errors is not None and len(errors) != len(records):
        raise ValueError(f"errors has {len(errors)} values; pass one a record of the history, {len(records)}")
    ax = new_axes(ax)
    size = max(float(np.linalg.norm(result.problem.B)), np.finfo(float).tiny)
    # A batch of starts counts those that are left in its phase: "fit: Gaussian 1 to 8, 5 left".
    names = [record.phase.removeprefix("fit: ").split(",")[0] for record in records]
    for k, name in enumerate(dict.fromkeys(names)):
        which = [i for i, other in enumerate(names) if other == name]
        steps = [records[i].iteration for i in which]
        colour = COLOURS[k % len(COLOURS)]
        residuals = [max(np.sqrt(2.0 * records[i].value) / size, FLOOR) for i in which]
        ax.plot(steps, residuals, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
        if errors is not None:
            told = [(records[i].iteration, max(errors[i], FLOOR)) for i in which if np.isfinite(errors[i])]
            ax.plot(*zip(*told, strict=True), "--", color=colour, linewidth=1.4)
    if errors is not None:
        ax.plot([], [], "--", color=GREY, label="error of the input")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    with_penalty = " with penalty" if result.problem.gamma > 0.0 else ""
    ax.set_ylabel(f"relative residual{with_penalty}" + (", error" if errors is not None else ""))
    ax.set_title("Residual of the output", loc="left")
    ax.legend(frameon=False, fontsize=8)
    return ax.get_figure(root=True)  # type: ignore[return-value]


def jacobian_spectrum(at: Identifiability, ax: Axes | None = None) -> Figure:
    """Plot the singular values of the Jacobian at an input: how much the output tells of each direction.

    Parameters
    ----------
    at : Identifiability
        Of `attnfit.inversion.identifiable` at a point, or of a `attnfit.inversion.Recovery`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If no Jacobian was taken.
    """
    if at.singular_values is None or at.rank is None:
        raise ValueError("at has no singular values: call identifiable(layer, x) with a point")
    ax = new_axes(ax)
    # Directions beyond the number of equations have none.
    values = np.zeros(at.n_unknowns)
    values[: len(at.singular_values)] = at.singular_values[: at.n_unknowns]
    values = np.maximum(values / max(float(values[0]), np.finfo(float).tiny), FLOOR)
    numbers = np.arange(1, at.n_unknowns + 1)
    seen = numbers <= at.rank
    ax.plot(numbers[seen], values[seen], ".", color=COLOURS[0], markersize=4, label="seen in the output")
    if not seen.all():
        ax.plot(numbers[~seen], values[~seen], ".", color=COLOURS[1], markersize=4, label="not seen")
        ax.legend(frameon=False, fontsize=8)
    ax.axvline(at.rank + 0.5, color=GREY, linewidth=1.0, linestyle="--")
    condition = "" if at.condition is None or np.isinf(at.condition) else f", condition {at.condition:.1e}"
    ax.set_yscale("log")
    ax.set_xlabel("direction of the input")
    ax.set_ylabel("singular value over the largest")
    ax.set_title(f"Jacobian: rank {at.rank:,} of {at.n_unknowns:,}{condition}", loc="left", fontsize=10)
    return ax.get_figure(root=True)  # type: ignore[return-value]


def success_map(
    scales: Sequence[float], known: Sequence[float], shares: Any, ax: Axes | None = None
) -> Figure:
    """Draw the share of inputs recovered, by the scale of the logits and the share of known tokens.

    Parameters
    ----------
    scales : sequence of float
        Standard deviations of the logits.
    known : sequence of float
        Shares of the tokens that are given.
    shares : array_like, shape (len(known), len(scales))
        Of the inputs recovered, between 0 and 1.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If shares has another shape.
    """
    shares = np.asarray(shares, dtype=np.float64)
    if shares.shape != (len(known), len(scales)):
        raise ValueError(
            f"shares has shape {shares.shape}; expected one row a share of known tokens and one column a "
            f"scale, ({len(known)}, {len(scales)})"
        )
    ax = new_axes(ax, height=0.6 * len(known) + 1.4)
    ax.grid(False)
    ax.imshow(shares, origin="lower", aspect="auto", vmin=0.0, vmax=1.0, cmap="Blues")
    for (i, j), value in np.ndenumerate(shares):
        colour = "white" if value > 0.55 else "black"
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    ax.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales])
    ax.set_yticks(range(len(known)), [f"{share:.0%}" for share in known])
    ax.set_xlabel("standard deviation of the logits")
    ax.set_ylabel("tokens known")
    ax.set_title("Share of inputs recovered", loc="left")
    return ax.get_figure(root=True)  # type: ignore[return-value]
