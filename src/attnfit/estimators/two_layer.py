"""Two-layer regression and mixtures as an estimator."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from attnfit.estimators.reading import read_weights
from attnfit.losses.activations import as_activation
from attnfit.problems import TwoLayer
from attnfit.solvers import Result, minimize

if TYPE_CHECKING:
    from attnfit.certificates import Certificate, MixtureCertificate

Array = NDArray[np.float64]


class TwoLayerRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Proportions of the columns of a dictionary: ``y = h(X softmax(logit_features coef)) + noise``.

    Each column of X is a signature (of a mineral, a cell type, a topic), each column of y a mixture to be
    taken apart: the proportions are not negative and sum to one. Minimises
    ``0.5 sum w (h(X f) - y)^2 + 0.5 ridge ||coef||^2`` over ``f = softmax(logit_features coef)``. With the
    identity as activation and no ``logit_features`` or ridge the answer is the exact optimum, certified by
    its duality gap.

    Parameters
    ----------
    activation : {"identity", "tanh", "sigmoid", "softplus", "gelu"} or tuple ``(h, h', h'')``
    logit_features : array or sparse matrix, shape (n_features, d), optional
        The logit of each signature is linear in these; by default each has a logit of its own.
    ridge : float
    solver : optional
        A solver of `attnfit.solvers`.
    tol : float
        Largest change of a log-odds of the softmax that the next Newton step may still make; mixtures are
        solved exactly whatever it is.
    max_iter : int
    random_state : int, optional

    Attributes
    ----------
    proportions_ : ndarray, shape (n_features,) or (n_features, k)
        Each column sums to one; proportions that are zero are exactly zero in a mixture.
    coef_ : ndarray, shape (d,) or (d, k)
        The logits, or the coefficients of ``logit_features``. In a mixture the logits of absent signatures
        lie 800 below the largest.
    duality_gap_ : ndarray, shape (k,)
        In a mixture: bounds of the loss's excess over the optimum; computed when first asked for.
    certificate_ : Certificate or MixtureCertificate
        Computed when first asked for.
    result_ : attnfit.solvers.Result
    is_mixture_ : bool
    n_iter_, n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where X had names.

    Notes
    -----
    Source: "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression", with the
    factor 0.5 that is missing there.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit.estimators.two_layer import TwoLayerRegressor
    >>> signatures = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [1.0, 1.0, 0.0]])
    >>> model = TwoLayerRegressor().fit(signatures, [0.7, 0.3, 1.0])
    >>> model.proportions_.round(6)
    array([0.7, 0.3, 0. ])
    """

    proportions_: Array
    coef_: Array
    result_: Result

    def __init__(
        self,
        activation: Any = "identity",
        logit_features: Any = None,
        ridge: float = 0.0,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
    ) -> None:
        self.activation = activation
        self.logit_features = logit_features
        self.ridge = ridge
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        # A convex combination of the columns cannot follow an arbitrary target.
        tags.regressor_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> TwoLayerRegressor:
        """Fit the proportions.

        Parameters
        ----------
        X : array, sparse matrix or data frame, shape (m, n_features)
            One row a band, one column a signature.
        y : array_like, shape (m,) or (m, k)
            One column a mixture.
        sample_weight : array_like, shape (m,), optional
            A weight w is the same as the row w times.

        Returns
        -------
        TwoLayerRegressor
            The estimator itself.

        Raises
        ------
        ValueError
            On input that is not finite, of the wrong shape or sign; the message names argument and index.
        """
        if y is None:
            raise ValueError(
                "TwoLayerRegressor requires y to be passed, but the target y is None; pass one value a row"
            )
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float64, multi_output=True, y_numeric=True
        )
        self.__dict__.pop("certificate_", None)
        weights = read_weights(sample_weight, X.shape[0], None)
        problem = TwoLayer(self.logit_features, X, y, self.activation, weights=weights, ridge=self.ridge)
        self.result_ = minimize(
            problem,
            solver=self.solver,
            tol=self.tol,
            max_iter=self.max_iter,
            random_state=self.random_state,
        )
        self.coef_ = self.result_.x
        self.proportions_ = problem.proportions(self.coef_)
        self.is_mixture_ = problem.is_mixture
        # The first evaluation may be the last; scikit-learn counts it as an iteration.
        self.n_iter_ = max(1, self.result_.n_iter)
        return self

    def predict(self, X: Any) -> Array:
        """Return ``h(X proportions_)``, shape (m,) or (m, k)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        return as_activation(self.activation)(np.asarray(X @ self.proportions_))

    @cached_property
    def certificate_(self) -> Certificate | MixtureCertificate:
        """What is certified of the fit; reads the data when first asked for."""
        check_is_fitted(self)
        if self.result_.problem is None:
            raise AttributeError("certificate_ needs the training data, which a pickled model does not carry")
        return self.result_.certificate()

    @property
    def duality_gap_(self) -> Array:
        """Bounds of the excess over the optimum, shape (k,)."""
        check_is_fitted(self)
        if not self.is_mixture_:
            raise AttributeError(
                "duality_gap_ is known for mixtures only (activation='identity', no logit_features, no "
                "ridge); see "
                "certificate_"
            )
        gap: Array = self.certificate_.gap  # type: ignore[attr-defined]
        return gap

    def __getstate__(self) -> dict[str, Any]:
        # A pickled model must not carry the training data along.
        state: dict[str, Any] = dict(super().__getstate__())
        if "result_" in state:
            state["result_"] = replace(state["result_"], problem=None)
        return state
