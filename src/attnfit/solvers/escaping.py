"""Newton's method that goes on from false optima."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.layers.layered import LayeredProblem
from attnfit.solvers.newton import Newton, Outcome
from attnfit.solvers.tracking import Tracker

Array = NDArray[np.float64]

# How often a fit goes on from a false optimum.
MAX_ESCAPES = 5


@dataclass(frozen=True)
class EscapingNewton:
    """`Newton` for layered problems: where a softmax output has underflowed although more of it would lower
    the loss, it goes on from a point where that output is raised.

    Parameters
    ----------
    newton : Newton
    """

    newton: Newton = field(default_factory=Newton)

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
            If the problem is not a layered one.
        """
        if not isinstance(problem, LayeredProblem):
            raise ValueError(
                "EscapingNewton takes TwoLayer, ReluSoftmax and ThreeLayer, not "
                f"{type(problem).__name__}; use Newton"
            )
        outcome = self.newton.run(problem, start, x0, tol, max_iter, tracker, rng)
        for _ in range(MAX_ESCAPES):
            left = max_iter - outcome.n_iter
            escapes = problem.escapes(outcome.best.at) if outcome.best.status == "converged" else {}
            if not escapes or left <= 0:
                break
            X = outcome.best.at.x.reshape(-1, problem.n_columns).copy()
            for column, escape in escapes.items():
                X[:, column] = escape.x
            onward = self.newton.run(problem, start, X.reshape(-1), tol, left, tracker, rng)
            values = outcome.local_values | {"escape": onward.best.at.value}
            outcome = replace(onward, local_values=values, n_iter=outcome.n_iter + onward.n_iter)
        return outcome
