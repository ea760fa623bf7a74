"""Newton's method with a trust region on the full centred Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.problems.base import MAX_DENSE, Problem
from attnfit.problems.inputs import choose
from attnfit.problems.inversion.layer_problem import LayerProblem
from attnfit.problems.rows.sample_sizes import rows_to_draw
from attnfit.sketching import RowSampler, leverage_sketch
from attnfit.solvers.curvature import Exact, FromSample, Kept, MatrixFree, Sampled, Strategy
from attnfit.solvers.descent import Descent, descend, reference_norm
from attnfit.solvers.sampled_jacobian import SampledJacobian
from attnfit.solvers.start import Start, same_minimum
from attnfit.solvers.tracking import Interrupted, Tracker

Array = NDArray[np.float64]

HESSIANS = ("auto", "exact", "sampled", "matrix_free")
# Johnson-Lindenstrauss columns: leverages within a factor of two are all that sampling needs.
N_PROBES = 8


@dataclass(frozen=True)
class Outcome:
    """What a solver hands to `minimize`; ``message`` replaces the usual one, ``column_status`` is one a
    right-hand
    side.
    """

    best: Descent
    scale: Array
    local_values: dict[str, float]
    n_iter: int
    description: str
    message: str = ""
    column_status: NDArray[Any] | None = None

    @classmethod
    def of(cls, ends: dict[str, Descent], scale: Array, description: str) -> Outcome:
        """Choose the best end; of ends in one minimum, which differ by rounding, one that converged."""
        ranked = sorted(ends, key=lambda name: ends[name].at.value)
        best = ends[ranked[0]]
        for other in (ends[name] for name in ranked[1:]):
            if best.status != "converged" == other.status and same_minimum(best.at, other.at, scale):
                best = other
        values = {name: ends[name].at.value for name in ranked}
        return cls(best, scale, values, sum(run.n_iter for run in ends.values()), description)


@dataclass(frozen=True)
class Newton:
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
    """

    hessian: Literal["auto", "exact", "sampled", "matrix_free"] = "auto"
    globalisation: Literal["trust_region", "none"] = "trust_region"
    sample_rows: int | None = None

    def __post_init__(self) -> None:
        choose(self.hessian, dict.fromkeys(HESSIANS), "hessian")
        choose(self.globalisation, dict.fromkeys(("trust_region", "none")), "globalisation")

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
        scale = start.scale()
        try:
            points = {"x0": x0} if x0 is not None else start.points(scale, tracker, rng)
        except Interrupted as interrupted:
            at = problem.evaluate(interrupted.x)
            return Outcome.of(
                {"start": Descent(at, reference_norm(at, scale), "interrupted")}, scale, "Newton"
            )
        ends: dict[str, Descent] = {}
        for name, x in points.items():
            strategy = self._strategy(kind, start, x, scale, rng)
            with tracker.timed("evaluate"):
                at = problem.evaluate(x, start.transfer(x), origin=True, **strategy.request(None))
            if not np.isfinite(at.value):
                problem.value(x)
            ends[name] = descend(
                problem,
                at,
                strategy,
                scale,
                tracker,
                phase=f"fit: {name}",
                tol=tol,
                max_iter=max_iter,
                trust_region=self.globalisation == "trust_region",
            )
            if ends[name].status == "interrupted":
                break
        return Outcome.of(ends, scale, f"Newton, {kind.replace('_', '-')} Hessian, {self.globalisation}")

    def _resolve(self, problem: Problem, start: Start) -> str:
        inverts = isinstance(problem, LayerProblem)
        if self.hessian == "sampled" and not (problem.rows_can_be_drawn or inverts):
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

    def _strategy(
        self, kind: str, start: Start, x: Array, scale: Array, rng: np.random.Generator
    ) -> Strategy:
        if kind == "kept":
            return Kept()
        if kind == "matrix_free" and not start.full.rows_can_be_drawn:
            return MatrixFree()
        if kind == "exact":
            return Exact()
        if isinstance(start.full, LayerProblem):
            return SampledJacobian(float(self.sample_rows or 4.0 * len(scale)), rng)
        n, d = start.full.n_rows, len(scale)
        rows_per_unknown = 10.0 if kind == "matrix_free" else 100.0
        most = start.full.most_drawn
        budget = min(most, float(self.sample_rows or rows_to_draw(n, d, rows_per_unknown)))
        if kind == "corrected_sample":
            other = "exact" if start.full.design.gram_pays else "sampled"
            return FromSample(start.sample.problem, lambda: self._strategy(other, start, x, scale, rng))
        if kind == "matrix_free" and budget >= 0.5 * n:
            return MatrixFree()
        small = start.sample.problem
        at = small.evaluate(x)
        if kind == "matrix_free":
            probes = rng.standard_normal((d, N_PROBES)) / np.sqrt(N_PROBES)
            sketch = probes / np.sqrt(np.maximum(small.diagonal_at(at), 1e-300))[:, None]
        else:
            sketch = leverage_sketch(small.hessian_at(at, absolute=True), N_PROBES, rng)
        # Exact scores would sum to d; the first read replaces this guess.
        sampler = RowSampler(start.full.n_leverages, budget, sketch, 1.3 * d, rng, most)
        if kind == "matrix_free":
            return MatrixFree(sampler)
        return Sampled(sampler, fresh=self.globalisation == "none")
