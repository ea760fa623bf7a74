"""Choose the inversion that fits an observation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnfit.audit.attention import invert_attention
from attnfit.audit.checks import check_budget, check_states
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.found import Found
from attnfit.audit.hidden import invert_hidden
from attnfit.audit.logits import invert_logits, logit_states
from attnfit.audit.models.model import Layer, Model
from attnfit.audit.observation import Observation
from attnfit.audit.topk import invert_topk
from attnfit.audit.withheld import WithheldSearch


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
        If the first position was withheld, and there is no attack without it.
    """
    if observation.fingerprint and observation.fingerprint != model.fingerprint:
        raise ObservationMismatch(
            f"the observation comes from another model than {model.name!r} (fingerprint "
            f"{observation.fingerprint}, not {model.fingerprint})"
        )
    if observation.dropped:
        return _without_first(model, observation, known_prefix, budget)
    access, array = observation.access, observation.array
    common: Any = {
        "error": observation.error,
        "reach": observation.reach,
        "known_prefix": known_prefix,
        "budget": budget,
    }
    if access.kind == "hidden":
        return invert_hidden(model, array, access.place, **common)
    if access.kind == "attention":
        return invert_attention(model, array, access.place, **common)
    if access.kind == "logits":
        return invert_logits(model, array, **common)
    return invert_topk(model, observation.shown, array, **common)


def _without_first(
    model: Model, observation: Observation, known_prefix: Sequence[int], budget: int | None
) -> Found:
    """Recover a text whose first position was withheld."""
    access, array = observation.access, observation.array
    if access.kind == "topk" or model.kind == "encoder":
        what = "outputs of an encoder" if model.kind == "encoder" else f"access {str(access)!r}"
        raise AuditError(
            f"the first position was withheld: {what} cannot be inverted without it, because every later "
            "position depends on the token there"
        )
    if known_prefix:
        raise AuditError("known_prefix cannot be used where the first position was withheld")
    if access.kind == "logits":
        states, uncertainty = logit_states(model, array, observation.error, observation.reach)
        layer: Layer = model.n_layers + 1
    else:
        states, uncertainty = check_states(model, array, observation.error, observation.reach)
        layer = access.place if access.kind == "hidden" else str(access)
    return WithheldSearch(model, layer, states, uncertainty, check_budget(budget, model)).run()
