"""The first block of a causal model, taken apart at its attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from attnfit.audit.engine.guard import TOLERANCE, random_tokens
from attnfit.audit.errors import Unsupported
from attnfit.audit.models.blocks import capture
from attnfit.audit.models.model import Model

NAME = "attnfit_mixture"
# Tokens whose keys and values are computed in one pass.
CHUNK = 1024
# Settings of an attention that are understood; others must be off.
KNOWN = {"scaling", "softcap", "sliding_window", "dropout", "position_ids", "use_cache", "cache_position"}


class _Seen(Exception):
    """The pass has come to the attention of the first block."""

    def __init__(self, queries: Any, keys: Any, values: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.queries, self.keys, self.values, self.settings = queries, keys, values, settings


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> tuple[Any, None]:
    """Return the mixture that was laid down for the module, or show what it was given."""
    given = getattr(module, NAME, None)
    if given is None:
        raise _Seen(query[0], key[0], value[0], settings)
    return given, None


AttentionInterface.register(NAME, _attention)


@dataclass(frozen=True, eq=False)
class Entries:
    """What every token would be to the attention of a later one.

    Attributes
    ----------
    keys : Tensor, shape (key heads, n_vocabulary, size)
    values : Tensor, shape (key heads, n_vocabulary, w)
    """

    keys: Any
    values: Any


class FirstBlock:
    """Queries, keys and values of the first block, and its output for any mixture of values.

    The attention of head h at the last position hands on ``o_h = sum_t e_ht v_ht / sum_t e_ht`` with
    ``e_ht = exp(q_h . k_ht)``; all that the block does besides depends on the last token alone. Nothing of
    the architecture needs to be known: the attention is exchanged for one that shows what it is given, or
    returns a mixture that was laid down.

    Parameters
    ----------
    model : Model
        A causal one.
    longest : int
        The longest text whose last position is looked at.

    Raises
    ------
    Unsupported
        If the attention cannot be exchanged, or what is put together again is not what the model gives.
    """

    def __init__(self, model: Model, longest: int) -> None:
        self.model, self.longest = model, longest
        self._entries: dict[int, Entries] = {}
        self._double: Any = None
        # Where only distances count, tables are shared by texts of all lengths.
        self.aligned = not model.counts_positions
        self.rounding = self._checked()

    def place(self, length: int) -> int:
        """Return the position that the last of so many tokens is given."""
        return self.longest - 1 if self.aligned else length - 1

    def entries(self, place: int) -> Entries:
        """Return the keys and values of all tokens at a position."""
        if place not in self._entries:
            tokens = torch.arange(self.model.n_vocabulary)
            seen = [self._see(some, torch.full_like(some, place)) for some in tokens.split(CHUNK)]
            keys, values = (torch.cat([getattr(one, name) for one in seen], 1) for name in ("keys", "values"))
            if self.aligned and self._entries:
                # Values do not turn: one copy serves all positions.
                values = next(iter(self._entries.values())).values
            self._entries[place] = Entries(keys, values)
        return self._entries[place]

    def asked(self, token: int, place: int) -> tuple[Any, Any, Any]:
        """Return the query of a token, scaled, its own key and its value, one row a head."""
        seen = self._see(torch.tensor([token]), torch.tensor([place]))
        heads = len(seen.queries)
        keys, values = (spread(one, heads)[:, 0] for one in (seen.keys, seen.values))
        return seen.queries[:, 0] * self._scale(seen), keys, values

    def scores(self, queries: Any, keys: Any) -> Any:
        """Return the logits of attention, shape (heads, n), of keys (heads, n, size) or (key heads, ...)."""
        products = torch.einsum("hs,hns->hn", queries, spread(keys, len(queries)))
        return products if self._cap is None else self._cap * torch.tanh(products / self._cap)

    def output(self, token: int, place: int, mixtures: Any) -> Any:
        """Return the block's output, shape (C, width), at a token for mixtures (C, heads, w), in their
        precision.
        """
        vectors = self.model.embeddings[torch.full((len(mixtures),), token)]
        places = torch.full((1, len(mixtures)), self.model.first_position + place)
        with self._exchanged(double=mixtures.dtype == torch.float64) as block:
            # Which part asks depends on the architecture: the mixture lies at hand for all.
            parts = list(block.modules())
            for part in parts:
                setattr(part, NAME, mixtures[None])
            try:
                return capture(
                    self.model.base, [block], "output", inputs_embeds=vectors.to(mixtures.dtype)[None],
                    position_ids=places, use_cache=False,
                )[0][0]  # fmt: skip
            finally:
                for part in parts:
                    delattr(part, NAME)

    def _see(self, tokens: Any, places: Any) -> _Seen:
        places = self.model.first_position + places
        with self._exchanged() as _, torch.no_grad():
            try:
                self.model.base(input_ids=tokens[None], position_ids=places[None], use_cache=False)
            except _Seen as seen:
                # Its frames would keep alive what the pass has computed.
                return seen.with_traceback(None)
        raise Unsupported(f"the attention of {self.model.family} cannot be exchanged for another")

    def _scale(self, seen: _Seen) -> float:
        found = seen.settings.get("scaling")
        return seen.queries.shape[-1] ** -0.5 if found is None else float(found)

    @contextmanager
    def _exchanged(self, *, double: bool = False) -> Iterator[Any]:
        """Let attentions show what they are given; with the first block in double precision if asked for."""
        config, blocks = self.model.module.config, self.model.blocks
        usual, block = config._attn_implementation, blocks[0]
        if double and self._double is None:
            # The copy asks the configuration that is changed here, not one of its own.
            shared = (config, config.get_text_config())
            self._double = deepcopy(block, {id(one): one for one in shared}).double()
        config._attn_implementation = NAME
        if double:
            blocks[0] = self._double
        try:
            yield blocks[0]
        finally:
            blocks[0], config._attn_implementation = block, usual

    def _checked(self) -> float:
        """Return by how much states in single precision differ from those in double, root mean square."""
        model = self.model
        tokens = random_tokens(model, None)[: self.longest]
        try:
            seen = self._see(torch.tensor(tokens), torch.arange(len(tokens)))
            self._cap = seen.settings.get("softcap")
            strange = {k for k, v in seen.settings.items() if v is not None and k not in KNOWN}
            if strange:
                raise Unsupported(f"the attention of {model.family} has settings {sorted(strange)}")
            heads = len(seen.queries)
            scores = self.scores(seen.queries[:, -1] * self._scale(seen), seen.keys)
            mixture = torch.einsum("hn,hnw->hw", torch.softmax(scores, -1), spread(seen.values, heads))
            given = self.output(tokens[-1], len(tokens) - 1, mixture.double()[None])[0]
        except Unsupported:
            raise
        # Whatever an architecture does not like about the exchange.
        except Exception as error:
            raise Unsupported(f"{model.family}: the first block cannot be taken apart: {error}") from error
        states = torch.from_numpy(model.states(tokens, 1))
        missed = (given - states[-1]).square().mean().sqrt()
        if not float(missed) <= TOLERANCE * float(states.std(0).mean()):
            raise Unsupported(
                f"{model.family}: the first block, put together again, differs by {float(missed):.0e}"
            )
        return float(missed)


def spread(heads: Any, count: int) -> Any:
    """Return key heads, shape (key heads, ...), once for every head that shares them."""
    return heads.repeat_interleave(count // len(heads), 0)
