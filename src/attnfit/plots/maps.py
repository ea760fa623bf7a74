"""Attention maps side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_maps(maps: Any, fitted: Any, labels: Any = None) -> Figure:
    """Draw observed maps, fitted maps and their difference.

    The first two panels share a logarithmic scale, which spans the observed values from their smallest
    positive one, at most six decades.

    Parameters
    ----------
    maps, fitted : array_like, shape (n1, n2)
        Observed maps, and those of ``AttentionRegressor.predict``.
    labels : sequence of str, optional
        One a key, written below the panels where there are at most 40.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If the shapes differ or no observed value is positive.
    """
    observed, fitted = np.asarray(maps, dtype=np.float64), np.asarray(fitted, dtype=np.float64)
    if observed.ndim != 2 or observed.shape != fitted.shape:
        raise ValueError(
            f"maps and fitted must be matrices of one shape, not {observed.shape} and {fitted.shape}"
        )
    if not (observed > 0).any():
        raise ValueError("maps has no positive entry to draw")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    top = float(observed.max())
    floor = max(float(observed[observed > 0].min()), 1e-6 * top)
    norm = LogNorm(floor, top)
    figure = Figure(figsize=(12.0, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 3)
    difference = fitted - observed
    reach = max(float(np.abs(difference).max()), np.finfo(np.float64).tiny)
    panels = (
        ("observed", np.maximum(observed, floor), {"norm": norm, "cmap": "viridis"}),
        ("fitted", np.maximum(fitted, floor), {"norm": norm, "cmap": "viridis"}),
        ("fitted - observed", difference, {"vmin": -reach, "vmax": reach, "cmap": "RdBu_r"}),
    )
    for ax, (title, values, style) in zip(axes, panels, strict=True):
        image = ax.imshow(values, interpolation="nearest", aspect="auto", **style)
        figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set_title(title)
        ax.set_xlabel("key")
        if labels is not None and len(labels) <= 40:
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes[0].set_ylabel("query")
    return figure
