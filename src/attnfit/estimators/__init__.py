"""scikit-learn estimators over the problems, their report and their files."""

from attnfit.estimators.attention import AttentionRegressor
from attnfit.estimators.exponential import ExponentialRegressor, PoissonRegressor
from attnfit.estimators.files import load
from attnfit.estimators.model_header import ModelFileError
from attnfit.estimators.reading import ShareTotals
from attnfit.estimators.rescaled import RescaledSoftmaxRegressor
from attnfit.estimators.scorers import ShareScorer
from attnfit.estimators.softmax import SoftmaxRegressor
from attnfit.estimators.summary import Summary
from attnfit.estimators.two_layer import TwoLayerRegressor

__all__ = [
    "AttentionRegressor",
    "ExponentialRegressor",
    "ModelFileError",
    "PoissonRegressor",
    "RescaledSoftmaxRegressor",
    "ShareScorer",
    "ShareTotals",
    "SoftmaxRegressor",
    "Summary",
    "TwoLayerRegressor",
    "load",
]
