"""Candidates for one position: compared by the largest log-probabilities, and what they tell of others."""

from __future__ import annotations

from math import inf
from typing import Any

import torch

from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.result import Position

# Log-probabilities agree up to this beyond the stated error: rounding of the forward passes.
ROUNDING = 2e-3
# Where some candidates agree, those nearest by differences alone are compared exactly.
EXACT = 32
# Candidates that the rest is ordered by, and the variance of the noise in their numbers beside the signal's.
LEARNED, RIDGE = 4096, 2.0


class ShownCandidates:
    """Candidates for one position.

    Attributes
    ----------
    tokens : list of int
    missed : Tensor, shape (n, k)
        Their logits of the tokens shown minus the log-probabilities shown.
    gaps : Tensor, shape (n,)
        The largest difference from the numbers, in units of what may be: above 1 is wrong. Where it is not
        exact, a lower bound: what remains whatever constant is added to the logits, which takes the logits of
        the tokens shown instead of all.
    """

    def __init__(self, model: Model, shown: Any, values: Any, allowed: Any) -> None:
        self._model, self._shown, self._values, self._allowed = model, shown, values, allowed
        self.tokens: Tokens = []
        self._states, self.missed = torch.empty(0, model.width), torch.empty(0, len(shown))
        self.gaps = torch.empty(0)
        self._exact, self._excluded = torch.empty(0, dtype=torch.bool), torch.empty(0, dtype=torch.bool)

    def add(self, tokens: Tokens, states: Any) -> None:
        """Compare more candidates, exactly where they may agree."""
        missed = self._model.unembed(states, self._shown) - self._values
        high, low = missed.max(-1), missed.min(-1)
        gaps = (high.values - low.values) / (self._allowed[high.indices] + self._allowed[low.indices])
        no = torch.zeros(len(gaps), dtype=torch.bool)
        before = len(self.tokens)
        self.tokens = self.tokens + tokens
        self._states, self.missed = torch.cat([self._states, states]), torch.cat([self.missed, missed])
        self.gaps, self._exact = torch.cat([self.gaps, gaps]), torch.cat([self._exact, no])
        self._excluded = torch.cat([self._excluded, no])
        self._compare(before + (gaps <= 1.0).nonzero()[:, 0])

    def sharpen(self, count: int = 1) -> None:
        """Compare exactly until it is known which of those that do not agree are nearest."""
        others = torch.ones(len(self.gaps), dtype=torch.bool)
        others[self.agreeing] = False
        places = others.nonzero()[:, 0]
        while not self._exact[places[self.gaps[places].argsort()[:count]]].all():
            unknown = (~self._exact).nonzero()[:, 0]
            near = self.gaps[unknown].topk(min(EXACT, len(unknown)), largest=False).indices
            self._compare(unknown[near])

    @property
    def agreeing(self) -> Any:
        """Places of the candidates that give what is shown: the numbers, and no other tokens."""
        return (~self._excluded & (self.gaps <= 1.0)).nonzero()[:, 0]

    def position(self, place: int, log_odds: float) -> Position:
        """Return what is known of one of those that agree."""
        gap = float(self.gaps[place])
        margin = self.nearest_but(place) - gap
        return Position(self.tokens[place], gap, margin, len(self.gaps), "shortlist", log_odds)

    def nearest_but(self, place: int) -> float:
        """Return the smallest gap of all others, infinite where there are none."""
        return float(torch.cat([self.gaps[:place], self.gaps[place + 1 :], torch.tensor([inf])]).min())

    def _compare(self, places: Any) -> None:
        if not len(places):
            return
        logits = self._model.unembed(self._states[places])
        least = logits[:, self._shown].amin(-1)
        self._excluded[places] = logits.topk(len(self._shown)).values[:, -1] > least + ROUNDING
        beyond = self.missed[places] - logits.logsumexp(-1, keepdim=True)
        self.gaps[places] = (beyond.abs() / self._allowed).amax(-1)
        self._exact[places] = True


def likelihoods(table: Any, tokens: Tokens, missed: Any) -> Any:
    """Return how likely every token is to give the numbers shown, by what those tried gave, in nats.

    Logits are regressed on embeddings, linearly and with a strong ridge, and the residuals of tokens left out
    tell how far to trust that. Only differences of logits count, which no added constant changes.

    Parameters
    ----------
    table : Tensor, shape (n_vocabulary, width)
    tokens : list of int
        Those tried.
    missed : Tensor, shape (len(tokens), k)
        Their logits minus the log-probabilities shown.
    """
    numbers = (missed - missed.mean(1, keepdim=True))[:LEARNED, 1:]
    count, width = numbers.shape
    if not width or count < 2:
        return torch.zeros(len(table))
    rows = table[tokens[:LEARNED]]
    centre, offset = rows.mean(0), numbers.mean(0)
    X, Y = rows - centre, numbers - offset
    gram = X.T @ X
    gram.diagonal().add_(RIDGE * gram.trace() / count)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = inverse @ (X.T @ Y)
    leverages = ((X @ inverse) * X).sum(1, keepdim=True) + 1.0 / count
    left_out = (Y - X @ weights) / (1.0 - leverages)
    covariance = left_out.T @ left_out / count
    covariance.diagonal().add_(ROUNDING)
    # A few columns, each contiguous: the product takes a third of the time.
    expected = table @ weights.T.contiguous().T + (offset - centre @ weights)
    return -0.5 * (expected @ torch.linalg.inv(covariance) * expected).sum(1)
