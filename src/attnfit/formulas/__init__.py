"""Formulas over data frames: columns of a model matrix that can be built again for new data."""

from attnfit.formulas.design import FormulaDesign
from attnfit.formulas.training import Training, read_training

__all__ = ["FormulaDesign", "Training", "read_training"]
