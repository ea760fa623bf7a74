"""Likelihoods of many sequences at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnfit.audit.models.model import Model

# Logits held at once.
ENTRIES = 1 << 25


@dataclass(eq=False)
class Likelihood:
    """Next-token probabilities of a causal model, with the tokens run counted.

    Attributes
    ----------
    model : Model
    n_tokens : int
        Tokens run so far.
    """

    model: Model
    n_tokens: int = 0

    def after(self, sequences: Any, columns: Any = None) -> Any:
        """Return ``log p(next | sequence)``, shape (k, N), or of some columns; sequences of shape (k, L)."""
        self.n_tokens += sequences.numel()
        parts = [self._after(part, columns) for part in self._parts(sequences, 1)]
        return torch.cat(parts)

    def of(self, sequences: Any, first: int = 1) -> Any:
        """Return ``log p(x_first .. x_L | before)``, positions counted from 0, shape (k,)."""
        self.n_tokens += sequences[:, 1:].numel()
        parts = [self._of(part, first) for part in self._parts(sequences, sequences.shape[1])]
        return torch.cat(parts)

    def _parts(self, sequences: Any, rows: int) -> Any:
        return sequences.split(max(1, ENTRIES // (rows * self.model.n_vocabulary)))

    def _after(self, sequences: Any, columns: Any) -> Any:
        chances = torch.log_softmax(self.model.unembed(self._states(sequences)[:, -1]), -1)
        return chances if columns is None else chances[:, columns]

    def _of(self, sequences: Any, first: int) -> Any:
        states = self._states(sequences[:, :-1])
        chances = torch.log_softmax(self.model.unembed(states[:, first - 1 :]), -1)
        return chances.gather(-1, sequences[:, first:, None])[..., 0].sum(-1)

    def _states(self, sequences: Any) -> Any:
        with torch.no_grad():
            return self.model.base(input_ids=sequences, use_cache=False)[0]
