"""scikit-learn estimators over the problems, their report and their files."""

from attnfit.estimators.exponential import ExponentialRegressor
from attnfit.estimators.files import load
from attnfit.estimators.model_header import ModelFileError
from attnfit.estimators.rescaled import RescaledSoftmaxRegressor
from attnfit.estimators.softmax import SoftmaxRegressor
from attnfit.estimators.summary import Summary

__all__ = [
    "ExponentialRegressor",
    "ModelFileError",
    "RescaledSoftmaxRegressor",
    "SoftmaxRegressor",
    "Summary",
    "load",
]
