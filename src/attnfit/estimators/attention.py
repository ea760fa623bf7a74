"""Attention maps from queries and keys, as an estimator."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from attnfit import problems
from attnfit.estimators.head_fit import FittedHead, held_out_head, point_of, unseen_note
from attnfit.objectives.attention import Attention, AttentionLoss
from attnfit.objectives.head_checks import distance_note, few_pairs_note, sums_note
from attnfit.objectives.rotary import Rotary, rotary_matrices
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
    mask : {"causal", "causal:W", "window:W"} or None
        "causal": a query attends to no later key; with W, to the last W keys only, its own included.
        "window:W": to keys at distances up to W. Any other mask goes to `fit`.
    ridge : float
    solver : optional
        A solver of `attnfit.solvers`.
    tol : float
    max_iter : int
    random_state : int, optional
    rotary : attnfit.problems.Rotary, optional
        Queries and keys are turned by their positions. This and the next three need ``rank``, the width of
        the head, and ask for losses "squared", "cross_entropy", "kl" or "log_ratio".
    softcap : float, optional
        Logits are ``cap tanh(q . k / cap)``.
    sink : bool
        Part of each row goes nowhere: rows may sum to less than one.
    qk_norm : float, optional
        Queries and keys are divided by the root of their mean square plus this.
    n_starts : int
        Random starts of such a fit; the best goes on.

    Attributes
    ----------
    coef_ : ndarray, shape (d1, d2)
        X, of least norm among all that fit as well; not where queries and keys are turned or normed, or
        logits capped.
    factors_ : tuple of ndarray
        U (d1, rank) and V (d2, rank) with X = U V^T where a rank was given; W_Q and W_K of a head with
        rotary, softcap, sink or qk_norm, W_Q of shape (heads, d1, rank) for several.
    feature_coef_ : ndarray, shape (p,)
        Coefficients of the pair features; for several heads (heads, p).
    sink_ : float, or ndarray of shape (heads,)
        Logit of the sink.
    gains_ : tuple of ndarray, shape (rank,)
        Gains of queries and keys, with qk_norm.
    frequencies_identified_ : ndarray of bool, shape (F,)
        Which frequencies turn by more than a radian over the distances of the fit: of slower ones only sums
        are known.
    distances_ : tuple of float
        The smallest and largest distance of a query from a key it attends to, with rotary.
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
        rotary: Rotary | None = None,
        softcap: float | None = None,
        sink: bool = False,
        qk_norm: float | None = None,
        n_starts: int = 4,
    ) -> None:
        self.rank = rank
        self.loss = loss
        self.mask = mask
        self.ridge = ridge
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.rotary = rotary
        self.softcap = softcap
        self.sink = sink
        self.qk_norm = qk_norm
        self.n_starts = n_starts

    @property
    def _is_head(self) -> bool:
        """Whether a setting is more than a bilinear form has."""
        settings = (self.rotary, self.softcap, self.qk_norm)
        return bool(self.sink) or any(setting is not None for setting in settings)

    def fit(
        self,
        queries: Any,
        maps: Any,
        keys: Any = None,
        *,
        positions: Any = None,
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
            Non-negative; rows over unmasked keys should sum to one. Tensors of torch of any type will do.
            With rotary, softcap, sink or qk_norm also (heads, n1, n2), of heads that share their keys.
        keys : array_like, shape (n2, d2), optional
            The queries by default.
        positions : array_like, shape (n2,), optional
            Positions of the keys, with rotary; 0, 1, ... by default.
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

        Warns
        -----
        UserWarning
            Where rows of maps do not sum to one, pairs are fewer than unknowns, or what is left without
            rotary depends on the distance; with numbers and the remedy.
        """
        same = keys is None
        keys = queries if keys is None else keys
        mask = self.mask if mask is None else mask
        if self._is_head:
            head = FittedHead.fit(
                self, queries, keys, maps, mask, positions, sample_weight, offset, pair_features, callback
            )
            for name, value in head.attributes().items():
                setattr(self, name, value)
            _warn(None if self.sink else sums_note(maps, mask))
            _warn(few_pairs_note(head.problem))
            return self
        if positions is not None:
            raise ValueError(
                "positions are for rotary embeddings; pass rotary=Rotary(...), or leave them out"
            )
        options = {"weights": sample_weight, "offset": offset, "pair_features": pair_features}
        loss: AttentionLoss = "cross_entropy" if self.loss == "auto" else self.loss
        full: Attention = Attention(queries, keys, maps, loss, mask, **options)
        if self.loss == "auto" and full.zeros_are_rounded():
            loss = "log_ratio"
        problem: Any = problems.Attention(
            queries, keys, maps, loss, mask, self.rank, ridge=self.ridge, **options
        )
        _warn(sums_note(maps, mask))
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
        if same and loss == "log_ratio":
            _warn(distance_note(full, self._point(), self.relative_error_))
        return self

    def rotary_matrices_(self) -> tuple[NDArray[np.complex128], Array]:
        """Return M, shape (F, d1, d2), and X_0, shape (d1, d2): the logit of tokens x and y at distance D is
        ``x' X_0 y + Re sum_f exp(i w_f D) x' M_f y`` before a cap.

        M_f has complex rank one. Compare two fits by these: the factors themselves are known up to a complex
        number a frequency. Of several heads both have the heads first.

        Raises
        ------
        ValueError
            If the fit had no rotary embedding, or norms, which are not bilinear.
        """
        check_is_fitted(self)
        if self.rotary is None or self.qk_norm is not None:
            raise ValueError("rotary_matrices_ needs a fit with rotary=Rotary(...) and without qk_norm")
        W_Q, W_K = self.factors_
        return rotary_matrices(W_Q, W_K, self.rotary)

    def predict(
        self,
        queries: Any,
        keys: Any = None,
        *,
        positions: Any = None,
        mask: Any = None,
        offset: Any = None,
        pair_features: Any = None,
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """Return the maps, shape (n1, n2), zero where masked; a list for several sequences.

        Parameters are those of `fit`. Raises ValueError where features are not those of the fit.
        """
        if self._is_head:
            check_is_fitted(self)
            head = held_out_head(self, queries, None, keys, positions, mask, offset, pair_features)
            _warn(unseen_note(head, self))
            found: Array | list[Array] = head.predict(point_of(self, head))
            return found
        problem = self._held_out(queries, None, keys, mask, offset, pair_features)
        maps: NDArray[np.float64] | list[NDArray[np.float64]] = problem.predict(self._point())
        return maps

    def relative_error(
        self,
        queries: Any,
        maps: Any,
        keys: Any = None,
        *,
        positions: Any = None,
        mask: Any = None,
        offset: Any = None,
        pair_features: Any = None,
    ) -> float:
        """Return ``||predicted - maps||_F / ||maps||_F`` over unmasked pairs."""
        if self._is_head:
            check_is_fitted(self)
            head = held_out_head(self, queries, maps, keys, positions, mask, offset, pair_features)
            _warn(unseen_note(head, self))
            return head.relative_error(point_of(self, head))
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


def _warn(note: str | None) -> None:
    if note is not None:
        warnings.warn(note, UserWarning, stacklevel=3)
