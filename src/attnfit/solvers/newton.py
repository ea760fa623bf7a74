"""Newton's method with a trust region on the full centred Hessian; for layered problems it goes on from false
optima.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose
from attnfit.objectives.budget import most_drawn, n_leverages, rows_to_draw
from attnfit.objectives.leverage import RowSampler, leverage_sketch
from attnfit.objectives.objective import MAX_DENSE, Offer, Problem
from attnfit.solvers.curvature import (
    Exact,
    FrozenHessian,
    MatrixFree,
    PilotHessian,
    SampledHessian,
    SampledJacobian,
    Strategy,
    natural_scale,
)
from attnfit.solvers.evidence import DEAR_GRAM, N_ROWS, ROWS_PER_UNKNOWN, Evidence
from attnfit.solvers.loop import Descent, Interrupted, Outcome, Solver, Tracker, descend, distance
from attnfit.solvers.published import PublishedNewton
from attnfit.solvers.starts import Start, draw_sample, probe_of
from attnfit.solvers.verdicts import Judge, Status, Verdict

Array = NDArray[np.float64]

HESSIANS = ("auto", "exact", "sampled", "matrix_free")
# Johnson-Lindenstrauss columns: leverages within a factor of two are all that sampling needs.
N_PROBES = 8
# Further starts descend until the next step moves no logit by more than this; an end closer than that to a
# known one is not followed.
LOOSE, CLOSE, MAX_LOOSE = 1e-2, 0.1, 50
# A loss of squares below this share of one seen elsewhere is zero but for rounding.
EXACT = 1e-22
# How often a fit goes on from a false optimum.
MAX_ESCAPES = 5


@dataclass(frozen=True)
class Newton(Solver):
    """Trust-region Newton.

    Parameters
    ----------
    hessian : {"auto", "exact", "sampled", "matrix_free"}
        "exact" forms the full Hessian in the same read as the gradient; "sampled" estimates it from rows
        drawn by approximate leverage scores during that read; "matrix_free" runs conjugate gradients on
        drawn rows and keeps no d x d array. "auto" takes matrix_free beyond 3,000 unknowns, exact where the
        rows are few, and else starts with the Hessian of the rows on which it found the start, corrected by
        the gradient differences of the steps (BFGS), and turns to exact or sampled where that is too coarse.
    globalisation : {"trust_region", "none"}
        "none" takes every step: with "sampled" this is Algorithm 1 of "An Iterative Algorithm for Rescaled
        Hyperbolic Functions Regression", signs corrected. It needs a good ``x0``.
    sample_rows : int, optional
        Rows to draw for a sampled Hessian; by default 5 % of the rows, at least 100 d (10 d where
        matrix-free).
    n_starts : int or "auto"
        Descents of a problem that is not convex, from the data's own suggestions and then from Gaussian
        points; "auto" takes ten where rows times unknowns are at most 10,000 and unknowns at most 16.
    """

    hessian: Literal["auto", "exact", "sampled", "matrix_free"] = "auto"
    globalisation: Literal["trust_region", "none"] = "trust_region"
    sample_rows: int | None = None
    n_starts: int | Literal["auto"] = "auto"
    records_points = True

    def __post_init__(self) -> None:
        if self.n_starts != "auto":
            require_starts(self.n_starts)
        choose(self.hessian, dict.fromkeys(HESSIANS), "hessian")
        choose(self.globalisation, dict.fromkeys(("trust_region", "none")), "globalisation")

    @staticmethod
    def as_published(
        epsilon0: float = 0.01,
        delta: float = 0.1,
        T: int | None = None,
        sampling: Literal["leverage", "approximate", "uniform"] = "leverage",
        low_rank: Literal["exact", "dropped"] = "exact",
        negative: Literal["refuse", "absolute"] = "refuse",
        measure: bool = False,
        n_probes: int = 32,
    ) -> PublishedNewton:
        """Return Algorithm 1 of the papers as a solver: sampled Newton steps with its guarantee, without
        safeguard.

        Each step draws rows so that ``(1 - eps0) G <= G~ <= (1 + eps0) G`` for the Gram ``G = A^T D A``, and
        takes ``x - H~^-1 g``. It needs a good ``x0`` and ``D = B_diag + w^2 > 0``, which at ordinary minima
        takes a ``row_penalty``.

        Parameters
        ----------
        epsilon0 : float, in (0, 1)
            Spectral accuracy. At 0.01 sampling does not pay below 8e5 rows for 8 unknowns.
        delta : float, in (0, 1)
            Bound on the probability that any step misses it.
        T : int, optional
            Number of steps, taken exactly. By default until ``(g^T H~^-1 g)^(1/2) <= tol (1 + |L|)^(1/2)``,
            60 at most, with ``6 delta/(pi^2 (t + 1)^2)`` left to step t.
        sampling : {"leverage", "approximate", "uniform"}
            Exact leverages; Gaussian probes of them, read again only when the weights have changed too
            much; or equal probabilities, with as many rows more as the coherence asks for.
        low_rank : {"exact", "dropped"}
            "dropped" leaves out the low-rank part of the Hessian as line 8 prints, and loses the rate.
        negative : {"refuse", "absolute"}
            Where an entry of D is negative: raise, or draw by its magnitude.
        measure : bool
            Measure the true spectral error of each step, for one exact Gram more.
        n_probes : int
            Of "approximate".

        Returns
        -------
        PublishedNewton
            Its fits have ``result.sampling``: rows asked for and drawn a step, mu, and the bound on failure.
            Status is "indefinite" where H~ is not positive definite; "converged" is the usual verdict.

        Raises
        ------
        ValueError
            If an argument is not usable; in a fit, if the problem has no rows to draw or D a negative entry.

        Notes
        -----
        Algorithm 1 of "An Iterative Algorithm for Rescaled Hyperbolic Functions Regression" and of "Local
        Convergence of Approximate Newton Method for Two Layer Nonlinear Regression", with what contradicts
        itself there settled: eps0 = 0.01 (Lemma 5.6), not Theta(1) (line 6); T steps, not T + 1 (line 4); the
        step is subtracted, not added (line 9); the low-rank part stays (line 8 drops it); D > 0 is checked;
        the second paper's gradient has the right signs and its regulariser. The number of rows is the
        smallest that the matrix Chernoff inequality allows: see `attnfit.solvers.chernoff_rows`.

        Examples
        --------
        >>> import numpy as np
        >>> from attnfit import minimize, problems, solvers
        >>> A = 0.3 * np.random.default_rng(0).standard_normal((5000, 4))
        >>> problem = problems.Rescaled(A, np.full(5000, 2e-4), row_penalty=1.0)
        >>> solver = solvers.Newton.as_published(epsilon0=0.3, T=6)
        >>> result = minimize(problem, np.full(4, 0.01), solver, random_state=0)
        >>> result.sampling.steps[0].asked
        558
        """
        return PublishedNewton(
            epsilon0, delta, T, sampling, low_rank, negative, measure=measure, n_probes=n_probes
        )

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
        """Minimise; `attnfit.minimize` documents the arguments."""
        kind = self._resolve(problem, start)
        name = f"Newton, {kind.replace('_', '-')} Hessian, {self.globalisation}"
        try:
            points = {"x0": x0} if x0 is not None else start.points(tracker, rng, self.n_starts)
        except Interrupted as stopped:
            end = Descent.begin(problem.evaluate(stopped.x))
            end.status, end.verdict = Status.INTERRUPTED, Verdict(Status.INTERRUPTED)
            return Outcome.of(problem, {"start": end}, name)
        probe = probe_of(start.pilot.problem)
        if probe is not None and not start.sample.is_full:
            probe.exact = False
        ends: dict[str, Descent] = {}
        n_starts, highest, lowest, trivial, interrupted = 0, 0.0, np.inf, list[str](), False
        for label, x in points.items():
            if len(ends) == 1 and self.n_starts == "auto" and start.settled_by(*next(iter(ends.items()))):
                break
            strategy = self._strategy(kind, start, x, rng)
            with tracker.timed("evaluate"):
                at = problem.evaluate(x, start.transfer(x), at_zero=not ends, **strategy.request(None))
            if not np.isfinite(at.value):
                if len(points) == 1:
                    problem.value(x)
                continue
            if abs(lowest) <= EXACT * at.value:
                # No other minimum can be lower than an exact fit.
                break
            n_starts += 1
            before = 0
            follow = partial(
                descend,
                problem,
                tracker=tracker,
                phase=f"fit: {label}",
                trust_region=self.globalisation == "trust_region",
            )
            if ends and start.sample.is_full:
                # As far as tells whether the minimum is another one.
                found = follow(
                    at, strategy, Judge(problem, LOOSE, probe, final=False), max_iter=min(max_iter, MAX_LOOSE)
                )
                interrupted, before = found.status == Status.INTERRUPTED, found.n_iter
                if interrupted:
                    ends[label] = found
                    break
                known = any(distance(problem, found.at, end.at, probe) <= CLOSE for end in ends.values())
                if known or (found.status != Status.CONVERGED and not found.at.value < lowest):
                    continue
                at, strategy = found.at, self._strategy(kind, start, found.at.x, rng)
            judge = Judge(problem, tol, probe, evidence=self._evidence(kind, start, rng))
            end = follow(at, strategy, judge, max_iter=max_iter)
            end.n_iter += before
            ends[label], lowest = end, min(lowest, end.at.value)
            interrupted = end.status == Status.INTERRUPTED
            separation = None if end.verdict is None else end.verdict.separation
            # Where the loss can vanish no other minimum can be lower.
            if interrupted or (separation is not None and not separation.remaining.any()):
                break
            highest = max(highest, at.value)
            if end.status == Status.CONVERGED and problem.is_trivial(end.at):
                trivial.append(label)
        if not ends:
            problem.value(next(iter(points.values())))
        if trivial:
            others = {label: end for label, end in ends.items() if label not in trivial}
            fits = [end for end in others.values() if end.status == Status.CONVERGED]
            # An exact fit says more than the point that fits every target.
            ends = others if any(end.at.value <= EXACT * highest for end in fits) else ends
        outcome = Outcome.of(problem, ends, name, probe)
        best = outcome.best
        if interrupted:
            best = replace(best, status=Status.INTERRUPTED, verdict=Verdict(Status.INTERRUPTED))
        return replace(outcome, best=best, n_starts=n_starts)

    def _resolve(self, problem: Problem, start: Start) -> str:
        if self.hessian == "sampled" and not (problem.rows_can_be_drawn or Offer.RESIDUALS in problem.offers):
            raise ValueError(
                f"hessian='sampled' draws rows, which {type(problem).__name__} does not offer; use 'auto', "
                "'exact' or 'matrix_free'"
            )
        if self.hessian != "auto":
            return self.hessian
        if problem.n_unknowns > MAX_DENSE:
            return "matrix_free"
        if problem.best_hessian != "exact":
            return problem.best_hessian
        return "exact" if start.sample.is_full else "corrected_sample"

    def _evidence(self, kind: str, start: Start, rng: np.random.Generator) -> Evidence | None:
        """Return what may accept a point without a Hessian that is dear."""
        full = start.full
        sampled = kind in ("sampled", "corrected_sample") and full.rows is not None
        if not sampled or full.design.gram_cost <= DEAR_GRAM:
            return None
        n_rows = max(N_ROWS, ROWS_PER_UNKNOWN * full.n_unknowns)
        return Evidence(full, lambda: draw_sample(full, n_rows, rng).problem)

    def _strategy(self, kind: str, start: Start, x: Array, rng: np.random.Generator) -> Strategy:
        if kind == "kept":
            return FrozenHessian()
        if kind == "exact":
            return Exact()
        small, full = start.sample.problem, start.full
        if kind == "matrix_free" and not full.rows_can_be_drawn:
            return MatrixFree(natural_scale(full, full.evaluate(x)))
        if Offer.RESIDUALS in full.offers:
            return SampledJacobian(float(self.sample_rows or 4.0 * len(x)), rng)
        if kind == "corrected_sample":
            other = "exact" if full.design.gram_pays else "sampled"
            return PilotHessian(small, x, lambda: self._strategy(other, start, x, rng))
        n, d = full.n_rows, len(x)
        rows_per_unknown = 10.0 if kind == "matrix_free" else 100.0
        most = most_drawn(full.rows)
        budget = min(most, float(self.sample_rows or rows_to_draw(n, d, rows_per_unknown)))
        at = small.evaluate(x)
        scale = natural_scale(small, at)
        if kind == "matrix_free":
            if budget >= 0.5 * n:
                return MatrixFree(scale)
            sketch = rng.standard_normal((d, N_PROBES)) / np.sqrt(N_PROBES) / scale[:, None]
        else:
            sketch = leverage_sketch(small.hessian_at(at, absolute=True), N_PROBES, rng)
        # Exact scores would sum to d; the first read replaces this guess.
        sampler = RowSampler(n_leverages(full.rows), budget, sketch, 1.3 * d, rng, most)
        if kind == "matrix_free":
            return MatrixFree(scale, sampler)
        return SampledHessian(sampler, fresh=self.globalisation == "none")


def require_starts(n_starts: Any) -> None:
    """Raise ValueError unless this is a number of starts."""
    whole = isinstance(n_starts, int | np.integer) and not isinstance(n_starts, bool)
    if not (whole and n_starts >= 1):
        raise ValueError(f'n_starts must be an integer >= 1 or "auto", not {n_starts!r}')


@dataclass(frozen=True)
class EscapingNewton(Solver):
    """`Newton` for layered problems: where a softmax output has underflowed although more of it would lower
    the loss, it goes on from a point where that output is raised.

    Parameters
    ----------
    newton : Newton
    """

    newton: Newton = field(default_factory=Newton)
    records_points = True

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
        if Offer.COLUMNS not in problem.offers:
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
