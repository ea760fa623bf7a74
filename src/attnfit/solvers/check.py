"""A solver against problems whose answers are known."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from attnfit.objectives.models import Exponential, Softmax
from attnfit.solvers.loop import Solver
from attnfit.solvers.minimize import minimize
from attnfit.solvers.result import Record

# Logits that agree to this are the same answer, whatever the solver's tolerance.
AGREE = 1e-4


def check_solver(solver: Solver, *, max_iter: int = 10_000) -> None:
    """Run a solver on small problems, and compare what it says with what is so.

    Cross entropy and least squares on shares, an exponential model, dependent columns, and data without a
    finite minimum: an end that is called converged must be one, to 1e-4 in the logits, against the closed
    form or `Newton`. The same seed must give the same answer, ``x0`` must be used, and a callback must be
    able to end the fit.

    Parameters
    ----------
    solver : Solver
    max_iter : int
        Steps it may take.

    Raises
    ------
    AssertionError
        Naming the problem and what is wrong.

    Examples
    --------
    >>> from attnfit import solvers
    >>> solvers.check_solver(solvers.Newton())
    """
    assert isinstance(solver, Solver), "a solver derives from attnfit.solvers.Solver"
    rng = np.random.default_rng(0)
    A, groups = rng.standard_normal((40, 3)), np.repeat(np.arange(10), 4)
    f = np.exp(A @ [0.5, -0.2, 0.3])
    shares = f / np.repeat(np.add.reduceat(f, np.arange(0, 40, 4)), 4)
    noisy = shares * np.exp(0.1 * rng.standard_normal(40))
    cases: dict[str, tuple[Any, Any]] = {
        "cross entropy with a known answer": (Softmax(A, shares, groups, "cross_entropy"), [0.5, -0.2, 0.3]),
        "cross entropy": (Softmax(A, noisy, groups, "cross_entropy"), None),
        "shares": (Softmax(A, noisy, groups), None),
        "an exponential": (Exponential(A, f), [0.5, -0.2, 0.3]),
        "dependent columns": (Softmax(np.column_stack([A, A[:, 0]]), noisy, groups, "cross_entropy"), None),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (problem, answer) in cases.items():
            result = minimize(problem, solver=solver, max_iter=max_iter, random_state=0)
            assert result.converged, f"{name}: not converged after {result.n_iter} steps: {result.message}"
            truth = minimize(problem, random_state=0).x if answer is None else np.asarray(answer)
            error = float(np.abs(problem.design @ (result.x - truth)).max())
            assert error <= AGREE, f"{name}: called converged, but a logit is off by {error:.1e}"
        problem = cases["cross entropy"][0]
        one, other = (minimize(problem, solver=solver, max_iter=max_iter, random_state=1).x for _ in range(2))
        assert np.array_equal(one, other), (
            "the same seed gives two answers: take random numbers from rng alone"
        )
        _check_x0(problem, solver)
        separable = Softmax(
            np.array([[1.0], [0.0]] * 5), [1.0, 0.0] * 5, np.repeat(np.arange(5), 2), "cross_entropy"
        )
        result = minimize(separable, solver=solver, max_iter=max_iter)
        assert not result.converged, "separable data have no finite minimum, but the end is called converged"
        stopped = minimize(cases["shares"][0], x0=np.ones(3), solver=solver, callback=lambda record: True)
        assert stopped.status == "interrupted", f"a callback ends the fit: status {stopped.status!r}"


def _check_x0(problem: Any, solver: Solver) -> None:
    values: list[float] = []

    def first(record: Record) -> bool:
        values.append(record.value)
        return True

    x0 = np.array([1.0, 1.0, 1.0])
    minimize(problem, x0=x0, solver=solver, callback=first)
    assert values and abs(values[0] - problem.value(x0)) <= 1e-9 * abs(values[0]), "the fit must begin at x0"
