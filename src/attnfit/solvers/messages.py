"""What is said of the end of a fit: the status in a sentence, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit.solvers.verdicts import Status, Verdict

Array = NDArray[np.float64]


@dataclass(frozen=True)
class End:
    """The end of a fit, and what is said of it."""

    status: Status
    verdict: Verdict
    tol: float
    max_iter: int
    n_starts: int
    problem: Any
    gradient_norm: float
    lift: Callable[[Array], Array] | None = None
    reason: str | None = None
    settled: Any = None

    def message(self) -> str:
        """Return the status in a sentence, with the remedy; unknowns are named as the user knows them."""
        move = self.verdict.move
        reached = f": the next step moves a logit by {move:.1e}, tol {self.tol:.0e}"
        if np.isnan(move):
            reached = f": relative gradient {self.gradient_norm:.1e}"
        match self.status:
            case Status.CONVERGED:
                return self._converged(reached)
            case Status.SEPARABLE:
                return (
                    f"the data are separable: {self._loss()} has no finite minimum and falls for ever along "
                    f"the direction ({self._direction()}), along which the outputs of {self._rows()} go to "
                    "zero; result.separation names them and fits the others; add ridge > 0, or drop or merge "
                    "the columns it names"
                )
            case Status.NO_MINIMUM:
                return (
                    f"no minimum: the loss falls to {self._limit()} along the direction "
                    f"({self._direction()}), where {self._rows()} have output zero; result.separation fits "
                    "the others; add ridge > 0"
                )
            case Status.FLAT if self.settled is not None and self.settled.dead:
                return (
                    "all outputs are dead: A2 f is negative everywhere, where the slope of the activation is "
                    "zero, although targets are positive; pass another x0, or take activation='leaky_relu'"
                )
            case Status.FLAT:
                assert self.verdict.flat is not None
                n = self.verdict.flat.shape[1]
                return (
                    f"{n} direction{'s have' if n > 1 else ' has'} no curvature in float64 although the data "
                    f"see {'them' if n > 1 else 'it'}: {self._flat_columns()}; centre or rescale these "
                    "columns, or add ridge"
                )
            case Status.SADDLE:
                return "a saddle point: the loss falls on both sides, but no step off it succeeded; pass x0"
            case Status.PRECISION if self.verdict.undecided:
                return (
                    "an output has all but vanished, and whether a finite minimum exists was not decided "
                    "(too many unknowns, or no time); add ridge > 0"
                )
            case Status.PRECISION:
                return (
                    f"no further step succeeds in float64{reached}; add ridge if columns are nearly "
                    "dependent, or loosen tol"
                )
            case Status.MAX_ITER:
                return f"not converged after max_iter={self.max_iter} steps{reached}; raise max_iter"
            case Status.OVERFLOW:
                return "a step overflowed; scale the data, or use a smaller step_size"
            case Status.INTERRUPTED:
                return "interrupted; x is the best point so far"
            case Status.INDEFINITE:
                return "a Hessian is not positive definite; use Newton(), or start nearer"
            case Status.FALSE_OPTIMUM:
                return f"not a minimum: {self.reason}; pass another x0, or add ridge"

    def _converged(self, reached: str) -> str:
        if self.verdict.at_floor:
            return f"converged to the rounding of the data: {self.verdict.move:.1e} in the logits"
        text = f"converged{reached}" + (", curvature sampled" if self.verdict.sampled else "")
        if self.settled is not None:
            return f"{text}; a minimum on a kink of the activation: see result.kinks"
        if self.problem.convex or not self.problem.has_logits:
            return text
        if self.n_starts > 1:
            return f"{text}; the lowest minimum found from {self.n_starts} starts"
        return f"{text}; one descent, the loss is not convex: pass n_starts to look for other minima"

    def _loss(self) -> str:
        name = type(getattr(self.problem, "loss", self.problem)).__name__
        return {"CrossEntropy": "cross entropy", "KullbackLeibler": "the divergence"}.get(name, "the loss")

    def _direction(self) -> str:
        assert self.verdict.separation is not None
        v = self.verdict.separation.direction
        v = v if self.lift is None else self.lift(v)
        return self._entries(v)

    def _entries(self, v: Array) -> str:
        order = np.argsort(-np.abs(v), kind="stable")
        size = max(float(np.abs(v).max()), np.finfo(float).tiny)
        moved = [int(j) for j in order if abs(v[j]) > 1e-9 * size]
        entries = ", ".join(f"{unknown(j, self.problem.shape)}: {v[j] / size:+.3g}" for j in moved[:3])
        return entries + (f", and {len(moved) - 3} more" if len(moved) > 3 else "")

    def _rows(self) -> str:
        assert self.verdict.separation is not None
        n = len(self.verdict.separation.rows)
        return f"{n:,} row{'s' if n > 1 else ''}"

    def rows_left_out(self) -> str:
        """Return what was fitted without, where rows are separated."""
        return f"{self._rows()} left out, whose outputs go to zero along the direction ({self._direction()})"

    def _limit(self) -> str:
        assert self.verdict.separation is not None
        return f"{self.verdict.separation.value:.6g}"

    def _flat_columns(self) -> str:
        assert self.verdict.flat is not None
        sizes = np.abs(self.verdict.flat).max(axis=1)
        return self._entries(sizes)


def unknown(j: int, shape: tuple[int, ...]) -> str:
    """Return the name of an unknown."""
    if len(shape) == 1:
        return f"column {j}"
    return f"entry ({', '.join(str(int(k)) for k in np.unravel_index(j, shape))})"
