"""Tokens already known, and what a candidate for the next one would look like after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from attnfit.audit.engine.attention import seeing_only_prefix
from attnfit.audit.models.blocks import capture
from attnfit.audit.models.model import Layer, Model, Tokens

# Candidates in one pass: more cost memory and are not faster.
CHUNK = 1024


class _Keys(DynamicCache):
    """Keys and values of the prefix; while frozen, new ones are used and kept apart."""

    frozen = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._apart: dict[int, tuple[Any, Any]] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Return the keys and values of the prefix and the new tokens."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *rest, **more)
        self._apart[layer_idx] = key_states, value_states
        if layer_idx >= len(self.layers) or self.layers[layer_idx].keys is None:
            return key_states, value_states
        held = self.layers[layer_idx]
        return torch.cat([held.keys, key_states], -2), torch.cat([held.values, value_states], -2)

    def adopt(self, place: int) -> None:
        """Append those that the last pass while frozen gave at one of its places."""
        for layer, (keys, values) in self._apart.items():
            self.update(keys[..., place : place + 1, :], values[..., place : place + 1, :], layer)
        self._apart = {}

    def shorten(self, length: int) -> None:
        """Keep the first `length` positions."""
        for held in self.layers:
            if held.keys is not None:
                held.keys, held.values = held.keys[..., :length, :], held.values[..., :length, :]
                # Layers with a sliding window count by themselves.
                if hasattr(held, "cumulative_length"):
                    held.cumulative_length = length


class Prefix:
    """Known tokens with their keys and values up to the deepest layer asked for.

    Attributes
    ----------
    tokens : list of int, or of tuples of int
        Tuples where the copies differ.
    states : Tensor, shape (copies, len(tokens), width)
        Theirs at the deepest layer.
    complete : bool
        Whether that is the state from which the next token is predicted.
    n_candidates : int
        Candidates evaluated so far: each is a pass of one token through the layers.
    n_forwards : int
        Tokens run to extend or verify prefixes.

    Parameters
    ----------
    model : Model
        A causal one.
    *layers : int or str
        States are read after these blocks, the deepest last.
    copies : int
        How many sequences are run at once; candidates are for one.
    """

    def __init__(self, model: Model, *layers: Layer, copies: int = 1) -> None:
        self.model, self._copies = model, copies
        self.tokens: list[Any] = []
        self.states = torch.empty(copies, 0, model.width)
        self.complete = layers[-1] == model.n_layers + 1
        self.n_candidates = self.n_forwards = 0
        self._parts = [model.part(layer) for layer in layers]
        self._keys = _Keys(config=model.module.config)
        # Candidates of the last pass, whose keys and values are kept, and their states.
        self._offered: Tokens = []
        self._offered_states: Any = None

    def extend(self, tokens: Sequence[int | tuple[int, ...]]) -> Any:
        """Append tokens, the same for all copies or a tuple with one for each, and return their states.

        One that was among the last candidates is not run again. The states are those of the deepest layer,
        shape (copies, len(tokens), width), or (len(tokens), width) where there is one copy.
        """
        if len(tokens) == 1 and tokens[0] in self._offered:
            place = self._offered.index(tokens[0])
            self._keys.adopt(place)
            states = self._offered_states[None, place : place + 1]
        else:
            ids = torch.stack([torch.as_tensor(token).expand(self._copies) for token in tokens], 1)
            places = torch.arange(len(self.tokens), len(self.tokens) + len(tokens))
            with torch.no_grad():
                states = self._run({"input_ids": ids}, places)[-1]
            self.n_forwards += ids.numel()
        self.tokens += tokens
        self.states = torch.cat([self.states, states], 1)
        self._offered = []
        return states[0] if self._copies == 1 else states

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        if length == 0:
            self._keys = _Keys(config=self.model.module.config)
        else:
            self._keys.shorten(length)
        del self.tokens[length:]
        self.states = self.states[:, :length]
        self._offered = []

    def candidates(self, tokens: Any) -> Any:
        """Return the state of each token at the next position, shape (len(tokens), width)."""
        states = self.embedded(self.model.embeddings[torch.as_tensor(tokens)])
        last = (len(tokens) - 1) // CHUNK * CHUNK
        self._offered, self._offered_states = list(tokens[last:]), states[last:]
        return states

    def embedded(self, vectors: Any) -> Any:
        """Return the state of each embedding at the next position: any vectors, shape (C, width)."""
        return self.embedded_at_all(vectors)[-1]

    def embedded_at_all(self, vectors: Any) -> list[Any]:
        """Return the states of embeddings at the next position for every layer asked for."""
        place = len(self.tokens)
        self._offered = []
        self._keys.frozen = True
        try:
            with torch.no_grad(), seeing_only_prefix(self.model.module):
                parts = [
                    self._run({"inputs_embeds": part[None]}, torch.full((len(part),), place))
                    for part in vectors.split(CHUNK)
                ]
        finally:
            self._keys.frozen = False
        self.n_candidates += len(vectors)
        return [torch.cat(states, 1)[0] for states in zip(*parts, strict=True)]

    def _run(self, inputs: dict[str, Any], places: Any) -> list[Any]:
        settings = {"position_ids": places[None], "past_key_values": self._keys, "use_cache": True}
        return capture(self.model.base, self._parts, "output", **inputs, **settings)
