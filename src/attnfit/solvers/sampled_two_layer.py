"""Newton's method for two layers with the diagonal part of the Hessian sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attnfit.data.inputs import choose
from attnfit.objectives.layers import TwoLayer
from attnfit.objectives.leverage import RowSampler, leverage_sketch
from attnfit.objectives.objective import Evaluation, Offer
from attnfit.solvers.curvature import Model, dense_model
from attnfit.solvers.loop import Outcome, Solver, Tracker, descend
from attnfit.solvers.verdicts import Judge

Array = NDArray[np.float64]

# Johnson-Lindenstrauss columns: leverages within a factor of two are all that sampling needs.
N_PROBES = 8
# Rows an unknown: the sampled diagonal is then some ten per cent off.
ROWS_PER_UNKNOWN = 100


@dataclass(frozen=True)
class SampledTwoLayer(Solver):
    """Algorithm 1 of "Local Convergence of Approximate Newton Method for Two Layer Nonlinear Regression",
    corrected.

    The Hessian is ``A1^T diag(a + w^2) A1`` plus a part of rank m + 2. Rows of A1 are drawn by approximate
    leverage scores for the first; the second is exact. The paper's direction has a wrong sign and leaves the
    regulariser out, and its rate holds in the norm of the Hessian, not in the Euclidean one.

    Parameters
    ----------
    sample_rows : int, optional
        Expected number of rows drawn a step; by default 100 d.
    globalisation : {"trust_region", "none"}
        "none" takes every step, as the paper does: it needs a good ``x0``, and a ``row_penalty`` that keeps
        ``a + w^2`` positive.

    Raises
    ------
    ValueError
        If an argument is not usable.
    """

    sample_rows: int | None = None
    globalisation: Literal["trust_region", "none"] = "trust_region"
    records_points = True

    def __post_init__(self) -> None:
        choose(self.globalisation, dict.fromkeys(("trust_region", "none")), "globalisation")
        if self.sample_rows is not None and not self.sample_rows > 0:
            raise ValueError(f"sample_rows must be positive, not {self.sample_rows!r}")

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
            If the problem is not `TwoLayer` with one right-hand side.
        """
        if Offer.LAYER_ROWS not in problem.offers:
            raise ValueError(
                "SampledTwoLayer fits TwoLayer with one right-hand side, b of shape (m,); leave solver "
                "out for others"
            )
        x = problem.initial_point(rng) if x0 is None else x0
        at = problem.evaluate(x, at_zero=True)
        if not np.isfinite(at.value):
            problem.value(x)
        budget = float(self.sample_rows or ROWS_PER_UNKNOWN * len(x))
        run = descend(
            problem,
            at,
            SampledDiagonal(budget, rng),
            Judge(problem, tol),
            tracker,
            phase="fit: sampled",
            max_iter=max_iter,
            trust_region=self.globalisation == "trust_region",
        )
        name = "zero" if x0 is None else "x0"
        return Outcome.of(problem, {name: run}, f"Newton, sampled diagonal, {self.globalisation}")


@dataclass
class SampledDiagonal:
    """The curvature strategy of `SampledTwoLayer`: every model draws rows anew.

    Parameters
    ----------
    budget : float
        Expected number of rows.
    rng : numpy.random.Generator
    """

    budget: float
    rng: np.random.Generator
    _sketch: Array | None = field(default=None, repr=False)
    _exact: bool = False

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, Any]:
        """Ask for nothing: rows of A1 are drawn when the model is made."""
        self._exact = exact
        return {}

    def model(self, problem: Any, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Draw rows by their share of the diagonal part and add the low-rank part."""
        if self._exact:
            return dense_model(problem, at)
        rows, factors = self.draw(problem, at)
        return dense_model(problem, at, problem.sampled_hessian(at, rows, factors))

    def draw(self, problem: TwoLayer, at: Evaluation) -> tuple[NDArray[np.intp], Array]:
        """Return the rows drawn and their inverse probabilities.

        Probabilities are proportional to ``|a_i + w_i^2|`` times the leverage of row i in the last draw's
        metric; the first metric is the exact one.
        """
        n = problem.logit_map.shape[0]
        weights = np.abs(problem.diagonal_weights(problem.layers_of(at)))
        if self._sketch is None:
            gram = problem.weighted_gram(weights)
            gram[np.diag_indices(len(gram))] += problem.ridge
            self._sketch = leverage_sketch(gram, N_PROBES, self.rng)
        scores = weights * np.sum(problem.logit_map.forward(None, self._sketch) ** 2, axis=1)
        sampler = RowSampler(n, self.budget, self._sketch, max(float(scores.sum()), 1e-300), self.rng)
        rows, factors = sampler.draw(scores)
        if len(rows) > len(self._sketch):
            gram = problem.weighted_gram(weights[rows] * factors, rows)
            gram[np.diag_indices(len(gram))] += problem.ridge
            self._sketch = leverage_sketch(gram, N_PROBES, self.rng)
        return rows, factors
