"""States of one text in an order that is not known: which row is next, and of which token."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.access import Leak, Search, no_attack_on_encoder
from attnfit.audit.calibration import calibrate
from attnfit.audit.candidates import CandidateSet
from attnfit.audit.engine.prefix import Prefix, alternatives
from attnfit.audit.engine.prior import Prior
from attnfit.audit.errors import AuditError
from attnfit.audit.hidden import CHEAP, SAME
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.ordering import interleaved
from attnfit.audit.position import TRUST, Clues, PositionSearch
from attnfit.audit.result import Cost, InversionResult, Position, certain_log_odds, conclude
from attnfit.audit.states import HiddenStates, resumed
from attnfit.audit.uncertainty import Uncertainty

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# Tokens of every row tried before any row is looked at by itself; then how many rows are, the nearest first,
# with at most how many candidates each.
SHARED, ROWS = (1, 4, 16), ((4, 512), (2, 4096), (1, None))


class PermutedStates(HiddenStates):
    """The states after a block in unknown order, as of a service that shuffles the positions of a text."""

    kind, ordered = "permuted", False

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the hidden states after layer {self.place} in unknown order"

    def layer(self, model: Model) -> Layer:
        """Return the block."""
        if self.place < 1:
            raise AuditError(f"layer must be 1 to {model.n_layers + 1} for {model.name!r}, not {self.place}")
        return self.place

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the states in an order of which the attack knows nothing."""
        return Leak(model.states(tokens, self.layer(model))[order_of(len(tokens))])

    def run_layer(self, model: Model) -> Layer | None:
        """Return none: the errors of a run are those of a position, which is not known."""
        return None

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for the next row and its token together."""
        if model.kind == "encoder":
            raise no_attack_on_encoder(self)
        if observation.dropped:
            raise AuditError(f"a row of {self} was withheld: there is no attack without all of them")
        return PermutedSearch(model, self.layer(model), *self.states(model, observation), budget)

    def rivals(self, model: Model, tokens: Tokens, place: int, every: Any) -> tuple[Any, slice]:
        """Return the states of tokens at a place, and the row where that stands."""
        row = int(np.flatnonzero(order_of(len(tokens)) == place)[0])
        return super().rivals(model, tokens, place, every)[0], slice(row, row + 1)

    def continued(self, model: Model, tokens: Tokens, observation: Observation) -> Any:
        """Go on through the rest of the model with the rows in their order, which the service knows."""
        if observation.dropped:
            return None
        array = observation.array[order_of(len(tokens)).argsort()]
        return resumed(model, tokens, 0, self.layer(model), array)


def order_of(count: int) -> NDArray[np.int64]:
    """Return the position of every row."""
    return np.random.default_rng(count).permutation(count)


class PermutedSearch:
    """The inversion of states in unknown order.

    After the tokens found so far, the tokens that the probe finds likeliest for every row left are candidates
    for the next position; the row that one of them hits is next. Where none is hit, the rows nearest to what
    was tried are searched for one after the other, as states whose position is known.

    Parameters
    ----------
    model : Model
        A causal one.
    layer : int
    states : Tensor, shape (n, width)
    uncertainty : Uncertainty
    budget : int
        Largest number of candidates for a row at a position.
    """

    def __init__(
        self, model: Model, layer: Layer, states: Any, uncertainty: Uncertainty, budget: int
    ) -> None:
        self._began = perf_counter()
        self._model, self._layer, self._budget = model, layer, budget
        self._states = states
        calibration = calibrate(model, [layer])[layer]
        # A row may be that of the first position, whose channels have another spread.
        scales = calibration.first.scale, calibration.running.scale
        self._targets = [
            [uncertainty.target(row, state, scale) for row, state in enumerate(states)] for scale in scales
        ]
        self._noisy = any(target.noisy for target in self._targets[1])
        self._rankers = calibration.rankers_under(uncertainty) if self._noisy else calibration.rankers
        self._kinds = calibration.kinds(states)
        self._prefix = Prefix(model, layer)
        self._prior = Prior(model, self._prefix)
        self._cheap = model.depth(layer) * model.n_vocabulary <= CHEAP
        self._left = list(range(len(states)))
        self._rows: list[int] = []
        self._positions: list[Position] = []
        self._probed: dict[str, Any] = {}

    def run(self, known: Tokens) -> InversionResult:
        """Return everything that could be recovered."""
        if known:
            raise AuditError("known_prefix cannot be used where the order of the rows is not known")
        reason = ""
        try:
            while self._left and not reason:
                reason = self._step()
        except KeyboardInterrupt:
            reason = "interrupted"
        tokens = [position.token for position in self._positions]
        consistent = not reason and not self._missed(self._rows, self._model.states(tokens, self._layer))
        others = alternatives(self._prefix, tokens, self._agrees) if consistent else {}
        n_forwards = self._prefix.n_forwards + self._prior.n_forwards + len(tokens) * (not reason)
        cost = Cost(self._prefix.n_candidates, n_forwards, perf_counter() - self._began)
        return conclude(self._model, self._positions, len(self._states), reason, consistent, cost, others)

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true tokens would not be accepted; empty if they would."""
        states = torch.from_numpy(self._model.states(truth, self._layer))
        left = list(range(len(self._states)))
        rows = []
        for place, state in enumerate(states[: len(left)]):
            misfits = {row: float(self._target(place, row).misfits(state)) for row in left}
            rows.append(min(misfits, key=misfits.__getitem__))
            left.remove(rows[-1])
        missed = self._missed(rows, states, accepting=True)
        return f"at position {missed[0]} the true token misses every row that is left" if missed else ""

    def _target(self, place: int, row: int) -> Any:
        return self._targets[min(place, 1)][row]

    def _missed(self, rows: list[int], states: Any, *, accepting: bool = False) -> list[int]:
        """Return the positions at which a state does not explain its row."""
        missed = []
        for place, (row, state) in enumerate(zip(rows, torch.as_tensor(states), strict=True)):
            target = self._target(place, row)
            allowed = target.bound if accepting else target.limit
            if not float(target.misfits(state)) <= allowed:
                missed.append(place)
        return missed

    def _agrees(self, place: int, states: Any) -> list[bool]:
        """Return which states explain the row of a position; under errors, as well as the one chosen."""
        target = self._target(place, self._rows[place])
        misfits = target.misfits(states)
        if not target.noisy:
            return [bool(fit) for fit in misfits <= target.bound]
        chosen = target.misfits(self._prefix.candidates([self._positions[place].token])[0])
        return [bool(fit) for fit in misfits <= chosen + SAME]

    def _step(self) -> str:
        """Find the next row and its token; return why not, if not."""
        at = len(self._positions)
        prior = self._prior.after(self._prefix.tokens)
        tried: Tokens = []
        states = torch.empty(0, self._states.shape[1])
        for size in SHARED:
            fresh = self._likely(at, prior, set(tried), size)
            states = torch.cat([states, self._prefix.candidates(fresh)]) if fresh else states
            tried += fresh
            sets = {row: self._tried(at, row, tried, states) for row in self._left}
            row = min(sets, key=lambda one: float(sets[one].misfits.min()))
            if sets[row].solved and not self._noisy:
                return self._found(row, sets[row], "shortlist")
        near = sorted(sets, key=lambda one: float(sets[one].misfits.min()))
        if self._noisy:
            lost = any(position.method == "nearest" for position in self._positions)
            found, search = sets[near[0]], self._search(at, near[0], sets[near[0]], prior, self._budget)
            thorough = found.target.bounded and not lost
            chosen = search.most_likely(certain_log_odds(len(self._states)), thorough=thorough)
            return self._found(near[0], found, chosen)
        for count, budget in ROWS:
            for row in near[:count]:
                most = self._budget if budget is None else min(budget, self._budget)
                method = self._search(at, row, sets[row], prior, sets[row].n_candidates + most).run()
                if method is not None:
                    return self._found(row, sets[row], method)
        # What was tried for one row tells of all of them.
        widest = max(sets.values(), key=lambda one: len(one.tokens))
        for row in near:
            found = self._tried(at, row, widest.tokens, widest.states)
            if found.solved:
                return self._found(row, found, "scan")
        return (
            f"no token explains one of the {len(self._left)} rows left at position {at}; the rows may come "
            "from another model or layer, or not be all of a text"
        )

    def _search(self, at: int, row: int, found: CandidateSet, prior: Any, budget: int) -> PositionSearch:
        drafter = self._rankers[self._kind(at, row)]
        mover = self._rankers["within"] if self._kind(at, row) == "running" else drafter
        clues = Clues(drafter, mover, prior)
        return PositionSearch(found, clues, self._model.embeddings, budget, cheap=self._cheap)

    def _kind(self, at: int, row: int) -> str:
        """Return which probe serves a row as the state of a position."""
        return self._kinds[row] if at else "first"

    def _tried(self, at: int, row: int, tokens: Tokens, states: Any) -> CandidateSet:
        """Return what was tried as candidates for a row."""
        found = CandidateSet(self._prefix, self._target(at, row))
        found.tokens, found.seen, found.states = list(tokens), set(tokens), states
        found.misfits = found.target.misfits(states)
        return found

    def _likely(self, at: int, prior: Any, seen: set[int], size: int) -> Tokens:
        """Return the tokens that probe and prior find likeliest for each row left."""
        fresh: dict[int, None] = {}
        for row in self._left:
            name = self._kind(at, row)
            if name not in self._probed:
                ranker = self._rankers[name]
                self._probed[name] = ranker.scores(ranker.probe.estimate(self._states))
            scores = self._probed[name][row]
            fresh |= dict.fromkeys(interleaved([scores, TRUST[-1] * scores + prior], seen, size))
        return list(fresh)

    def _found(self, row: int, found: CandidateSet, method: str) -> str:
        token, distance, margin = found.nearest()
        log_odds = found.log_odds
        if self._noisy:
            # Rows are told apart by what the chosen token gives, too.
            chosen = found.states[found.best]
            place = len(self._positions)
            likely = {one: float(self._target(place, one).likelihoods(chosen)) for one in self._left}
            others = [likely[one] for one in likely if one != row]
            log_odds = min(log_odds, likely[row] - float(np.logaddexp.reduce(others or [-np.inf])))
        count = len(found.tokens)
        self._positions.append(Position(token, distance, margin, count, method, log_odds))
        self._prefix.extend([token])
        self._rows.append(row)
        self._left.remove(row)
        return ""
