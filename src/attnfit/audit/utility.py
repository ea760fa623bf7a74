"""What a defence costs: how far the model's predictions move when it works with what is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnfit.audit.errors import AuditError
from attnfit.audit.models.model import Model
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


def utility_lost(model: Model, text: str, observation: Observation) -> Utility:
    """Return what the defence of an observation costs on its text.

    Defended states go on through the rest of the model; defended logits are compared as they are.

    Parameters
    ----------
    model : Model
        A causal one.
    text : str
        What was observed.
    observation : Observation
        Of hidden states or logits.

    Raises
    ------
    AuditError
        If other things were observed.
    """
    tokens = model.tokenise(text)
    start = len(observation.dropped)
    plain = torch.log_softmax(torch.from_numpy(model.logits(tokens))[start:].double(), -1)
    if observation.access.kind == "logits":
        given = torch.from_numpy(np.asarray(observation.array, dtype=np.float64))
    elif observation.access.kind == "hidden":
        given = _resumed(model, tokens, observation.access.place, torch.from_numpy(observation.array), start)
    else:
        raise AuditError(
            f"nothing goes on from access {str(observation.access)!r}: observe hidden states or logits"
        )
    defended = torch.log_softmax(given.double(), -1)
    divergence = float((plain.exp() * (plain - defended)).sum(-1).mean())
    agreement = float((plain.argmax(-1) == defended.argmax(-1)).double().mean())
    return Utility(max(0.0, divergence), agreement)


def _resumed(model: Model, tokens: list[int], layer: int, states: Any, start: int) -> Any:
    """Return the logits when the states of a layer are replaced."""

    def replace(_: Any, __: Any, out: Any) -> Any:
        return (states[None], *out[1:]) if isinstance(out, tuple) else states[None]

    handle = model.part(layer).register_forward_hook(replace)
    try:
        with torch.no_grad():
            places = torch.arange(start, len(tokens))[None]
            last = model.base(input_ids=torch.tensor([tokens[start:]]), position_ids=places, use_cache=False)[
                0
            ]
    finally:
        handle.remove()
    return model.unembed(last[0])
