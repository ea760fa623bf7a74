"""Tokens already known, and what a candidate for the next one would look like after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from attnfit.audit.engine.guard import check_way, random_tokens, windows
from attnfit.audit.engine.ways import WAYS, Way
from attnfit.audit.errors import Unsupported
from attnfit.audit.models.model import Layer, Model, Tokens


class Prefix:
    """Known tokens with what the model keeps of them up to the deepest layer asked for.

    Attributes
    ----------
    tokens : list of int, or of tuples of int
        Tuples where the copies differ.
    states : Tensor, shape (copies, len(tokens), width)
        Theirs at the deepest layer, whose width may be another one.
    complete : bool
        Whether that is the state from which the next token is predicted, or the one before the last norm.
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
    way : type of Way, optional
        How candidates are evaluated: the first way that passes the guard at all layers unless given.

    Raises
    ------
    Unsupported
        If no way gives what a plain forward pass gives.
    """

    def __init__(self, model: Model, *layers: Layer, copies: int = 1, way: type[Way] | None = None) -> None:
        self.model, self._copies = model, copies
        self.tokens: list[Any] = []
        self.states = torch.empty(copies, 0, model.width)
        self.complete = layers[-1] in (model.n_layers, model.n_layers + 1)
        self._is_normed = layers[-1] != model.n_layers
        self.n_candidates = self.n_forwards = 0
        kind = way or max((way_for(model, layer) for layer in layers), key=WAYS.index)
        self._way = kind(model, [model.part(layer) for layer in layers], copies)
        # Candidates of the last pass, which can be adopted, and their states.
        self._offered: Tokens = []
        self._offered_states: Any = None

    @property
    def chunk(self) -> int:
        """How many candidates are evaluated in one pass."""
        return self._way.chunk

    def extend(self, tokens: Sequence[int | tuple[int, ...]]) -> Any:
        """Append tokens, the same for all copies or a tuple with one for each, and return their states.

        One that was among the last candidates is not run again. The states are those of the deepest layer,
        shape (copies, len(tokens), width), or (len(tokens), width) where there is one copy.
        """
        if len(tokens) == 1 and tokens[0] in self._offered:
            place = self._offered.index(tokens[0])
            self._way.adopt(place, self._offered[place])
            states = self._offered_states[None, place : place + 1]
        else:
            ids = torch.stack([torch.as_tensor(token).expand(self._copies) for token in tokens], 1)
            with torch.no_grad():
                states = self._way.extend(ids)
            self.n_forwards += ids.numel()
        self.states = torch.cat([self.states, states], 1) if self.tokens else states
        self.tokens += tokens
        self._offered = []
        return states[0] if self._copies == 1 else states

    def predicted(self) -> Any:
        """Return log p(next token | tokens), shape (copies, n_vocabulary); only of a complete prefix."""
        last = self.states[:, -1]
        if not self._is_normed:
            with torch.no_grad():
                last = self.model.final_norm(last)
        return torch.log_softmax(self.model.unembed(last), -1)

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._way.crop(length)
        del self.tokens[length:]
        self.states = self.states[:, :length]
        self._offered = []

    def candidates(self, tokens: Any) -> Any:
        """Return the state of each token at the next position, shape (len(tokens), width)."""
        states = self.embedded(self.model.embeddings[torch.as_tensor(tokens)])
        last = (len(tokens) - 1) // self.chunk * self.chunk
        self._offered, self._offered_states = [int(token) for token in tokens[last:]], states[last:]
        return states

    def embedded(self, vectors: Any) -> Any:
        """Return the state of each embedding at the next position: any vectors, shape (C, width)."""
        return self.embedded_at_all(vectors)[-1]

    def embedded_at_all(self, vectors: Any) -> list[Any]:
        """Return the states of embeddings at the next position for every layer asked for."""
        self._offered = []
        with torch.no_grad():
            states = self._way.evaluate(vectors)
        self.n_candidates += len(vectors)
        return states


def alternatives(
    prefix: Prefix,
    tokens: Tokens,
    agrees: Callable[[int, Any], Sequence[bool]],
    rivals: Sequence[Sequence[int]] = (),
) -> dict[int, Tokens]:
    """Return other tokens with nearly the same embedding that explain an observation as well, by position.

    Parameters
    ----------
    prefix : Prefix
        It is emptied first.
    tokens : list of int
        Those found.
    agrees : callable
        Tells which states at a position explain what was observed there.
    rivals : sequence of sequences of int, optional
        Further tokens to compare at each position.
    """
    prefix.crop(0)
    found: dict[int, Tokens] = {}
    for place, token in enumerate(tokens):
        more = rivals[place] if rivals else ()
        near = [other for other in dict.fromkeys([*prefix.model.near(token), *more]) if other != token]
        if near:
            if place > len(prefix.tokens):
                prefix.extend(tokens[len(prefix.tokens) : place])
            fits = agrees(place, prefix.candidates(near))
            same = [other for other, fit in zip(near, fits, strict=True) if fit]
            found |= {place: same} if same else {}
    return found


def way_for(model: Model, layer: Layer) -> type[Way]:
    """Return the first way to evaluate candidates that gives what the model itself gives; found once.

    Raises
    ------
    Unsupported
        If none does.
    """
    known = model.ways.get(layer)
    if known is None:
        known = _first_right(model, layer, random_tokens(model, min(windows(model), default=None)), WAYS)
    return _named(known)


def check_text(model: Model, layer: Layer, tokens: Tokens) -> str:
    """Check the way that is used for a layer on a text of its own, and take the next one where it fails.

    Returns
    -------
    str
        The name of the way.

    Raises
    ------
    Unsupported
        If none gives what the model itself gives.
    """
    way = way_for(model, layer)
    return _named(_first_right(model, layer, tokens, WAYS[WAYS.index(way) :])).name


def _named(known: str) -> type[Way]:
    """Return a way by its name; what is no name is the reason why there is none."""
    for way in WAYS:
        if way.name == known:
            return way
    raise Unsupported(known)


def _first_right(model: Model, layer: Layer, tokens: Tokens, ways: Sequence[type[Way]]) -> str:
    """Return the name of the first way that passes, or why none does; keep it for the layer."""
    # What has no such layer says so itself.
    model.part(layer)
    faults = []
    for way in ways:
        fault = check_way(model, layer, tokens, partial(Prefix, model, layer, way=way))
        if fault is None:
            model.ways[layer] = way.name
            return way.name
        faults.append(f"{way.name}: {fault}")
    access = layer if isinstance(layer, str) else f"hidden:{layer}"
    model.ways[layer] = (
        f"{model.family}, {access}: no way of evaluating candidates is right: {'; '.join(faults)}"
    )
    return model.ways[layer]
