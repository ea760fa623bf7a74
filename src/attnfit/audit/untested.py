"""Forms of access on which there is no attack here: named, so that a report says so, never given a share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from attnfit.audit.access import Access, Leak, Search
from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model, Tokens

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation


class Untested(Access):
    """One row for a whole text. What others have recovered from it stands in the message.

    Attributes
    ----------
    published : str
        The best figure published, and whose it is.
    """

    forecasts, ordered = False, False
    published: ClassVar[str] = ""

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Refuse: there is no attack here.

        Raises
        ------
        AuditError
            Always.
        """
        raise AuditError(
            f"there is no attack here on {self.description}, which others have read: {self.published}"
        )


class LastLogits(Untested):
    """The scores of the next token after the whole text only."""

    kind = "last:logits"
    published = (
        "79.5 % of inputs of up to 10 to 15 tokens exact without a false one, and little of longer ones "
        "(SODA, arXiv 2507.01693, at second hand)"
    )

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return "the next-token scores after the last token"

    def layer(self, model: Model) -> Layer:
        """Return the last states, after the final norm."""
        return model.n_layers + 1

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the last row."""
        return Leak(model.logits(tokens)[-1:])


class Pooled(Untested):
    """The mean of the last states, of length one: what embedding services return."""

    kind, reads_encoders = "pooled", True
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
