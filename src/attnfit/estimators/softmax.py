"""Softmax regression as an estimator."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from attnfit.data.inputs import choose
from attnfit.estimators.absorbing import Absorbed
from attnfit.estimators.base import with_options
from attnfit.estimators.choice_effects import ChoiceEffectsMixin
from attnfit.estimators.reading import Rows
from attnfit.estimators.shares import ShareRegressor
from attnfit.inference.exact_ties import ExactTies
from attnfit.losses.loss import Loss
from attnfit.losses.softmax import LossLike, find_loss
from attnfit.losses.sums import Composite
from attnfit.objectives.models import Softmax
from attnfit.objectives.rows import RowProblem

Array = NDArray[np.float64]
TIES = ("counts", "exact")
# Losses that are minus a log likelihood, up to what the targets say.
LIKELIHOODS = ("cross_entropy", "kl")


@with_options
class SoftmaxRegressor(ChoiceEffectsMixin, ShareRegressor):
    """Shares as a softmax: ``y = softmax(X coef + offset)`` within each group.

    Minimises ``sum over groups of Phi(softmax(X_g x + offset_g)) + 0.5 sum w (row_penalty * X x)^2 + 0.5
    ridge ||x||^2``, where Phi(f) is

    ======================= =================================
    loss                    Phi(f)
    ======================= =================================
    "squared"               ``0.5 sum w (f - y)^2``
    "cross_entropy"         ``-sum w y log f``
    "kl"                    ``sum w y (log y - log f)``
    "linear_cross_entropy"  ``-sum w y f``
    "entropy"               ``-sum w f log f`` (y does not enter)
    ======================= =================================

    Parameters
    ----------
    loss : str, Loss or list of (str or Loss, float)
        A list is the weighted sum of losses: see `attnfit.losses.find_loss`.
        "squared" is for shares; choices (one 1 a group) call for "cross_entropy", the conditional logit.
    ridge : float
    row_penalty : float or array_like of shape (n,)
    outside_good : bool
        Add to each group a row of zeros whose target is one minus the sum of the others.
    %(options)s
    ties : {"counts", "exact"}, optional
        What several ones in a group are under cross entropy: counts, each a choice from the whole group (the
        default, with a warning), or one choice of so many rows, as in the conditional logit of Stata and
        statsmodels.
    absorb : list of str, optional
        Sets of fixed effects besides the groups by name of the column of X; a tuple of names is one set, of
        combinations. See `fit`.

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
        Coefficients in the units of X.
    covariance_, standard_errors_ : ndarray, shapes (d, d) and (d,)
        Cross entropy and KL: inverse of the observed information. Other losses: sandwich ``H^+ S H^+`` with
        one score a group where there are several groups, else one a row. NaN for a coefficient that the data
        do not identify. Computed when first asked for.
    loss_value_ : float
        Sum of Phi, without the penalties.
    log_likelihood_ : float
        ``sum w y log f``; cross entropy and KL only.
    log_normaliser_ : float
        ``log sum exp(X coef + offset)`` of the training rows; where these form one group.
    r2_ : float
        Computed when first asked for.
    result_ : attnfit.solvers.Result
    n_groups_, n_unbalanced_groups_ : int
        Number of groups, and of those whose targets do not sum to one (allowed).
    n_iter_, n_rows_, n_features_in_ : int
    feature_names_in_ : ndarray of str, shape (d,)
        Where X had names.

    Notes
    -----
    Sources: "In-Context Learning for Attention Scheme: from Single Softmax Regression to Multiple Softmax
    Regression via a Tensor Trick", Section 5 (gradient and Hessian); McFadden (1974), conditional logit
    (cross entropy).

    Examples
    --------
    >>> from attnfit import datasets
    >>> from attnfit.estimators import SoftmaxRegressor
    >>> travel = datasets.load_travel_mode()
    >>> model = SoftmaxRegressor(loss="cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    >>> model.coef_.round(4)
    array([ 5.2074,  3.869 ,  3.1632, -0.0155, -0.0961,  0.0133])
    >>> model.standard_errors_.round(4)
    array([0.7791, 0.4431, 0.4503, 0.0044, 0.0104, 0.0103])
    """

    _normaliser_name = "log_normaliser_"

    def __init__(
        self,
        loss: LossLike = "squared",
        ridge: float = 0.0,
        row_penalty: Any = 0.0,
        outside_good: bool = False,
        solver: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
        random_state: Any = None,
        n_starts: int | Literal["auto"] = "auto",
        separation: Literal["warn", "drop", "keep"] = "warn",
        covariance: Literal["auto", "classic", "robust", "row", "cluster"] = "auto",
        weight_type: Literal["sampling", "frequency"] = "sampling",
        ties: Literal["counts", "exact"] | None = None,
        absorb: Any = None,
    ) -> None:
        self._remember(locals())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = self.loss in LIKELIHOODS
        return tags

    def _loss(self) -> Loss:
        return find_loss(self.loss)

    def _problem(self, rows: Rows) -> Softmax:
        likelihood = self.loss in LIKELIHOODS
        if rows.counts is not None and (self.loss == "entropy" or isinstance(self._loss(), Composite)):
            raise ValueError(
                f"sample_weight repeats rows where there are no groups, for which loss={self.loss!r} has no "
                "form; pass groups (np.zeros(n) for one group) to weight the loss instead"
            )
        if likelihood and (rows.y < 0).any():
            i = int(np.flatnonzero(rows.y < 0)[0])
            raise ValueError(
                f"y is negative at index {i} ({rows.y[i]:g}); loss={self.loss!r} needs shares >= 0, "
                "loss='squared' takes any target"
            )
        return Softmax(
            rows.design,
            rows.target,
            groups=rows.groups,
            loss=self.loss,
            # w copies of a row with share f have the same -wy log f whatever w: nothing is left to weight.
            weights=rows.loss_weights if likelihood else rows.squared_weights,
            offset=rows.logit_offset,
            row_penalty=rows.row_penalty,
            ridge=self.ridge,
        )

    def _objective(self, problem: Any, labels: Absorbed | None) -> Any:
        if self.ties is not None:
            choose(self.ties, dict.fromkeys(TIES), "ties")
        objective = problem if labels is None else super()._objective(problem, labels)
        if self.ties != "exact":
            return objective
        if labels is not None:
            raise ValueError("ties='exact' does not go with absorb; leave ties out")
        if self.loss != "cross_entropy":
            raise ValueError(f"ties='exact' is a likelihood: use loss='cross_entropy', not {self.loss!r}")
        return ExactTies(problem)

    def _bounded(self, shares: Array) -> Array:
        # Against the normaliser of the training data a new row can outweigh all of its rows; its share is
        # still one at most.
        return np.minimum(shares, 1.0)

    def _note_targets(self, rows: Rows, *, grouped: bool) -> None:
        if not grouped:
            # Of one group there is nothing to say about choices.
            super()._note_targets(rows, grouped=grouped)
            return
        target, totals = rows.target, rows.totals
        assert totals is not None
        several = totals.above and self.loss == "cross_entropy" and self.ties is None
        if several and rows.n_groups > 1 and ((target == 0.0) | (target == 1.0)).all():
            warnings.warn(
                f"y has several ones in {totals.n_above} groups, which are fitted as counts; the "
                "conditional logit of Stata and statsmodels takes their number as given: ties='exact' does, "
                "ties='counts' silences this",
                UserWarning,
                stacklevel=5,
            )
        choices = self.loss == "squared" and rows.n_groups > 1 and not (totals.n_above or totals.n_below)
        if choices and ((target == 0.0) | (target == 1.0)).all():
            warnings.warn(
                "y holds choices (one 1 in each group, else 0), on which the squared loss is the "
                "Brier score: its best fit is often nearly a step function; use loss='cross_entropy' for "
                "choices, the squared loss is for shares",
                UserWarning,
                stacklevel=5,
            )

    def _after_fit(self, rows: Rows, problem: RowProblem, y: Any, groups: Any) -> None:
        super()._after_fit(rows, problem, y, groups)
        self.__dict__.pop("log_likelihood_", None)
        if self.loss not in LIKELIHOODS:
            return
        counts = 1.0 if rows.counts is None else rows.counts
        if self.ties == "exact":
            self.log_likelihood_ = -self.loss_value_
        elif self.loss == "cross_entropy":
            # The problem sees the share w f of w copies.
            self.loss_value_ += float(np.sum(xlogy(counts * rows.y, counts)))
            self.log_likelihood_ = -self.loss_value_
        elif rows.totals is not None:
            # Elsewhere: one more read of the targets for a number that the loss implies.
            weights, outside_weights = (
                (counts, 1.0) if rows.weights is None else (rows.weights, rows.outside_weights)
            )
            best = np.sum(weights * xlogy(rows.y, rows.y))
            best += np.sum(outside_weights * xlogy(rows.outside, rows.outside))
            self.log_likelihood_ = float(best) - self.loss_value_
