"""Design + loss + regulariser: value, gradient, Hessian and their products."""

from attnfit.problems.exponential import Exponential
from attnfit.problems.rescaled import Rescaled
from attnfit.problems.softmax import Softmax

__all__ = ["Exponential", "Rescaled", "Softmax"]
