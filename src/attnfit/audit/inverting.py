"""Choose the inversion that fits an observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from attnfit.audit.checks import check_budget, check_states
from attnfit.audit.encoder_attention import encoder_search
from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.found import Found
from attnfit.audit.hidden import HiddenSearch
from attnfit.audit.logits import logit_states
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.observation import Access, Observation
from attnfit.audit.topk import topk_search
from attnfit.audit.uncertainty import Uncertainty
from attnfit.audit.withheld import WithheldSearch


def invert(
    model: Model,
    observation: Observation,
    *,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
    first_position: int | None = None,
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
    first_position : int, optional
        Position of the first token of the text; that of the observation unless given.

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
    if first_position is not None:
        observation = replace(observation, first_position=first_position)
    return search_for(model, observation, budget).run(list(known_prefix))


class Search(Protocol):
    """The inversion of one observation."""

    def run(self, known: Tokens) -> Found:
        """Return everything that could be recovered, given the first tokens."""

    def contradiction(self, truth: Tokens) -> str:
        """Return why the search would not accept these tokens, which are the true ones; empty if it would."""


def search_for(model: Model, observation: Observation, budget: int | None = None) -> Search:
    """Return the search that fits an observation."""
    if observation.fingerprint and observation.fingerprint != model.fingerprint:
        raise ObservationMismatch(
            f"the observation comes from another model than {model.name!r} (fingerprint "
            f"{observation.fingerprint}, not {model.fingerprint})"
        )
    model = model.at(observation.first_position)
    access, array, allowed = observation.access, observation.array, check_budget(budget, model)
    if observation.dropped:
        return _without_first(model, observation, allowed)
    if access.kind == "topk":
        return topk_search(model, observation.shown, array, observation.error, observation.reach, allowed)
    if model.kind == "encoder":
        return encoder_search(model, array, access.place, observation.error, access.kind)
    states, uncertainty, layer = _states(model, observation)
    return HiddenSearch(model, layer, states, uncertainty, allowed)


def _states(model: Model, observation: Observation) -> tuple[Any, Uncertainty, Layer]:
    """Return the states that were observed or are behind what was, their errors, and where they are."""
    access, array = observation.access, observation.array
    if access.kind == "logits":
        states, uncertainty = logit_states(model, array, observation.error, observation.reach)
        return states, uncertainty, model.n_layers + 1
    states, uncertainty = check_states(model, array, observation.error, observation.reach)
    return states, replace(uncertainty, run=observation.run), layer_of(model, access)


def layer_of(model: Model, access: Access) -> Layer:
    """Return the layer whose states a form of access shows."""
    if access.kind in ("logits", "topk"):
        return model.n_layers + 1
    return access.place if access.kind == "hidden" else str(access)


def _without_first(model: Model, observation: Observation, budget: int) -> Search:
    """Return the search for a text whose first position was withheld."""
    access = observation.access
    if access.kind == "topk" or model.kind == "encoder":
        what = "outputs of an encoder" if model.kind == "encoder" else f"access {str(access)!r}"
        raise AuditError(
            f"the first position was withheld: {what} cannot be inverted without it, because every later "
            "position depends on the token there"
        )
    states, uncertainty, layer = _states(model, observation)
    return WithheldSearch(model, layer, states, uncertainty, budget)
