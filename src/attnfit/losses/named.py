"""Losses by name: our own, and those that other packages register."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from attnfit.losses.loss import Loss
from attnfit.losses.softmax import LOSSES

# Entry points of this group name a loss, or a function that returns one.
GROUP = "attnfit.losses"


def find_loss(loss: Any, name: str = "loss") -> Loss:
    """Return a loss, given itself or its name.

    Parameters
    ----------
    loss : str or Loss
        One of `LOSSES`, a name registered under the entry point group ``attnfit.losses``, or a loss.
    name : str
        What the argument is called, for messages.

    Raises
    ------
    ValueError
        If there is no loss of that name, or what is registered gives none.

    Examples
    --------
    >>> from attnfit.losses import find_loss
    >>> find_loss("kl").convex
    True
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss in LOSSES:
            return LOSSES[loss]
        for entry in entry_points(group=GROUP):
            if entry.name == loss:
                found = entry.load()
                found = found if isinstance(found, Loss) else found()
                if isinstance(found, Loss):
                    return found
                raise ValueError(f"{name}={loss!r} is registered, but gives no attnfit.losses.Loss")
    known = ", ".join(map(repr, LOSSES))
    raise ValueError(f"{name} must be one of {known}, or an attnfit.losses.Loss, not {loss!r}")
