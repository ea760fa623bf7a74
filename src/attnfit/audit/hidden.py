"""From hidden states of a causal model to its input: draft, verify, repair."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from time import perf_counter
from typing import Any

import torch

from attnfit.audit.calibration import calibrate
from attnfit.audit.candidates import CandidateSet
from attnfit.audit.checks import check_prefix
from attnfit.audit.context_free import context_free
from attnfit.audit.engine.prefix import Prefix, alternatives
from attnfit.audit.engine.prior import Prior
from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.position import Clues, PositionSearch
from attnfit.audit.reference import Reference
from attnfit.audit.result import Cost, InversionResult, Position, certain_log_odds, conclude
from attnfit.audit.target import Target
from attnfit.audit.uncertainty import Uncertainty

# Tokens of a draft verified at once after a repair; doubled while the draft is right.
LOOKAHEAD = 2
# With drafts right at a rate p, two verified and the search after a wrong one take 2 - p^2 passes for 1 + p
# tokens, to search at once, which tries the draft among others, one each: less unless p^2 + p > 1.
RIGHT_ENOUGH = 0.618
# Passes of one token through one block that take about a second: the whole vocabulary where this suffices.
CHEAP = 1 << 16
# Positions at which a false idea of what was observed shows.
OPENING = 2
# Misfits that differ by less are of tokens that are one to the model.
SAME = 1e-4


class HiddenSearch:
    """The inversion of states of one layer.

    Parameters
    ----------
    model : Model
        A causal one.
    layer : int or str
    states : Tensor, shape (n, width)
        Of positions 0 to n - 1.
    uncertainty : Uncertainty
    budget : int
        Largest number of candidates at a position.
    n_rivals : int
        Where states are projections, which tokens with other embeddings may share: so many of those that the
        probe finds most like each state are compared before anything is claimed.
    hint : str
        What else may be wrong where no token explains one of the first positions.
    """

    def __init__(
        self, model: Model, layer: Layer, states: Any, uncertainty: Uncertainty, budget: int,
        *, n_rivals: int = 0, hint: str = "",
    ) -> None:  # fmt: skip
        self._began = perf_counter()
        self._model, self._layer, self._budget = model, layer, budget
        self._n_rivals, self._hint = n_rivals, hint
        self._states, self._run = states, uncertainty.run
        calibration = calibrate(model, [layer])[layer]
        self._targets = [
            uncertainty.target(place, state, calibration.running.scale if place else calibration.first.scale)
            for place, state in enumerate(states)
        ]
        noisy = any(target.noisy for target in self._targets)
        self._rankers = calibration.rankers_under(uncertainty) if noisy else calibration.rankers
        self._kinds = ["first", *calibration.kinds(states[1:])]
        self._prefix = Prefix(model, layer)
        self._prior = Prior(model, self._prefix)
        self._reference = Reference.of(model, layer, calibration.running.scale)
        self._cheap = model.depth(layer) * model.n_vocabulary <= CHEAP
        self._positions: list[Position] = []
        self._n_drafted = 0
        # Drafts that were right, and those of which this is known.
        self._n_right = self._n_judged = 0

    def run(self, known: Tokens) -> InversionResult:
        """Return everything that could be recovered."""
        reason = ""
        try:
            self._accept_known(known)
            draft = self._draft()
            lookahead = len(draft)
            while len(self._positions) < len(self._states):
                at = len(self._positions)
                tried = None
                if not self._targets[at].noisy and self._n_right >= RIGHT_ENOUGH * self._n_judged:
                    segment = draft[at : at + lookahead]
                    tried = self._verify(segment)
                    if tried is None:
                        lookahead *= 2
                        continue
                    lookahead = LOOKAHEAD
                at = len(self._positions)
                reason = self._search(at, tried)
                if reason:
                    break
                if tried is None:
                    self._judge(self._positions[at].token == draft[at])
        except KeyboardInterrupt:
            reason = "interrupted"
        return self._found(reason)

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true tokens would not be accepted; empty if they would."""
        return contradicted(self._targets, torch.from_numpy(self._model.states(truth, self._layer)))

    def _draft(self) -> Tokens:
        """Return the probe's best token for every position."""
        return [int(token) for token in self._probed().argmax(-1)]

    def _probed(self) -> Any:
        """Return how well the probe finds every token to fit each state, shape (n, n_vocabulary)."""
        running = self._rankers["running"]
        scores = running.scores(running.probe.estimate(self._states))
        for place, kind in enumerate(self._kinds):
            if kind == "first":
                first = self._rankers[kind]
                scores[place] = first.scores(first.probe.estimate(self._states[place]))
        return scores

    def _accept_known(self, tokens: Tokens) -> None:
        if tokens:
            check_prefix(tokens, len(self._states), self._model)
            for at, (token, state) in enumerate(zip(tokens, self._prefix.extend(tokens), strict=True)):
                target = self._targets[at]
                if not float(target.misfits(state)) <= target.bound:
                    raise ObservationMismatch(
                        f"known_prefix[{at}] is {token}, which the observation contradicts"
                    )
                self._note(token, float(target.distances(state)), inf, 0, "known")

    def _note(
        self,
        token: int,
        distance: float,
        margin: float,
        n_candidates: int,
        method: str,
        log_odds: float = inf,
    ) -> None:
        self._positions.append(Position(token, distance, margin, n_candidates, method, log_odds))

    def _verify(self, draft: Tokens) -> tuple[int, Any] | None:
        """Accept the draft as far as it is right; return the first wrong token and its state, if any."""
        start = len(self._positions)
        states = self._prefix.extend(draft)
        for place, (token, state) in enumerate(zip(draft, states, strict=True), start):
            target = self._targets[place]
            self._n_drafted += 1
            right = float(target.misfits(state)) <= target.bound
            self._judge(right)
            if not right:
                self._prefix.crop(place)
                return token, state
            self._note(token, float(target.distances(state)), inf, 1, "draft")
        return None

    def _judge(self, right: bool) -> None:
        self._n_right += right
        self._n_judged += 1

    def _search(self, at: int, tried: tuple[int, Any] | None) -> str:
        """Find one token; return why not, if not."""
        target, tokens = self._targets[at], self._prefix.tokens
        evaluated = CandidateSet(self._prefix, target)
        if tried is not None:
            evaluated.note(*tried)
        ordinary = self._kinds[at] == "running"
        drafter, mover = (
            self._rankers[name] for name in (self._kinds[at], "within" if ordinary else "first")
        )
        clues = Clues(drafter, mover, self._prior.after(tokens))
        free = context_free(self._model, self._layer) if target.noisy and target.basis is None else None
        search = PositionSearch(
            evaluated, clues, self._model.embeddings, self._budget, cheap=self._cheap, context_free=free,
            # The states of a first position, or of one like it, are those of no other.
            reference=self._reference if ordinary else None,
        )  # fmt: skip
        method: str | None
        if target.noisy:
            certain = certain_log_odds(len(self._states))
            # After a wrong token nothing agrees: the whole vocabulary would be tried in vain.
            lost = any(position.method == "nearest" for position in self._positions)
            method = search.most_likely(certain, thorough=target.bounded and not lost)
        else:
            method = search.run()
        count = evaluated.n_candidates + (tried is not None)
        if method is None:
            return describe_failure(self._model, at, evaluated) + self._hint * (at < OPENING)
        token, distance, margin = evaluated.nearest()
        self._note(token, distance, margin, count, method, evaluated.log_odds)
        self._prefix.extend([token])
        return ""

    def _found(self, reason: str) -> InversionResult:
        tokens = [position.token for position in self._positions]
        consistent = not reason and self._reproduced(tokens)
        others = alternatives(self._prefix, tokens, self._agrees, self._rivals()) if consistent else {}
        n_forwards = self._prefix.n_forwards + self._prior.n_forwards + len(tokens) * (not reason)
        cost = Cost(self._prefix.n_candidates + self._n_drafted, n_forwards, perf_counter() - self._began)
        return conclude(self._model, self._positions, len(self._states), reason, consistent, cost, others)

    def _rivals(self) -> list[Tokens]:
        """Return the tokens that the probe finds most like each state."""
        if not self._n_rivals:
            return []
        scores = self._probed()
        return [list(map(int, row)) for row in scores.topk(min(self._n_rivals, scores.shape[1])).indices]

    def _agrees(self, place: int, states: Any) -> list[bool]:
        """Return which states explain an observation; under errors, as well as the one that was chosen."""
        target, misfits = self._targets[place], self._targets[place].misfits(states)
        if not target.noisy:
            return [bool(fit) for fit in misfits <= target.bound]
        token = self._positions[place].token
        chosen = target.misfits(self._prefix.candidates([token])[0])
        return [bool(fit) for fit in misfits <= chosen + SAME]

    def _reproduced(self, tokens: Tokens) -> bool:
        """Return whether a plain forward pass of the tokens explains every observed state."""
        states = torch.from_numpy(self._model.states(tokens, self._layer))
        if self._explains(states):
            return True
        # The same tokens in the precision that was observed, where that is known and can be run here.
        lower = self._run and self._model.in_dtype(self._run.dtype).states(tokens, self._layer)
        return lower is not None and self._explains(torch.from_numpy(lower))

    def _explains(self, states: Any) -> bool:
        return all(
            float(target.misfits(state)) <= target.limit
            for target, state in zip(self._targets, states, strict=True)
        )


def contradicted(targets: Sequence[Target], states: Any, first: int = 0) -> str:
    """Return which of the true states its target does not accept, and by how much; empty if all are."""
    for place, (target, state) in enumerate(zip(targets, states, strict=True), first):
        misfit = float(target.misfits(state))
        if not misfit <= target.bound:
            return (
                f"at position {place} the true token misses the observation by {misfit:.2g} (allowed "
                f"{target.bound:.2g})"
            )
    return ""


def describe_failure(model: Model, at: int, evaluated: CandidateSet) -> str:
    """Say what is known about a position that was not solved."""
    token, distance, _ = evaluated.nearest()
    told = (
        f"no token explains position {at} after {evaluated.n_candidates} candidates; the nearest, "
        f"{model.detokenise([token])!r}, is at distance {distance:.2g} (1 is the spread of text in general)"
    )
    if at == 0:
        told += "; the states may come from another model or layer, or lack their first positions"
        if model.counts_positions:
            told += f", or begin at another position than {model.first_position} (first_position)"
    return told
