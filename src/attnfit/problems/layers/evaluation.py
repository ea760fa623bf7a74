"""What the layers of a problem hold at a point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.evaluation import Evaluation

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layers:
    """What the layers hold at a point, one column a right-hand side.

    Attributes
    ----------
    pattern : ndarray of bool or None
        Which entries of ``A1 x`` are positive, where a ReLU comes first.
    linear, f : ndarray, shape (n, k)
        Logits without offset, and their softmax.
    q : ndarray, shape (n, k)
        Gradient of the loss with respect to f.
    a : ndarray, shape (n, k)
        ``f (q - <f, q>)``: gradient with respect to the logits.
    residual, slope, curvature, gauss : ndarray, shape (m, k)
        ``h(y) - b``; derivatives of the loss by y, ``w h' c`` and ``w (h'^2 + c h'')``; ``w h'^2``.
    """

    pattern: Any
    linear: Array
    f: Array
    q: Array
    a: Array
    residual: Array
    slope: Array
    curvature: Array
    gauss: Array


@dataclass(frozen=True)
class LayeredEvaluation(Evaluation):
    """An evaluation with the values of the columns, and the layers where they are small enough to keep."""

    column_values: Array = field(default_factory=lambda: np.zeros(0))
    layers: Layers | None = field(default=None, repr=False)


class Escape(NamedTuple):
    """An output of the softmax that was left out, and a point where it is raised and the loss is lower."""

    output: int
    x: Array
