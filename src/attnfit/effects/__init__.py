"""Fixed effects of many levels, eliminated from the fit: no column is ever made for a level."""

from attnfit.effects.problem import AbsorbedProblem
from attnfit.effects.values import Effects, EffectSet

__all__ = ["AbsorbedProblem", "EffectSet", "Effects"]
