"""The rows of the tables: attnfit and its peers, with the problems each of them can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import peers, peers_sampled
from benchmarks.data import Case, Spec
from benchmarks.meter import Clock, Outcome


@dataclass(frozen=True)
class Solver:
    """A row of a table.

    ``isolated`` runs it in its own process under a hard time limit; ``once`` runs it on the first seed only.
    """

    label: str
    run: Callable[[Case, float, float], Outcome]
    isolated: bool = False
    once: bool = False


def attnfit_problem(case: Case) -> Any:
    """The problem as a user of the library writes it."""
    import attnfit

    if case.spec.family == "exponential":
        return attnfit.problems.Exponential(case.A, case.b)
    if case.spec.family == "choice":
        return attnfit.problems.Softmax(case.A, case.b, groups=case.labels, loss="cross_entropy")
    return attnfit.problems.Softmax(case.A, case.b)


def attnfit_run(case: Case, tol: float, limit: float) -> Outcome:
    """attnfit with everything at its default but the tolerance."""
    return attnfit_with(case, tol)


def attnfit_matrix_free(case: Case, tol: float, limit: float) -> Outcome:
    """attnfit told to form no d x d array."""
    from attnfit.solvers import Newton

    return attnfit_with(case, tol, solver=Newton(hessian="matrix_free"))


def attnfit_with(case: Case, tol: float, **settings: Any) -> Outcome:
    """Validation and set-up are inside the clock, as they are for a peer's ``fit``."""
    import attnfit

    clock = Clock()
    result = attnfit.minimize(attnfit_problem(case), tol=tol, **settings)
    return clock.outcome(
        np.ravel(result.x),
        iterations=result.n_iter,
        reads=result.n_passes,
        status="" if result.converged else f"not converged: {result.status}",
    )


OURS = "attnfit"
SOLVERS = {
    OURS: Solver("attnfit", attnfit_run),
    "attnfit_matrix_free": Solver("attnfit, matrix-free", attnfit_matrix_free),
    "lbfgs": Solver("scipy L-BFGS-B, scaled, left at tol", peers.lbfgs),
    "lbfgs_tight": Solver("scipy L-BFGS-B, scaled, to its end", peers.lbfgs_tight, once=True),
    "lbfgs_columns": Solver("scipy L-BFGS-B, scaled, columns normed", peers.lbfgs_columns),
    "lbfgs_default": Solver("scipy L-BFGS-B, out of the box", peers.lbfgs_default, once=True),
    "newton_cg": Solver("scipy Newton-CG, exact hessp, scaled", peers.newton_cg),
    "lbfgs_sample": Solver("scipy L-BFGS-B, sample's start and Hessian", peers_sampled.lbfgs_sample),
    "lbfgs_sample_ours": Solver("the same on attnfit's reads", peers_sampled.lbfgs_sample_ours),
    "newton_cg_sample": Solver("scipy Newton-CG, sample's start and Hessian", peers_sampled.newton_cg_sample),
    "newton_sketch": Solver("Newton sketch, sample's start", peers_sampled.newton_sketch),
    "sklearn_lbfgs": Solver("sklearn Tweedie lbfgs", peers.sklearn_lbfgs),
    "sklearn_cholesky": Solver("sklearn Tweedie newton-cholesky", peers.sklearn_cholesky),
    "glum": Solver("glum gaussian/log, stops at tol", peers.glum_matched),
    "glum_fixed": Solver("glum gaussian/log, to 1e-10", peers.glum_fixed, once=True),
    "xlogit": Solver("xlogit MultinomialLogit", peers.xlogit_fit, isolated=True, once=True),
    "statsmodels": Solver("statsmodels ConditionalLogit", peers.statsmodels_fit, isolated=True, once=True),
}


def rows_for(spec: Spec) -> list[str]:
    """Names of the solvers that take a problem."""
    fair = ["lbfgs_sample", "lbfgs_sample_ours", "newton_cg_sample", "newton_sketch"]
    if spec.nonzeros:
        wide = ["attnfit_matrix_free"] if spec.d > 5_000 else []
        # A dense Hessian of 10,000 columns is no preconditioner that anybody would form.
        fair = [] if spec.d > 5_000 else fair[:3]
        return [OURS, *wide, "lbfgs", "lbfgs_columns", "lbfgs_default", "newton_cg", *fair]
    own = {
        "softmax": [OURS, "lbfgs", "lbfgs_tight", "lbfgs_default", "newton_cg"],
        "exponential": [OURS, "glum", "glum_fixed", "sklearn_cholesky", "sklearn_lbfgs", "lbfgs"],
        "choice": [OURS, "lbfgs", "lbfgs_default", "newton_cg", "xlogit", "statsmodels"],
    }[spec.family]
    return [*own, *fair]
