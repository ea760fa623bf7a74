"""All heads of a model at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def head_survey(columns: dict[str, list[Any]], panels: Sequence[tuple[str, str]]) -> Figure:
    """Draw a panel a quantity, layers downwards and heads across; heads without a number stay white.

    Parameters
    ----------
    columns : dict of list
        "layer", "head" and the quantities, an entry a head.
    panels : sequence of (str, str)
        Name of the column and title of each panel. Panels without a number are left out.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            'plots need matplotlib; type: python -m pip install "attnfit[plot]"', name=missing.name
        ) from None
    layers, heads = sorted(set(columns["layer"])), sorted(set(columns["head"]))
    shown = [(name, title) for name, title in panels if np.isfinite(columns[name]).any()]
    figure = Figure(figsize=(3.2 * len(shown) + 0.4, 1.2 + 0.18 * len(layers)), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, (name, title) in zip(axes, shown, strict=True):
        values = np.full((len(layers), len(heads)), np.nan)
        for layer, head, value in zip(columns["layer"], columns["head"], columns[name], strict=True):
            values[layers.index(layer), heads.index(head)] = value
        image = ax.imshow(values, interpolation="nearest", aspect="auto", cmap="viridis")
        figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set_title(title)
        ax.set_xlabel("head")
        ax.set_xticks(range(len(heads)), [str(head) for head in heads], fontsize=6)
        ax.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=6)
    axes[0].set_ylabel("layer")
    return figure
