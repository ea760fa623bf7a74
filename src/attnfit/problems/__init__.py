"""Design + loss + regulariser: value, gradient, Hessian and their products."""

from attnfit.problems.inversion.layer_inversion import LayerInversion
from attnfit.problems.layers.relu_softmax import ReluSoftmax
from attnfit.problems.layers.three_layer import ThreeLayer
from attnfit.problems.layers.two_layer import TwoLayer
from attnfit.problems.maps.attention import Attention
from attnfit.problems.maps.full_attention import FullAttention
from attnfit.problems.rows.exponential import Exponential
from attnfit.problems.rows.poisson import Poisson
from attnfit.problems.rows.rescaled import Rescaled
from attnfit.problems.rows.softmax import Softmax

__all__ = [
    "Attention",
    "Exponential",
    "FullAttention",
    "LayerInversion",
    "Poisson",
    "ReluSoftmax",
    "Rescaled",
    "Softmax",
    "ThreeLayer",
    "TwoLayer",
]
