"""Three-layer regression: ReLU, softmax, activation."""

from __future__ import annotations

from typing import Any

from attnfit.losses.activations import as_activation
from attnfit.problems.layers.inputs import as_columns, as_matrix, as_penalty
from attnfit.problems.layers.relu_softmax import ReluProblem


class ThreeLayer(ReluProblem):
    """Three layers: ``0.5 sum w (h(A3 softmax(A2 relu(A1 x) + offset)) - b)^2 + penalties``.

    The penalties are ``0.5 ||diag(row_penalty) A2 relu(A1 x)||^2 + 0.5 ridge ||x||^2``.

    Parameters
    ----------
    A1 : array or sparse matrix, shape (n, d)
    A2 : array or sparse matrix, shape (k, n)
    A3 : array or sparse matrix, shape (m, k)
    b : array_like, shape (m,)
    activation : {"tanh", "identity", "sigmoid", "softplus", "gelu"} or tuple ``(h, h', h'')``
    weights : array_like, shape (m,), optional
    offset : array_like, shape (k,), optional
        Added to the logits.
    row_penalty : float or array_like of shape (k,)
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names argument and index.

    Notes
    -----
    `TwoLayer` with ``A2 diag(s) A1``, ``s = 1[A1 x > 0]``, in place of A1 and A3 in place of A2; derivatives
    hold where no entry of ``A1 x`` is zero. Source: "Local Convergence of Approximate Newton Method for Two
    Layer Nonlinear Regression", without the factor 0.5 there.
    """

    def __init__(
        self,
        A1: Any,
        A2: Any,
        A3: Any,
        b: Any,
        activation: Any = "tanh",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        second, outer = as_matrix(A2, "A2"), as_matrix(A3, "A3")
        n_logits = second.shape[0]
        if outer.shape[1] != n_logits:
            raise ValueError(
                f"A3 has {outer.shape[1]} columns but A2 has {n_logits} rows; A3 multiplies the softmax "
                "of A2's "
                "rows, so transpose or cut one of them"
            )
        super().__init__(
            A1,
            second,
            outer,
            b,
            as_activation(activation),
            weights,
            None if offset is None else as_columns(offset, n_logits, "offset", "A2", n_columns=1),
            as_penalty(row_penalty, n_logits),
            ridge,
        )
