"""Three ways to evaluate candidates after a prefix: each slower than the last, and right for more models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from attnfit.audit.engine.attention import seeing_only_prefix
from attnfit.audit.errors import Unsupported
from attnfit.audit.models.cached import arguments, cache_argument
from attnfit.audit.models.model import Model

# Copies of a prefix that are held at once, and tokens of whole sequences in one pass.
COPIES, TOKENS = 64, 1 << 12


class _Keys(DynamicCache):
    """Keys and values of all positions, also of layers with a window, which would forget what crops need.

    While frozen, new ones are used and kept apart.
    """

    frozen = False

    def __init__(self) -> None:
        # Without a configuration every layer keeps all positions; the mask is the window.
        super().__init__()
        self._apart: dict[int, tuple[Any, Any]] = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Return the keys and values of the prefix and the new tokens."""
        if not self.frozen:
            return super().update(key_states, value_states, layer_idx, *rest, **more)
        self._apart[layer_idx] = key_states, value_states
        if layer_idx >= len(self.layers) or not self.layers[layer_idx].is_initialized:
            return key_states, value_states
        held = self.layers[layer_idx]
        return torch.cat([held.keys, key_states], -2), torch.cat([held.values, value_states], -2)

    def adopt(self, place: int) -> None:
        """Append those that the last pass while frozen gave at one of its places."""
        for layer, (keys, values) in self._apart.items():
            self.update(keys[..., place : place + 1, :], values[..., place : place + 1, :], layer)
        self._apart = {}

    def copied(self, count: int) -> _Keys:
        """Return the same for several sequences that start alike."""
        copy = _Keys()
        for layer, held in enumerate(self.layers):
            if held.is_initialized:
                copy.update(held.keys.expand(count, -1, -1, -1), held.values.expand(count, -1, -1, -1), layer)
        return copy

    def adopt_last(self, keys: list[tuple[Any, Any]], place: int) -> None:
        """Append the last position of one of several sequences."""
        for layer, (some, values) in enumerate(keys):
            self.update(some[place : place + 1], values[place : place + 1], layer)

    def last(self) -> list[tuple[Any, Any]]:
        """Return the last position of every layer."""
        return [(held.keys[..., -1:, :].clone(), held.values[..., -1:, :].clone()) for held in self.layers]


class Way(ABC):
    """A prefix inside the model: what is kept of it, and how candidates after it are evaluated.

    Parameters
    ----------
    model : Model
    parts : list
        Modules whose outputs are read.
    copies : int
        How many sequences are run at once.
    """

    name: ClassVar[str]
    # Candidates in one pass.
    chunk: int

    def __init__(self, model: Model, parts: list[Any], copies: int) -> None:
        self._model, self._parts, self._copies = model, parts, copies

    @abstractmethod
    def extend(self, ids: Any) -> Any:
        """Append tokens, shape (copies, k); return their states at the last part, (copies, k, width)."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget all positions but the first ones."""

    @abstractmethod
    def evaluate(self, vectors: Any) -> list[Any]:
        """Return the states at the next position of embeddings, shape (C, width), for every part."""

    @abstractmethod
    def adopt(self, place: int, token: int) -> None:
        """Append one of the last `chunk` embeddings evaluated, by its place among them."""


class Fast(Way):
    """Candidates are positions of one sequence that see the prefix and themselves."""

    name = "fast"
    # Candidates in one pass: more cost memory and are not faster.
    chunk = 1024

    def __init__(self, model: Model, parts: list[Any], copies: int) -> None:
        super().__init__(model, parts, copies)
        self._keys, self._length = _Keys(), 0
        self._places = "position_ids" in arguments(model.base)
        self._cache = cache_argument(model.base)

    def extend(self, ids: Any) -> Any:
        """Run the tokens after the keys of the prefix."""
        places = torch.arange(self._length, self._length + ids.shape[1])
        states = self._run({"input_ids": ids}, places, self._keys)[-1]
        self._length += ids.shape[1]
        return states

    def crop(self, length: int) -> None:
        """Forget the keys of later positions."""
        if length == 0:
            self._keys = _Keys()
        elif length < self._length:
            self._keys.crop(length - self._length)
        self._length = length

    def evaluate(self, vectors: Any) -> list[Any]:
        """Let every attention treat candidates as alternatives."""
        if not self._places:
            raise Unsupported(f"{self._model.name!r} takes no positions")
        self._keys.frozen = True
        try:
            with seeing_only_prefix(self._model.module):
                parts = [
                    self._run(
                        {"inputs_embeds": part[None]}, torch.full((len(part),), self._length), self._keys
                    )
                    for part in vectors.split(self.chunk)
                ]
        finally:
            self._keys.frozen = False
        return [torch.cat(states, 1)[0] for states in zip(*parts, strict=True)]

    def adopt(self, place: int, token: int) -> None:
        """Take the keys from the last pass."""
        self._keys.adopt(place)
        self._length += 1

    def _run(self, inputs: dict[str, Any], places: Any, keys: Any) -> list[Any]:
        if self._places:
            inputs |= {"position_ids": self._model.first_position + places[None]}
        if self._cache is None:
            raise Unsupported(f"{self._model.name!r} takes no keys of tokens before")
        inputs |= {self._cache: keys, "use_cache": True}
        return self._model.capture(self._parts, "output", **inputs)


class Expanded(Fast):
    """Each candidate is the last token of a sequence of its own, with copies of the keys of the prefix."""

    name = "expanded"
    chunk = COPIES

    def evaluate(self, vectors: Any) -> list[Any]:
        """Run one token for each copy, through the model's own attention."""
        parts, place = [], torch.full((1,), self._length)
        for some in vectors.split(self.chunk):
            keys = self._keys.copied(len(some))
            parts.append(self._run({"inputs_embeds": some[:, None]}, place, keys))
            self._last = keys.last()
        return [torch.cat(states)[:, 0] for states in zip(*parts, strict=True)]

    def adopt(self, place: int, token: int) -> None:
        """Take the keys from the copy."""
        self._keys.adopt_last(self._last, place)
        self._length += 1


class Whole(Way):
    """Every sequence is run from its first token, and nothing is kept: right for every causal model."""

    name = "whole"

    def __init__(self, model: Model, parts: list[Any], copies: int) -> None:
        super().__init__(model, parts, copies)
        self._ids = torch.empty(copies, 0, dtype=torch.int64)

    @property
    def chunk(self) -> int:  # type: ignore[override]
        """Candidates in one pass: fewer the longer the prefix."""
        return max(1, TOKENS // (1 + int(self._ids.shape[1])))

    def extend(self, ids: Any) -> Any:
        """Run everything so far and the new tokens."""
        self._ids = torch.cat([self._ids, ids], 1)
        return self._run(input_ids=self._ids)[-1][:, -ids.shape[1] :]

    def crop(self, length: int) -> None:
        """Forget later tokens."""
        self._ids = self._ids[:, :length]

    def evaluate(self, vectors: Any) -> list[Any]:
        """Run the prefix before each candidate."""
        known = self._model.embeddings[self._ids[0]]
        parts = []
        for some in vectors.split(self.chunk):
            rows = torch.cat([known.expand(len(some), -1, -1), some[:, None]], 1)
            parts.append([states[:, -1] for states in self._run(inputs_embeds=rows)])
        return [torch.cat(states) for states in zip(*parts, strict=True)]

    def adopt(self, place: int, token: int) -> None:
        """Append the token."""
        self._ids = torch.cat([self._ids, torch.full((self._copies, 1), token)], 1)

    def _run(self, **inputs: Any) -> list[Any]:
        return self._model.capture(self._parts, "output", **inputs, use_cache=False)


WAYS: tuple[type[Way], ...] = (Fast, Expanded, Whole)
