"""From the few largest log-probabilities at every position to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, log
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import log_softmax

from attnfit.audit.access import Access, Leak, Search, no_attack_without_first
from attnfit.audit.checks import check_budget, check_prefix
from attnfit.audit.engine.prefix import Prefix, alternatives
from attnfit.audit.engine.prior import Prior, with_surprises
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.ordering import interleaved
from attnfit.audit.result import Cost, InversionResult, Position, certain_log_odds, conclude
from attnfit.audit.shown_candidates import ROUNDING, ShownCandidates, likelihoods

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# A uniform error never exceeds this many of its standard deviations; a few more for Gaussian ones.
WIDTHS = 4.0
FIRST_BATCH, GROWTH, LARGEST_BATCH = 32, 2, 256
# Candidates after which the best of those that agree is taken, although others may as well.
MANY = 1024
# Tokens nearest to a doubtful one that are compared at the next position too.
RIVALS = 64
# Tokens of one position that may be gone back to, and candidates in all after the first time.
BRANCHES, RETURNED = 16, 1 << 14
# With more tokens than this to go back to it is likelier that one of them was taken wrongly than that the
# next token is a rare one: the vocabulary is not tried to its end then.
FEW, COMMON = 4, 4096


class TopLogProbabilities(Access):
    """The largest log-probabilities at every position, and their tokens."""

    kind, number, first, forecasts = "topk", "COUNT", 1, False

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the {self.place} largest log-probabilities at every position"

    def layer(self, model: Model) -> Layer:
        """Return the last states, after the final norm."""
        return model.n_layers + 1

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the log-probabilities, largest first."""
        logits = model.logits(tokens)
        if self.place > model.n_vocabulary:
            raise AuditError(f"{self} exceeds the vocabulary of {model.n_vocabulary}")
        chances = log_softmax(logits.astype(np.float64), axis=1)
        shown = np.argsort(-chances, axis=1, kind="stable")[:, : self.place]
        return Leak(np.take_along_axis(chances, shown, axis=1).astype(np.float32), shown)

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search through the model's own next-token distribution."""
        if observation.dropped:
            raise no_attack_without_first(f"access {str(self)!r}")
        return topk_search(
            model, observation.shown, observation.array, observation.error, observation.error_bound, budget
        )


def invert_topk(
    model: Model,
    shown: Any,
    values: Any,
    *,
    error: Any = 0.0,
    error_bound: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> InversionResult:
    """Recover the tokens from the largest log-probabilities at every position.

    Candidates are tried in the order of the model's own next-token distribution and of what those before
    them gave, and compared by the tokens and the numbers shown: even one number with two decimals tells the
    true token from most others.

    Parameters
    ----------
    model : Model
    shown : array_like of int, shape (n, k)
        Tokens whose log-probabilities are known: those for which they are largest.
    values : array_like, shape (n, k)
        These log-probabilities.
    error : array_like, broadcastable to values
        Standard deviation of their errors.
    error_bound : array_like, broadcastable to values, optional
        The largest error of each.
    known_prefix : sequence of int
        Tokens known to come first. Without any, all tokens are equally likely at position 0.
    budget : int, optional
        Largest number of candidates at a position.

    Returns
    -------
    InversionResult
    """
    search = topk_search(model, shown, values, error, error_bound, check_budget(budget, model))
    return search.run(list(known_prefix))


def topk_search(
    model: Model, shown: Any, values: Any, error: Any, error_bound: Any, budget: int
) -> TopkSearch:
    """Return the inversion of log-probabilities, checked."""
    return TopkSearch(model, *_checked(model, shown, values, error, error_bound), budget)


class TopkSearch:
    """The inversion of one observation."""

    def __init__(self, model: Model, shown: Any, values: Any, allowed: Any, budget: int) -> None:
        self._began = perf_counter()
        self._model, self._budget = model, budget
        self._shown, self._values, self._allowed = shown, values, allowed
        self._prefix = Prefix(model, model.n_layers + 1)
        self._prior = Prior(model, self._prefix)
        self._positions: list[Position] = []
        # For each position, the other tokens that agree, best last: to go back to if nothing follows.
        self._others: list[list[Position]] = []
        self._before_returns: int | None = None
        # The tokens tried that are nearest to the last one taken and not it, their gaps, and how many were.
        self._rivals: tuple[Any, Any, int] | None = None
        self._n_compared = 0

    def run(self, known: list[int]) -> InversionResult:
        """Return everything that could be recovered."""
        reason = ""
        if known:
            check_prefix(known, len(self._shown), self._model)
            for at, state in enumerate(self._prefix.extend(known)):
                if not self._agrees(at, state):
                    raise ObservationMismatch(
                        f"known_prefix[{at}] is {known[at]}, which the observation contradicts"
                    )
                gap = float(self._gaps(at, state[None]).gaps)
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

    def contradiction(self, truth: list[int]) -> str:
        """Return why the true tokens would not be accepted; empty if they would."""
        for at, state in enumerate(torch.from_numpy(self._model.states(truth, self._model.n_layers + 1))):
            if not self._agrees(at, state):
                return (
                    f"at position {at} the true token misses the numbers shown by "
                    f"{float(self._gaps(at, state[None]).gaps):.2g} times what may be, or gives other tokens"
                )
        return ""

    def _return(self) -> bool:
        """Take the next best token at the last position that had several; return whether there was one."""
        while self._others and not self._others[-1]:
            self._others.pop()
            self._positions.pop()
        spent = self._prefix.n_candidates
        if self._before_returns is None:
            self._before_returns = spent
        if not self._others or spent - self._before_returns > RETURNED:
            return False
        self._rivals = None
        self._positions[-1] = self._others[-1].pop()
        self._prefix.crop(len(self._positions) - 1)
        self._prefix.extend([self._positions[-1].token])
        return True

    def _search(self, at: int) -> str:
        """Find one token; return why not, if not."""
        prior = self._prior.after(self._prefix.tokens)
        limit = self._budget if sum(map(len, self._others)) <= FEW else min(COMMON, self._budget)
        limit = min(limit, len(prior))
        expected = with_surprises(prior)
        left = expected.clone()
        tried = ShownCandidates(self._model, self._shown[at], self._values[at], self._allowed[at])
        certain = certain_log_odds(len(self._shown))
        log_odds, size = 0.0, FIRST_BATCH
        while len(tried.tokens) < limit:
            told = likelihoods(self._model.embeddings, tried.tokens, tried.missed)
            count = min(size, limit - len(tried.tokens))
            fresh = interleaved([prior + told, prior], set(tried.tokens), count)
            tried.add(fresh, self._prefix.candidates(fresh))
            left[fresh] = -inf
            size = min(GROWTH * size, LARGEST_BATCH)
            agreeing = tried.agreeing
            if len(agreeing):
                log_odds = self._log_odds(tried, certain)
                score = expected[tried.tokens][agreeing] - 0.5 * (WIDTHS * tried.gaps[agreeing]).square()
                # No token that is left can score better than by being expected.
                settled = bool(score.max() >= left.max())
                many = len(tried.tokens) >= MANY
                if log_odds >= certain or many or (settled and self._doubtful(tried, log_odds, certain)):
                    break
        if not len(agreeing):
            tried.sharpen()
            return (
                f"no token explains position {at} after {len(tried.tokens)} candidates; the nearest misses "
                f"the numbers shown by {float(tried.gaps.min()):.2g} times their error"
                + ("; before it several tokens agree, and one may be wrong" if any(self._others) else "")
            )
        ranked = agreeing[score.argsort(descending=True)].tolist()
        best, *others = [tried.position(place, log_odds) for place in ranked[: 1 + BRANCHES]]
        self._positions.append(best)
        self._others.append(others[::-1])
        self._prefix.extend([best.token])
        self._reconsider(at, certain)
        if log_odds < certain:
            tried.sharpen(RIVALS + 1)
        near = tried.gaps.argsort()
        near = near[near != ranked[0]][: RIVALS + 1]
        self._rivals = torch.tensor(tried.tokens)[near], tried.gaps[near], len(tried.tokens)
        return ""

    def _reconsider(self, at: int, certain: float) -> None:
        """Compare the rivals of a doubtful token by what they give at the next position too.

        Only where the next token is certain, so that a rival would not go on with another one.
        """
        if self._rivals is None or self._others[-2] or self._positions[-2].log_odds >= certain:
            return
        rivals, gaps, count = self._rivals
        if self._positions[-1].log_odds < certain or len(rivals) <= RIVALS:
            return
        sequences = torch.tensor(self._prefix.tokens).repeat(RIVALS, 1)
        sequences[:, -2] = rivals[:RIVALS]
        part = self._model.part(self._model.n_layers + 1)
        with torch.no_grad():
            seen = self._model.capture([part], "output", input_ids=sequences, use_cache=False)[0]
        self._n_compared += sequences.numel()
        both = torch.maximum(gaps[:RIVALS], self._gaps(at, seen[:, -1]).gaps)
        # Those not compared are at least as far as they are at their own position.
        nearest = min(float(both.min()), float(gaps[RIVALS]))
        log_odds = max(self._positions[-2].log_odds, self._log_odds_over(nearest, count))
        self._positions[-2] = replace(self._positions[-2], log_odds=log_odds)

    def _log_odds(self, tried: ShownCandidates, certain: float) -> float:
        """Return how unlikely it is, in nats, that a token agrees by accident: a lower bound if certain.

        Zero where two agree, or no other was tried.
        """
        agreeing = tried.agreeing
        if len(agreeing) > 1 or len(tried.gaps) == 1:
            return 0.0
        if len(tried.gaps) == self._model.n_vocabulary:
            return inf
        log_odds = self._log_odds_over(tried.nearest_but(agreeing[0]), len(tried.gaps))
        if log_odds < certain:
            tried.sharpen()
            log_odds = self._log_odds_over(tried.nearest_but(agreeing[0]), len(tried.gaps))
        return log_odds

    def _log_odds_over(self, nearest: float, count: int) -> float:
        """Return the log odds of a token against others of which `count` were tried, the nearest missing by
        so much.

        The k numbers of wrong tokens spread over k dimensions: as the nearest of those tried misses by g, one
        of them in ``g^k`` comes within 1, and all tokens are to those tried as their numbers.
        """
        return int(self._shown.shape[1]) * log(max(1.0, nearest)) + log(count / self._model.n_vocabulary)

    def _doubtful(self, tried: ShownCandidates, log_odds: float, certain: float) -> bool:
        """Return whether doubt will be left however many candidates are tried.

        The log odds grow with the share of the vocabulary tried, and by nothing else; where two tokens agree
        they stay zero.
        """
        if log_odds == 0.0:
            return True
        return (
            self._model.n_vocabulary > MANY and log_odds + log(max(1.0, MANY / len(tried.tokens))) < certain
        )

    def _gaps(self, at: int, states: Any) -> ShownCandidates:
        """Compare states with what is shown at a position."""
        tried = ShownCandidates(self._model, self._shown[at], self._values[at], self._allowed[at])
        tried.add([-1] * len(states), states)
        tried.sharpen()
        return tried

    def _found(self, reason: str) -> InversionResult:
        tokens = [position.token for position in self._positions]
        consistent = False
        if not reason:
            states = torch.from_numpy(self._model.states(tokens, self._model.n_layers + 1))
            consistent = all(self._agrees(at, state) for at, state in enumerate(states))
        others = alternatives(self._prefix, tokens, self._explained) if consistent else {}
        n_forwards = self._prefix.n_forwards + self._prior.n_forwards + self._n_compared
        n_forwards += len(tokens) * (not reason)
        cost = Cost(self._prefix.n_candidates, n_forwards, perf_counter() - self._began)
        return conclude(self._model, self._positions, len(self._shown), reason, consistent, cost, others)

    def _explained(self, at: int, states: Any) -> list[bool]:
        agreeing = set(self._gaps(at, states).agreeing.tolist())
        return [place in agreeing for place in range(len(states))]

    def _agrees(self, at: int, state: Any) -> bool:
        return len(self._gaps(at, state[None]).agreeing) == 1


def _checked(model: Model, shown: Any, values: Any, error: Any, error_bound: Any) -> tuple[Any, Any, Any]:
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
    allowed = (widest if error_bound is None else np.minimum(widest, error_bound)) + ROUNDING
    return (
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(chances),
        torch.from_numpy(allowed.astype(np.float32)),
    )
