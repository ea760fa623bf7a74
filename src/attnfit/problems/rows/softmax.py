"""Softmax regression within groups."""

from __future__ import annotations

from typing import Any

from attnfit.losses.softmax import LOSSES
from attnfit.problems.inputs import choose
from attnfit.problems.rows.grouped import GroupedProblem


class Softmax(GroupedProblem):
    """Softmax regression: ``L(x) = sum_g Phi(softmax(A_g x + offset_g)) + penalties``.

    ======================= =================================
    loss                    Phi(f)
    ======================= =================================
    "squared"               ``0.5 sum w (f - b)^2``
    "cross_entropy"         ``-sum w b log f``
    "kl"                    ``sum w b (log b - log f)``
    "linear_cross_entropy"  ``-sum w b f``
    "entropy"               ``-sum w f log f`` (b does not enter)
    ======================= =================================

    The penalties are ``0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``. The papers print the squared
    loss without the 0.5.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, d)
        Rows are alternatives; a row of zeros is an outside option.
    b : array_like, shape (n,)
        Target, usually shares of the group; zeros are data. It need not sum to one.
    groups : array_like, optional
        n labels in any order, or offsets ``0 < ... < n``; one group by default.
    loss : str
    weights : array_like, shape (n,) or (n_groups,), optional
        Row weights w, or one weight a group (groups in order of first appearance).
    offset : array_like, shape (n,), optional
        Added to the logits.
    row_penalty : float or array_like of shape (n,)
        The papers' regulariser w.
    ridge : float

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign; the message names the index.

    Notes
    -----
    With ``f`` the softmax, ``p = Phi'(f)``, ``C`` the rows centred at ``A^T f`` of their group: gradient
    ``C^T (p f)``, Hessian ``C^T diag(t) C`` with ``t = f (Phi'' f + p - <p, f>)``. Sources: "In-Context
    Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax Regression via a Tensor
    Trick", Section 5; "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression",
    Lemma 4.5 (sign corrected).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> problem = problems.Softmax(A, [0.5, 0.25, 0.25])
    >>> minimize(problem).x.round(4) + 0.0
    array([0.6931, 0.    ])
    """

    def __init__(
        self,
        A: Any,
        b: Any,
        groups: Any = None,
        loss: str = "squared",
        *,
        weights: Any = None,
        offset: Any = None,
        row_penalty: Any = 0.0,
        ridge: float = 0.0,
    ) -> None:
        super().__init__(
            A,
            b,
            loss=choose(loss, LOSSES, "loss"),
            groups=groups,
            weights=weights,
            offset=offset,
            row_penalty=row_penalty,
            ridge=ridge,
        )

    @property
    def zero_is_stationary(self) -> bool:
        """True for entropy without offset and weights: uniform outputs are its maximum."""
        return self.loss is LOSSES["entropy"] and self.offset is None and self.weights is None
