"""Attention layers whose input is known: what an inversion is judged on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnfit import problems

Array = NDArray[np.float64]

# The input counts as recovered at this relative error.
RECOVERED = 1e-6

SETTINGS: dict[str, dict[str, Any]] = {
    "base": {},
    "self-dominant": {"own": 2.0},
    "causal": {"mask": "causal"},
    "two outputs": {"heads": 2},
    "half known": {"known": 0.5},
    "3/4 known": {"known": 0.75},
}


@dataclass(frozen=True)
class Planted:
    """A layer with the exact output of tokens drawn from a table.

    Attributes
    ----------
    layer : LayerInversion
    truth : ndarray, shape (d, n_unknown)
        The tokens that are not known.
    vocabulary : ndarray, shape (N, d)
    tokens : ndarray of int, shape (n_unknown,)
        Their rows in the vocabulary.
    """

    layer: problems.LayerInversion
    truth: Array
    vocabulary: Array
    tokens: NDArray[np.intp]

    def error(self, x: Any) -> float:
        """Return the relative error of the unknown tokens."""
        difference = np.reshape(x, self.truth.shape) - self.truth
        return float(np.linalg.norm(difference) / np.linalg.norm(self.truth))

    def residual(self, x: Any) -> float:
        """Return the relative residual of the output."""
        return float(np.linalg.norm(self.layer.residuals(x)) / np.linalg.norm(self.layer.B))


def plant(
    n: int,
    d: int,
    scale: float,
    seed: int,
    *,
    own: float = 0.0,
    mask: str | None = None,
    heads: int = 1,
    known: float = 0.0,
    n_vocabulary: int = 1000,
) -> Planted:
    """Draw a layer and its tokens.

    Parameters
    ----------
    n, d : int
    scale : float
        Standard deviation of the logits.
    seed : int
    own : float
        ``W + own scale / sqrt(d) I``: how much a token attends to itself.
    mask : {"causal"}, optional
    heads : int
        Outputs side by side, one a head.
    known : float
        Share of the tokens that is given.
    n_vocabulary : int
        Gaussian rows that tokens are drawn from.
    """
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((n_vocabulary, d))
    tokens = rng.integers(n_vocabulary, size=n)
    X = np.ascontiguousarray(table[tokens].T)
    W = [scale / d * rng.standard_normal((d, d)) + own * scale / np.sqrt(d) * np.eye(d) for _ in range(heads)]
    V = np.zeros((heads, d, heads * d))
    for h in range(heads):
        V[h, :, h * d : (h + 1) * d] = rng.standard_normal((d, d)) / np.sqrt(d)
    hidden = np.sort(rng.permutation(n)[round(known * n) :])
    given = X.copy()
    given[:, hidden] = np.nan
    output = problems.LayerInversion(W, V, np.zeros((n, heads * d)), mask=mask).output(X)
    layer = problems.LayerInversion(W, V, output, mask=mask, known=given)
    return Planted(layer, X[:, hidden], table, tokens[hidden])
