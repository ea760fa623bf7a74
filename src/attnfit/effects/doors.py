"""Poisson, softmax and exponential regression as users call them, with absorbed effects and without."""

from __future__ import annotations

from typing import Any, Literal, overload

from attnfit.effects.problem import AbsorbedProblem, absorbed_problem
from attnfit.losses.elementwise import FunctionName
from attnfit.losses.softmax import LossLike
from attnfit.objectives import models

Singletons = Literal["keep", "drop"]


@overload
def Poisson(
    A: Any,
    b: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: None = None,
    singletons: Singletons = "keep",
) -> models.Poisson: ...


@overload
def Poisson(
    A: Any,
    b: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any,
    singletons: Singletons = "keep",
) -> AbsorbedProblem: ...


def Poisson(
    A: Any,
    b: Any,
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any = None,
    singletons: Singletons = "keep",
) -> models.Poisson | AbsorbedProblem:
    """Poisson regression, or pseudo-likelihood: ``L(x) = sum w (exp(eta) - b eta) + penalties`` with ``eta =
    A x + sum_s a_s[c_s] + offset``.

    The effects ``a_s`` of the levels ``c_s`` of each set in ``absorb`` are fitted with x and eliminated: no
    column is made for them. The penalties are ``0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``; the
    ridge is one of x alone.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, K)
        With ``absorb`` there may be no columns: None.
    b : array_like, shape (n,)
        Counts, or any numbers that are not negative; zeros are data.
    weights, offset : array_like, shape (n,), optional
        Row weights w, and an addition to the logits: the logarithm of an exposure.
    row_penalty : float or array_like of shape (n,)
        Not with ``absorb``.
    ridge : float
    absorb : list of array_like, shape (n,) each, optional
        Labels of the sets of effects: integers, text, categories, truth values or times. A tuple of arrays is
        one set, of the combinations of their labels. All in memory; A may be on disk, which is read in one
        pass an evaluation where its rows are in the order of the set with the most levels, else in two.
    singletons : {"keep", "drop"}
        Whether rows that are the only one of a level stay: coefficients are the same, degrees of freedom are
        not.

    Returns
    -------
    attnfit.objectives.models.Poisson or attnfit.problems.AbsorbedProblem

    Raises
    ------
    ValueError
        On input that is not finite, of the wrong shape or sign, for labels that are missing or no labels, two
        sets that are the same, and data of which less than two rows carry information; the message names the
        argument and the index.
    NotImplementedError
        With ``absorb``: for data on Dask and for a row penalty.

    Notes
    -----
    Gradient ``A^T (w (exp(eta) - b))``, Hessian ``A^T diag(w exp(eta)) A``: convex.

    Rows that carry no information leave before the fit, and ``result.dropped`` names them: those of weight
    zero, of levels without outcomes, and separated ones (for two sets exactly: see
    `attnfit.effects.separation.separated_by_pair`). ``result.effects[s]`` holds the effects of set s,
    ``result.x`` the coefficients of A; NaN for a column that the effects explain. Method: Newton's, the
    effects of the largest set at their optimum in each read and those of the others eliminated by conjugate
    gradients on the cells of rows that have all levels in common. With two sets the preconditioner, where one
    is needed, is that of Gao, Kyng and Spielman, "Robust and practical solution of Laplacian equations by
    approximate elimination" (2023), arXiv:2303.00709. Standard errors are those of a fit with a dummy for
    every level. Source of the model: Santos Silva and Tenreyro, "The Log of Gravity" (2006),
    doi:10.1162/rest.88.4.641.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> rng = np.random.default_rng(0)
    >>> x, origin = rng.standard_normal(2000), rng.integers(0, 50, 2000)
    >>> destination = rng.integers(0, 40, 2000)
    >>> y = rng.poisson(np.exp(0.5 * x + 0.1 * np.sqrt(origin) - 0.02 * destination))
    >>> result = minimize(problems.Poisson(x[:, None], y, absorb=[origin, destination]))
    >>> result.x.round(3), len(result.effects[0]), len(result.effects[1])
    (array([0.493]), 50, 40)
    """
    given: dict[str, Any] = {"weights": weights, "offset": offset, "ridge": ridge}
    if absorb is None:
        return models.Poisson(A, b, row_penalty=row_penalty, **given)
    return absorbed_problem(lambda X: models.Poisson(X, b, **given), A, absorb, row_penalty, singletons)


@overload
def Softmax(
    A: Any,
    b: Any,
    groups: Any = None,
    loss: LossLike = "squared",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: None = None,
    singletons: Singletons = "keep",
) -> models.Softmax: ...


@overload
def Softmax(
    A: Any,
    b: Any,
    groups: Any = None,
    loss: LossLike = "squared",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any,
    singletons: Singletons = "keep",
) -> AbsorbedProblem: ...


def Softmax(
    A: Any,
    b: Any,
    groups: Any = None,
    loss: LossLike = "squared",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any = None,
    singletons: Singletons = "keep",
) -> models.Softmax | AbsorbedProblem:
    """Softmax regression: ``L(x) = sum_g Phi(softmax(A_g x + sum_s a_s[c_s] + offset_g)) + penalties``.

    ======================= ==================================================
    loss                    Phi(f)
    ======================= ==================================================
    "squared"               ``0.5 sum w (f - b)^2``
    "cross_entropy"         ``-sum w b log f``
    "kl"                    ``sum w b (log b - log f)``
    "linear_cross_entropy"  ``-sum w b f`` (not with absorb)
    "entropy"               ``-sum w f log f`` (b does not enter; not with absorb)
    ======================= ==================================================

    The penalties are ``0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2``. The papers print the squared
    loss without the 0.5.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, K)
        Rows are alternatives; a row of zeros is an outside option. With ``absorb`` there may be no columns:
        None.
    b : array_like, shape (n,)
        Target, usually shares of the group; zeros are data. It need not sum to one.
    groups : array_like, optional
        n labels in any order, or offsets ``0 < ... < n``; one group by default. Their normalisers are a set
        of effects already.
    loss : str, Loss or list of (str or Loss, float)
        A name of the table, one that a package registers, or a loss of your own: see `attnfit.losses`. A list
        of losses with weights is their weighted sum, with "sparse" (``sum w exp(z)``) and "rescaled" besides:
        see `attnfit.losses.find_loss`.
    weights : array_like, shape (n,) or (n_groups,), optional
        Row weights w, or one weight a group (groups in order of first appearance).
    offset : array_like, shape (n,), optional
        Added to the logits.
    row_penalty : float or array_like of shape (n,)
        The papers' regulariser w; not with ``absorb``.
    ridge : float
        Of x alone.
    absorb, singletons
        Sets of effects besides the groups: see `Poisson`.

    Returns
    -------
    attnfit.objectives.models.Softmax or attnfit.problems.AbsorbedProblem

    Raises
    ------
    ValueError, NotImplementedError
        As `Poisson`; the losses of the table that have no form with ``absorb`` are refused by name.

    Notes
    -----
    With ``f`` the softmax, ``p = Phi'(f)``, ``C`` the rows centred at ``A^T f`` of their group: gradient
    ``C^T (p f)``, Hessian ``C^T diag(t) C`` with ``t = f (Phi'' f + p - <p, f>)``. Sources: "In-Context
    Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax Regression via a Tensor
    Trick", Section 5; "The Closeness of In-Context Learning and Weight Shifting for Softmax Regression",
    Lemma 4.5 (sign corrected).

    With ``absorb`` cross entropy is the Poisson model with one effect a group: see `Poisson`, also for what
    leaves before the fit.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems
    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> problem = problems.Softmax(A, [0.5, 0.25, 0.25])
    >>> minimize(problem).x.round(4) + 0.0
    array([0.6931, 0.    ])
    """
    given: dict[str, Any] = {
        "groups": groups,
        "loss": loss,
        "weights": weights,
        "offset": offset,
        "ridge": ridge,
    }
    if absorb is None:
        return models.Softmax(A, b, row_penalty=row_penalty, **given)
    return absorbed_problem(lambda X: models.Softmax(X, b, **given), A, absorb, row_penalty, singletons)


@overload
def Exponential(
    A: Any,
    b: Any,
    function: FunctionName = "exp",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: None = None,
    singletons: Singletons = "keep",
) -> models.Exponential: ...


@overload
def Exponential(
    A: Any,
    b: Any,
    function: FunctionName = "exp",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any,
    singletons: Singletons = "keep",
) -> AbsorbedProblem: ...


def Exponential(
    A: Any,
    b: Any,
    function: FunctionName = "exp",
    *,
    weights: Any = None,
    offset: Any = None,
    row_penalty: Any = 0.0,
    ridge: float = 0.0,
    absorb: Any = None,
    singletons: Singletons = "keep",
) -> models.Exponential | AbsorbedProblem:
    """``L(x) = 0.5 sum w (u(eta) - b)^2 + 0.5 ||diag(row_penalty) A x||^2 + 0.5 ridge ||x||^2`` with ``eta =
    A x + sum_s a_s[c_s] + offset``.

    Parameters
    ----------
    A : array, sparse matrix, memory map or data frame, shape (n, K)
        With ``absorb`` there may be no columns: None.
    b : array_like, shape (n,)
    function : {"exp", "cosh", "sinh"}
        The function u; with ``absorb`` "exp" only.
    weights, offset : array_like, shape (n,), optional
        Row weights w and an addition to the logits.
    row_penalty : float or array_like of shape (n,)
        The papers' regulariser w; not with ``absorb``.
    ridge : float
        Of x alone.
    absorb, singletons
        Sets of effects: see `Poisson`.

    Returns
    -------
    attnfit.objectives.models.Exponential or attnfit.problems.AbsorbedProblem

    Raises
    ------
    ValueError, NotImplementedError
        As `Poisson`.
    OverflowError
        From `value` and its kin where ``u(eta)^2`` exceeds float64.

    Notes
    -----
    With ``v = u'`` and ``c = u - b``: gradient ``A^T (w c v)``, Hessian ``A^T diag(w (v^2 + c u)) A``.
    Source: "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression", Definition 7.5.

    Examples
    --------
    >>> from attnfit import minimize, problems
    >>> doubling = problems.Exponential([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], [1.0, 2.0, 4.0])
    >>> abs(minimize(doubling).x).round(4)
    array([0.    , 0.6931])
    """
    given: dict[str, Any] = {"weights": weights, "offset": offset, "ridge": ridge}
    if absorb is None:
        return models.Exponential(A, b, function, row_penalty=row_penalty, **given)
    if function != "exp":
        raise NotImplementedError(
            f"absorb takes function='exp' only, not {function!r}; pass the effects as sparse dummies"
        )
    return absorbed_problem(lambda X: models.Exponential(X, b, **given), A, absorb, row_penalty, singletons)
