"""Choose the inversion that fits an observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnfit.audit.access import Search
from attnfit.audit.checks import check_budget
from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.models.model import Model
from attnfit.audit.observation import Observation
from attnfit.audit.result import InversionResult


def invert(
    model: Model,
    observation: Observation,
    *,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
    first_position: int | None = None,
) -> InversionResult:
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
    InversionResult

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


def search_for(model: Model, observation: Observation, budget: int | None = None) -> Search:
    """Return the search that fits an observation."""
    if observation.fingerprint and observation.fingerprint != model.fingerprint:
        raise ObservationMismatch(
            f"the observation comes from another model than {model.name!r} (fingerprint "
            f"{observation.fingerprint}, not {model.fingerprint})"
        )
    model = model.at(observation.first_position, keys=observation.access.counts_positions)
    return observation.access.search(model, observation, check_budget(budget, model))
