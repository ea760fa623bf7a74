"""Strategies that find a minimum, each on a page."""

from attnfit.solvers.batched import BatchedNewton
from attnfit.solvers.check import check_solver
from attnfit.solvers.conjugate_gradients import ConjugateGradients
from attnfit.solvers.damped import LevenbergMarquardt
from attnfit.solvers.factors import FactorLevenbergMarquardt
from attnfit.solvers.gradient_descent import GradientDescent
from attnfit.solvers.gram_powers import solve_even_power, solve_odd_power
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit
from attnfit.solvers.many import ManyResult, minimize_many
from attnfit.solvers.minimize import minimize
from attnfit.solvers.newton import Newton
from attnfit.solvers.published import PublishedNewton, SampledStep, Sampling, chernoff_rows
from attnfit.solvers.record import CheckpointError
from attnfit.solvers.result import History, Record, Result
from attnfit.solvers.sampled_two_layer import SampledTwoLayer
from attnfit.solvers.separation import Separation
from attnfit.solvers.simplex import ActiveSet
from attnfit.solvers.variable_projection import VariableProjection
from attnfit.solvers.verdicts import Status

__all__ = [
    "ActiveSet",
    "BatchedNewton",
    "CheckpointError",
    "ConjugateGradients",
    "Descent",
    "FactorLevenbergMarquardt",
    "GradientDescent",
    "History",
    "LevenbergMarquardt",
    "ManyResult",
    "Newton",
    "Outcome",
    "PublishedNewton",
    "Record",
    "Result",
    "SampledStep",
    "SampledTwoLayer",
    "Sampling",
    "Separation",
    "Solver",
    "Status",
    "StopFit",
    "VariableProjection",
    "check_solver",
    "chernoff_rows",
    "minimize",
    "minimize_many",
    "solve_even_power",
    "solve_odd_power",
]
