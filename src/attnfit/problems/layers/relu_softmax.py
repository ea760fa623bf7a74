"""Softmax regression behind a ReLU layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.losses.activations import ACTIVATIONS, Activation
from attnfit.problems.inputs import as_ridge
from attnfit.problems.layers.inputs import as_columns, as_matrix, as_weights
from attnfit.problems.layers.layered import LayeredProblem
from attnfit.problems.layers.logit_maps import ReluMap

Array = NDArray[np.float64]

# Random starts give logits of this size: outputs near uniform, yet away from the kink at zero.
START_SIZE = 0.3
N_STARTS = 4


class ReluProblem(LayeredProblem):
    """What the problems share whose logits are ``A2 relu(A1 x)``."""

    linear = False
    logit_map: ReluMap

    def __init__(
        self,
        A1: Any,
        A2: Any,
        outer: Any,
        b: Any,
        activation: Activation,
        weights: Any,
        offset: Array | None,
        penalty: Array | None,
        ridge: float,
    ) -> None:
        first, second = as_matrix(A1, "A1"), as_matrix(A2, "A2")
        if second.shape[1] != first.shape[0]:
            raise ValueError(
                f"A2 has {second.shape[1]} columns but A1 has {first.shape[0]} rows; A2 multiplies "
                "relu(A1 x), so "
                "transpose or cut one of them"
            )
        last, name = (second, "A2") if outer is None else (outer, "A3")
        if np.ndim(b) == 2 and np.shape(b)[1] != 1:
            raise ValueError(f"b has shape {np.shape(b)}; pass one right-hand side, shape ({last.shape[0]},)")
        targets = as_columns(b, last.shape[0], "b", name)
        super().__init__(
            ReluMap(first, second),
            outer,
            targets,
            activation,
            batch=False,
            weights=as_weights(weights, last.shape[0], name, 1),
            offset=offset,
            penalty=penalty,
            ridge=as_ridge(ridge),
        )

    @property
    def zero_is_stationary(self) -> bool:
        """True: at zero no row is active, and the gradient vanishes whatever the data."""
        return True

    def initial_point(self, random_state: Any = None) -> Array:
        """Return a small random point: zero is a kink."""
        rng = np.random.default_rng(random_state)
        first = self.logit_map.first
        squares = np.asarray((first**2).sum(axis=0), dtype=np.float64).reshape(-1)
        x = rng.standard_normal(len(squares)) / np.sqrt(np.where(squares > 0.0, squares, 1.0))
        linear, _ = self.logit_map.logits(x[:, None])
        size = float(np.abs(linear).max())
        return x * (START_SIZE / size) if size > 0.0 else x

    def starts(self, rng: np.random.Generator) -> dict[str, Array]:
        """Return several random points: sign patterns differ, and each has a minimum of its own."""
        return {f"random {k + 1}": self.initial_point(rng) for k in range(N_STARTS)}


class ReluSoftmax(ReluProblem):
    """Softmax of a ReLU layer: ``0.5 sum w (softmax(A2 relu(A1 x)) - b)^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A1 : array or sparse matrix, shape (n, d)
    A2 : array or sparse matrix, shape (m, n)
    b : array_like, shape (m,)
    weights : array_like, shape (m,), optional
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names argument and index.

    Notes
    -----
    As long as no entry of ``A1 x`` changes sign this is softmax regression with the matrix ``A2 diag(s) A1``,
    ``s = 1[A1 x > 0]``: derivatives hold within such a region. Source: the two-layer problem that "Local
    Convergence of Approximate Newton Method for Two Layer Nonlinear Regression" starts from, without the
    factor 0.5 there.
    """

    def __init__(self, A1: Any, A2: Any, b: Any, *, weights: Any = None, ridge: float = 0.0) -> None:
        super().__init__(A1, A2, None, b, ACTIVATIONS["identity"], weights, None, None, ridge)
