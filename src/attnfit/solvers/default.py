"""Which solver a problem gets when none is asked for."""

from __future__ import annotations

from typing import Any

from attnfit.problems.base import Problem
from attnfit.problems.inversion.layer_inversion import LayerInversion
from attnfit.problems.layers.layered import LayeredProblem
from attnfit.problems.maps.projected import ProjectedAttention
from attnfit.solvers.newton import Newton


def default_solver(problem: Problem) -> Any:
    """Return the exact solver for mixtures, all columns at once where there are several, restarts for the
    inversion of a layer, many starts for attention outputs whose maps fit in memory, else Newton's method,
    which for layered problems goes on from false optima.
    """
    if isinstance(problem, LayerInversion):
        from attnfit.solvers.levenberg_marquardt import LevenbergMarquardt

        return LevenbergMarquardt()
    if isinstance(problem, ProjectedAttention):
        from attnfit.solvers.variable_projection import VariableProjection

        return VariableProjection() if VariableProjection.suits(problem) else Newton()
    if not isinstance(problem, LayeredProblem):
        return Newton()
    if problem.is_mixture:
        from attnfit.solvers.simplex import ActiveSet

        return ActiveSet()
    if len(problem.shape) == 2:
        from attnfit.solvers.batched import BatchedNewton

        return BatchedNewton()
    from attnfit.solvers.escaping import EscapingNewton

    return EscapingNewton()
