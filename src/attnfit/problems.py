"""The problems that `attnfit.minimize` takes."""

from attnfit.objectives.attention import Attention
from attnfit.objectives.full_attention import FullAttention
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.layers import ReluSoftmax, ThreeLayer, TwoLayer
from attnfit.objectives.models import Exponential, Poisson, Rescaled, Softmax
from attnfit.objectives.rows import RowProblem

__all__ = [
    "Attention",
    "Exponential",
    "FullAttention",
    "LayerInversion",
    "Poisson",
    "ReluSoftmax",
    "Rescaled",
    "RowProblem",
    "Softmax",
    "ThreeLayer",
    "TwoLayer",
]
