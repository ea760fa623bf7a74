"""What must hold of an observation before anything is computed from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.models.model import Model, Tokens
from attnfit.audit.uncertainty import Uncertainty

# A position may cost this many times the vocabulary: everything once, and the searches before that.
EVERYTHING = 2


def check_states(model: Model, states: Any, error: Any, error_bound: Any = None) -> tuple[Any, Uncertainty]:
    """Return states as a float32 tensor of shape (n, width), and what is known about their errors."""
    array = np.asarray(states, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != model.width or not len(array):
        raise ObservationMismatch(
            f"states must have shape (n, {model.width}) for {model.name!r}, not {array.shape}"
        )
    finite = np.isfinite(array)
    if not finite.all():
        row, channel = np.argwhere(~finite)[0]
        raise ObservationMismatch(
            f"states[{row}, {channel}] is {array[row, channel]}: observations must be finite"
        )
    likely, largest = (
        None if one is None else torch.from_numpy(np.broadcast_to(one, array.shape).astype(np.float32))
        for one in (error, error_bound)
    )
    return torch.from_numpy(array.copy()), Uncertainty(likely, error_bound=largest)


def check_budget(budget: int | None, model: Model) -> int:
    """Return the largest number of candidates at a position."""
    if budget is None:
        return EVERYTHING * model.n_vocabulary
    if budget < 1:
        raise AuditError(f"budget must be at least 1 candidate a position, not {budget}")
    return budget


def check_prefix(tokens: Tokens, observed: int, model: Model) -> None:
    """Raise AuditError unless these can be the first of as many tokens as were observed."""
    if len(tokens) > observed:
        raise AuditError(f"known_prefix has {len(tokens)} tokens, and {observed} positions were observed")
    for at, token in enumerate(tokens):
        if not 0 <= token < model.n_vocabulary:
            raise AuditError(f"known_prefix[{at}] is {token}, not a token of {model.name!r}")
