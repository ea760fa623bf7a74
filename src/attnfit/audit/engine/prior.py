"""The model's own opinion of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.models.model import Model, Tokens

# Where a text begins without the token that the model saw before every text, its first predictions are
# worthless: up to this many tokens, what it predicts after each token that may stand there is averaged in.
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
        self._plain = _Continuation(model)
        tokenizer = model.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) if tokenizer else ()
        openings = tuple(dict.fromkeys(token for token in named if token is not None))
        self._opened = _Continuation(model, openings) if openings else None

    @property
    def n_forwards(self) -> int:
        """Tokens run so far."""
        opened = self._opened.prefix.n_forwards if self._opened else 0
        return self._plain.prefix.n_forwards + opened

    def after(self, tokens: Sequence[int]) -> Any:
        """Return log p(next token | tokens), shape (n_vocabulary,)."""
        readings = [self._plain.after(list(tokens))] if tokens else []
        if self._opened and len(tokens) < OPENING:
            readings.append(self._opened.after(list(tokens)))
        if not readings:
            return torch.zeros(self._model.n_vocabulary)
        chances = torch.cat(readings)
        return torch.logsumexp(chances, 0) - math.log(len(chances))


class _Continuation:
    """What follows some tokens, in one copy for every token that may stand before them."""

    def __init__(self, model: Model, openings: tuple[int, ...] = ()) -> None:
        self.prefix = Prefix(model, model.n_layers + 1, copies=max(1, len(openings)))
        self._opening: list[Any] = [openings] if openings else []
        self._last: Any = None

    def after(self, tokens: Tokens) -> Any:
        """Return the log-probabilities of the next token, a row for each copy; only new tokens are run."""
        tokens = self._opening + tokens
        known = self.prefix.tokens
        same = 0
        while same < min(len(known), len(tokens)) and known[same] == tokens[same]:
            same += 1
        if same < len(known) or same < len(tokens):
            # The last token is run again where nothing else is new: its state is what counts.
            same = min(same, len(tokens) - 1)
            self.prefix.crop(same)
            self._last = self.prefix.extend(tokens[same:])[..., -1, :]
        logits = self.prefix.model.unembed(self._last)
        return torch.log_softmax(logits, -1).reshape(-1, logits.shape[-1])
