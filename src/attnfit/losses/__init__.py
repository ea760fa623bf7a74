"""What is fitted: pure functions of the logits of a block of rows.

`SeparableLoss` and `PointwiseLoss` are where a loss of your own starts; `check_loss` tests it; a problem
takes it as ``loss=``. The entry point group ``attnfit.losses`` gives it a name.
"""

from attnfit.losses.activations import ACTIVATIONS, Activation, as_activation, leaky_relu
from attnfit.losses.check import check_loss
from attnfit.losses.elementwise import ElementwiseLoss, PoissonDeviance, SquaredExponential
from attnfit.losses.loss import GramTerm, GroupStatistics, Loss
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.losses.separable import PointwiseLoss, SeparableLoss
from attnfit.losses.softmax import LOSSES, LogRatio, SoftmaxLoss, find_loss
from attnfit.losses.sums import MixedSum, SoftmaxSum
from attnfit.losses.vector_activations import VectorActivation
from attnfit.segments import Segments

__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "Activation",
    "ElementwiseLoss",
    "GramTerm",
    "GroupStatistics",
    "LogRatio",
    "Loss",
    "MixedSum",
    "PointwiseLoss",
    "PoissonDeviance",
    "Segments",
    "SeparableLoss",
    "SoftmaxLoss",
    "SoftmaxSum",
    "SquaredExponential",
    "SquaredRescaled",
    "VectorActivation",
    "as_activation",
    "check_loss",
    "find_loss",
    "leaky_relu",
]
