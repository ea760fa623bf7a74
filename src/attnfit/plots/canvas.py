"""The look that all figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers and on grey paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a8a8a"


def new_axes(ax: Axes | None, width: float = 5.0, height: float = 4.0) -> Axes:
    """Return ``ax``, or the axes of a new figure, without box and with a light grid.

    The figure is made without pyplot, so it needs no display and is freed like any other object.
    """
    if ax is None:
        ax = new_figure(width, height).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, made without pyplot.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            'plots need matplotlib; type: python -m pip install "attnfit[plot]"', name=missing.name
        ) from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)
