"""States after a block, and outputs of an attention: what leaks, and how it is inverted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnfit.audit.access import Access, Leak, Search, no_attack_on_encoder, no_attack_without_first
from attnfit.audit.checks import check_budget, check_states
from attnfit.audit.encoder_attention import EncoderSearch
from attnfit.audit.errors import AuditError
from attnfit.audit.hidden import HiddenSearch
from attnfit.audit.lower_precision import as_error
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.result import InversionResult
from attnfit.audit.uncertainty import Uncertainty
from attnfit.audit.withheld import WithheldSearch

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# Texts in one pass of an attention.
BATCH = 256


class StatesAccess(Access):
    """Numbers that tell the states of a causal model at some layer: inverted one position after the other."""

    probed = True

    @abstractmethod
    def states(self, model: Model, observation: Observation) -> tuple[Any, Uncertainty]:
        """Return the states that were observed, or are behind what was, and what is known about their
        errors.
        """

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for one token after the other; where the first position was withheld, for that
        token too.
        """
        if model.kind == "encoder":
            withheld = observation.dropped
            raise no_attack_without_first("outputs of an encoder") if withheld else no_attack_on_encoder(self)
        states, uncertainty = self.states(model, observation)
        kind = WithheldSearch if observation.dropped else HiddenSearch
        return kind(model, self.layer(model), states, uncertainty, budget)


class HiddenStates(StatesAccess):
    """The states after a block, counted from 1; ``n_layers + 1`` is after the final norm."""

    kind, number = "hidden", "LAYER"

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the hidden states after layer {self.place}"

    def layer(self, model: Model) -> Layer:
        """Return the block."""
        return self.place

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the states."""
        return Leak(model.states(tokens, self.layer(model)))

    def states(self, model: Model, observation: Observation) -> tuple[Any, Uncertainty]:
        """Return them as they are."""
        states, uncertainty = check_states(
            model, observation.array, observation.error, observation.error_bound, layer=self.layer(model)
        )
        return states, replace(uncertainty, run=observation.run)

    def run_layer(self, model: Model) -> Layer | None:
        """Return the block."""
        return self.layer(model)

    def continued(self, model: Model, tokens: Tokens, observation: Observation) -> Any:
        """Go on through the rest of the model from the first position observed."""
        start = len(observation.dropped)
        return resumed(model, tokens[start:], start, self.layer(model), observation.array)


class InsideBlock(HiddenStates):
    """Numbers from inside a block, which are no states but stand at every position; blocks count from 0."""

    number = "BLOCK"

    def layer(self, model: Model) -> Layer:
        """Return the name of the part."""
        return str(self)

    def continued(self, model: Model, tokens: Tokens, observation: Observation) -> Any:
        """Go on with the numbers in the place of the true ones; what was withheld counts as zero."""
        start = len(observation.dropped)
        nothing = np.zeros((start, observation.array.shape[1]), dtype=np.float32)
        array = np.concatenate([nothing, observation.array])
        return resumed(model, tokens, 0, self.layer(model), array)[start:]


class AttentionOutput(InsideBlock):
    """What the self-attention of a block adds, its output projection included."""

    kind, reads_encoders = "attention", True

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return f"the attention output of block {self.place}"

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search; of an encoder in the rows of a table, all positions at once."""
        if model.kind != "encoder":
            return super().search(model, observation, budget)
        if observation.dropped:
            raise no_attack_without_first("outputs of an encoder")
        return self.of_encoder(model, observation.array, observation.error)

    def of_encoder(self, model: Model, output: Any, error: Any) -> EncoderSearch:
        """Return the inversion of the output of an encoder's first attention."""
        if self.place != 0:
            raise no_attack_on_encoder(self)
        return EncoderSearch(model, output, error)

    def rivals(self, model: Model, tokens: Tokens, place: int, every: Any) -> tuple[Any, slice]:
        """Return the outputs at the place; an encoder's at all positions."""
        encoder = model.kind == "encoder"
        length = len(tokens) if encoder else place + 1
        sequences = torch.tensor(tokens[:length]).repeat(len(every), 1)
        sequences[:, place] = every
        part = model.part(self.layer(model))
        with torch.no_grad():
            batches = [model.capture([part], "output", input_ids=b)[0] for b in sequences.split(BATCH)]
        outputs = torch.cat(batches)
        if encoder:
            return outputs.flatten(1), slice(None)
        return outputs[:, place], slice(place, place + 1)


def resumed(model: Model, tokens: Tokens, start: int, layer: Layer, outputs: Any) -> Any:
    """Return the logits of tokens from position ``start`` on when the outputs of a layer are replaced."""
    given = torch.from_numpy(np.asarray(outputs, dtype=np.float32))

    def replaced(_: Any, __: Any, out: Any) -> Any:
        return (given[None], *out[1:]) if isinstance(out, tuple) else given[None]

    first = model.first_position + start
    places = torch.arange(first, first + len(tokens))[None]
    handle = model.part(layer).register_forward_hook(replaced)
    try:
        with torch.no_grad():
            last = model.base(input_ids=torch.tensor([tokens]), position_ids=places, use_cache=False)[0]
    finally:
        handle.remove()
    return model.unembed(last[0])


def invert_hidden(
    model: Model,
    states: Any,
    layer: int,
    *,
    error: Any = 0.0,
    error_bound: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> InversionResult:
    """Recover the tokens from the states after one block.

    A linear probe drafts all tokens, one forward pass verifies the draft, and the first wrong token is
    searched for until its state agrees with the observation; then the rest is verified again.

    Parameters
    ----------
    model : Model
        A causal one, the one that produced the states.
    states : array_like, shape (n, width)
        At every position from the first on.
    layer : int
        Block after which they were taken, from 1; ``n_layers + 1`` is after the final norm.
    error : array_like, broadcastable to states, or "run:bfloat16"
        Standard deviation of the error of each number, or that they are of a run in bfloat16, whose errors
        are measured once for each layer. Where it matters, the best candidate is taken instead
        of the first that agrees.
    error_bound : array_like, broadcastable to states, optional
        The largest error of each number, as half a step where numbers were rounded: a candidate must then lie
        within it.
    known_prefix : sequence of int
        Tokens known to come first.
    budget : int, optional
        Largest number of candidates at a position; the size of the vocabulary and more unless given.

    Returns
    -------
    InversionResult

    Raises
    ------
    AuditError
        If the model is an encoder, or the budget is not positive.
    ObservationMismatch
        If the states have another width, are not finite, or are unlike any of this model and layer.
    """
    if model.kind != "causal":
        raise AuditError(f"model {model.name!r} is an encoder: its states depend on all tokens at once")
    return _inverted(model, layer, states, error, error_bound, known_prefix, budget)


def invert_attention(
    model: Model,
    output: Any,
    block: int = 0,
    *,
    error: Any = 0.0,
    error_bound: Any = None,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> InversionResult:
    """Recover the tokens from the output of a block's self-attention.

    In a causal model row t depends on the tokens up to t: the same search as for hidden states, with the
    attention in the place of the block, finds one token after the other. In an encoder all tokens see all,
    and the first block is inverted by the spans of its heads' values.

    Parameters
    ----------
    model : Model
    output : array_like, shape (n, width)
        What the attention adds, its output projection included.
    block : int
        Counted from 0; of an encoder only 0.
    error : array_like, broadcastable to output, or "run:bfloat16"
        Standard deviation of the error of each number; of a causal model also that they are of a run in
        bfloat16 (see `invert_hidden`).
    error_bound : array_like, broadcastable to output, optional
        The largest error of each number, of a causal model.
    known_prefix : sequence of int
        Tokens known to come first, of a causal model.
    budget : int, optional
        Largest number of candidates at a position, of a causal model.

    Returns
    -------
    InversionResult

    Raises
    ------
    AuditError
        If the block is another than the first of an encoder, or the budget is not positive.
    ObservationMismatch
        If the output has another width or is not finite.
    """
    form = AttentionOutput(block)
    if model.kind == "encoder":
        return form.of_encoder(model, output, error).run(list(known_prefix))
    return _inverted(model, form.layer(model), output, error, error_bound, known_prefix, budget)


def _inverted(
    model: Model,
    layer: Layer,
    states: Any,
    error: Any,
    error_bound: Any,
    known: Sequence[int],
    budget: int | None,
) -> InversionResult:
    error, run = as_error(model, layer, error, len(states))
    observed, uncertainty = check_states(model, states, error, error_bound)
    uncertainty = replace(uncertainty, run=run)
    return HiddenSearch(model, layer, observed, uncertainty, check_budget(budget, model)).run(list(known))
