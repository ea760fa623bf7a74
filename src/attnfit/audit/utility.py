"""What a defence costs: how far the model's predictions move when it works with what is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Model
from attnfit.audit.models.texts import Text
from attnfit.audit.observation import Observation


@dataclass(frozen=True)
class Utility:
    """How the next-token distributions change.

    Attributes
    ----------
    divergence : float
        Mean over positions of KL(undefended || defended) in nats.
    agreement : float
        Share of positions whose likeliest token stays.
    """

    divergence: float
    agreement: float


def utility_lost(model: Model, text: Text, observation: Observation) -> Utility:
    """Return what the defence of an observation costs on its text.

    Defended states go on through the rest of the model, and so do defended outputs of an attention, in the
    place of the true ones; a withheld output counts as zero. Defended logits are compared as they are.

    Parameters
    ----------
    model : Model
        A causal one.
    text : str, list of int or list of dict
        What was observed.
    observation : Observation
        Of hidden states, of an attention or of logits.

    Raises
    ------
    AuditError
        If other things were observed.
    """
    found = cost_of(model, text, observation)
    if found is None:
        raise AuditError(
            f"nothing goes on from access {str(observation.access)!r}: observe states, attention or logits"
        )
    return found


def cost_of(model: Model, text: Text, observation: Observation) -> Utility | None:
    """Return the same; None where nothing goes on from what was observed."""
    tokens = model.tokenise(text)
    given = observation.access.continued(model, tokens, observation)
    if given is None:
        return None
    plain = torch.from_numpy(model.logits(tokens))[len(observation.dropped) :]
    plain = torch.log_softmax(plain.double(), -1)
    defended = torch.log_softmax(given.double(), -1)
    divergence = float((plain.exp() * (plain - defended)).sum(-1).mean())
    agreement = float((plain.argmax(-1) == defended.argmax(-1)).double().mean())
    return Utility(max(0.0, divergence), agreement)
