"""Weight shift against data shift: which change of the target reproduces a move, and what one step does."""

from attnfit.incontext.constructions import linear_regression_layer, one_step, softmax_regression_layer
from attnfit.incontext.shifts import Shift, data_shift, shift

__all__ = [
    "Shift",
    "data_shift",
    "linear_regression_layer",
    "one_step",
    "shift",
    "softmax_regression_layer",
]
