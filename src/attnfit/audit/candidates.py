"""The candidates tried for one position, nearest first."""

from __future__ import annotations

from typing import Any

import torch

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.models.model import Tokens
from attnfit.audit.target import Target


class CandidateSet:
    """Tokens tried after a prefix, with their states, and how well each explains the observation.

    Attributes
    ----------
    tokens : list of int
    states : Tensor, shape (n, width)
    misfits : Tensor, shape (n,)
    """

    def __init__(self, prefix: Prefix, target: Target) -> None:
        self.prefix, self.target = prefix, target
        self.tokens: Tokens = []
        self.seen: set[int] = set()
        self.states = torch.empty(0, len(target.state))
        self.misfits = torch.empty(0)
        # Whether all tokens were tried that the errors could hide.
        self.exhausted = True
        self._chosen: int | None = None
        self._before = prefix.n_candidates

    def add(self, tokens: Tokens) -> None:
        """Try tokens that were not tried before."""
        fresh = [token for token in dict.fromkeys(tokens) if token not in self.seen]
        if fresh:
            states = self.prefix.candidates(fresh)
            self.tokens += fresh
            self.seen.update(fresh)
            self.states = torch.cat([self.states, states])
            self.misfits = torch.cat([self.misfits, self.target.misfits(states)])

    def note(self, token: int, state: Any) -> None:
        """Keep a token whose state is known already."""
        self.tokens.append(token)
        self.seen.add(token)
        self.states = torch.cat([self.states, state[None]])
        self.misfits = torch.cat([self.misfits, self.target.misfits(state[None])])

    @property
    def n_candidates(self) -> int:
        """Passes made for this position, those of embeddings that are no token included."""
        return self.prefix.n_candidates - self._before

    def choose(self, place: int) -> None:
        """Prefer a token over the one that explains the observation best."""
        self._chosen = place

    @property
    def best(self) -> int:
        """Place of the token that explains the observation best, or was chosen."""
        return int(self.misfits.argmin()) if self._chosen is None else self._chosen

    @property
    def solved(self) -> bool:
        """Whether a token explains the observation."""
        return len(self.tokens) > 0 and float(self.misfits.min()) <= self.target.bound

    @property
    def apart(self) -> float:
        """The squared distance from the best token's state to the next one, in units of the error."""
        squares = self.target.separations(self.states, self.states[self.best])
        squares[self.best] = torch.inf
        return float(squares.min())

    @property
    def log_odds(self) -> float:
        """By how many nats the observation prefers the best token to all others tried together."""
        likely = self.target.likelihoods(self.states)
        others = torch.cat([likely[: self.best], likely[self.best + 1 :]])
        # Where errors are small, a candidate that agrees needs no rival; elsewhere it proves nothing.
        if not len(others) or not self.exhausted:
            return 0.0 if self.target.noisy else float("inf")
        return float(likely[self.best] - others.logsumexp(0))

    def nearest(self) -> tuple[int, float, float]:
        """Return the best token, its distance and by how much the runner-up's is larger."""
        distances = self.target.distances(self.states)
        best = self.best
        others = torch.cat([distances[:best], distances[best + 1 :]])
        margin = float(others.min() - distances[best]) if len(others) else float("inf")
        return self.tokens[best], float(distances[best]), margin
