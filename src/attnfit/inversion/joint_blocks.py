"""Blocks whose tokens see one another: paths where descents find no input, and what determinants prove."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnfit.inversion.block_bounds import ROUNDING
from attnfit.inversion.homotopy import Equation, follow, sign
from attnfit.inversion.in_order import CROSSINGS, NARROW, SAME, SAME_ERRORS, WORST_CONDITION
from attnfit.inversion.recovered import Given, Recovery
from attnfit.inversion.search import Found
from attnfit.objectives.block_problem import BlockInversion
from attnfit.objectives.objective import MAX_DENSE

Array = NDArray[np.float64]

# Unknowns up to which a path is followed where no descent reached a zero residual.
MAX_PATH = 512


def is_square(problem: BlockInversion) -> bool:
    """Return whether no token is known and no row has further equations."""
    return bool(len(problem.unknown) == problem.n and problem.m == problem.d)


def with_paths(given: Given, found: Found) -> tuple[Found, int]:
    """Return what was found together with the inputs on a path from the output, and the points of that."""
    problem = given.layer
    assert isinstance(problem, BlockInversion)
    most = NARROW if found.inputs else MAX_PATH
    if not (problem.bounded and is_square(problem)) or problem.n_unknowns > most:
        return found, 0

    def value(x: Array) -> Array:
        return problem.stack.forward(problem.token_rows(x)).output.T.reshape(-1)

    def jacobian(x: Array) -> Array:
        J = problem.stack.jacobian(problem.stack.forward(problem.token_rows(x)), problem.unknown)
        n, m = problem.B.shape
        return np.ascontiguousarray(J.reshape(n, m, -1).transpose(1, 0, 2)).reshape(n * m, -1)

    crossings, steps = follow(Equation(value, jacobian, problem.B.T.reshape(-1)), CROSSINGS)
    same = max(SAME, SAME_ERRORS * given.precision)
    inputs, best, least = list(found.inputs), found.best, found.square
    for x in crossings:
        square = float(problem.evaluate_many(x[None]).squares[0])
        if square < least:
            best, least = x, square
        if square <= given.enough and not any(
            np.linalg.norm(other - x) <= same * np.linalg.norm(other) for other in inputs
        ):
            inputs.append(x)
    return Found(best, least, inputs, found.n_starts), steps


def judge_blocks(given: Given, report: Recovery) -> Recovery:
    """Return a verdict with what determinants, and bounded branches, add to it."""
    problem = given.layer
    assert isinstance(problem, BlockInversion)
    report = replace(report, radius=_radius(given, report))
    if report.verdict == "not recovered":
        exists = problem.bounded and is_square(problem)
        tail = "; an input exists, the search did not find it"
        return replace(report, message=report.message + tail) if exists else report
    if not (is_square(problem) and problem.n_unknowns <= MAX_DENSE):
        return report
    jacobians = [problem.jacobian(x) for x in report.inputs]
    signs = np.array([_sign(J, problem) for J in jacobians], dtype=int)
    total = int(signs.sum())
    report = replace(report, signs=signs, sign_sum=total)
    if not problem.bounded or 0 in signs:
        return report
    message = report.message
    if len(report.inputs) == 1 and total < 0:
        message = (
            "ambiguous: proven: the determinant of the Jacobian is negative at the input found, so that "
            "others give this output"
        )
    elif total != 1:
        message += f"; their determinants have signs that add to {total}, not to 1: there are more"
    return replace(report, verdict="ambiguous", message=message)


def _sign(J: Array, problem: BlockInversion) -> int:
    """Return the sign of the determinant with outputs in the order of the unknowns."""
    s = np.linalg.svd(J, compute_uv=False)
    if not s[-1] * WORST_CONDITION > s[0]:
        return 0
    n, m = problem.B.shape
    return sign(J.reshape(n, m, -1).transpose(1, 0, 2).reshape(n * m, -1))


def _radius(given: Given, report: Recovery) -> Array | None:
    """Return how far each token can be from an exact one, to first order."""
    problem = given.layer
    at = report.identifiability
    if problem.n_unknowns > MAX_DENSE or at.condition is None or at.condition > WORST_CONDITION:
        return None
    inverse = np.abs(np.linalg.pinv(problem.jacobian(report.x)))
    errors = np.abs(problem.residuals(report.x)) + (given.precision + ROUNDING) * np.abs(problem.B)
    moves = (inverse @ errors.reshape(-1)).reshape(problem.shape)
    return np.asarray(np.linalg.norm(moves, axis=0))
