"""Choose the inversion that fits an observation."""

from __future__ import annotations

from collections.abc import Sequence

from attnfit.audit.attention import invert_attention
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.found import Found
from attnfit.audit.hidden import invert_hidden
from attnfit.audit.logits import invert_logits
from attnfit.audit.models.model import Model
from attnfit.audit.observation import Observation
from attnfit.audit.topk import invert_topk


def invert(
    model: Model,
    observation: Observation,
    *,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> Found:
    """Recover the text behind an observation.

    Parameters
    ----------
    model : Model
        The one that was observed.
    observation : Observation
    known_prefix : sequence of int
        Tokens known to come first.
    budget : int, optional
        Largest number of candidates at a position.

    Returns
    -------
    Found

    Raises
    ------
    ObservationMismatch
        If another model was observed.
    AuditError
        If positions were withheld.
    """
    if observation.fingerprint and observation.fingerprint != model.fingerprint:
        raise ObservationMismatch(
            f"the observation comes from another model than {model.name!r} (fingerprint "
            f"{observation.fingerprint}, not {model.fingerprint})"
        )
    if observation.dropped:
        raise AuditError(
            f"positions {observation.dropped} were withheld: every later state depends on their tokens, "
            "which "
            "would have to be guessed along with each candidate"
        )
    access, array, error = observation.access, observation.array, observation.error
    if access.kind == "hidden":
        return invert_hidden(
            model, array, access.place, error=error, known_prefix=known_prefix, budget=budget
        )
    if access.kind == "attention":
        return invert_attention(
            model, array, access.place, error=error, known_prefix=known_prefix, budget=budget
        )
    if access.kind == "logits":
        return invert_logits(model, array, error=error, known_prefix=known_prefix, budget=budget)
    return invert_topk(model, observation.shown, array, error=error, known_prefix=known_prefix, budget=budget)
