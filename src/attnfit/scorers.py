"""Scorers for scikit-learn that hand groups on to the prediction: negative losses, greater is better.

`sklearn.metrics.make_scorer` gives groups to the metric alone; a model of several groups then refuses to
predict, or takes all rows of a fold for one group.

Examples
--------
>>> import sklearn
>>> from sklearn.model_selection import GroupKFold, cross_validate
>>> from attnfit import SoftmaxRegressor, datasets, scorers
>>> travel = datasets.load_travel_mode()
>>> with sklearn.config_context(enable_metadata_routing=True):
...     model = SoftmaxRegressor("cross_entropy").set_fit_request(groups=True)
...     found = cross_validate(
...         model, travel.A, travel.b, params={"groups": travel.groups}, cv=GroupKFold(5),
...         scoring={"log_loss": scorers.log_loss, "brier": scorers.brier},
...     )
>>> bool(found["test_log_loss"].mean() > -1.2)
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.utils.metadata_routing import MetadataRequest

from attnfit import metrics

__all__ = ["RoutedScorer", "brier", "log_loss"]


class RoutedScorer:
    """The negative of a metric of shares, with groups and offset for the prediction.

    Parameters
    ----------
    metric : callable ``(y, shares, groups, sample_weight)``
    name : str
    """

    def __init__(self, metric: Callable[..., float], name: str) -> None:
        self.metric, self.name = metric, name

    def __call__(
        self,
        estimator: Any,
        X: Any,
        y: Any,
        groups: Any = None,
        sample_weight: Any = None,
        offset: Any = None,
    ) -> float:
        """Return the score of a fitted estimator or pipeline."""
        given = {"groups": groups, "offset": offset}
        shares = estimator.predict(X, **{name: value for name, value in given.items() if value is not None})
        last = getattr(estimator, "best_estimator_", estimator)
        last = last[-1] if hasattr(last, "steps") else last
        outside = bool(getattr(last, "outside_good", False))
        if isinstance(groups, str):
            groups = X[groups].to_numpy()
        return -self.metric(y, shares, groups, sample_weight, outside_good=outside)

    def get_metadata_routing(self) -> MetadataRequest:
        """Return the request for groups, weights and offsets."""
        request = MetadataRequest(owner=self)
        for name in ("groups", "sample_weight", "offset"):
            request.score.add_request(param=name, alias=True)
        return request

    def __repr__(self) -> str:
        return f"attnfit.scorers.{self.name}"


log_loss = RoutedScorer(metrics.log_loss, "log_loss")
brier = RoutedScorer(metrics.brier, "brier")
