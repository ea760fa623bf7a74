"""The papers' main convergence theorems and their sampling lemma, evaluated on a trajectory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnfit.certificates.good_start import row_sizes, spectral_norm, two_layer_sizes
from attnfit.losses.rescaled import SquaredRescaled
from attnfit.objectives.attention import Attention
from attnfit.objectives.inverse import LayerInversion
from attnfit.objectives.objective import Offer
from attnfit.objectives.rows import RowProblem
from attnfit.theory.convergence import ACCURATE, PERCENT, START, NewtonRun, newton_reason
from attnfit.theory.theorem import Assumption, Row, Theorem, compared
from attnfit.theory.trajectory import Trajectory

# The accuracy eps that is asked for lies below.
EPS = 0.1
REPAIRED = "T >= (ln(r_0/eps) + 0.5 ln cond H*)/ln 2.5"


def descent_factors(m: float, L: float, t: float, k: int) -> tuple[float, float]:
    """Return ``(1 - m/L)^(k/2)`` and ``(1 - t m)^k``: what UT-I.1 prints, of ``r_0^2``, and what holds, of
    ``r_0``, for ``t <= 2/(m + L)``; NaN beyond.
    """
    if not m > 0.0:
        return np.nan, np.nan
    repaired = max(1.0 - t * m, 0.0) ** k if t * (m + L) <= 2.0 else np.nan
    return float((1.0 - m / L) ** (k / 2)), float(repaired)


def steps_needed(ratio: float, cond: float) -> float:
    """Return ``(ln(r_0/eps) + 0.5 ln cond H*)/ln 2.5`` for ``ratio = r_0/eps``."""
    return float((np.log(ratio) + 0.5 * np.log(cond)) / np.log(2.5))


def _counted(run: Trajectory, printed: Callable[[float], float], *, newton: bool = True) -> list[Row]:
    """Return, for the distance eps reached at each step, the steps taken against those of a theorem."""
    found = NewtonRun(run)
    applies = newton and found.eps <= PERCENT * (1 + 1e-9) and found.theta(float(run.scaled[0])) <= START
    out = []
    for t in np.flatnonzero(run.resolved):
        if t == 0 or not run.r[t] < min(EPS, run.r[:t].min()):
            continue
        ratio = float(run.r[0] / run.r[t])
        allowed = printed(ratio)
        repaired = float(np.ceil(steps_needed(ratio, run.reference.cond))) if applies else np.nan
        out.append(
            Row(
                int(t), float(run.r[t]), float(t), allowed, bool(t <= allowed),
                "",
                float(t) if applies else np.nan, repaired, bool(t <= repaired) if applies else None,
            )
        )  # fmt: skip
    return out


def readings(ratio: float) -> dict[str, float]:
    """Return ``T = log(r_0/eps)`` to base e and 2, and the largest reading: rounded up, and the loop's one
    step more.
    """
    return {
        "ln": float(np.log(ratio)), "log2": float(np.log2(ratio)),
        "largest": float(np.ceil(np.log2(ratio)) + 1.0),
    }  # fmt: skip


def main_rescaled(id: str, run: Trajectory, sampling: Any) -> Theorem:
    """Theorems RH-11.1 and RH-1.5."""
    formula = "|x_T - x*| <= eps after T = log(r_0/eps) steps: left and printed are steps"
    problem = run.problem
    rows_loss = problem.loss if isinstance(problem, RowProblem) else None
    if not isinstance(rows_loss, SquaredRescaled) or (id == "RH-11.1" and rows_loss.function != "exp"):
        return Theorem(id, formula, REPAIRED, reason=f"it is about {_ABOUT[id]}")
    if problem.n_groups > 1 or not _plain(problem):
        return Theorem(id, formula, REPAIRED, reason=f"it is about one group, {PLAIN}")
    found = NewtonRun(run)
    if not found.l > 0.0:
        return Theorem(id, formula, REPAIRED, tuple(found.assumptions(ACCURATE, strict=True)))
    rows_only = problem.dense() if isinstance(problem, Attention) else problem
    gram, b = row_sizes(rows_only, rows_only.evaluate(run.reference.at.x))
    A = np.linalg.eigvalsh(gram.result())
    R = max(4.0, float(np.sqrt(A[-1])), float(np.linalg.norm(run.reference.at.x)), b)
    log10_M = run.condition.log10_constant
    M = float(10.0**log10_M) if log10_M < 300 else np.inf
    w2 = 0.0 if problem.penalty is None else float(np.min(problem.penalty))
    share = found.l / max(float(A[0]), np.finfo(float).tiny)
    needed, name = (100.0, "100") if id == "RH-11.1" else (100.0 * M, "100 M")
    name_b = "w_i^2 >= " + name + " + l/sigma_min^2"
    assumptions = [
        *found.assumptions(np.inf, strict=False)[:2],
        Assumption.below(f"|A|, |x*|, |b| <= R = {R:.4g}, R >= 4", max(np.sqrt(A[-1]), b), R),
        Assumption.above(name_b, w2, needed + share),
        Assumption(
            f"M r_0 <= 0.1 l, M = n^4 e^{{20R^2}} = 10^{log10_M:.2f}",
            M * float(run.r[0]), START * found.l,
            bool(log10_M + np.log10(max(run.r[0], 1e-300)) <= np.log10(START * found.l)),
        ),
        Assumption.below("delta < 0.1", 0.0 if sampling is None else sampling.delta, 0.1, strict=True),
    ]  # fmt: skip
    rows = _counted(run, lambda ratio: readings(ratio)["largest"])
    notes = [_readings(run)] if len(rows) else []
    return Theorem(id, formula, REPAIRED, tuple(assumptions), tuple(rows), newton_reason(run), tuple(notes))


def _readings(run: Trajectory) -> str:
    ratio = float(run.r[0] / run.r[run.resolved].min())
    read = readings(ratio)
    repaired = np.ceil(steps_needed(ratio, run.reference.cond))
    return (
        f"r_0/eps = {ratio:.3g}: T = {read['ln']:.1f} (base e), {read['log2']:.1f} (base 2), one more by the "
        f"loop t = 0..T; corrected {repaired:.0f}"
    )


_ABOUT = {
    "RH-11.1": "Rescaled with function='exp'", "RH-1.5": "Rescaled", "TL-7.1": "TwoLayer",
    "TL-1.5": "TwoLayer", "UT-I.2": "gradient descent on LayerInversion",
    "UT-4.3": "gradient descent on LayerInversion", "UT-I.3": "Newton's method on LayerInversion",
    "UT-4.4": "Newton's method on LayerInversion",
}  # fmt: skip


PLAIN = "without weights, offset and ridge"


def _plain(problem: Any) -> bool:
    """Return whether the loss is the paper's, with its regulariser alone."""
    return problem.weights is None and problem.offset is None and not np.any(problem.ridge)


def main_two_layer(id: str, run: Trajectory) -> Theorem:
    """Theorem TL-7.1, and TL-1.5, its informal version."""
    formula = "|x_T - x*| <= eps after T = O(log(r_0/eps)) steps: left is T, printed ln(r_0/eps)"
    problem = run.problem
    if Offer.LAYER_ROWS not in problem.offers:
        return Theorem(id, formula, REPAIRED, reason=f"it is about {_ABOUT[id]}")
    if not _plain(problem):
        return Theorem(id, formula, REPAIRED, reason=f"it is about the loss {PLAIN}")
    found = NewtonRun(run)
    if not found.l > 0.0:
        return Theorem(id, formula, REPAIRED, tuple(found.assumptions(ACCURATE, strict=True)))
    A1, A2 = problem.logit_map.matrix, problem.outer
    norms = tuple(map(spectral_norm, (A1, A2)))
    sizes = two_layer_sizes(problem, norms, run.points[0], run.reference.at.x)
    gram = np.linalg.eigvalsh(problem.weighted_gram(np.ones(problem.logit_map.shape[0])))
    w2 = 0.0 if problem.penalty is None else float(np.min(problem.penalty))
    share = found.l / max(float(gram[0]), np.finfo(float).tiny)
    needed = 12.0 * sizes.R_h * sizes.L_h * sizes.R * (sizes.R + sizes.R_h)
    log10_M = run.condition.log10_constant
    M = float(10.0**log10_M) if log10_M < 300 else np.inf
    assumptions = [
        *found.assumptions(np.inf, strict=False)[:2],
        Assumption.below(
            f"|A1|, |A2|, |b|, |x| <= R = {sizes.R:.4g}, R >= 4",
            max(*norms, float(np.linalg.norm(problem.b))), sizes.R,
        ),
        Assumption.above("w_i^2 >= 12 R_h L_h R (R + R_h) + l/sigma_min^2", w2, needed + share),
        Assumption(
            f"M r_0 <= 0.1 l, M of Lemma 5.2 = 10^{log10_M:.2f}", M * float(run.r[0]), START * found.l,
            bool(log10_M + np.log10(max(run.r[0], 1e-300)) <= np.log10(START * found.l)),
        ),
    ]  # fmt: skip
    rows = _counted(run, lambda ratio: float(np.ceil(np.log(ratio))))
    return Theorem(
        id, formula, REPAIRED, tuple(assumptions), tuple(rows), newton_reason(run), _constant(run, rows)
    )


def _constant(run: Trajectory, rows: list[Row]) -> tuple[str, ...]:
    if not rows:
        return ()
    T = rows[-1].t
    needed = T / float(np.log(run.r[0] / rows[-1].r))
    return (
        f"O(.) is tested as 1, rounded up; the run needed T = {T}: {needed:.3g} ln(r_0/eps) at eps = "
        f"{rows[-1].r:.2g}",
    )


def sampled_rows(id: str, run: Trajectory, sampling: Any) -> Theorem:
    """Lemma RH-5.3, and TL-6.5, the same in the other paper."""
    formula = "(1 - eps0) D <= D~ <= (1 + eps0) D over range(A), eps0 = 0.01, from O(d log(n/delta)) rows"
    corrected = "eps0 as asked for, from m rows by the matrix Chernoff bound"
    if sampling is None:
        return Theorem(id, formula, corrected, reason="no sampled Hessian: fit by Newton.as_published()")
    steps = sampling.steps
    measured = all(step.error is not None for step in steps)
    assumptions = [
        Assumption.above("D > 0: smallest entry", sampling.smallest, np.finfo(float).tiny),
        Assumption(
            "spectral error measured (measure=True)", float(measured), 1.0, met=bool(measured and steps)
        ),
    ]
    rows = []
    for t, step in enumerate(steps):
        error = np.nan if step.error is None else step.error
        rows.append(
            Row(
                t, float(run.r[t]) if t < len(run.r) else np.nan, error, PERCENT,
                None if np.isnan(error) else bool(error <= PERCENT), "",
                error, sampling.epsilon0, None if np.isnan(error) else bool(error <= sampling.epsilon0),
            )
        )  # fmt: skip
    n, d = sampling.n_rows, run.points.shape[1]
    per = max((step.drawn for step in steps), default=0) / (d * np.log(n / sampling.delta))
    note = (
        f"rows drawn a step: at most {per:.3g} d ln(n/delta); failure bound of the run {sampling.failure:.3g}"
    )
    return Theorem(id, formula, corrected, tuple(assumptions), tuple(rows), notes=(note,))


# ---- gradient descent


def descent(id: str, run: Trajectory, gamma: float | None = None) -> Theorem:
    """Theorem UT-I.1, and UT-I.2 = UT-4.3, which rests on it."""
    layer = isinstance(run.problem, LayerInversion)
    main = id != "UT-I.1"
    formula = "|x_k - x*| <= (1 - m/L)^(k/2) |x_0 - x*|^2 for t < 2/(m + L)"
    if main:
        formula = (
            "|X_k - X*|_F <= eps after O(poly(n, d, R) log(r_0/eps)) steps: left is k, printed ln(r_0/eps)"
        )
    corrected = "|x_k - x*| <= (1 - t m)^k |x_0 - x*|"
    t = run.constant_step
    if t is None:
        return Theorem(
            id, formula, corrected, reason="the steps are not those of gradient descent, x - t grad"
        )
    if main and not layer:
        return Theorem(id, formula, corrected, reason=f"it is about {_ABOUT[id]}")
    name, value, bound, met = run.stationary
    m, L = run.curvature
    assumptions = [
        Assumption(name, value, bound, met),
        Assumption("H >= m I, m > 0, where the iterates move (sampled)", m, 0.0, m > 0.0),
    ]
    if main:
        assumptions += _bounded(run, gamma)
    assumptions.append(Assumption.below("t < 2/(m + L)", t, 2.0 / (m + L), strict=True))
    r0, rho = float(run.r[0]), run.reference.radius
    rows = []
    for k in np.flatnonzero(run.resolved):
        r = float(run.r[k])
        factor, repaired = descent_factors(m, L, t, int(k))
        right = factor * r0**2
        holds = compared(r, rho, lambda r0, factor=factor: factor * r0**2, r0, rho)  # type: ignore[misc]
        left = r
        if main:
            left, right = float(k), float(np.ceil(np.log(r0 / r))) if r > 0.0 else np.inf
            holds = bool(left <= max(right, 0.0))
        proven = None if np.isnan(repaired) else _linear(r, rho, repaired, r0)
        rows.append(Row(int(k), r, left, right, holds, "", r, repaired * r0, proven))
    told = f"m = {m:.4g}, L = {L:.4g}, t = {t:.5g}"
    told += " of the loss with its factor 0.5, half of the paper's" if layer else ""
    notes = [told]
    if main:
        notes.append(
            f"O(.) is tested as 1; |X*|_F = {np.linalg.norm(run.reference.at.x):.3g}: the theorem is about "
            "X*, which the regulariser draws to zero, not about the data"
        )
    return Theorem(id, formula, corrected, tuple(assumptions), tuple(rows), notes=tuple(notes))


def _linear(r: float, rho: float, factor: float, r0: float) -> bool | None:
    return compared(r, rho, lambda start: factor * start, r0, rho)


def _bounded(run: Trajectory, gamma: float | None) -> list[Assumption]:
    """Return the assumptions of UT-I.2 and UT-I.3 on sizes, in Frobenius norms, and on gamma."""
    problem = run.problem
    tokens = [float(np.linalg.norm(problem.token_rows(x))) for x in (run.points[0], run.reference.at.x)]
    weights = [float(np.linalg.norm(M)) for head in problem.layer.heads for M in (head.M, head.V)]
    largest = max(*tokens, *weights, float(np.abs(problem.B).max()))
    R = max(1.0, largest)
    n, d = problem.n, problem.d
    gamma = problem.gamma if gamma is None else gamma
    return [
        Assumption.below(f"|W|_F, |V|_F, |X|_F, |b_ij| <= R = {R:.4g}", largest, R),
        Assumption.above("gamma >= 72 n d R^8", float(gamma), 72.0 * n * d * R**8),
    ]


def inversion_newton(id: str, run: Trajectory, gamma: float | None) -> Theorem:
    """Theorem UT-I.3, and UT-4.4, its informal version."""
    formula = "|X_T - X*|_F <= eps after T = O(log(r_0/eps)) steps: left is T, printed ln(r_0/eps)"
    if not isinstance(run.problem, LayerInversion):
        return Theorem(id, formula, REPAIRED, reason=f"it is about {_ABOUT[id]}")
    found = NewtonRun(run)
    assumptions = found.assumptions(np.inf, strict=False)[:2]
    if not found.l > 0.0:
        return Theorem(id, formula, REPAIRED, tuple(assumptions))
    condition = run.condition
    assert condition.log10_limit is not None
    M, limit = 10.0**condition.log10_constant, 10.0**condition.log10_limit
    assumptions += _bounded(run, gamma)
    assumptions.append(Assumption.below("M r_0 <= n d R^8, M = n^3 d^3 R^10", 2 * M * run.r[0], 2 * limit))
    rows = _counted(run, lambda ratio: float(np.ceil(np.log(ratio))))
    return Theorem(
        id, formula, REPAIRED, tuple(assumptions), tuple(rows), newton_reason(run), _constant(run, rows)
    )
