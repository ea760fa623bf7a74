"""One row for a whole text: the state of the last position after a block, or the scores of the next token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from attnfit.audit.access import Access, Leak, Search
from attnfit.audit.calibration import calibrate, calibration_path
from attnfit.audit.checks import check_states, real_numbers
from attnfit.audit.engine.first_block import FirstBlock
from attnfit.audit.engine.guard import windows
from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import AuditError, Unsupported
from attnfit.audit.logits import last_states
from attnfit.audit.mixture import CHEAP, MixtureFinder, TokenMixture
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.models.sampling import sample
from attnfit.audit.result import Cost, InversionResult, Position, conclude
from attnfit.audit.row_response import Reader, learn_responses
from attnfit.audit.row_search import RowSearch
from attnfit.audit.storage import kept
from attnfit.audit.target import Target
from attnfit.audit.untested import Untested

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# Texts of at most so many tokens are looked for: see benchmarks/results/audit-one-row.md.
LONGEST = 12
# Last tokens tried: those of the probe, which is right for wide states; where the states of all tokens after
# many contexts are cheap, those that these make likely. And tokens of a text of one.
N_LAST, N_LAST_CHEAP, N_ALONE = 2, 8, 64
N_CONTEXTS, CONTEXT = 64, 11
# States agree within so many roundings, measured on the text itself, and at least within this share of the
# spread of a channel; where more would be needed nothing can be told. Others must miss by so many times more.
REPEATS, AGREES, LOOSEST, APART = 30.0, 1e-5, 1e-4, 3.0
# Tokens exchanged at every position before a text is claimed, beside all with nearly the same embedding; and
# tokens put before the first.
N_RIVALS, N_DRAWN = 8, 16
# Text of the model's own from which the frequencies of tokens are learned, and what of them may be anything.
SAMPLED, SURPRISES, BATCH = (48, 32), 0.1, 4
# What the first block taken apart is kept as, beside what was learned about layers.
BLOCK, TYPICAL = "first:block", "last:tokens"
NOT_PROVEN = "not recovered within the budget, and no protection proven"


class LastState(Untested):
    """The state of the last position only, of causal models."""

    kind, number, first = "last", "LAYER", 1
    conclusive = False
    published = (
        "27 % of texts exact from one vector of Llama-2-7B (arXiv 2311.13647, after training an inverter on "
        "outputs, at second hand); the attack here reads causal models"
    )

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the last token's state after layer {self.place}"

    def layer(self, model: Model) -> Layer:
        """Return the block."""
        return self.place

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the last row."""
        return Leak(model.states(tokens, self.place)[-1:])

    def prepare(self, model: Model) -> None:
        """Learn how a state answers to tokens, and how frequent these are."""
        if model.kind == "causal" and self.place == 1:
            calibrate(model, [1])
            token_frequencies(model)
        elif model.kind == "causal":
            learn_responses(Reader(model, self.place), token_frequencies(model))

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for the text of one state.

        Raises
        ------
        AuditError
            If it is of an encoder, is not one row, or has errors.
        """
        if model.kind != "causal":
            return super().search(model, observation, budget)
        _without_errors(self, observation)
        if self.place == 1:
            return LastRowSearch(model, observation.array, budget)
        states, _ = check_states(model, observation.array, 0.0, layer=self.place)
        return RowSearch(
            Reader(model, self.place), _only(self, states), token_frequencies(model), budget,
            published=self.published,
        )  # fmt: skip


class LastLogits(Untested):
    """The scores of the next token after the whole text only."""

    kind, conclusive = "last:logits", False
    published = (
        "79.5 % of inputs of up to 10 to 15 tokens exact without a false one, and little of longer ones "
        "(SODA, arXiv 2507.01693, at second hand)"
    )

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return "the next-token scores after the last token"

    def layer(self, model: Model) -> Layer:
        """Return the last states, after the final norm."""
        return model.n_layers + 1

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the last row."""
        return Leak(model.logits(tokens)[-1:])

    def prepare(self, model: Model) -> None:
        """Learn how the normed last state answers to tokens, and how frequent these are."""
        learn_responses(Reader(model, model.n_layers + 1), token_frequencies(model))

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for the text of the state behind the scores: least squares through the head.

        Raises
        ------
        ObservationMismatch
            If the scores have another width, are not finite, or no state of this model explains them.
        AuditError
            If they are not one row, or have errors.
        Unsupported
            If the head does not tell all directions of a state apart.
        """
        _without_errors(self, observation)
        states, uncertainty = last_states(model, real_numbers("logits", observation.array))
        if uncertainty.basis.shape[1] < model.width:
            raise Unsupported(
                f"{model.family}, {self}: the head tells only {uncertainty.basis.shape[1]} of {model.width} "
                "directions of a state apart, and there is no attack here on a part of one"
            )
        return RowSearch(
            Reader(model, model.n_layers + 1), _only(self, states), token_frequencies(model), budget,
            published=self.published,
        )  # fmt: skip


def _without_errors(form: Access, observation: Observation) -> None:
    if (observation.error > 0).any():
        raise AuditError(f"there is no attack here on {form} with errors, only on the row as computed")


def _only(form: Access, rows: Any) -> Any:
    if len(rows) != 1:
        raise AuditError(f"{form} is one row, that of the last position, not {len(rows)}")
    return rows[0]


class LastRowSearch:
    """The inversion of the state of a last position after the first block.

    The block is inverted first: the mixture of values that its attention handed on. The rows of a table that
    cancel for it are the text. Lengths are tried in turn. A text is verified if one forward pass of it gives
    the state to rounding, and no text with another token at a position, or one more or less at the front,
    does.

    Parameters
    ----------
    model : Model
        A causal one.
    row : array_like, shape (1, width)
    budget : int
        Largest number of tokens compared at each distance from the last one, in the first round.
    longest : int
        Texts of at most so many tokens are looked for.

    Raises
    ------
    ObservationMismatch
        If the row has another shape or is not finite.
    Unsupported
        If the first block cannot be taken apart.
    """

    def __init__(self, model: Model, row: Any, budget: int, *, longest: int = LONGEST) -> None:
        self._began = perf_counter()
        states, _ = check_states(model, row, 0.0, layer=1)
        if len(states) != 1:
            raise AuditError(f"last:1 is one row, the state of the last position, not {len(states)}")
        self._model, self._state, self._budget = model, states[0], budget
        self._calibration = calibrate(model, [1])[1]
        longest = min(longest, model.max_length, *windows(model))
        name = f"{BLOCK}:{longest}"
        if name not in model.calibrations:
            model.calibrations[name] = FirstBlock(model, longest)
        self._block: FirstBlock = model.calibrations[name]
        self._prior = token_frequencies(model)
        self._n_compared = self._n_forwards = 0

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true text would not be accepted; empty if it would."""
        (missed,) = self._missed([truth])
        limit = self._limit(truth)
        if missed <= limit:
            return ""
        return f"the true text misses the state by {missed:.2g} (allowed {limit:.2g})"

    def run(self, known: Tokens) -> InversionResult:
        """Return the text, if one was found."""
        if known:
            raise AuditError("known_prefix cannot be used with one row, in which all tokens are mixed")
        found: Tokens | None = None
        others: dict[int, Tokens] = {}
        reason = NOT_PROVEN
        try:
            for tokens, search in self._proposed():
                self._n_forwards += len(tokens)
                if self._missed([tokens])[0] <= self._limit(tokens):
                    others, longer = self._others(tokens, search), self._of_another_length(tokens)
                    reason = f"a text of {len(longer)} tokens gives the state too" if longer else ""
                    found = tokens
                    break
        except KeyboardInterrupt:
            reason = "interrupted"
        cost = Cost(self._n_compared, self._n_forwards, perf_counter() - self._began)
        if found is None:
            return InversionResult("", [], False, (), 0, f"no text of up to {self._block.longest} tokens was "
                                   f"found that gives the state: {reason}", **vars(cost))  # fmt: skip
        (distance,) = self._missed([found])
        positions = [Position(token, distance, inf, 0, "joint") for token in found]
        return conclude(self._model, positions, len(found), reason, True, cost, others)

    def _proposed(self) -> Iterator[tuple[Tokens, TokenMixture | None]]:
        """Yield texts with the searches that found them."""
        first = self._calibration.rankers["first"]
        alone = first.scores(first.probe.estimate(self._state)).topk(N_ALONE).indices
        self._n_compared += N_ALONE
        states = torch.stack([torch.from_numpy(self._model.states([int(token)], 1)[0]) for token in alone])
        misses = self._target(1).distances(states)
        yield [int(alone[misses.argmin()])], None
        for last, lengths in self._ends():
            search = self._search(last, lengths[-1])
            if search is not None:
                for length in lengths:
                    before = search.n_scored
                    tokens = search.tokens(length, self._budget)
                    self._n_compared += search.n_scored - before
                    yield tokens, search

    def _ends(self) -> Iterator[tuple[int, list[int]]]:
        """Yield last tokens with the lengths to try them for."""
        lengths = list(range(2, self._block.longest + 1))
        if self._model.n_vocabulary * self._model.width <= CHEAP:
            likely = self._typical().topk(N_LAST_CHEAP).indices.tolist()
        else:
            running = self._calibration.rankers["running"]
            likely = running.scores(running.probe.estimate(self._state)).topk(N_LAST).indices.tolist()
        # Where only distances count, one mixture serves all lengths.
        for some in [lengths] if self._block.aligned else [[length] for length in lengths]:
            yield from ((last, some) for last in likely)

    def _typical(self) -> Any:
        """Return the log-probability of each token as the last one, from the states of all after contexts."""
        model = self._model
        if TYPICAL not in model.calibrations:
            generator, seen = torch.Generator().manual_seed(0), []
            for place in range(N_CONTEXTS):
                prefix = Prefix(model, 1)
                context = torch.multinomial(self._prior.exp(), 1 + place % CONTEXT, generator=generator)
                prefix.extend(context.tolist())
                seen.append(prefix.candidates(torch.arange(model.n_vocabulary)).double())
            states = torch.stack(seen)
            within = (states - states.mean(0)).flatten(0, 1)
            model.calibrations[TYPICAL] = states.mean(0), within.T @ within / len(within)
        means, covariance = model.calibrations[TYPICAL]
        missed = torch.linalg.solve_triangular(
            torch.linalg.cholesky(covariance), (means - self._state.double()).T, upper=False
        )
        return self._prior - 0.5 * missed.square().sum(0)

    def _search(self, last: int, length: int) -> TokenMixture | None:
        """Return the search for the tokens before a last one, if a likely mixture gives the state."""
        block, generator = self._block, torch.Generator().manual_seed(0)
        mixture = MixtureFinder(block, self._prior, last, length, generator).find(self._state)
        self._n_compared += 1
        return None if mixture is None else TokenMixture(block, self._prior, mixture, generator)

    def _others(self, tokens: Tokens, search: TokenMixture | None) -> dict[int, Tokens]:
        """Return other tokens that give the state as well, by position."""
        found: dict[int, Tokens] = {}
        rivals = search.rivals(tokens, N_RIVALS) if search else [[]]
        for place, token in enumerate(tokens):
            near = dict.fromkeys([*self._model.near(token), *rivals[place]])
            others = [other for other in near if other != token]
            texts = [[*tokens[:place], other, *tokens[place + 1 :]] for other in others]
            same = [other for other, fits in zip(others, self._agree(texts), strict=True) if fits]
            found |= {place: same} if same else {}
        return found

    def _of_another_length(self, tokens: Tokens) -> Tokens:
        """Return a text that lacks the first token, or has one before it, and gives the state as well."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(self._prior.exp(), N_DRAWN, generator=generator).tolist()
        texts = [tokens[1:]] * (len(tokens) > 1) + [[one, *tokens] for one in drawn]
        return next((text for text, fits in zip(texts, self._agree(texts), strict=True) if fits), [])

    def _agree(self, texts: list[Tokens]) -> list[bool]:
        """Return which texts cannot be told from the one that gives the state."""
        self._n_compared += len(texts)
        missed = self._missed(texts)
        return [miss <= APART * self._limit(text) for miss, text in zip(missed, texts, strict=True)]

    def _missed(self, texts: list[Tokens]) -> list[float]:
        """Return how far the states of texts are from the one observed, in units of the spread."""
        states = [torch.from_numpy(self._model.states(text, 1)[-1]) for text in texts]
        return [
            float(self._target(len(text)).distances(state)) for text, state in zip(texts, states, strict=True)
        ]

    def _limit(self, tokens: Tokens) -> float:
        """Return how far apart two runs of a text may be."""
        part = self._model.part(1)
        with torch.no_grad():
            alone, twice = (
                self._model.capture([part], "output", input_ids=torch.tensor(ids), use_cache=False)[0][0, -1]
                for ids in ([tokens], [tokens, tokens[::-1]])
            )
        repeated = float(
            Target(alone, alone.new_zeros(len(alone)), self._scale(len(tokens))).distances(twice)
        )
        if REPEATS * repeated > LOOSEST:
            raise Unsupported(f"{self._model.family}: the same text beside another differs by {repeated:.0e}")
        return max(AGREES, REPEATS * repeated)

    def _target(self, length: int) -> Target:
        return Target(self._state, torch.zeros_like(self._state), self._scale(length))

    def _scale(self, length: int) -> Any:
        return self._calibration.first.scale if length == 1 else self._calibration.running.scale


def token_frequencies(model: Model, random_state: int = 0) -> Any:
    """Return log-probabilities of tokens wherever they stand, shape (n_vocabulary,); kept on disk.

    The mean of what the model expects next in text of its own; a tenth of the tokens may be anything.
    """
    path = kept(
        calibration_path(model, "tokens", random_state), partial(_learn_frequencies, model, random_state)
    )
    chances = load_file(path / "frequencies.safetensors")["frequencies"]
    return ((1.0 - SURPRISES) * chances + SURPRISES / len(chances)).log()


def _learn_frequencies(model: Model, seed: int, directory: Path) -> None:
    if model.predicts:
        texts = sample(model, *SAMPLED, torch.Generator().manual_seed(seed))
        total = torch.zeros(model.n_vocabulary)
        with torch.no_grad():
            for some in texts.split(BATCH):
                states = model.base(input_ids=some, use_cache=False)[0]
                total += torch.softmax(model.unembed(states), -1).sum((0, 1))
    else:
        total = torch.ones(model.n_vocabulary)
    save_file({"frequencies": total / total.sum()}, directory / "frequencies.safetensors")
