"""Design + loss + regulariser: value, gradient, Hessian and their products."""

from attnfit.problems.attention import Attention
from attnfit.problems.exponential import Exponential
from attnfit.problems.full_attention import FullAttention
from attnfit.problems.relu_softmax import ReluSoftmax
from attnfit.problems.rescaled import Rescaled
from attnfit.problems.softmax import Softmax
from attnfit.problems.three_layer import ThreeLayer
from attnfit.problems.two_layer import TwoLayer

__all__ = [
    "Attention",
    "Exponential",
    "FullAttention",
    "ReluSoftmax",
    "Rescaled",
    "Softmax",
    "ThreeLayer",
    "TwoLayer",
]
