"""One row for a whole text: the mean of its last states, as embedding services return it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnfit.audit.access import Leak, Search
from attnfit.audit.checks import real_numbers
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.last import token_frequencies
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.row_response import Reader, learn_responses
from attnfit.audit.row_search import RowSearch
from attnfit.audit.untested import Untested

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation

# A row has length one up to this, beside what its errors can change.
UNIT = 1e-4


class Pooled(Untested):
    """The mean of the last states, of length one: what embedding services return."""

    kind, reads_encoders, conclusive = "pooled", True, False
    published = (
        "92 % of texts of 32 tokens exact after training an inverter for the embedding (vec2text, arXiv "
        "2310.06816)"
    )

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return "the mean of the last states (an embedding of the text)"

    def layer(self, model: Model) -> Layer:
        """Return the last block."""
        return model.n_layers

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the mean over positions, normalised."""
        mean = model.states(tokens, model.n_layers).mean(0, keepdims=True)
        return Leak((mean / np.linalg.norm(mean)).astype(np.float32))

    def prepare(self, model: Model) -> None:
        """Learn how a mean answers to tokens."""
        learn_responses(Reader(model, model.n_layers, pooled=True), token_frequencies(model))

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for the text of one row, which may be rounded.

        The row may also hold the first numbers only, again of length one.

        Raises
        ------
        ObservationMismatch
            If the row has more numbers than the model, is not finite, or not of length one.
        AuditError
            If it is not one row, or has errors without a bound.
        """
        row = real_numbers("a pooled row", observation.array)
        if row.ndim != 2 or len(row) != 1 or not 1 < row.shape[1] <= model.width:
            raise ObservationMismatch(
                f"a pooled row must have shape (1, k), k from 2 to {model.width} for {model.name!r}, not "
                f"{row.shape}"
            )
        if not np.isfinite(row).all():
            place = int(np.flatnonzero(~np.isfinite(row[0]))[0])
            raise ObservationMismatch(
                f"number {place} of the pooled row is {row[0, place]}: observations must be finite"
            )
        bound = _bound(observation)
        size, room = float(np.linalg.norm(row)), UNIT + float(np.linalg.norm(bound))
        if abs(size - 1.0) > room:
            raise ObservationMismatch(
                f"a pooled row has length one, and this one {size:.4g}: divide it by its length"
            )
        numbers = None if row.shape[1] == model.width else row.shape[1]
        reader = Reader(model, model.n_layers, pooled=True, numbers=numbers)
        return RowSearch(
            reader, torch.from_numpy(row[0]), token_frequencies(model), budget,
            error_bound=torch.from_numpy(bound), published=self.published,
        )  # fmt: skip


def _bound(observation: Observation) -> Any:
    """Return the largest error of each number of the row."""
    if observation.error_bound is None:
        bounded = not (observation.error > 0).any()
        bound = np.zeros(observation.array.shape[1], dtype=np.float32)
    else:
        bounded = bool(np.isfinite(observation.error_bound).all())
        bound = np.broadcast_to(observation.error_bound, observation.array.shape)[0].astype(np.float32)
    if not bounded:
        raise AuditError(
            "there is no attack here on pooled with noise, only on the row as computed or rounded"
        )
    return bound
