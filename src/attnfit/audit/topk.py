"""From the few largest log-probabilities at every position to the text."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log
from time import perf_counter
from typing import Any

import numpy as np
import torch

from attnfit.audit.checks import check_budget, check_prefix
from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.engine.prior import Prior, with_surprises
from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.found import Cost, Found, Position, certain_lead, conclude
from attnfit.audit.models.model import Model

# Log-probabilities agree up to this beyond the stated error: rounding of the forward passes.
ROUNDING = 2e-3
# A uniform error never exceeds this many of its standard deviations; a few more for Gaussian ones.
WIDTHS = 4.0
FIRST_BATCH, GROWTH, LARGEST_BATCH = 32, 4, 1024
# Candidates after which the best of those that agree is taken, although others may as well.
MANY = 2048
# Tokens of one position that may be gone back to, and how often in all.
BRANCHES, RETURNS = 16, 64


def invert_topk(
    model: Model,
    shown: Any,
    values: Any,
    *,
    error: Any = 0.0,
    reach: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> Found:
    """Recover the tokens from the largest log-probabilities at every position.

    Candidates are tried in the order of the model's own next-token distribution, and compared by the tokens
    and the numbers shown: even one number with two decimals tells the true token from most others.

    Parameters
    ----------
    model : Model
    shown : array_like of int, shape (n, k)
        Tokens whose log-probabilities are known: those for which they are largest.
    values : array_like, shape (n, k)
        These log-probabilities.
    error : array_like, broadcastable to values
        Standard deviation of their errors.
    reach : array_like, broadcastable to values, optional
        The largest error of each.
    known_prefix : sequence of int
        Tokens known to come first. Without any, all tokens are equally likely at position 0.
    budget : int, optional
        Largest number of candidates at a position.

    Returns
    -------
    Found
    """
    checked = _checked(model, shown, values, error, reach)
    search = _TopkSearch(model, *checked, check_budget(budget, model))
    return search.run(list(known_prefix))


class _TopkSearch:
    """The inversion of one observation."""

    def __init__(self, model: Model, shown: Any, values: Any, allowed: Any, budget: int) -> None:
        self._began = perf_counter()
        self._model, self._budget = model, budget
        self._shown, self._values, self._allowed = shown, values, allowed
        self._prefix, self._prior = Prefix(model, model.n_layers + 1), Prior(model)
        self._positions: list[Position] = []
        # For each position, the other tokens that agree, best last: to go back to if nothing follows.
        self._others: list[list[Position]] = []
        self._n_returns = 0

    def run(self, known: list[int]) -> Found:
        """Return everything that could be recovered."""
        reason = ""
        if known:
            check_prefix(known, len(self._shown), self._model)
            for at, state in enumerate(self._prefix.extend(known)):
                if not self._agrees(at, state):
                    raise ObservationMismatch(
                        f"known_prefix[{at}] is {known[at]}, which the observation contradicts"
                    )
                gap = float(self._compared(at, state[None])[0])
                self._positions.append(Position(known[at], gap, inf, 0, "known"))
                self._others.append([])
        farthest: tuple[list[Position], str] = ([], "")
        try:
            while not reason and len(self._positions) < len(self._shown):
                reason = self._search(len(self._positions))
                if reason:
                    if not farthest[1] or len(self._positions) > len(farthest[0]):
                        farthest = list(self._positions), reason
                    reason = "" if self._return() else reason
        except KeyboardInterrupt:
            reason, farthest = "interrupted", ([], "")
        if reason and farthest[1]:
            self._positions, reason = farthest
        return self._found(reason)

    def _return(self) -> bool:
        """Take the next best token at the last position that had several; return whether there was one."""
        while self._others and not self._others[-1]:
            self._others.pop()
            self._positions.pop()
        if not self._others or self._n_returns == RETURNS:
            return False
        self._n_returns += 1
        self._positions[-1] = self._others[-1].pop()
        self._prefix.crop(len(self._positions) - 1)
        self._prefix.extend([self._positions[-1].token])
        return True

    def _search(self, at: int) -> str:
        """Find one token; return why not, if not."""
        prior = self._prior.after(self._prefix.tokens)
        order = prior.argsort(descending=True, stable=True)[: self._budget]
        gaps, excluded = torch.empty(0), torch.empty(0, dtype=torch.bool)
        certain = certain_lead(len(self._shown))
        lead, size = 0.0, FIRST_BATCH
        while len(gaps) < len(order):
            states = self._prefix.candidates(order[len(gaps) : len(gaps) + size])
            some, others = self._compared(at, states)
            gaps, excluded = torch.cat([gaps, some]), torch.cat([excluded, others])
            size = min(GROWTH * size, LARGEST_BATCH)
            agreeing = (~excluded & (gaps <= 1.0)).nonzero()[:, 0]
            if len(agreeing):
                lead = self._lead(gaps, excluded)
                if lead >= certain or len(gaps) >= MANY:
                    break
        if not len(agreeing):
            return (
                f"no token explains position {at} after {len(order)} candidates; the nearest misses the "
                f"numbers shown by {float(gaps.min()):.2g} times their error"
            )
        score = with_surprises(prior)[order[agreeing]] - 0.5 * (WIDTHS * gaps[agreeing]).square()
        ranked = agreeing[score.argsort(descending=True)].tolist()
        best, *others = [self._position(place, order, gaps, lead) for place in ranked[: 1 + BRANCHES]]
        self._positions.append(best)
        self._others.append(others[::-1])
        self._prefix.extend([best.token])
        return ""

    def _position(self, place: int, order: Any, gaps: Any, lead: float) -> Position:
        """Return what is known of one of the tokens that agree."""
        rest = torch.cat([gaps[:place], gaps[place + 1 :], torch.tensor([inf])])
        gap = float(gaps[place])
        return Position(int(order[place]), gap, float(rest.min()) - gap, len(gaps), "shortlist", lead)

    def _lead(self, gaps: Any, excluded: Any) -> float:
        """Return how unlikely it is, in nats, that a token agrees by accident; zero where two agree.

        The k numbers of wrong tokens spread over k dimensions: as the nearest of those tried misses by g, one
        of them in ``g^k`` comes within 1, and all tokens are to those tried as their numbers.
        """
        agreeing = ~excluded & (gaps <= 1.0)
        if int(agreeing.sum()) > 1:
            return 0.0
        if len(gaps) == self._model.n_vocabulary:
            return inf
        nearest = float(gaps[~agreeing].min()) if len(gaps) > 1 else 1.0
        return int(self._shown.shape[1]) * log(max(1.0, nearest)) + log(len(gaps) / self._model.n_vocabulary)

    def _compared(self, at: int, states: Any) -> tuple[Any, Any]:
        """Return the largest difference from the numbers, in units of what may be, and who shows others.

        A difference above 1 is wrong. So is a candidate of which other tokens would have been shown.
        """
        logits = self._model.unembed(states)
        least = logits[:, self._shown[at]].amin(-1)
        excluded = logits.topk(self._shown.shape[1]).values[:, -1] > least + ROUNDING
        chances = logits[:, self._shown[at]] - logits.logsumexp(-1, keepdim=True)
        return ((chances - self._values[at]).abs() / self._allowed[at]).amax(-1), excluded

    def _found(self, reason: str) -> Found:
        tokens = [position.token for position in self._positions]
        consistent = False
        if not reason:
            states = torch.from_numpy(self._model.states(tokens, self._model.n_layers + 1))
            consistent = all(self._agrees(at, state) for at, state in enumerate(states))
        n_forwards = self._prefix.n_forwards + self._prior.n_forwards + len(tokens) * (not reason)
        cost = Cost(self._prefix.n_candidates, n_forwards, perf_counter() - self._began)
        return conclude(self._model, self._positions, len(self._shown), reason, consistent, cost)

    def _agrees(self, at: int, state: Any) -> bool:
        gap, excluded = self._compared(at, state[None])
        return float(gap) <= 1.0 and not bool(excluded)


def _checked(model: Model, shown: Any, values: Any, error: Any, reach: Any) -> tuple[Any, Any, Any]:
    """Return tokens, log-probabilities and the errors that they may have as tensors of one shape."""
    tokens, chances = np.asarray(shown), np.asarray(values, dtype=np.float32)
    if tokens.ndim != 2 or tokens.shape != chances.shape or not tokens.size:
        raise ObservationMismatch(
            f"shown and values must have one shape (n, k), not {tokens.shape} and {chances.shape}"
        )
    outside = (tokens < 0) | (tokens >= model.n_vocabulary)
    if outside.any():
        at = tuple(int(place) for place in np.argwhere(outside)[0])
        raise ObservationMismatch(
            f"shown[{at[0]}, {at[1]}] is {tokens[at]}, not a token of {model.name!r}, which has "
            f"{model.n_vocabulary}"
        )
    if not np.isfinite(chances).all():
        row, place = np.argwhere(~np.isfinite(chances))[0]
        raise ObservationMismatch(
            f"values[{row}, {place}] is {chances[row, place]}: observations must be finite"
        )
    widest = WIDTHS * np.broadcast_to(np.asarray(error, dtype=np.float32), chances.shape)
    allowed = (widest if reach is None else np.minimum(widest, reach)) + ROUNDING
    return (
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(chances),
        torch.from_numpy(allowed.astype(np.float32)),
    )
