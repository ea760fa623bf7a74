"""The gradient of a training step: what leaks of one text, and how one of a batch is inverted."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from attnfit.audit.access import Access, Leak, Search
from attnfit.audit.errors import AuditError
from attnfit.audit.gradient_search import GradientResult, GradientSearch
from attnfit.audit.gradients import gradients_of, observed_weights, stacked
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.result import Cost, InversionResult, Position, conclude

if TYPE_CHECKING:
    from attnfit.audit.observation import Observation


class Gradient(Access):
    """The gradient of the loss of one text: of the weights of the first two attentions and of the head."""

    kind, forecasts, ordered = "gradient", False, False

    @property
    def description(self) -> str:
        """What leaves, in words."""
        return "the gradient of a training step on a text"

    def layer(self, model: Model) -> Layer:
        """Return what enters the second attention, whose span tells the order of tokens."""
        return "entering:1"

    def leak(self, model: Model, tokens: Tokens) -> Leak:
        """Return the rows of the gradients in turn."""
        rows = gradients_of(model, [tokens], observed_weights(model))
        return Leak(np.concatenate([one.numpy() for one in rows]))

    def search(self, model: Model, observation: Observation, budget: int) -> Search:
        """Return the search for one text."""
        if observation.dropped:
            raise AuditError("drop0 withholds a position, and rows of a gradient have none")
        return OneText(model, GradientSearch(model, observation.array, observation.error))


class OneText:
    """The inversion of a gradient that is of one text."""

    def __init__(self, model: Model, search: GradientSearch) -> None:
        self._model, self._search = model, search

    def contradiction(self, truth: Tokens) -> str:
        """Return why the true text would not be accepted; empty if it would."""
        return self._search.differs([truth])

    def run(self, known: Tokens) -> InversionResult:
        """Return the text with the largest weight in the loss."""
        if known:
            raise AuditError("known_prefix cannot be used with a gradient, which all tokens share")
        found = self._search.search()
        tokens = found.tokens[0] if found.tokens else []
        sure = found.verified and len(found.tokens) == 1
        positions = [Position(token, found.residual, inf, 0, "joint") for token in tokens]
        cost = Cost(found.n_candidates, len(tokens), found.seconds)
        return conclude(self._model, positions, len(tokens), "" if sure else found.message, sure, cost)


def invert_gradient(model: Model, gradients: Mapping[str, Any], *, error: Any = 0.0) -> GradientResult:
    """Recover the texts of a batch from the gradient of its loss.

    The loss is the mean, or any weighted sum, of the cross entropies of next tokens, each text a sequence of
    its own. Every row of ``dL/dW = sum_t delta_t x_t'`` is a combination of what enters W: the tokens are
    those whose rows lie in the span of the first block's gradient, their order is read from the second
    block's, and the last token of a text from the head's (arXiv 2405.15586, with a proof: the gradient of
    what was found is compared with the one observed). Texts that begin with the same token twice are not
    found where positions only turn keys, as the second is the same row.

    Parameters
    ----------
    model : Model
        A causal one, with the weights before the step.
    gradients : dict of str to array_like
        By the names and in the shapes of the parameters: queries, keys and values of the first two blocks,
        and the head, or the table of embeddings that is tied to it. Others are ignored.
    error : float
        Standard deviation of the error of each number.

    Returns
    -------
    GradientResult

    Raises
    ------
    AuditError
        If the model is an encoder, the first block was frozen, or the batch has more tokens than the model
        has channels: then every token lies in the span.
    ObservationMismatch
        If a gradient has another shape, is not finite, or none that tells is given.

    Examples
    --------
    >>> from attnfit import audit
    >>> from attnfit.audit.gradients import gradients_of, observed_weights
    >>> tiny = audit.load("tiny")
    >>> batch = [tiny.tokenise(text) for text in tiny.private_texts[:2]]
    >>> weights = observed_weights(tiny)
    >>> rows = gradients_of(tiny, batch, weights)
    >>> seen = {weight.name: weight.rows(row) for weight, row in zip(weights, rows)}
    >>> sorted(audit.invert_gradient(tiny, seen).texts) == sorted(tiny.private_texts[:2])
    True
    """
    if model.kind != "causal":
        raise AuditError(f"model {model.name!r} is an encoder: its loss has no next tokens")
    array = stacked(model, gradients)
    return GradientSearch(model, array, np.broadcast_to(np.float32(error), array.shape)).search()
