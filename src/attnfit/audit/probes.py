"""Linear maps from hidden states back to token embeddings, and the ranking of a vocabulary by them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# Ridge and floor of the residual covariance, relative to the mean variance.
RIDGE = 1e-4
FLOOR = 1e-3
# Share of the samples on which the residuals are measured rather than fitted.
HELD_OUT = 0.2


@dataclass(frozen=True, eq=False)
class Probe:
    """``e = (h - centre) / scale @ matrix + offset``, and how far that is from the true embedding.

    Attributes
    ----------
    centre, scale : Tensor, shape (width,)
        Mean and standard deviation of the states it was fitted to.
    offset : Tensor, shape (width,)
        Mean of the embeddings.
    matrix, covariance : Tensor, shape (width, width)
        Ridge regression, and the covariance of its residuals.
    """

    centre: Any
    scale: Any
    offset: Any
    matrix: Any
    covariance: Any

    def estimate(self, states: Any) -> Any:
        """Return the estimated embedding of each state."""
        return self.displacement(states - self.centre) + self.offset

    def displacement(self, differences: Any) -> Any:
        """Return by how much embeddings differ whose states differ by this much."""
        return (differences / self.scale) @ self.matrix

    def under_noise(self, factor: Any) -> Probe:
        """Return the probe for states with errors of covariance ``factor @ factor.T``."""
        noisy = factor.T @ (self.matrix / self.scale[:, None])
        return Probe(self.centre, self.scale, self.offset, self.matrix, self.covariance + noisy.T @ noisy)

    @cached_property
    def precision(self) -> Any:
        """Inverse of the residual covariance."""
        return torch.linalg.inv(self.covariance.double()).float()


def fit_probe(states: Any, embeddings: Any, scale: Any, ridge: float = RIDGE) -> Probe:
    """Regress embeddings on states in closed form; the residuals are those of samples left out.

    Parameters
    ----------
    states, embeddings : Tensor, shape (n, width)
    scale : Tensor, shape (width,)
        Divides the states.
    ridge : float
        Relative to the mean variance of the scaled states.
    """
    centre, offset = states.mean(0), embeddings.mean(0)
    X, Y = ((states - centre) / scale).double(), (embeddings - offset).double()
    kept = len(X) - int(HELD_OUT * len(X))
    missed = Y[kept:] - X[kept:] @ _ridge(X[:kept], Y[:kept], ridge)
    covariance = missed.T @ missed / len(missed)
    covariance.diagonal().add_(FLOOR * covariance.diagonal().mean())
    return Probe(centre, scale, offset, _ridge(X, Y, ridge).float(), covariance.float())


def _ridge(X: Any, Y: Any, ridge: float) -> Any:
    gram = X.T @ X
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, X.T @ Y)


class Ranker:
    """Scores every token of a vocabulary against an estimated embedding.

    ``-0.5 (E_v - e)^T S^-1 (E_v - e)`` up to a constant, S the covariance of the probe's residuals.

    Parameters
    ----------
    probe : Probe
    table : Tensor, shape (n_vocabulary, width)
    """

    def __init__(self, probe: Probe, table: Any) -> None:
        self.probe, self._table = probe, table
        self._squares = 0.5 * torch.einsum("ij,ij->i", table @ probe.precision, table)

    def scores(self, estimates: Any) -> Any:
        """Return the scores, shape (..., n_vocabulary), of estimates of shape (..., width)."""
        return estimates @ self.probe.precision @ self._table.T - self._squares
