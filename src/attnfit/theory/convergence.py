"""The papers' lemmas on a step of approximate Newton, evaluated on a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from attnfit.theory.theorem import Assumption, Row, Theorem, compared
from attnfit.theory.trajectory import Trajectory

# What Lemmas 5.5 and 5.6 ask of a step.
START, SHRINK, ACCURATE, PERCENT = 0.1, 0.4, 0.1, 0.01
SHRINKING = "r_{t+1} <= 2 (eps0 + M r/(l - M r)) r"
SCALED = (
    "|e+|_* <= (eps0 + th + eps0 th + th/2)/((1 - eps0)(1 - th)) |e|_*, |e|_* = |H*^(1/2) e|, th = M_s |e|_*"
)
INDUCTION = "r_{t+1} <= 0.4 r_t and M r_{t+1} <= 0.1 l"


def printed_factor(eps: float, M: float, l: float, r: float) -> float:  # noqa: E741
    """Return ``2 (eps0 + M r/(l - M r))``, infinite from ``M r = l`` on."""
    gap = l - M * r
    return float(2.0 * (eps + M * r / gap)) if gap > 0.0 else np.inf


def scaled_factor(eps: float, theta: float) -> float:
    """Return ``(eps0 + th + eps0 th + th/2)/((1 - eps0)(1 - th))``, infinite where it says nothing."""
    if theta >= 1.0 or eps >= 1.0:
        return np.inf
    return float((eps + theta + eps * theta + 0.5 * theta) / ((1.0 - eps) * (1.0 - theta)))


@dataclass(frozen=True)
class NewtonRun:
    """What the lemmas on Newton's method ask of a trajectory.

    Attributes
    ----------
    run : Trajectory
    """

    run: Trajectory

    @cached_property
    def eps(self) -> float:
        """Spectral accuracy of the Hessians: as given, or the least that makes every step."""
        return self.needed if self.run.epsilon0 is None else self.run.epsilon0

    @cached_property
    def needed(self) -> float:
        """The least eps0 that makes every resolved step; NaN where there is none."""
        found = self.run.accuracy[self.run.resolved[:-1]]
        return float(found.max()) if len(found) else np.nan

    @property
    def l(self) -> float:  # noqa: E743
        """The smallest eigenvalue of H*."""
        return self.run.reference.lowest

    def assumptions(self, limit: float, *, strict: bool) -> list[Assumption]:
        """Return those of Lemma 5.5; ``limit`` is that of eps0."""
        run = self.run
        name, value, bound, met = run.stationary
        found = [
            Assumption(name, value, bound, met),
            Assumption("H(x*) >= l I, l > 0", self.l, 0.0, self.l > 0.0),
        ]
        if not self.l > 0.0:
            return found
        M = run.lipschitz
        found.append(Assumption.below(f"M r_0 <= 0.1 l, M = {M:.4g}", M * float(run.r[0]), START * self.l))
        told = "the Hessian that makes each step is within eps0 of the exact one"
        if run.epsilon0 is not None:
            found.append(Assumption.below(told, self.needed, run.epsilon0))
        found.append(
            Assumption.below(f"eps0 {'<' if strict else '<='} {limit:g}", self.eps, limit, strict=strict)
        )
        return found

    def rows(
        self,
        printed: Callable[[float], float],
        scaled: Callable[[float], float],
        obstacle: Callable[[int], str],
    ) -> list[Row]:
        """Return the steps from points that are resolved, given both right sides as functions of the
        distance.
        """
        run = self.run
        if not self.l > 0.0:
            return []
        rho, scaled_rho = run.reference.radius, run.reference.scaled_radius
        out = []
        for t in np.flatnonzero(run.resolved[:-1]):
            r, after, e, e_after = run.r[t], run.r[t + 1], run.scaled[t], run.scaled[t + 1]
            right = scaled(e)
            out.append(
                Row(
                    int(t), float(r), float(after), printed(r), compared(after, rho, printed, r, rho),
                    obstacle(int(t)), float(e_after), right,
                    compared(e_after, scaled_rho, scaled, e, scaled_rho) if np.isfinite(right) else None,
                )
            )  # fmt: skip
        return out

    def start_kept(self, t: int) -> str:
        """Return an obstacle where ``M r_t <= 0.1 l`` no longer holds."""
        return "" if self.run.lipschitz * self.run.r[t] <= START * self.l * (1 + 1e-9) else "M r > 0.1 l"

    def theta(self, e: float) -> float:
        """``M_s |e|_*``."""
        return float(self.run.scaled_lipschitz * e)


def newton_reason(run: Trajectory) -> str:
    """Return why theorems on Newton's method do not speak of a run; empty where they do."""
    if run.constant_step is not None:
        return "the steps are those of gradient descent"
    return ""


def shrinking(id: str, run: Trajectory) -> Theorem:
    """Lemmas RH-5.5 and TL-6.6; UT-I.3 rests on them."""
    found = NewtonRun(run)
    rows = found.rows(
        lambda r: printed_factor(found.eps, run.lipschitz, found.l, r) * r,
        lambda e: scaled_factor(found.eps, found.theta(e)) * e,
        found.start_kept,
    )
    assumptions = found.assumptions(ACCURATE, strict=True)
    return Theorem(id, SHRINKING, SCALED, tuple(assumptions), tuple(rows), newton_reason(run), _told(found))


def induction(id: str, run: Trajectory) -> Theorem:
    """Lemmas RH-5.6 and TL-6.7."""
    found = NewtonRun(run)

    def printed(r: float) -> float:
        M = run.lipschitz
        return min(SHRINK * r, START * found.l / M if M > 0.0 else np.inf)

    def scaled(e: float) -> float:
        return SHRINK * e if found.eps <= PERCENT * (1 + 1e-9) and found.theta(e) <= START else np.inf

    def obstacle(t: int) -> str:
        shrunk = np.all(run.r[1 : t + 1] <= SHRINK * run.r[:t] * (1 + 1e-9))
        return found.start_kept(t) or ("" if shrunk else "r_i > 0.4 r_{i-1} before")

    rows = found.rows(printed, scaled, obstacle)
    assumptions = found.assumptions(PERCENT, strict=False)
    corrected = "|e+|_* <= 0.4 |e|_* where eps0 <= 0.01 and th <= 0.1"
    return Theorem(
        id, INDUCTION, corrected, tuple(assumptions), tuple(rows), newton_reason(run), _told(found)
    )


def _told(found: NewtonRun) -> tuple[str, ...]:
    run = found.run
    if not found.l > 0.0:
        return ()
    rho = "certified" if run.reference.certified else "not certified"
    return (
        f"l = {found.l:.4g}, cond H* = {run.reference.cond:.4g}, M = {run.lipschitz:.4g}, M_s = "
        f"{run.scaled_lipschitz:.4g}, eps0 = {found.eps:.3g}, rho = {run.reference.radius:.1e} ({rho})",
    )
