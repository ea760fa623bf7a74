"""Attention maps from queries and keys, as an estimator."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from attnfit import problems
from attnfit.objectives.attention import Attention, AttentionLoss
from attnfit.solvers import Result, minimize

Array = NDArray[np.float64]


class AttentionRegressor(BaseEstimator):
    """The matrix X with ``softmax(queries X keys^T)`` row by row equal to given attention maps.

    For a head of a transformer: queries and keys are the hidden states (with a column of ones where the head
    has biases), and X is ``W_Q W_K^T / sqrt(d_head)``, of rank d_head. A map tells nothing of directions that
    no token has: judge a fit on maps of other text (`score`, `relative_error`), and give the rank.

    Parameters
    ----------
    rank : int, optional
        Rank of X; a full matrix by default.
    loss : str
        A loss of `attnfit.problems.Attention`. "auto" is "log_ratio" where all entries are positive, or zeros
        are explained by rounding to half or single precision; else "cross_entropy".
    mask : "causal" or None
        "causal": a query attends to no later key. Any other mask goes to `fit`.
    ridge : float
    solver : optional
        A solver of `attnfit.solvers`.
    tol : float
    max_iter : int
    random_state : int, optional

    Attributes
    ----------
    coef_ : ndarray, shape (d1, d2)
        X, of least norm among all that fit as well.
    factors_ : tuple of ndarray
        U (d1, rank) and V (d2, rank) with X = U V^T where a rank was given.
    feature_coef_ : ndarray, shape (p,)
        Coefficients of the pair features.
    relative_error_ : float
        ``||fitted - maps||_F / ||maps||_F`` on the training maps.
    loss_ : str
        The loss that was minimised.
    loss_value_ : float
    n_identified_ : tuple of int
        Directions of the queries and of the keys that the data identify.
    result_ : attnfit.solvers.Result
    n_features_in_, n_iter_ : int

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import AttentionRegressor
    >>> rng = np.random.default_rng(0)
    >>> tokens, X = rng.standard_normal((50, 6)), np.diag([1.0, -0.5, 0.0, 0.0, 0.0, 0.0])
    >>> maps = np.exp(tokens @ X @ tokens.T)
    >>> maps /= maps.sum(axis=1, keepdims=True)
    >>> model = AttentionRegressor(rank=2).fit(tokens, maps)
    >>> bool(abs(model.coef_ - X).max() < 1e-10)
    True
    """

    coef_: Array
    result_: Result

    def __init__(
        self,
        rank: int | None = None,
        loss: AttentionLoss | Literal["auto"] = "auto",
        mask: str | None = None,
        ridge: float = 0.0,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: int | None = None,
    ) -> None:
        self.rank = rank
        self.loss = loss
        self.mask = mask
        self.ridge = ridge
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def fit(
        self,
        queries: Any,
        maps: Any,
        keys: Any = None,
        *,
        mask: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
        pair_features: Any = None,
        callback: Any = None,
    ) -> AttentionRegressor:
        """Fit X.

        Parameters
        ----------
        queries : array_like, shape (n1, d1), or a list of them
            A list means several sequences that share X; all other arguments are then lists too.
        maps : array_like, shape (n1, n2)
            Non-negative; rows over unmasked keys should sum to one.
        keys : array_like, shape (n2, d2), optional
            The queries by default.
        mask : array_like of bool, shape (n1, n2), optional
            True where a query attends to a key; replaces the parameter of the same name.
        sample_weight : array_like, shape (n1,) or (n1, n2), optional
        offset : array_like, shape (n1, n2), optional
            Added to the logits.
        pair_features : list of array_like, shape (n1, n2), optional
            Features of pairs with scalar coefficients.
        callback : callable, optional
            As in `attnfit.minimize`.

        Returns
        -------
        AttentionRegressor

        Raises
        ------
        ValueError
            As `attnfit.problems.Attention`.
        """
        keys = queries if keys is None else keys
        mask = self.mask if mask is None else mask
        options = {"weights": sample_weight, "offset": offset, "pair_features": pair_features}
        loss: AttentionLoss = "cross_entropy" if self.loss == "auto" else self.loss
        full: Attention = Attention(queries, keys, maps, loss, mask, **options)
        if self.loss == "auto" and full.zeros_are_rounded():
            loss = "log_ratio"
        problem: Any = problems.Attention(
            queries, keys, maps, loss, mask, self.rank, ridge=self.ridge, **options
        )
        self.loss_ = loss
        self.result_ = minimize(
            problem,
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
            callback=callback,
            random_state=self.random_state,
        )
        self.coef_, self.feature_coef_ = problem.split(self.result_.x)
        if self.rank is not None:
            self.factors_ = problem.factors(self.result_.x)[:2]
        identified = full.identified()
        self.n_identified_ = identified.queries.shape[1], identified.keys.shape[1]
        self.n_features_in_ = len(self.coef_)
        self.n_iter_ = max(1, self.result_.n_iter)
        self.loss_value_ = self.result_.value
        self.relative_error_ = problem.relative_error(self.result_.x)
        return self

    def predict(
        self,
        queries: Any,
        keys: Any = None,
        *,
        mask: Any = None,
        offset: Any = None,
        pair_features: Any = None,
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return the maps, shape (n1, n2), zero where masked; a list for several sequences.

        Parameters are those of `fit`. Raises ValueError where features are not those of the fit.
        """
        problem = self._held_out(queries, None, keys, mask, offset, pair_features)
        maps: NDArray[np.float64] | list[NDArray[np.float64]] = problem.predict(self._point())
        return maps

    def relative_error(
        self,
        queries: Any,
        maps: Any,
        keys: Any = None,
        *,
        mask: Any = None,
        offset: Any = None,
        pair_features: Any = None,
    ) -> float:
        """Return ``||predicted - maps||_F / ||maps||_F`` over unmasked pairs."""
        problem = self._held_out(queries, maps, keys, mask, offset, pair_features)
        return problem.relative_error(self._point())

    def score(self, queries: Any, maps: Any, keys: Any = None, **options: Any) -> float:
        """Return ``1 - relative_error(...)``: one for a perfect prediction."""
        return 1.0 - self.relative_error(queries, maps, keys, **options)

    def _held_out(
        self, queries: Any, maps: Any, keys: Any, mask: Any, offset: Any, pair_features: Any
    ) -> Attention:
        """Return the problem on these sequences; without maps only predictions can be had from it."""
        check_is_fitted(self)
        keys = queries if keys is None else keys
        mask = self.mask if mask is None else mask
        loss: AttentionLoss = "entropy" if maps is None else "cross_entropy"
        problem: Attention = Attention(
            queries, keys, maps, loss, mask, offset=offset, pair_features=pair_features
        )
        d1, d2 = self.coef_.shape
        given = (problem.design.d1, problem.design.d2, problem.design.n_features)
        if given != (d1, d2, len(self.feature_coef_)):
            raise ValueError(
                f"queries have {given[0]} features, keys {given[1]} and pairs {given[2]}; the model was "
                f"fitted on {d1}, {d2} and {len(self.feature_coef_)}"
            )
        return problem

    def _point(self) -> Array:
        return np.concatenate([self.coef_.reshape(-1), self.feature_coef_])
