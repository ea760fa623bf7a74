"""Strategies that find a minimum, each on a page."""

from attnfit.solvers.gradient_descent import GradientDescent
from attnfit.solvers.minimize import minimize
from attnfit.solvers.newton import Newton
from attnfit.solvers.result import History, Record, Result
from attnfit.solvers.tracking import StopFit

__all__ = ["GradientDescent", "History", "Newton", "Record", "Result", "StopFit", "minimize"]
