"""The one call that fits any problem."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import Problem, Reduction
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inputs import as_point
from attnfit.problems.memory import parse_size
from attnfit.solvers.checkpoint import Checkpoint
from attnfit.solvers.default import default_solver
from attnfit.solvers.descent import Descent
from attnfit.solvers.identification import least_norm, recession_direction, unidentified_directions
from attnfit.solvers.journal import Journal
from attnfit.solvers.journaled import journaled
from attnfit.solvers.newton import Outcome
from attnfit.solvers.result import Result
from attnfit.solvers.start import Start
from attnfit.solvers.tracking import Callback, Tracker

Array = NDArray[np.float64]

# A fit with a minimum ends on steps far smaller than this share of x; one that runs away keeps its stride.
STRIDE = 1e-3


class Solver(Protocol):
    """What `minimize` asks of a solver."""

    def run(
        self,
        problem: Problem,
        start: Start,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise the problem."""
        ...


def minimize(
    problem: Problem,
    x0: Any = None,
    solver: Solver | None = None,
    tol: float = 1e-8,
    max_iter: int = 100,
    callback: Callback | None = None,
    random_state: Any = None,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = True,
    memory_limit: str | int | None = None,
) -> Result:
    """Find a local minimiser of a problem, from the best start known.

    Parameters
    ----------
    problem : any problem of `attnfit.problems`
    x0 : array_like, in the problem's natural shape or flat, optional
        Start here only. By default a convex problem is started from a sample of its rows; any other from its
        convex neighbour (cross entropy) and from zero, and the best end is returned with all local values.
    solver : a solver of `attnfit.solvers`, optional
        `Newton()` by default, `ActiveSet()` for mixtures, `BatchedNewton()` for several right-hand sides,
        `LevenbergMarquardt()` for `LayerInversion`;
        ``result.solver`` says what it chose.
    tol : float
        Stop when the gradient in internally scaled variables is at most ``tol`` times the one at zero (times
        the largest seen where zero is stationary).
    max_iter : int
        Largest number of steps on the full data.
    callback : callable, optional
        Called with a `Record` after each evaluation; a true return value, or KeyboardInterrupt, ends the fit
        with the best point.
    random_state : int, numpy.random.Generator, optional
        Seed of all sampling.
    checkpoint : str or path-like, optional
        File in which the fit keeps what it has read. After a crash or an interruption the same call goes on
        from there and ends, on one machine, at the same ``x`` bit for bit; ``tol``, ``max_iter`` and
        ``callback`` may differ. No read is done again but the last evaluation, which proves that the data
        are still the same; of a fit that had ended that is all. The file holds a vector a read and a matrix a
        Hessian. It is replaced in one step, so often that it takes about a tenth of the time.
        `LevenbergMarquardt` and `ActiveSet`, which work in memory, do their work again.
    resume : bool
        False starts afresh and overwrites the file.
    memory_limit : str or int, optional
        Bytes that the process may hold, such as ``"1GB"``: data on disk are read in smaller pieces, and less
        is kept between reads. ``problem.memory_estimate()`` tells beforehand.

    Returns
    -------
    Result
        A fit that did not converge has ``converged=False``, a status, and warns with the reason.

    Raises
    ------
    OverflowError
        If the loss overflows at the start.
    ValueError
        If an argument is not usable; the message names it.
    CheckpointError
        A ValueError: the checkpoint is damaged, or of other data, another fit or another version.
    OSError
        If the checkpoint cannot be written; the one before is intact.
    MemoryError
        If the fit is estimated to exceed ``memory_limit``; the message says what takes most, and the remedy.

    Examples
    --------
    >>> from attnfit import datasets, minimize, problems
    >>> travel = datasets.load_travel_mode()
    >>> result = minimize(problems.Softmax(travel.A, travel.b, travel.groups, loss="cross_entropy"))
    >>> result.x.round(4)
    array([ 5.2074,  3.869 ,  3.1632, -0.0155, -0.0961,  0.0133])
    >>> result.certificate().radius < 1e-6
    True
    """
    if not tol > 0:
        raise ValueError(f"tol must be positive, not {tol!r}; 1e-8 is the default")
    if max_iter < 0:
        raise ValueError(f"max_iter must not be negative, not {max_iter!r}")
    problem = problem if memory_limit is None else problem.within(parse_size(memory_limit))
    point = None if x0 is None else as_point(x0, problem.shape, "x0")
    reduction = problem.reduction()
    solver = default_solver(problem if reduction is None else reduction.problem) if solver is None else solver
    fit = (problem, reduction, point, solver, tol, max_iter)
    if checkpoint is None:
        result = _fit(*fit, callback, np.random.default_rng(random_state))
    else:
        with Checkpoint(
            checkpoint, problem, solver, point, random_state, tol=tol, max_iter=max_iter, resume=resume
        ) as kept:
            result = kept.finish(_fit(*fit, kept.hearing(callback), kept.rng, kept.journal))
    if not result.converged and result.status != "interrupted":
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(result.message, ConvergenceWarning, stacklevel=2)
    return result


def _fit(
    given: Problem,
    reduction: Reduction | None,
    x0: Array | None,
    solver: Solver,
    tol: float,
    max_iter: int,
    callback: Callback | None,
    rng: np.random.Generator,
    journal: Journal | None = None,
) -> Result:
    """Fit in the problem's better variables, if it has any; a journal keeps, and gives, what was read."""
    problem, point = given, x0
    if reduction is not None:
        problem, point = reduction.problem, None if x0 is None else reduction.restrict(x0)
    if journal is not None:
        problem = journaled(problem, journal)
    first_read = problem.n_passes
    start = Start.draw(problem, rng)
    tracker = Tracker(
        lambda: problem.n_passes - first_read + start.n_passes,
        callback,
        time.perf_counter if journal is None else journal.clock,
    )
    # Steps that overflow are rejected by their value; numpy need not warn of each product on the way.
    with np.errstate(over="ignore", invalid="ignore"):
        outcome = solver.run(problem, start, point, tol, max_iter, tracker, rng)
    settled = _settle(problem, outcome, tracker, tol)
    if journal is not None:
        journal.check()
    at, norm = settled.at, settled.norm
    lift = None if reduction is None else reduction.lift
    message = outcome.message or _message(settled, tol, outcome, max_iter, given.shape, lift)
    flat = settled.flat
    if reduction is not None:
        at, flat = given.evaluate(reduction.lift(at.x)), None
        message += f"; {reduction.note}" if reduction.note else ""
    return Result(
        x=at.x.reshape(given.shape),
        value=at.value,
        gradient=at.gradient.reshape(given.shape),
        gradient_norm=norm,
        converged=settled.status == "converged",
        status=settled.status,
        message=message,
        n_iter=outcome.n_iter,
        n_passes=tracker.n_passes(),
        history=tracker.history,
        seconds=tracker.seconds(),
        solver=outcome.description,
        problem=given,
        local_values=outcome.local_values,
        unidentified=flat,
        column_status=outcome.column_status,
    )


@dataclass(frozen=True)
class _Settled:
    """The end of a fit once it is known what the data leave open.

    ``separating`` is a direction along which there is no minimum, ``reason`` why the end is none.
    """

    at: Evaluation
    status: str
    norm: float
    flat: Array | None
    separating: Array | None
    reason: str | None


def _settle(problem: Problem, outcome: Outcome, tracker: Tracker, tol: float) -> _Settled:
    """Look at the end of a fit: open directions, separable data, false optima."""
    best, scale = outcome.best, outcome.scale
    at, status = best.at, best.status
    flat = unidentified_directions(best.model, scale)
    separating = None
    if status != "interrupted":
        if best.last_step is not None and _runs_away(best, scale):
            separating = recession_direction(problem, [at.x, best.last_step])
        if separating is not None:
            status = "separable"
        elif flat is not None and flat.shape[1] and problem.linear:
            at = least_norm(problem, best, scale, tracker, tol)
    with np.errstate(over="ignore"):
        norm = best.relative(float(np.linalg.norm(at.gradient / scale)))
    reason = problem.false_optimum(at) if status == "converged" and not outcome.message else None
    status = status if reason is None else "false_optimum"
    return _Settled(at, status, norm, flat, separating, reason)


def _runs_away(best: Descent, scale: Array) -> bool:
    assert best.last_step is not None
    return float(np.linalg.norm(scale * best.last_step)) > STRIDE * float(np.linalg.norm(scale * best.at.x))


def _message(
    settled: _Settled,
    tol: float,
    outcome: Outcome,
    max_iter: int,
    shape: tuple[int, ...],
    lift: Callable[[Array], Array] | None,
) -> str:
    """Return the status in a sentence, with the remedy; unknowns are named as the user knows them."""
    status, reason = settled.status, settled.reason
    reached = f"relative gradient {settled.norm:.2e}, tol {tol:.0e}"
    if status == "converged":
        return f"converged: {reached}"
    if settled.separating is not None:
        direction = settled.separating if lift is None else lift(settled.separating)
        order = np.argsort(-np.abs(direction))[:3]
        size = np.abs(direction).max()
        entries = ", ".join(f"{_unknown(int(j), shape)}: {direction[j] / size:+.3g}" for j in order)
        return (
            "the data are separable: cross entropy has no finite minimum and falls for ever along the "
            "direction "
            f"({entries}{', ...' if len(direction) > 3 else ''}); add ridge > 0, or drop or merge the "
            "columns it names"
        )
    return {
        "max_iter": f"not converged after max_iter={max_iter} steps ({reached}); raise max_iter, or loosen "
        f"tol",
        "precision": f"no further decrease is possible in float64 ({reached}); loosen tol, or add ridge if "
        f"columns are nearly "
        "dependent",
        "overflow": f"a fixed step of {outcome.description} overflowed ({reached}); use a smaller step_size",
        "false_optimum": f"not a minimum: {reason} ({reached}); pass another x0, or add ridge",
        "interrupted": f"interrupted; x is the best point so far ({reached})",
    }[status]


def _unknown(j: int, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"column {j}"
    return f"entry ({', '.join(str(int(k)) for k in np.unravel_index(j, shape))})"
