"""Covariances, tests and effects of fitted models, as functions of sums over rows."""

from attnfit.inference.covariance import Covariance
from attnfit.inference.fitted import Fitted
from attnfit.inference.hypotheses import compare
from attnfit.inference.statistics import FitStatistics

__all__ = ["Covariance", "FitStatistics", "Fitted", "compare"]
