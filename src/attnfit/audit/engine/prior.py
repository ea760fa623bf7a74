"""The model's own opinion of the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from attnfit.audit.engine.prefix import Prefix
from attnfit.audit.errors import Unsupported
from attnfit.audit.models.model import Model

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

    Parameters
    ----------
    model : Model
    prefix : Prefix, optional
        One that is run anyway: where it goes through all layers, its last state tells what comes next.
        Otherwise the prior keeps keys and values of its own, which cost nothing before it is first asked.
    """

    def __init__(self, model: Model, prefix: Prefix | None = None) -> None:
        self._model = model
        self._shared = prefix if prefix is not None and prefix.complete else None
        self._own: list[Prefix] = []
        self._openings: tuple[int, ...] = ()
        # Where the head or its input cannot be had, states can still be inverted: all tokens are as likely.
        self._plain = self._shared or self._more(copies=1) if model.predicts else None
        if self._plain is None:
            return
        tokenizer = model.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) if tokenizer else ()
        # In one copy for every token that may stand before a text, of those that the model knows.
        known = [token for token in named if token is not None and token < model.n_vocabulary]
        self._openings = tuple(dict.fromkeys(known))
        self._opened = self._more(copies=len(self._openings))

    def _more(self, copies: int) -> Prefix | None:
        try:
            self._own.append(Prefix(self._model, self._model.n_layers + 1, copies=copies))
        except Unsupported:
            return None
        return self._own[-1]

    @property
    def n_forwards(self) -> int:
        """Tokens run so far for the prior alone."""
        return sum(prefix.n_forwards for prefix in self._own)

    def after(self, tokens: Sequence[int]) -> Any:
        """Return log p(next token | tokens), shape (n_vocabulary,); a shared prefix then holds the tokens."""
        readings = [_next(self._plain, list(tokens))] if tokens and self._plain else []
        if self._openings and self._opened and len(tokens) < OPENING:
            readings.append(_next(self._opened, [self._openings, *tokens]))
        if not readings:
            return torch.zeros(self._model.n_vocabulary)
        chances = torch.cat(readings)
        return torch.logsumexp(chances, 0) - math.log(len(chances))


def _next(prefix: Prefix, tokens: list[Any]) -> Any:
    """Return the log-probabilities after the tokens, a row for each copy; only new ones are run."""
    known = prefix.tokens
    same = 0
    while same < min(len(known), len(tokens)) and known[same] == tokens[same]:
        same += 1
    if same < len(known):
        prefix.crop(same)
    if same < len(tokens):
        prefix.extend(tokens[same:])
    return prefix.predicted()
