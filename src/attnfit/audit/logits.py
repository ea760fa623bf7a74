"""From logits to the normed last states they were computed from, and from there to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attnfit.audit.errors import ObservationMismatch
from attnfit.audit.found import Found
from attnfit.audit.hidden import invert_hidden
from attnfit.audit.models.model import Model

# Share of the logits that no state may explain: more means that another model wrote them.
MAX_UNEXPLAINED = 0.3


def invert_logits(
    model: Model,
    logits: Any,
    *,
    error: Any = 0.0,
    known_prefix: Sequence[int] = (),
    budget: int | None = None,
) -> Found:
    """Recover the tokens from the next-token logits, or log-probabilities, at every position.

    Logits are linear in the normed last state: ``logits - mean = (U - mean(U)) y``, whatever constant was
    added to them. The least-squares solution is a state to invert.

    Parameters
    ----------
    model : Model
        The one that produced the logits.
    logits : array_like, shape (n, n_vocabulary)
    error : array_like, broadcastable to logits
        Standard deviation of the error of each number.
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
        If the logits have another width, are not finite, or no states of this model explain them.
    """
    states, likely = last_states(model, logits, error)
    return invert_hidden(
        model, states, model.n_layers + 1, error=likely, known_prefix=known_prefix, budget=budget
    )


def last_states(model: Model, logits: Any, error: Any = 0.0) -> tuple[Any, Any]:
    """Return the normed last states behind some logits, and the standard deviation of their errors.

    Parameters
    ----------
    model : Model
    logits : array_like, shape (n, n_vocabulary)
    error : array_like, broadcastable to logits

    Returns
    -------
    states, error : ndarray, shape (n, width)
    """
    U = model.head.weight.double()
    given = np.asarray(logits)
    if given.ndim != 2 or given.shape[1] != len(U) or not len(given):
        raise ObservationMismatch(
            f"logits must have shape (n, {len(U)}) for {model.name!r}, not {given.shape}"
        )
    if not np.isfinite(given).all():
        row, token = np.argwhere(~np.isfinite(given))[0]
        raise ObservationMismatch(
            f"logits[{row}, {token}] is {given[row, token]}: observations must be finite"
        )
    observed = torch.from_numpy(given.astype(np.float64))
    if model.head.bias is not None:
        observed = observed - model.head.bias
    observed = observed - observed.mean(1, keepdim=True)
    centred = U - U.mean(0)
    inverse = torch.linalg.pinv(centred.T @ centred, hermitian=True)
    states = observed @ centred @ inverse
    missed = (observed - states @ centred.T).square().mean(1).sqrt()
    size = observed.square().mean(1).sqrt()
    if float((missed / size).median()) > MAX_UNEXPLAINED:
        raise ObservationMismatch(
            f"no states of {model.name!r} explain the logits: a share "
            f"{float((missed / size).median()):.2f} of them "
            "lies outside what its head produces"
        )
    per_row = np.sqrt(np.mean(np.square(np.broadcast_to(error, given.shape)), axis=1))
    noise = np.maximum(per_row, missed.numpy())[:, None]
    return states.float().numpy(), noise * np.sqrt(np.abs(np.diagonal(inverse.numpy())))
