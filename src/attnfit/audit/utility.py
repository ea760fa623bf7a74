"""What a defence costs: how far the model's predictions move when it works with what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Layer, Model, Tokens
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
    access, tokens = observation.access, model.tokenise(text)
    start = len(observation.dropped)
    plain = torch.log_softmax(torch.from_numpy(model.logits(tokens))[start:].double(), -1)
    array = torch.from_numpy(np.asarray(observation.array, dtype=np.float32))
    if access.kind == "logits":
        given = array
    elif access.kind == "hidden":
        given = _resumed(model, tokens[start:], start, access.place, array)
    elif access.kind == "attention":
        nothing = torch.zeros(start, array.shape[1])
        given = _resumed(model, tokens, 0, str(access), torch.cat([nothing, array]))[start:]
    else:
        raise AuditError(f"nothing goes on from access {str(access)!r}: observe states, attention or logits")
    defended = torch.log_softmax(given.double(), -1)
    divergence = float((plain.exp() * (plain - defended)).sum(-1).mean())
    agreement = float((plain.argmax(-1) == defended.argmax(-1)).double().mean())
    return Utility(max(0.0, divergence), agreement)


def _resumed(model: Model, tokens: Tokens, start: int, layer: Layer, outputs: Any) -> Any:
    """Return the logits of tokens from position `start` on when the outputs of a layer are replaced."""

    def replace(_: Any, __: Any, out: Any) -> Any:
        return (outputs[None], *out[1:]) if isinstance(out, tuple) else outputs[None]

    first = model.first_position + start
    places = torch.arange(first, first + len(tokens))[None]
    handle = model.part(layer).register_forward_hook(replace)
    try:
        with torch.no_grad():
            last = model.base(input_ids=torch.tensor([tokens]), position_ids=places, use_cache=False)[0]
    finally:
        handle.remove()
    return model.unembed(last[0])
