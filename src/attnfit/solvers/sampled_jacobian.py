"""The curvature of a layer inversion from a part of its residuals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from attnfit.problems.base import Problem
from attnfit.problems.evaluation import Evaluation
from attnfit.problems.inversion.layer_problem import LayerProblem
from attnfit.solvers.curvature import Model, dense_model, exact_model

Array = NDArray[np.float64]


@dataclass
class SampledJacobian:
    """``J^T D J`` of residuals drawn by leverage scores, plus their own curvature, exact.

    Every model draws anew. The approximate Newton step of "Unmasking Transformers: A Theoretical Approach to
    Data Recovery via Attention Weights": it samples what is positive and leaves alone what is not. It
    pays where residuals far outnumber the unknowns: many known tokens, several outputs.

    Parameters
    ----------
    budget : float
        Expected number of residuals drawn.
    rng : numpy.random.Generator
    """

    budget: float
    rng: np.random.Generator

    _exact: bool = False

    def request(self, contraction: float | None, *, exact: bool = False) -> dict[str, object]:
        """Ask for nothing: residuals are drawn when the model is made."""
        self._exact = exact
        return {}

    def model(self, problem: Problem, at: Evaluation, last: Model | None, *, learn: bool = True) -> Model:
        """Draw residuals and add the exact part."""
        assert isinstance(problem, LayerProblem)
        return (
            exact_model(problem, at) if self._exact else dense_model(problem, self.curvature(problem, at), at)
        )

    def curvature(self, problem: LayerProblem, at: Evaluation) -> Array:
        """Return an unbiased estimate of the Hessian."""
        J = problem.jacobian_at(at)
        scores = np.sum(linalg.qr(J, mode="economic", check_finite=False)[0] ** 2, axis=1)
        chances = np.minimum(1.0, self.budget * scores / max(float(scores.sum()), np.finfo(float).tiny))
        drawn = np.flatnonzero(self.rng.random(len(chances)) < chances)
        weighted = J[drawn] / np.sqrt(chances[drawn])[:, None]
        return np.asarray(weighted.T @ weighted + problem.residual_curvature_at(at))
