"""The one call that fits any problem."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, is_dataclass, replace
from os import PathLike
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import as_point, choose
from attnfit.objectives.objective import Evaluation, Offer, Problem, Reduction, parse_size
from attnfit.solvers.checkpoint import Checkpoint
from attnfit.solvers.loop import Callback, Outcome, Solver, Tracker
from attnfit.solvers.newton import EscapingNewton, Newton, require_starts
from attnfit.solvers.recorded import Recorded
from attnfit.solvers.result import End, Result
from attnfit.solvers.starts import Start
from attnfit.solvers.verdicts import MAX_TOL, Status, Verdict, assess

# Ends that need no second look.
ENDED = (Status.INTERRUPTED, Status.OVERFLOW, Status.INDEFINITE)
Array = NDArray[np.float64]


def default_solver(problem: Problem) -> Any:
    """Return the exact solver for mixtures, all columns at once where there are several, restarts for the
    inversion of a layer, many starts for attention outputs whose maps fit in memory, alternating factors for
    heads, else Newton's method, which for layered problems goes on from false optima.
    """
    offers = problem.offers
    if Offer.ABSORBED in offers:
        from attnfit.solvers.absorbed import AbsorbedNewton

        return AbsorbedNewton()
    if Offer.LINEAR_SYSTEM in offers:
        from attnfit.solvers.conjugate_gradients import ConjugateGradients

        return ConjugateGradients()
    if Offer.INVERSION in offers:
        from attnfit.solvers.damped import LevenbergMarquardt

        return LevenbergMarquardt()
    if Offer.PROJECTION in offers:
        from attnfit.solvers.variable_projection import VariableProjection

        return VariableProjection() if VariableProjection.suits(problem) else Newton()
    if Offer.FACTORS in offers:
        from attnfit.solvers.factors import FactorLevenbergMarquardt

        return FactorLevenbergMarquardt()
    if Offer.MIXTURE in offers:
        from attnfit.solvers.simplex import ActiveSet

        return ActiveSet()
    if Offer.COLUMNS in offers and len(problem.shape) == 2:
        from attnfit.solvers.batched import BatchedNewton

        return BatchedNewton()
    return EscapingNewton() if Offer.COLUMNS in offers else Newton()


def minimize(
    problem: Problem,
    x0: Any = None,
    solver: Solver | None = None,
    tol: float = 1e-8,
    max_iter: int = 100,
    callback: Callback | None = None,
    random_state: Any = None,
    n_starts: int | Literal["auto"] = "auto",
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = True,
    memory_limit: str | int | None = None,
    separation: Literal["warn", "drop", "keep"] = "warn",
    history: Literal["records", "points"] = "records",
) -> Result:
    """Find a local minimiser of a problem, from the best start known.

    Parameters
    ----------
    problem : any problem of `attnfit.problems`
    x0 : array_like, in the problem's natural shape or flat, optional
        Start here only. By default a fit starts from least squares on the logarithm of the target (on a
        sample of the rows where they are many); one that is not convex also from zero, and, if small, from
        Gaussian points, and the best end is returned with all local values.
    solver : a solver of `attnfit.solvers`, optional
        `Newton()` by default, `ActiveSet()` for mixtures, `BatchedNewton()` for several right-hand sides,
        `LevenbergMarquardt()` for `LayerInversion`, `ConjugateGradients()` for `KernelRegression`;
        ``result.solver`` says what it chose.
    tol : float, in (0, 1e-2]
        The largest change of a fitted logit that the next Newton step may still make: of ``exp(z)``
        relatively, or of half a log-odds. It does not depend on the units of the target, the weights or the
        unknowns. Where rounding forbids it, steps that stop shrinking are accepted up to 2e-7.
    max_iter : int
        Largest number of steps on the full data.
    callback : callable, optional
        Called with a `Record` after each evaluation; a true return value, or KeyboardInterrupt, ends the fit
        with the best point.
    random_state : int, numpy.random.Generator, optional
        Seed of all sampling.
    n_starts : int or "auto"
        Number of descents of a problem that is not convex; "auto" takes ten for small ones and else those
        that the data suggest, or the first alone where its end has at most half of the loss at zero and of
        that of outputs that vanish. ``solver`` may say it instead.
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
    separation : {"warn", "drop", "keep"}
        What is returned where the loss has no finite minimum, as with separable data. "warn": ``x`` is the
        fit of the remaining rows, infinite or NaN where a coefficient has no finite value, with status
        "separable" or "no_minimum" and a warning. "drop": the same ``x`` with the status of the fit of the
        remaining rows; the message counts the rows left out. "keep": the last finite point, with the status
        and the warning.
    history : {"records", "points"}
        "points" keeps the iterates too, d numbers a step: ``result.points``, which `attnfit.theory.on`
        needs.

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
    if not (isinstance(tol, int | float | np.number) and 0.0 < tol <= MAX_TOL):
        raise ValueError(
            f"tol must be a number in (0, {MAX_TOL:g}], not {tol!r}: the largest change of a logit that the "
            "next step may make; 1e-8 is the default"
        )
    if n_starts != "auto":
        require_starts(n_starts)
    choose(separation, dict.fromkeys(("warn", "drop", "keep")), "separation")
    choose(history, dict.fromkeys(("records", "points")), "history")
    if max_iter < 0:
        raise ValueError(f"max_iter must not be negative, not {max_iter!r}")
    problem = problem if memory_limit is None else problem.with_memory_limit(parse_size(memory_limit))
    point = None if x0 is None else as_point(x0, problem.shape, "x0")
    given, rows, reduction = problem, problem.rows, problem.reduction()
    problem = given if reduction is None else reduction.problem
    solver = default_solver(problem) if solver is None else solver
    solver = solver if n_starts == "auto" else _with_starts(solver, n_starts)
    if history == "points" and not solver.records_points:
        raise ValueError(
            f"history='points': {type(solver).__name__} keeps no points; pass solver=Newton() or "
            "GradientDescent(), or leave history out"
        )
    if checkpoint is not None and Offer.ABSORBED in given.offers:
        raise NotImplementedError("checkpoint does not go with absorb; leave it out, the fit takes few reads")
    with ExitStack() as stack:
        if rows is not None and rows.is_whole:
            stack.enter_context(rows.threads())
        if checkpoint is None:
            kept, rng, clock = None, np.random.default_rng(random_state), time.perf_counter
        else:
            kept = Checkpoint(
                checkpoint, given, solver, point, random_state, tol=tol, max_iter=max_iter, resume=resume
            )
            stack.enter_context(kept)
            problem = cast(Problem, Recorded(problem, kept.recording))
            callback, rng, clock = kept.wrap_callback(callback), kept.rng, kept.recording.clock
        if reduction is not None and point is not None:
            point = reduction.restrict(point)
        first_read, start = problem.n_passes, Start.draw(problem, rng)
        tracker = Tracker(
            lambda: problem.n_passes - first_read + start.n_passes,
            callback,
            clock,
            keep_points=history == "points",
        )
        # Steps that overflow are rejected by their value; numpy need not warn of each product on the way.
        with np.errstate(over="ignore", invalid="ignore"):
            outcome = solver.run(problem, start, point, tol, max_iter, tracker, rng)
            best = outcome.best
            if best.verdict is None:
                # The solver has no judge of its own.
                ended = best.status in ENDED
                best.verdict = Verdict(Status(best.status)) if ended else assess(problem, best.at, tol)
        if kept is not None:
            kept.recording.check()
        result = _report(given, problem, reduction, outcome, tol, max_iter, separation, tracker)
        if kept is not None:
            result = kept.finish(result)
    if not result.converged and result.status != "interrupted":
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(result.message, ConvergenceWarning, stacklevel=2)
    return result


def _report(
    given: Problem,
    problem: Problem,
    reduction: Reduction | None,
    outcome: Outcome,
    tol: float,
    max_iter: int,
    separation: str,
    tracker: Tracker,
) -> Result:
    """Return what is known of the end of a fit, in the user's variables and words."""
    best, verdict = outcome.best, outcome.best.verdict
    assert verdict is not None
    at, status, column_status = best.at, verdict.status, outcome.column_status
    reason, settled = None, None
    if Offer.COLUMNS in problem.offers and status is Status.CONVERGED and not outcome.message:
        reason = problem.false_optimum(at)
        status = status if reason is None else Status.FALSE_OPTIMUM
    if Offer.KINKS in given.offers and status not in ENDED:
        settled = problem.end(at, tol)  # type: ignore[attr-defined]
        if settled is not None:
            at, verdict, column_status = _settled(problem, settled, at, verdict, column_status)
            status = verdict.status
    gradient_norm = best.relative(at.gradient)
    flat, found, ended = verdict.flat, verdict.separation, outcome.absorbed
    lift = None if reduction is None else reduction.lift
    end = End(status, verdict, tol, max_iter, outcome.n_starts, given, gradient_norm, lift, reason, settled)
    message = end.message() if settled is not None else outcome.message or end.message()
    message += f"; {ended.note}" if ended is not None and ended.note else ""
    message += f"; {given.note}" if given.note else ""
    if status is Status.CONVERGED and problem.is_trivial(best.at):
        message += "; all outputs are zero there, where the loss vanishes whatever the target: pass x0"
    if reduction is not None:
        if not reduction.keeps_unknowns:
            flat = None
        elif flat is not None and flat.size:
            flat = np.linalg.qr(np.apply_along_axis(reduction.lift, 0, flat))[0]
        at = given.evaluate(reduction.lift(at.x))
        message += f"; {reduction.note}" if reduction.note else ""
    x, value = at.x, at.value
    # In other variables than the user's all of them move.
    known = reduction is None or reduction.keeps_unknowns
    if found is not None and separation != "keep" and known:
        x = found.coefficients(best.at.x)
        value = found.value if np.isfinite(found.value) else value
        if separation == "drop" and found.has_rest:
            status = Status(found.rest.status)
            message = f"{found.rest.message}; {end.rows_left_out()}"
        if reduction is not None:
            x = reduction.lift(x)
    if ended is not None:
        x = ended.x
    if found is not None and reduction is not None:
        found = found.lifted(given, reduction.lift, 0.0 if reduction.keeps_unknowns else 1e-12)
    return Result(
        x=x.reshape(given.shape),
        value=value,
        gradient=at.gradient.reshape(given.shape),
        gradient_norm=gradient_norm,
        converged=status is Status.CONVERGED,
        status=status,
        message=message,
        n_iter=outcome.n_iter,
        n_passes=tracker.n_passes(),
        history=tracker.history,
        seconds=tracker.clock() - tracker.began,
        solver=outcome.description,
        problem=given,
        local_values=outcome.local_values,
        unidentified=flat,
        column_status=column_status,
        move=verdict.move,
        decrement=verdict.decrement,
        n_flat=None if verdict.flat is None else int(verdict.flat.shape[1]),
        separation=found,
        kinks=given.kinks(x) if Offer.KINKS in given.offers else [],  # type: ignore[attr-defined]
        effects=None if ended is None else ended.effects,
        dropped=None if ended is None else ended.dropped,
        absorbed=ended,
        points=_points(tracker, best.at.x, given, lift) if tracker.keep_points else None,
        sampling=outcome.sampling,
    )


def _points(tracker: Tracker, x: Array, given: Problem, lift: Callable[[Array], Array] | None) -> Array:
    """Return the iterates that led to x, in the user's variables, shape (n_points, ...)."""
    found = tracker.history.points_to(x)
    return np.array([p if lift is None else lift(p) for p in found]).reshape(-1, *given.shape)


def _settled(
    problem: Any, settled: Any, at: Evaluation, verdict: Verdict, columns: NDArray[Any] | None
) -> tuple[Evaluation, Verdict, NDArray[Any] | None]:
    """Return the end of a fit, the verdict and the status of each right-hand side, given what kinks say."""
    if settled.minima:
        at = problem.evaluate(settled.x.reshape(-1))
    if columns is None:
        status = Status.FLAT if settled.dead else Status.CONVERGED
    else:
        columns = columns.astype(object)
        columns[list(settled.minima)], columns[settled.dead] = "converged", "flat"
        columns = columns.astype(str)
        others = [Status(name) for name in columns.tolist() if name not in ("converged", "flat")]
        status = others[0] if others else Status.FLAT if settled.dead else Status.CONVERGED
    move = max(settled.minima.values(), default=verdict.move)
    return at, replace(verdict, status=status, move=move), columns


def _with_starts(solver: Any, n_starts: int) -> Any:
    """Return a solver that descends from so many points."""
    known = {f.name for f in fields(solver)} if is_dataclass(solver) else set()
    for name in ("n_starts", "n_restarts"):
        if name in known:
            return replace(solver, **{name: n_starts})
    raise ValueError(f"{type(solver).__name__} takes no n_starts; leave it out, or choose another solver")
