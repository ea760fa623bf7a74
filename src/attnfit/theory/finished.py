"""The papers' convergence theorems on the iterates of a fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnfit.certificates.certification import missing_bound
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.layers import TwoLayer
from attnfit.objectives.objective import MAX_DENSE
from attnfit.objectives.rows import RowProblem
from attnfit.theory.convergence import induction, shrinking
from attnfit.theory.main_theorems import (
    descent,
    inversion_newton,
    main_rescaled,
    main_two_layer,
    sampled_rows,
)
from attnfit.theory.theorem import Theorem
from attnfit.theory.trajectory import Trajectory

# Results that are printed twice, and the name under which they are evaluated.
ALIASES = {"RH-5.3": "TL-6.5", "TL-1.5": "TL-7.1", "UT-4.3": "UT-I.2", "UT-4.4": "UT-I.3"}


@dataclass(frozen=True)
class OnFit:
    """The convergence theorems on one fit; prints a block for each that speaks of it.

    Attributes
    ----------
    theorems : tuple of Theorem
    trajectory : Trajectory
    """

    theorems: tuple[Theorem, ...]
    trajectory: Trajectory

    def __getitem__(self, id: str) -> Theorem:
        for theorem in self.theorems:
            if theorem.id == ALIASES.get(id, id):
                return replace(theorem, id=id)
        known = [theorem.id for theorem in self.theorems] + list(ALIASES)
        raise KeyError(f"{id!r} is no convergence theorem; they are {', '.join(known)}")

    def __str__(self) -> str:
        run = self.trajectory
        certified = "certified" if run.reference.certified else "not certified"
        left_out = int((~run.resolved).sum())
        head = (
            f"{len(run.points)} points, r_0 = {run.r[0]:.4g}; x* known to {run.reference.radius:.1e} "
            f"({certified})"
        )
        if left_out:
            told = "1 point is" if left_out == 1 else f"{left_out} points are"
            head += f"; {told} closer than ten times that, and left out"
        blocks = [str(theorem) for theorem in self.theorems if not theorem.reason]
        rest: dict[str, list[str]] = {}
        for theorem in self.theorems:
            if theorem.reason:
                rest.setdefault(theorem.reason, []).append(theorem.id)
        silent = [f"not applicable: {', '.join(ids)} ({reason})" for reason, ids in rest.items()]
        return "\n\n".join([head, *blocks, *(["\n".join(silent)] if silent else [])])


def on(result: Any, *, x_ref: Any = None, epsilon0: float | None = None, gamma: float | None = None) -> OnFit:
    """Evaluate the papers' convergence theorems on a finished fit: assumptions and both sides, step by step.

    Distances are from the stationary point next to ``result.x``, which exact Newton steps polish; its
    certificate says how well it is known, and distances below ten times that are left out. Constants are the
    tightest: l is the smallest eigenvalue of the Hessian there, M the library's proven Lipschitz constant on
    the ball of the iterates, M_s that in the variables ``H*^(1/2) x``, in which the corrected forms hold.

    Parameters
    ----------
    result : Result
        Of ``minimize(..., history="points")`` on rows, `TwoLayer` or `LayerInversion`.
    x_ref : array_like, in the problem's natural shape, optional
        Look for the stationary point next to this one.
    epsilon0 : float, optional
        Spectral accuracy of the Hessians that the steps were made with. By default the least one with which
        each step can have been made: 0 of exact Newton steps.
    gamma : float, optional
        Regulariser of "Unmasking Transformers", by default that of the problem.

    Returns
    -------
    OnFit
        Indexed by id, such as ``"RH-5.5"``: a `Theorem` with ``status``, ``assumptions`` and ``rows``. A
        status is "holds" only where every assumption is met and every step holds.

    Raises
    ------
    ValueError
        If the result has no points, epsilon0 or gamma is not usable, or the papers state no constants for
        the problem.

    Notes
    -----
    Lemmas 5.3, 5.5, 5.6 and Theorems 1.5, 11.1 of "An Iterative Algorithm for Rescaled Hyperbolic Functions
    Regression" (RH); Lemmas 6.5 to 6.7 and Theorems 1.5, 7.1 of "Local Convergence of Approximate Newton
    Method for Two Layer Nonlinear Regression" (TL); Theorems I.1 to I.3 of "Unmasking Transformers" (UT). The
    corrected right side of RH-5.5 is ``(eps0 + th + eps0 th + th/2)/((1 - eps0)(1 - th)) |e|_*`` with
    ``|e|_* = |H*^(1/2) e|`` and ``th = M_s |e|_*``.

    Examples
    --------
    >>> import numpy as np
    >>> from attnfit import minimize, problems, theory
    >>> A = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])
    >>> problem = problems.Rescaled(A, [0.5, 0.3, 0.2], row_penalty=1.0)
    >>> result = minimize(problem, [0.103, 0.047], history="points")
    >>> report = theory.on(result)
    >>> report["RH-5.5"].status
    'holds'
    >>> report["RH-11.1"].status[:50]
    'assumption not met: w_i^2 >= 100 + l/sigma_min^2: '
    """
    if epsilon0 is not None and not 0.0 <= epsilon0 < 1.0:
        raise ValueError(f"epsilon0 must lie in [0, 1), not {epsilon0!r}: 0 is an exact Hessian")
    if gamma is not None and not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative, not {gamma!r}")
    problem = result.problem
    if result.points is None or problem is None:
        raise ValueError(
            "result has no points: the theorems speak of the iterates; fit again with "
            'minimize(..., history="points")'
        )
    if problem.n_unknowns > MAX_DENSE:
        raise ValueError(
            f"the theorems take Hessians of {problem.n_unknowns:,} unknowns, more than {MAX_DENSE:,}; fit "
            "fewer"
        )
    if not isinstance(problem, RowProblem | TwoLayer | LayerInversion):
        raise ValueError(
            f"the papers state no convergence theorem for {type(problem).__name__}; pass the fit of Softmax, "
            "Exponential, Rescaled, Attention (without rank), TwoLayer or LayerInversion"
        )
    missing = missing_bound(problem.loss) if isinstance(problem, RowProblem) else None
    if missing is not None:
        raise ValueError(f"{missing}; the theorems need a Lipschitz constant of the Hessian")
    run = Trajectory.of(result, x_ref, epsilon0)
    about_rows, layers = isinstance(problem, RowProblem), isinstance(problem, TwoLayer)

    def only(theorem: Any, id: str, applies: bool, about: str) -> Theorem:
        if applies:
            return theorem(id, run)  # type: ignore[no-any-return]
        return Theorem(id, "", "", reason=f"it is about {about}")

    rows_only, layers_only = "losses of rows", "TwoLayer"
    return OnFit(
        (
            only(shrinking, "RH-5.5", about_rows, rows_only),
            only(shrinking, "TL-6.6", layers, layers_only),
            only(induction, "RH-5.6", about_rows, rows_only),
            only(induction, "TL-6.7", layers, layers_only),
            main_rescaled("RH-11.1", run, result.sampling),
            main_rescaled("RH-1.5", run, result.sampling),
            sampled_rows("TL-6.5", run, result.sampling),
            main_two_layer("TL-7.1", run),
            descent("UT-I.1", run),
            descent("UT-I.2", run, gamma),
            inversion_newton("UT-I.3", run, gamma),
        ),
        run,
    )
