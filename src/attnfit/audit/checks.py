"""What must hold of an observation before anything is computed from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnfit.audit.errors import AuditError, ObservationMismatch
from attnfit.audit.models.model import Layer, Model, Tokens
from attnfit.audit.uncertainty import Uncertainty

# A position may cost this many times the vocabulary: everything once, and the searches before that.
EVERYTHING = 2


def check_states(
    model: Model, states: Any, error: Any, error_bound: Any = None, *, layer: Layer | None = None
) -> tuple[Any, Uncertainty]:
    """Return states as a float32 tensor of shape (n, width), and what is known about their errors.

    The width is that of a layer where one is given.
    """
    array = real_numbers("states", states)
    width = model.width if layer is None else model.width_of(layer)
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        where = f" at {layer}" if isinstance(layer, str) else ""
        raise ObservationMismatch(
            f"states must have shape (n, {width}) for {model.name!r}{where}, not {array.shape}"
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


def real_numbers(name: str, given: Any) -> NDArray[np.float32]:
    """Return an array or a tensor of real numbers of any precision as float32.

    Raises
    ------
    ObservationMismatch
        If it holds anything else.
    """
    array = np.asarray(given.detach().float().cpu() if isinstance(given, torch.Tensor) else given)
    if array.dtype.kind not in "fiu":
        raise ObservationMismatch(f"{name} must hold real numbers, not {array.dtype}")
    return array.astype(np.float32)


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
