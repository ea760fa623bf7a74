"""Scorers of share models for scikit-learn: groups go to the prediction and to the score."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.metadata_routing import UNUSED

from attnfit.data.inputs import choose, parse_groups
from attnfit.estimators import reading

Array = NDArray[np.float64]
METRICS = ("log_loss", "brier")
# As in scikit-learn: a share of zero where something was chosen costs much, but not everything.
LEAST = float(np.finfo(np.float64).eps)


class ShareScorer(BaseEstimator):
    """The mean over groups of a loss of shares, negative so that greater is better.

    Parameters
    ----------
    metric : {"log_loss", "brier"}
        ``-sum y log f`` or ``sum (y - f)^2`` of a group; with ``outside_good=True`` the outside good counts.

    Notes
    -----
    Called as a scorer, ``scorer(estimator, X, y, groups=..., sample_weight=..., offset=...)``. In
    `cross_val_score`, `GridSearchCV` and the like the arguments arrive by metadata routing:
    ``ShareScorer("log_loss").set_score_request(groups=True)``.

    Examples
    --------
    >>> from attnfit import datasets
    >>> from attnfit.estimators import ShareScorer, SoftmaxRegressor
    >>> travel = datasets.load_travel_mode()
    >>> model = SoftmaxRegressor(loss="cross_entropy").fit(travel.A, travel.b, groups=travel.groups)
    >>> round(ShareScorer("log_loss")(model, travel.A, travel.b, groups=travel.groups), 6)
    -0.94823
    """

    # The estimator is no metadata.
    __metadata_request__score: ClassVar[dict[str, Any]] = {"estimator": UNUSED}

    def __init__(self, metric: Literal["log_loss", "brier"] = "log_loss") -> None:
        self.metric = metric

    def __call__(self, estimator: Any, X: Any, y: Any, **metadata: Any) -> float:
        """Return `score`."""
        return self.score(estimator, X, y, **metadata)

    def score(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
    ) -> float:
        """Return the negative mean loss of a group.

        Parameters
        ----------
        estimator : fitted estimator or pipeline
        X, y, groups, sample_weight, offset
            As in ``fit``; weights are those of groups, given row by row or once a group.

        Raises
        ------
        ValueError
            If the estimator was fitted on several groups and none are given.
        """
        choose(self.metric, dict.fromkeys(METRICS), "metric")
        given = {"groups": groups, "offset": offset}
        shares = estimator.predict(X, **{name: value for name, value in given.items() if value is not None})
        last = (
            estimator[-1] if hasattr(estimator, "steps") else getattr(estimator, "best_estimator_", estimator)
        )
        n = len(shares)
        if isinstance(groups, str):
            groups = reading.column_of(X, groups)[0]
        sets = parse_groups(groups, n)
        target = reading.read_target(last, y, n)
        weights = reading.read_weights(sample_weight, n, None if groups is None else sets)
        numbers = reading.group_numbers(sets, n)
        sizes = np.bincount(numbers, minlength=len(sets))
        row_weights = np.ones(n) if weights is None else weights
        group_weights = np.bincount(numbers, weights=row_weights, minlength=len(sets)) / sizes
        loss: Any = np.bincount(
            numbers, weights=row_weights * self._loss(target, shares), minlength=len(sets)
        )
        if getattr(last, "outside_good", False):
            rest, left = (
                1.0 - np.bincount(numbers, weights=s, minlength=len(sets)) for s in (target, shares)
            )
            loss = loss + group_weights * self._loss(rest, np.maximum(left, 0.0))
        return -float(loss.sum() / group_weights.sum())

    def _loss(self, target: Any, shares: Any) -> Array:
        if self.metric == "brier":
            return np.asarray((target - shares) ** 2)
        return np.asarray(-target * np.log(np.maximum(shares, LEAST)))
