"""The model's own opinion of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.models.model import Model, Tokens

# Where a text begins without the token that the model saw before every text, its first predictions are
# worthless: # up to this many tokens, what it predicts after each token that may stand there is averaged in.
OPENING = 4
# Share of the tokens of a text that may be anything: models are too sure of what they expect.
SURPRISES = 0.1


def with_surprises(prior: Any) -> Any:
    """Return the log-probabilities if some tokens are drawn from the whole vocabulary, all alike."""
    anything = torch.full_like(prior, math.log(SURPRISES / len(prior)))
    return torch.logaddexp(prior + math.log1p(-SURPRISES), anything)


class Prior:
    """Next-token distributions after growing prefixes.

    They have keys and values of their own, through all layers, and cost nothing before they are first asked.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._plain = _Continuation(model, [])
        tokenizer = model.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) if tokenizer else ()
        self._opened = [_Continuation(model, [token]) for token in dict.fromkeys(named) if token is not None]

    @property
    def n_forwards(self) -> int:
        """Tokens run so far."""
        return sum(each.prefix.n_forwards for each in [self._plain, *self._opened])

    def after(self, tokens: Sequence[int]) -> Any:
        """Return log p(next token | tokens), shape (n_vocabulary,)."""
        readings = [self._plain] if tokens else []
        if len(tokens) < OPENING:
            readings += self._opened
        if not readings:
            return torch.zeros(self._model.n_vocabulary)
        chances = torch.stack([reading.after(list(tokens)) for reading in readings])
        return torch.logsumexp(chances, 0) - math.log(len(readings))


class _Continuation:
    """What follows some tokens after a fixed opening."""

    def __init__(self, model: Model, opening: Tokens) -> None:
        self.prefix = Prefix(model, model.n_layers + 1)
        self._opening, self._last = opening, None

    def after(self, tokens: Tokens) -> Any:
        """Return the log-probabilities of the next token; only tokens not seen before are run."""
        tokens = self._opening + tokens
        known = self.prefix.tokens
        same = 0
        while same < min(len(known), len(tokens)) and known[same] == tokens[same]:
            same += 1
        if same < len(known) or same < len(tokens):
            # The last token is run again where nothing else is new: its state is what counts.
            same = min(same, len(tokens) - 1)
            self.prefix.crop(same)
            self._last = self.prefix.extend(tokens[same:])[-1]
        return torch.log_softmax(self.prefix.model.unembed(self._last), -1)
