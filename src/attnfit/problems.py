"""The problems that `attnfit.minimize` takes."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from attnfit.data.inputs import as_ridge
from attnfit.effects import AbsorbedProblem
from attnfit.effects.doors import Exponential, Poisson, Softmax
from attnfit.losses.elementwise import FunctionName
from attnfit.objectives.attention import Attention as _FullRank
from attnfit.objectives.attention import AttentionLoss
from attnfit.objectives.full_attention import FullAttention as _FullOutputs
from attnfit.objectives.head_outputs import HeadOutputs, read_outputs
from attnfit.objectives.head_reading import read_head
from attnfit.objectives.heads import HeadAttention
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.kernel import KernelRegression
from attnfit.objectives.layers import ReluSoftmax, ThreeLayer, TwoLayer
from attnfit.objectives.low_rank import LowRankAttention
from attnfit.objectives.models import Rescaled
from attnfit.objectives.rotary import Rotary
from attnfit.objectives.rows import RowProblem

__all__ = [
    "AbsorbedProblem",
    "Attention",
    "Exponential",
    "FullAttention",
    "KernelRegression",
    "LayerInversion",
    "Poisson",
    "ReluSoftmax",
    "Rescaled",
    "Rotary",
    "RowProblem",
    "Softmax",
    "ThreeLayer",
    "TwoLayer",
]


@overload
def Attention(
    A1: Any,
    A2: Any,
    B: Any = None,
    loss: AttentionLoss = "squared",
    mask: Any = None,
    rank: None = None,
    *,
    function: FunctionName = "exp",
    weights: Any = None,
    offset: Any = None,
    pair_features: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    rotary: None = None,
    softcap: None = None,
    sink: Literal[False] = False,
    qk_norm: None = None,
) -> _FullRank: ...


@overload
def Attention(
    A1: Any,
    A2: Any,
    B: Any = None,
    loss: AttentionLoss = "squared",
    mask: Any = None,
    rank: int = ...,
    *,
    function: FunctionName = "exp",
    weights: Any = None,
    offset: Any = None,
    pair_features: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    rotary: None = None,
    softcap: None = None,
    sink: Literal[False] = False,
    qk_norm: None = None,
) -> LowRankAttention: ...


@overload
def Attention(
    A1: Any,
    A2: Any,
    B: Any = None,
    loss: AttentionLoss = "squared",
    mask: Any = None,
    rank: int | None = None,
    *,
    function: FunctionName = "exp",
    weights: Any = None,
    offset: Any = None,
    pair_features: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
) -> HeadAttention: ...


def Attention(
    A1: Any,
    A2: Any,
    B: Any = None,
    loss: AttentionLoss = "squared",
    mask: Any = None,
    rank: int | None = None,
    *,
    function: FunctionName = "exp",
    weights: Any = None,
    offset: Any = None,
    pair_features: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
) -> _FullRank | LowRankAttention | HeadAttention:
    """Fit X so that ``softmax(A1 X A2^T)``, row by row, is a given map:
    ``sum_i Phi(softmax(z_i)) + penalties``.

    The logits are ``Z = A1 X A2^T + sum_p c_p F_p + offset``. Losses, with f_i the softmax of row i over its
    unmasked keys:

    ======================= ========================================================================
    loss                    the sum over the rows i, with weights w
    ======================= ========================================================================
    "squared"               ``0.5 w |f_i - b_i|^2``
    "cross_entropy"         ``-w <b_i, log f_i>``
    "kl"                    ``w <b_i, log b_i - log f_i>``
    "linear_cross_entropy"  ``-w <b_i, f_i>`` (printed as cross entropy in the paper: the log is missing)
    "entropy"               ``-w <f_i, log f_i>`` (B does not enter)
    "log_ratio"             ``0.5 sum_k w v_ik (z_ik - log b_ik - mean_i)^2``, see below
    "rescaled"              ``0.5 w |u(z_i) - <u(z_i), 1> b_i|^2``
    "exponential"           ``0.5 w |u(z_i) - b_i|^2``
    "sparse"                ``w <exp(z_i), 1>`` (B does not enter)
    ======================= ========================================================================

    "log_ratio" is least squares on logarithms up to a constant a row, and quadratic in X. It is the loss for
    maps that were rounded, whose relative error is the same for large and small entries: the weight v is 1
    for numbers that the format holds in full precision, ``(b / smallest normal number)^2`` below, and 0 for
    zeros. The format is the narrowest of half, single and double precision that holds all of B.

    The penalties are ``0.5 ||row_penalty o (Z - offset)||_F^2 + 0.5 ridge (||X||_F^2 + |c|^2)``.

    Parameters
    ----------
    A1 : array_like, shape (n1, d1), or a list of them
        Queries. A list means several sequences, of any lengths, that share X.
    A2 : array_like, shape (n2, d2), or a list of them
        Keys. May be A1 itself.
    B : array_like or source on disk, shape (n1, n2), or a list of them
        Maps, in any precision, which is kept; zeros are data, and negative entries too where the loss takes
        no logarithm of them ("squared", "linear_cross_entropy", "rescaled", "exponential"). On disk (a
        memory map, a zarr array, what `attnfit.data.open_source` returns) they are read by blocks of
        queries. None where the loss has no target.
    loss : str
    mask : "causal", or array_like of bool, shape (n1, n2), or a list, optional
        True where a query attends to a key. A causal mask lets the last query see every key.
    rank : int, optional
        Fit ``X = U V^T`` of this rank: the unknown is then that of
        `attnfit.objectives.low_rank.LowRankAttention`.
    function : {"exp", "cosh", "sinh"}
        The function u of the losses "rescaled" and "exponential".
    weights : array_like, shape (n1,) or (n1, n2), or a list, optional
    offset : array_like, shape (n1, n2), or a list, optional
    pair_features : list of array_like, shape (n1, n2), optional
        Features of the pairs beside the bilinear part, such as a distance; for several sequences a list of
        such lists. The unknown is then the vector (X in C order, c): see `split`.
    row_penalty : float or array_like, shape (n1, n2)
    ridge : float
    rotary : Rotary, optional
        Turn queries and keys by their positions, as in nearly every model since 2022. This and the next three
        act on queries ``A1 W_Q`` and keys ``A2 W_K`` of width ``rank``, which is then required and may exceed
        d1 and d2; the unknown is that of `attnfit.objectives.heads.HeadAttention`. The losses "squared",
        "cross_entropy", "kl" and "log_ratio" are offered, B may hold several heads that share W_K, shape
        (heads, n1, n2), and the ridge is ``0.5 ridge`` times the square of all unknowns.
    softcap : float, optional
        Keep logits below this size: ``cap tanh(q . k / cap)``, before features and offset are added.
    sink : bool
        Let part of each row go nowhere: row t is ``exp(z_ts) / (exp(sigma) + sum_s exp(z_ts))``, with sigma
        unknown.
    qk_norm : float, optional
        Divide queries and keys by the root of their mean square plus this, and multiply them by gains, before
        they are turned.

    Raises
    ------
    ValueError
        If anything is not finite, of the wrong shape or sign, a mask empties a row, or the rank exceeds
        min(d1, d2), or, with rotary, is less than the columns turned; if a loss or a row penalty is not
        offered together with rotary, softcap, sink or qk_norm. The message names the argument and the index.

    Notes
    -----
    The matrix ``A1 (x) A2`` of shape (n1 n2, d1 d2) is never formed: with S the gradient in the logits,
    ``dL/dX = A1^T (S A2)``; the Hessian is a row-wise Khatri-Rao product on either side (see
    `attnfit.data.pairs`). Work arrays hold one block of queries. Constants in a row of logits, and
    directions that no query or key has, are not identified: `identified` names the rest, and `minimize`
    returns the X of least norm. Source: "In-Context Learning for Attention Scheme: from Single Softmax
    Regression to Multiple Softmax Regression via a Tensor Trick", Sections 5 and 6 (signs corrected).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> A = np.random.default_rng(0).standard_normal((30, 4))
    >>> X = np.diag([1.0, 0.5, -1.0, 0.0])
    >>> maps = np.exp(A @ X @ A.T)
    >>> maps /= maps.sum(axis=1, keepdims=True)
    >>> bool(abs(minimize(problems.Attention(A, A, maps)).x - X).max() < 1e-12)
    True
    """
    if rotary is not None or softcap is not None or sink or qk_norm is not None:
        if np.any(np.asarray(row_penalty, dtype=np.float64)):
            raise ValueError("row_penalty is not offered with rotary, softcap, sink or qk_norm; use ridge")
        read = read_head(
            A1, A2, B, loss, mask, rank, rotary=rotary, softcap=softcap, sink=sink, qk_norm=qk_norm,
            weights=weights, offset=offset, pair_features=pair_features,
        )  # fmt: skip
        if B is None:
            raise ValueError(f"B is missing; loss {loss!r} needs the maps, shape (queries, keys)")
        return HeadAttention(read, as_ridge(ridge))
    options: dict[str, Any] = {
        "function": function,
        "weights": weights,
        "offset": offset,
        "pair_features": pair_features,
        "row_penalty": row_penalty,
    }
    if rank is None:
        return _FullRank(A1, A2, B, loss, mask, ridge=ridge, **options)
    return LowRankAttention(_FullRank(A1, A2, B, loss, mask, **options), rank, ridge)


@overload
def FullAttention(
    A1: Any,
    A2: Any,
    A3: Any,
    B: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    offset: Any = None,
    ridge: float = 0.0,
    n_heads: int = 1,
    rank: None = None,
    rotary: None = None,
    positions: None = None,
    softcap: None = None,
    sink: Literal[False] = False,
    qk_norm: None = None,
    n_key_heads: None = None,
) -> _FullOutputs: ...


@overload
def FullAttention(
    A1: Any,
    A2: Any,
    A3: Any,
    B: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    offset: Any = None,
    ridge: float = 0.0,
    n_heads: int = 1,
    rank: int = ...,
    rotary: Rotary | None = None,
    positions: Any = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
    n_key_heads: int | None = None,
) -> HeadOutputs: ...


def FullAttention(
    A1: Any,
    A2: Any,
    A3: Any,
    B: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    offset: Any = None,
    ridge: float = 0.0,
    n_heads: int = 1,
    rank: int | None = None,
    rotary: Rotary | None = None,
    positions: Any = None,
    softcap: float | None = None,
    sink: bool = False,
    qk_norm: float | None = None,
    n_key_heads: int | None = None,
) -> _FullOutputs | HeadOutputs:
    """Fit (X, Y) so that attention outputs are given: ``0.5 sum_i w_i |(sum_h P_h A3 Y_h - B)_i|^2 + ridge``.

    ``P_h = softmax(A1 X_h A2^T + offset)`` row by row over unmasked keys; the ridge is ``0.5 ridge
    (||X||_F^2 + ||Y||_F^2)``. The source prints the loss without the 0.5, for one head and one text.

    Parameters
    ----------
    A1 : array_like, shape (n, d1), or a list of them
        Queries; a list holds one matrix a text, and so do then A2, A3, B and, where given, mask, weights and
        offset. X and Y are the same for all texts, and a query attends to keys of its text only.
    A2 : array_like, shape (k, d2), or a list
        Keys.
    A3 : array_like, shape (k, v), or a list
        What values are made of.
    B : array_like, shape (n, m), or a list
        Outputs.
    mask : "causal" or array_like of bool, shape (n, k), or a list, optional
    weights : array_like, shape (n,), or a list, optional
    offset : array_like, shape (n, k), or a list, optional
    ridge : float
        Needed where A3 has dependent columns, or more columns (times heads) than there are outputs: Y is then
        not determined.
    n_heads : int
        Heads whose outputs are added. They are a set: their order means nothing.
    rank : int, optional
        The width h of the heads: the unknown is then W_Q, shape (d1, h), and W_K, (d2, h), of each head and
        Y, and the problem is `attnfit.objectives.head_outputs.HeadOutputs`. Required by all that follow, and
        may exceed d1 and d2. The ridge is ``0.5 ridge`` times the square of all unknowns.
    rotary : Rotary, optional
        Turn queries ``W_Q^T a1`` and keys ``W_K^T a2`` by their positions.
    positions : array_like, shape (k,) or (k, F), or a list, optional
        Those of the keys, in the place of what ``rotary`` has.
    softcap : float, optional
        Keep logits below this size: ``cap tanh(q . k / cap)``.
    sink : bool
        Let part of each row go to a key without a value, whose logit is unknown, one a head.
    qk_norm : float, optional
        Divide queries and keys by the root of their mean square plus this, and multiply them by gains, before
        they are turned.
    n_key_heads : int, optional
        Heads that differ in W_K: each serves as many heads in their order. As many as heads by default.

    Raises
    ------
    ValueError
        If anything is not finite or of the wrong shape, a query sees no key, Z = [P_1 A3 ... P_H A3] is
        singular for every X and ridge is zero, or rank is missing or less than the columns turned.

    Notes
    -----
    Y is linear in the model, so `attnfit.minimize` eliminates it. To first order in X one text without a mask
    shows ``X C Y`` only, C being the covariance of keys and values; several texts or a causal mask have
    several C. Source: "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression",
    attention optimisation problem, with exact derivatives; Golub and Pereyra, "The differentiation of
    pseudo-inverses and nonlinear least squares problems whose variables separate" (1973); of rotary factors,
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> rng = np.random.default_rng(0)
    >>> texts = [rng.standard_normal((25, 3)) for _ in range(3)]
    >>> head = {"mask": "causal", "rank": 2, "rotary": problems.Rotary(frequencies=[0.5])}
    >>> blank = problems.FullAttention(texts, texts, texts, [np.zeros((25, 3))] * 3, **head)
    >>> x = rng.standard_normal(blank.n_unknowns)
    >>> problem = problems.FullAttention(texts, texts, texts, blank.predict(x), **head)
    >>> result = minimize(problem, random_state=0)
    >>> M, true = problem.matrices(result.x)[0], blank.matrices(x)[0]
    >>> "exact fit" in result.message, bool(abs(M - true).max() < 1e-6 * abs(true).max())
    (True, True)
    """
    plain = rotary is None and softcap is None and not sink and qk_norm is None
    options: dict[str, Any] = {
        "mask": mask, "weights": weights, "offset": offset, "ridge": ridge, "n_heads": n_heads
    }  # fmt: skip
    if rank is None and plain:
        for name, value in (("positions", positions), ("n_key_heads", n_key_heads)):
            if value is not None:
                raise ValueError(f"{name} is for factors of heads; pass rank= and rotary=, or leave it out")
        return _FullOutputs(A1, A2, A3, B, **options)
    return read_outputs(
        A1, A2, A3, B, rank, rotary=rotary, positions=positions, softcap=softcap, sink=sink, qk_norm=qk_norm,
        n_key_heads=n_key_heads, **options,
    )  # fmt: skip
