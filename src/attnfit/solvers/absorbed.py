"""Newton's method for problems with absorbed effects, which eliminate them themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.effects.newton import Ending
from attnfit.objectives.objective import Evaluation, Offer
from attnfit.solvers.loop import Descent, Outcome, Solver, StopFit, Tracker
from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]
STATUS = {
    Ending.CONVERGED: Status.CONVERGED,
    Ending.AT_FLOOR: Status.CONVERGED,
    Ending.STRIDING: Status.MAX_ITER,
    Ending.MAX_ITER: Status.MAX_ITER,
    Ending.PRECISION: Status.PRECISION,
    Ending.OVERFLOW: Status.OVERFLOW,
    Ending.SADDLE: Status.SADDLE,
    Ending.FLAT: Status.FLAT,
    Ending.ENDLESS: Status.NO_MINIMUM,
}


@dataclass(frozen=True)
class AbsorbedNewton(Solver):
    """Newton's method on coefficients and effects together, effects eliminated: for problems with ``absorb``.

    A point is accepted once the next Newton step, with the exact gradient and the Hessian of all the data
    there, solved to a thousandth, moves no logit by more than ``tol``.
    """

    def run(
        self,
        problem: Any,
        start: Any,
        x0: Array | None,
        tol: float,
        max_iter: int,
        tracker: Tracker,
        rng: np.random.Generator,
    ) -> Outcome:
        """Minimise; `attnfit.minimize` documents the arguments.

        Raises
        ------
        ValueError
            If the problem has no absorbed effects.
        """
        if Offer.ABSORBED not in problem.offers:
            raise ValueError("AbsorbedNewton fits problems with absorb; leave solver out for other problems")
        seen: list[Evaluation] = []

        def record(n_iter: int, at: Evaluation, move: float, accepted: bool) -> None:
            if accepted:
                seen.append(at)
            first = float(np.linalg.norm(seen[0].gradient))
            size = float(np.linalg.norm(at.gradient)) / first if first > 0.0 else 0.0
            tracker.record("fit: effects absorbed", n_iter, at.value, size, step_norm=move, accepted=accepted)

        description = "AbsorbedNewton()"
        try:
            end = problem.descend(x0, tol, max_iter, record)
        except (KeyboardInterrupt, StopFit):
            if not seen:
                raise
            best = Descent.begin(seen[0])
            best.at, best.status = seen[-1], Status.INTERRUPTED
            best.verdict = Verdict(Status.INTERRUPTED)
            return Outcome(best, {}, max(len(seen) - 1, 0), description)
        status = STATUS[end.ending]
        message = ""
        if end.separated and status is Status.CONVERGED:
            status = Status.SEPARABLE
            message = (
                "the data are separable: a coefficient that result.x shows as infinite has no finite value; "
                "the others are those of the fit of the remaining rows"
            )
        if status is Status.NO_MINIMUM:
            message = (
                "no minimum: the effects of some levels fall for ever, and the outputs of their rows go to "
                "zero; coefficients and other effects are those of the limit"
            )
        here = end.curvature
        best = Descent.begin(seen[0] if seen else end.at)
        best.at, best.status, best.n_iter = end.at, status, end.n_iter
        best.verdict = Verdict(
            status, here.move, here.decrement, end.flat, at_floor=end.ending is Ending.AT_FLOOR
        )
        values = {"effects": end.at.value} if status is Status.CONVERGED else {}
        return Outcome(best, values, end.n_iter, description, message=message, absorbed=end)
