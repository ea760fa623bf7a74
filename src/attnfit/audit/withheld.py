"""Texts whose first position was withheld: its token is searched for along with the next one."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from time import perf_counter
from typing import Any

import torch

from attnfit.audit.calibration import calibrate
from attnfit.audit.engine.prior import Prior
from attnfit.audit.errors import AuditError
from attnfit.audit.hidden import HiddenSearch, contradicted
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.result import Cost, InversionResult, Position, certain_log_odds, conclude
from attnfit.audit.target import reach
from attnfit.audit.uncertainty import Uncertainty

# First tokens that stand for all others while the second is looked for, and pairs with them.
STANDING, STANDING_PAIRS = 32, 1 << 15
# Pairs tried in all once few second tokens are left, and how many these are at most.
PAIRS, SECONDS_KEPT = 1 << 18, 64
# First tokens compared by all states in the end, with how many of the best the rest is looked for, and pairs
# at once.
FIRSTS_KEPT, ATTEMPTS, BATCH = 256, 3, 512


class WithheldSearch:
    """The inversion of states from position 1 on.

    Every state depends on the token withheld, the next one most, but on its own token more. So second tokens
    are ranked with a few that stand for any first one, then all first tokens are tried with the best of them;
    with both known the rest is found as usual, and shows in the end which first tokens it allows.

    Parameters
    ----------
    model : Model
        A causal one.
    layer : int or str
    states : Tensor, shape (n, width)
        Of positions 1 to n.
    uncertainty : Uncertainty
    budget : int
        Largest number of candidates at a position.
    """

    def __init__(
        self, model: Model, layer: Layer, states: Any, uncertainty: Uncertainty, budget: int
    ) -> None:
        self._began, self._n_pairs = perf_counter(), 0
        self._model, self._layer, self._budget = model, layer, budget
        self._states, self._uncertainty = states, uncertainty
        self._calibration = calibrate(model, [layer])[layer]
        scale = self._calibration.running.scale
        self._targets = [uncertainty.target(place, state, scale) for place, state in enumerate(states)]
        self._certain = certain_log_odds(len(states) + 1)

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true tokens would not be accepted; empty if they would."""
        states = torch.from_numpy(self._model.states(truth, self._layer))
        return contradicted(self._targets, states[1:], first=1)

    def run(self, known: Tokens) -> InversionResult:
        """Return everything that could be recovered."""
        if known:
            raise AuditError("known_prefix cannot be used where the first position was withheld")
        best: InversionResult | None = None
        for first in self._firsts():
            found = self._after(first)
            if best is None or len(found.tokens) > len(best.tokens) or found.failed_at is None:
                best = found
            if found.failed_at is None or found.message.endswith("interrupted"):
                break
        assert best is not None
        return self._settled(best)

    def _firsts(self) -> Tokens:
        """Return the first tokens to try the rest with, best first."""
        order = self._order()
        every = max(1, 2 * len(order) // STANDING)
        standing = torch.cat([order[: STANDING // 2], order[STANDING // 2 :: every]])
        tried = torch.cartesian_prod(standing, self._suggested(STANDING_PAIRS // STANDING))
        likely = self._likelihoods(tried).reshape(len(standing), -1).amax(0)
        seconds = tried[: len(likely), 1][likely.argsort(descending=True)[:SECONDS_KEPT]]
        pairs, known = tried[:0], torch.empty(0, dtype=torch.float64)
        for second in seconds[: max(1, PAIRS // len(order))]:
            for batch in order.split(BATCH):
                fresh = torch.stack([batch, second.expand(len(batch))], 1)
                pairs, known = torch.cat([pairs, fresh]), torch.cat([known, self._likelihoods(fresh)])
            if self._explained(known):
                break
        firsts = dict.fromkeys(pairs[known.argsort(descending=True)][:, 0].tolist())
        return [int(token) for token in firsts][:ATTEMPTS]

    def _order(self) -> Any:
        """Return all first tokens, those that the model expects before others."""
        return Prior(self._model).after([]).argsort(descending=True, stable=True)[: self._budget]

    def _suggested(self, count: int) -> Any:
        """Return the second tokens that the probe finds likeliest."""
        noisy = any(target.noisy for target in self._targets)
        calibration = self._calibration
        rankers = calibration.rankers_under(self._uncertainty) if noisy else calibration.rankers
        ranker = rankers["running"]
        scores = ranker.scores(ranker.probe.estimate(self._states[0]))
        return scores.topk(min(count, len(scores))).indices

    def _explained(self, likely: Any) -> bool:
        """Return whether the best pair explains its state, and no other tried does."""
        bound = -0.5 * self._targets[0].n_numbers * self._targets[0].bound ** 2
        best, place = likely.max(0)
        others = torch.cat([likely[:place], likely[place + 1 :]])
        return float(best) >= bound and float(best - others.logsumexp(0)) >= self._certain

    def _likelihoods(self, sequences: Any) -> Any:
        """Return how likely texts make the states of their positions from 1 on, shape (len(sequences),)."""
        self._n_pairs += len(sequences)
        part = self._model.part(self._layer)
        total = []
        for some in sequences.split(BATCH):
            with torch.no_grad():
                seen = self._model.capture([part], "output", input_ids=some, use_cache=False)[0]
            rows = [self._targets[at].likelihoods(seen[:, at + 1]) for at in range(some.shape[1] - 1)]
            total.append(torch.stack(rows).sum(0))
        return torch.cat(total)

    def _after(self, first: int) -> InversionResult:
        """Invert the rest as if the withheld state had been seen to be that of a token."""
        state = torch.from_numpy(self._model.states([first], self._layer))
        states = torch.cat([state, self._states])
        search = HiddenSearch(self._model, self._layer, states, self._uncertainty.preceded(), self._budget)
        return search.run([first])

    def _settled(self, found: InversionResult) -> InversionResult:
        """Choose the first token that all states together make likeliest."""
        tokens = found.tokens
        if found.failed_at is not None or len(tokens) < 2:
            return replace(found, n_candidates=found.n_candidates + self._n_pairs)
        order = self._order()
        order = torch.cat([torch.tensor(tokens[:1]), order[order != tokens[0]]])
        likely = torch.empty(0, dtype=torch.float64)
        tail = torch.tensor(tokens[1:])
        for some in order.split(max(1, 2 * BATCH // len(tokens))):
            sequences = torch.cat([some[:, None], tail.expand(len(some), -1)], 1)
            likely = torch.cat([likely, self._likelihoods(sequences)])
            if len(likely) >= FIRSTS_KEPT:
                break
        place = int(likely.argmax())
        others = torch.cat([likely[:place], likely[place + 1 :]])
        log_odds = float(likely[place] - others.logsumexp(0)) if len(others) else 0.0
        n_numbers = sum(target.n_numbers for target in self._targets)
        nearest = 2.0 * float(likely[place] - others.max()) if len(others) else 0.0
        most = reach(n_numbers, -2.0 * float(likely[place]))
        if len(likely) < self._model.n_vocabulary and nearest <= most:
            # First tokens that were not tried may be as near.
            log_odds = min(log_odds, 0.0)
        first = Position(int(order[place]), 0.0, inf, len(likely), "joint", log_odds)
        positions = [first, *found.positions[1:]]
        chosen = [position.token for position in positions]
        states = torch.from_numpy(self._model.states(chosen, self._layer))[1:]
        consistent = all(
            float(target.misfits(state)) <= target.limit
            for target, state in zip(self._targets, states, strict=True)
        )
        cost = Cost(found.n_candidates + self._n_pairs, found.n_forwards, perf_counter() - self._began)
        return conclude(self._model, positions, len(positions), "", consistent, cost, found.alternatives)
